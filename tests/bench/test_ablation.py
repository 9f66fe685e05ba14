"""The ablation: each variant is measured as it says, and the table tells it beside the defaults."""

from __future__ import annotations

import copy
import json

import pytest
import timm
import torch

from mixrank import compress
from mixrank.counting import count_parameters
from mixrank.fidelity import compare, logits_of
from mixrank_bench import ablation, tables_ablation
from mixrank_bench.ablation import Ablation, Subject
from mixrank_bench.ablation_variants import BASE, VARIANTS, Variant

SVD = {"factors": "svd", "centre": True}


def measured_images():
    torch.manual_seed(1)
    kinds = torch.randn(5, 3, 32, 32)  # so that what is learnt on some images holds on others
    return [kinds.repeat(count, 1, 1, 1) + 0.3 * torch.randn(5 * count, 3, 32, 32) for count in (8, 2)]


@pytest.fixture(scope="module")
def measured():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=7).eval()
    torch.nn.init.normal_(model.head.weight, std=0.1)
    images, apart = measured_images()
    subject = Subject(model, images, apart, keep=0.5, batch_size=16, steps=20, dtype=None)
    run = Ablation(subject)
    wanted = {
        "base": BASE,
        "svd": Variant("", "", factors=SVD),
        "few": Variant("", "", images=12),
        "views": Variant("", "", views=1),
        "sequence": Variant("", "", ridge=1.0),
        "uniform": Variant("", "", allocation={"ranks": "uniform", "energy": "weight"}),
        "seen": Variant("", "", allocation={}, seen=True),
        "split": Variant("", "", allocation={}, split=True),
        "blocks": Variant("", "", blocks=(16, 0.2)),
        "trained": Variant("", "", factors=SVD, training={"learning_rate": 1e-4, "min_scale": 1.0}),
        "again": BASE,
        "by heart": Variant("", "", images=12, by_heart=True),
        "measured": Variant("", "", factors={"shrink": "measured"}),
        "sparse": Variant("", "", sparse={}),
        "sparse, more factors": Variant("", "", sparse={"rank_share": 0.6}),
        "defaults": next(variant for variant in VARIANTS if variant.switch == "defaults"),
    }
    rows = {name: run.measure(variant) for name, variant in wanted.items()}
    rows["resumed"] = Ablation(subject, rows["base"]["ranks"]).measure(wanted["svd"])
    return model, rows


def test_what_changes_the_factors_takes_the_ranks_of_the_reference(measured):
    _, rows = measured
    for name in ("svd", "few", "views", "sequence", "blocks", "trained"):
        assert rows[name]["ranks"] == rows["base"]["ranks"]
        assert rows[name]["kl"] != rows["base"]["kl"]
    assert rows["svd"]["kl"] > rows["base"]["kl"]
    assert rows["trained"]["kl"] < 0.5 * rows["svd"]["kl"]
    for name in ("uniform", "split"):
        assert rows[name]["ranks"] != rows["base"]["ranks"]


def test_every_variant_holds_the_budget_and_the_same_gives_the_same(measured):
    model, rows = measured
    for row in rows.values():
        assert 0.4 * count_parameters(model) < row["parameters"] <= 0.5 * count_parameters(model)
        assert row["images"] == 10
    assert rows["again"]["kl"] == rows["base"]["kl"]


def test_the_default_of_low_ranks_is_what_compress_does(measured):
    model, rows = measured
    kinds, apart = measured_images()
    compressed = copy.deepcopy(model)
    plan = compress(compressed, kinds.split(16), keep=0.5, form="pivoted").plan
    assert rows["defaults"]["ranks"] == {layer.name: layer.rank for layer in plan.layers}
    found = compare(logits_of(compressed, [apart]), logits_of(model, [apart]))
    assert rows["defaults"]["kl"] == pytest.approx(found.divergence, rel=1e-3)
    assert rows["measured"]["ranks"] == rows["base"]["ranks"]


def test_sparse_weights_are_what_compress_makes(measured):
    model, rows = measured
    kinds, apart = measured_images()
    compressed = copy.deepcopy(model)
    plan = compress(compressed, kinds.split(16), keep=0.5, form="sparse").plan
    assert rows["sparse"]["ranks"] == {layer.name: layer.rank for layer in plan.layers}
    found = compare(logits_of(compressed, [apart]), logits_of(model, [apart]))
    assert rows["sparse"]["kl"] == pytest.approx(found.divergence, rel=1e-3)
    assert rows["sparse, more factors"]["ranks"]["blocks.0.mlp.fc1"] > rows["sparse"]["ranks"]["blocks.0.mlp.fc1"]


def test_a_run_that_goes_on_takes_the_ranks_that_the_reference_had(measured):
    _, rows = measured
    assert rows["resumed"] | {"seconds": 0} == rows["svd"] | {"seconds": 0}


def test_what_is_learnt_by_heart_is_measured_on_images_that_were_used(measured):
    _, rows = measured
    assert rows["by heart"]["kl"] == rows["few"]["kl"]
    assert 0 < rows["by heart"]["kl_seen"] < rows["by heart"]["kl"]
    assert "kl_seen" not in rows["few"]


def test_names_of_variants_are_their_own():
    names = [(variant.switch, variant.value) for variant in VARIANTS]
    assert len(set(names)) == len(names)


def test_the_table_sets_each_beside_the_reference_of_its_model(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "OUT", tmp_path / "rows.jsonl")
    assert tables_ablation.switches() == tables_ablation.NO_RUN
    environment = {"cpu": "a", "threads": 1, "torch": "2", "timm": "1", "commit": "c", "date": "2026-01-01"}

    def row(model, switch, value, kl):
        found = {"model": model, "switch": switch, "value": value, "kl": kl, "agreement": 90.0, "keep": 0.4}
        return json.dumps(found | {"environment": environment}) + "\n"

    rows = [
        row("vit_b16", "reference", "", 0.5),
        row("fashion", "reference", "", 0.01),
        row("fashion", "qkv", "split", 0.02),
    ]
    ablation.OUT.write_text("".join(rows))
    lines = tables_ablation.switches().splitlines()
    assert lines[2] == "| reference |  | 0.5 | 1.00 | 90.0 | 0.01 | 1.00 | 90.0 |"
    assert lines[3] == "| qkv | split | not measured |  |  | 0.02 | 2.00 | 90.0 |"


def test_the_table_of_what_is_learnt_by_heart_goes_by_the_number_of_images(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "OUT", tmp_path / "rows.jsonl")
    assert tables_ablation.by_heart() == tables_ablation.NO_RUN
    environment = {"cpu": "a", "threads": 1, "torch": "2", "timm": "1", "commit": "c", "date": "2026-01-01"}
    shared = {"model": "vit_b16", "switch": "images", "keep": 0.4, "agreement": 70.0, "environment": environment}
    rows = [
        shared | {"value": "all", "calibration": 800, "kl": 0.9, "kl_seen": 0.5},
        shared | {"value": "100", "calibration": 100, "kl": 2.0, "kl_seen": 0.25},
        shared | {"value": "200", "calibration": 200, "kl": 1.5},
    ]
    ablation.OUT.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = tables_ablation.by_heart().splitlines()
    assert [line for line in lines if line.startswith("| ViT")] == [
        "| ViT-B/16 | 0.4 | 100 | 0.25 | 2 | 70.0 |",
        "| ViT-B/16 | 0.4 | 800 | 0.5 | 0.9 | 70.0 |",
    ]
