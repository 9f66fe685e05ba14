"""Ways to choose what goes: all fit the budget, and each goes by what it says."""

from __future__ import annotations

import copy
import json

import pytest
import timm
import torch

from mixrank.counting import count_macs
from mixrank.uvc.landing import macs_of
from mixrank.uvc.primal_dual import Groups
from mixrank.uvc.shrink import KeptBlock, remaining_blocks, shrink_
from mixrank.uvc.structure import parts_of, structure_of
from mixrank_bench import figures_uvc, tables_uvc, uvc, uvc_speed
from mixrank_bench.accuracy_peers.structured import prune_to_


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=4, num_classes=5).eval()
    for block in model.blocks:  # norms that differ, as those of a trained model do
        block.mlp.fc2.weight.data *= torch.rand(768) + 0.1
        block.attn.proj.weight.data *= torch.rand(192) + 0.1
    return model


@pytest.mark.parametrize("name", [name for name, choose in uvc.CHOICES.items() if choose is not None])
@pytest.mark.parametrize("budget", [0.3, 0.5, 0.7])
def test_every_choice_fits_the_budget_and_fills_it(model, name, budget):
    kept = uvc.CHOICES[name](model, budget, 0)
    structure = structure_of(model)
    assert 0.99 * budget <= macs_of(structure, kept) / structure.macs() <= budget
    assert count_macs(shrink_(copy.deepcopy(model), kept)) == macs_of(structure, kept)


def test_magnitude_goes_by_norms_and_random_by_the_seed(model):
    groups = [Groups.of(part) for part in parts_of(model)]
    first = uvc.magnitude(model, 0.6, 0)
    assert uvc.magnitude(model, 0.6, 1) == first
    for one, found in zip(first, groups, strict=True):
        gone = sorted(set(range(768)) - set(one.neurons))
        assert found.neurons[gone].max() <= found.neurons[list(one.neurons)].min()
    assert uvc.at_random(model, 0.6, 0) == uvc.at_random(model, 0.6, 0) != uvc.at_random(model, 0.6, 1)


def test_depth_takes_the_last_blocks(model):
    stays = [one is not None for one in uvc.depth(model, 0.6, 0)]
    assert stays == sorted(stays, reverse=True)
    assert not all(stays)


@pytest.mark.parametrize("budget", [0.5, 0.3])  # the highest ratio leaves 0.36: whole layers are not removed
@pytest.mark.parametrize("bottleneck", [True, False])
def test_torch_pruning_fits_the_budget_closely(bottleneck, budget):
    model = uvc.load(uvc.ASSETS, {})
    full = count_macs(model)
    prune_to_(model, count_macs, budget, "budget", uvc.RATIOS, bottleneck=bottleneck)
    assert budget - 0.03 < count_macs(model) / full <= budget
    with torch.no_grad():
        assert model(torch.zeros(1, 1, 28, 28)).isfinite().all()


def test_the_tables_tell_the_latest_of_each(tmp_path, monkeypatch):
    monkeypatch.setattr(uvc, "OUT", tmp_path / "rows.jsonl")
    monkeypatch.setattr(uvc_speed, "OUT", tmp_path / "speed.jsonl")
    tables = (tables_uvc.methods, tables_uvc.mechanisms, tables_uvc.split, tables_uvc.speed, tables_uvc.times)
    assert [make() for make in tables] == [tables_uvc.NO_RUN] * 5
    environment = {"cpu": "a", "threads": 1, "torch": "2", "timm": "1", "commit": "c", "date": "2026-01-01"}
    removed = {"blocks": 0, "heads": 1, "columns": 1, "neurons": 2}
    common = {"model": "m", "environment": environment}

    def method(name: str, after: float, seed: int = 0) -> dict:
        result = {"before": 90.0, "landed": 50.0, "after": after} | ({"removed": removed} if name == uvc.OURS else {})
        row = {"kind": "method", "method": name, "budget": 0.5, "seed": seed, "epochs": 4.0, "share": 0.4999}
        return row | common | {"parameters": 1234, "result": result}

    def speed(budget: str, rate: float, macs: int) -> dict:
        row = {"budget": budget, "batch": 8, "threads": 2, "images_per_second": rate, "macs": macs}
        return row | common | {"milliseconds": dict.fromkeys((*uvc_speed.KINDS, uvc_speed.ELSE), rate)}

    rows = [method("depth", 80.0), method(uvc.OURS, 70.0), method(uvc.OURS, 88.0), method(uvc.OURS, 87.0, 1)]
    rows.append(method("Torch-Pruning, uniform", 60.0))
    rows.append(method(uvc.BOTH, 50.0))
    rows[-1]["result"] |= {"removed": removed | {"ranks": 4}, "power": 0.25, "tried": {"0.25": 0.5, "0.1": 1.0}}
    speeds = [speed("dense", 10.0, 100), speed("0.5", 1.0, 50), speed("0.5", 18.0, 50)]
    for path, written in ((uvc.OUT, rows), (uvc_speed.OUT, speeds)):
        path.write_text("".join(json.dumps(row) + "\n" for row in written))
    lines = tables_uvc.methods().splitlines()
    assert lines[2] == "| m | 0.5 | unified | 0.4999 | 1,234 | 50.00, 50.00 | 88.00, 87.00 | 87.50 |"
    assert lines[3].startswith("| m | 0.5 | depth |")
    assert lines[4] == "| m | 0.5 | Torch-Pruning, uniform | 0.4999 | 1,234 | 50.00 | 60.00 | 60.00 |"
    assert lines[-1].startswith("Dense, m: 90.00 %. 4 epochs each. ")
    told = tables_uvc.mechanisms().splitlines()
    assert told[2] == "| m | 0.5 | both | 0 | 0 % | 12 % | 12 % | 25 % | 50 % |"
    assert told[3] == "| m | 0.5 | unified | 0 | 0 % | 25 % | 25 % | 50 % | 0 % |"
    assert tables_uvc.split().splitlines()[2] == "| m | 0.5 | 0 | 1.0000 | **0.5000** |"
    assert tables_uvc.speed().splitlines()[3] == "| m | 2 | 0.5 | 18.0 | 1.80x | 2.00x | 0.90 |"
    assert tables_uvc.times().splitlines()[3] == "| m | 2 | 0.5 |" + 7 * " 18.00 |" + " 126.0 |"


def test_a_larger_model_loses_the_same_shares_and_its_time_is_told_by_kind():
    small = uvc.load(uvc.ASSETS, {})
    half = tuple(range(32))
    shrink_(small, [None, KeptBlock((half, (), half), tuple(range(192))), *[whole_block(small)] * 4])
    larger = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=12, num_heads=6, embed_dim=384)
    shrunk = uvc_speed.like(larger, small)
    shapes = [(block.index, block.shape.columns, block.shape.neurons) for block in remaining_blocks(shrunk)]
    assert shapes == [(i, (32,) * 4, 384) for i in (2, 3)] + [(i, (64,) * 6, 1536) for i in range(4, 12)]
    told = uvc_speed.milliseconds(shrunk.eval(), torch.randn(2, 3, 32, 32))
    assert set(told) == {*uvc_speed.KINDS, uvc_speed.ELSE}
    assert all(time > 0 for time in told.values())


def whole_block(model: torch.nn.Module) -> KeptBlock:
    part = parts_of(model)[0]
    return KeptBlock(tuple(tuple(range(count)) for count in part.columns), tuple(range(part.mlp.fc1.out_features)))


def test_the_figures_show_a_search_and_the_front(tmp_path, monkeypatch):
    monkeypatch.setattr(uvc, "OUT", tmp_path / "rows.jsonl")
    drawings = figures_uvc.FIGURES
    assert [drawing.source() for drawing in drawings.values()] == [None, None]

    def entry(step: int, share: float) -> dict:
        told = {"step": step, "target": share, "remaining": share, "pressure": 1 - share, "keep": [share, 1.0]}
        return told | {"multipliers": {kind: [0.0, 1.0] for kind in ("heads", "columns", "neurons")}}

    def row(method: str, budget: float, seed: int, parameters: int, top1: float) -> dict:
        history = [entry(0, 1.0), entry(5, budget), {"step": 6, "landed": budget, "top1": 1.0}]
        named = {"kind": "method", "model": "m", "method": method, "budget": budget, "seed": seed}
        return named | {"parameters": parameters, "result": {"before": 90.0, "after": top1, "history": history}}

    rows = [row(uvc.OURS, 0.7, 0, 70, 89.0), row(uvc.OURS, 0.5, 0, 50, 88.0), row(uvc.OURS, 0.5, 1, 52, 87.0)]
    rows.append(row("depth", 0.5, 0, 51, 80.0))
    uvc.OUT.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert figures_uvc.fronts() == {"m": {uvc.OURS: [(51, 87.5), (70, 89.0)], "depth": [(51, 80.0)]}}
    assert tables_uvc.dense() == {"m": 90.0}
    for drawing in drawings.values():
        assert len(drawing.source()) == 64
        drawing.draw().savefig(tmp_path / "figure.svg")
