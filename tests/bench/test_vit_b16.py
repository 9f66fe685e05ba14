"""Models of the defaults whose files were lost: they are made anew from the ranks of their rows."""

from __future__ import annotations

import copy
import dataclasses

import timm
import torch

import mixrank
from mixrank.measured_pull import FIRST, PULLS
from mixrank_bench import vit_b16


class Folder:
    """In place of the folder with the real model."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.dense = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=7).eval()

    def model(self) -> torch.nn.Module:
        return copy.deepcopy(self.dense)


def test_lost_models_are_made_from_the_ranks_of_their_rows(tmp_path, monkeypatch) -> None:
    data = Folder()
    dense = data.model()
    batches = [torch.randn(4, 3, 32, 32)]
    stats = mixrank.calibrate(dense, batches, gradients=True)
    monkeypatch.setattr(vit_b16, "cached_statistics", lambda *_: stats)
    ranks = dict.fromkeys(mixrank.decompose(dense, factors="svd"), 8)
    first, second, _ = vit_b16.KEEPS
    rows = [
        {
            "kind": "strategy",
            "strategy": dataclasses.asdict(vit_b16.low_ranks(keep)),
            "ranks": ranks | {"blocks.0.attn.proj": own},
            "pull": 0.1,
        }
        for keep, own in ((first, 16), (second, None))
    ]
    vit_b16.checkpoint_of(tmp_path, first).write_bytes(b"kept")
    vit_b16.remake_models(data, [{"kind": "dense"}, *rows], None, tmp_path)
    assert vit_b16.checkpoint_of(tmp_path, first).read_bytes() == b"kept"
    assert {path.name for path in tmp_path.iterdir()} == {f"keep_{keep}.safetensors" for keep in (first, second)}
    model = mixrank.load(vit_b16.checkpoint_of(tmp_path, second))
    assert isinstance(model.blocks[0].attn.proj, torch.nn.Linear)
    assert model.blocks[0].mlp.fc1.rank == 8
    monkeypatch.setattr(vit_b16, "cached_statistics", None)
    vit_b16.remake_models(data, rows, None, tmp_path)  # nothing is lost


def test_tokens_that_do_not_count_alike_have_a_cache_of_their_own(tmp_path) -> None:
    data, seen = Folder(), [torch.randn(10, 3, 32, 32)]
    data.calibration = lambda _model: seen
    cache, tokens = tmp_path / "cache.safetensors", mixrank.Weighting("gradient", 1.0)
    plain = vit_b16.cached_statistics(data, data.model(), cache)
    weighted = vit_b16.cached_statistics(data, data.model(), cache, tokens)
    assert len(list(tmp_path.iterdir())) == 2
    seen.clear()  # both come from their files now
    for made, again in (
        (plain, vit_b16.cached_statistics(data, data.model(), cache)),
        (weighted, vit_b16.cached_statistics(data, data.model(), cache, tokens)),
    ):
        for name, layer in made.held_out.items():
            assert torch.equal(layer.gram, again.held_out[name].gram)
    name = "blocks.0.mlp.fc1"
    assert not torch.allclose(plain[name].gram, weighted[name].gram)


def test_the_pull_of_a_strategy_is_measured_and_told(tmp_path, monkeypatch) -> None:
    data = Folder()
    images = torch.randn(20, 3, 32, 32)
    data.calibration = data.test = lambda _model: [mixrank.data.Batch(images, torch.arange(20) % 7, list("x" * 20))]
    monkeypatch.setattr(vit_b16, "fast_dtype", lambda: None)
    strategy = dataclasses.replace(vit_b16.low_ranks(0.5), shrink=FIRST, weighting="none", level=None)
    assert strategy in vit_b16.strategies()
    vit_b16.measure_strategies(data, tmp_path / "rows.jsonl", [strategy, vit_b16.low_ranks(0.5)], None, None)
    _, *rows = vit_b16.read(tmp_path / "rows.jsonl")
    pulls = {vit_b16.Strategy(**row["strategy"]): row["pull"] for row in rows}
    assert pulls[strategy] == FIRST
    assert pulls[vit_b16.low_ranks(0.5)] in PULLS


def test_what_low_ranks_are_called_is_what_compress_does(tmp_path, monkeypatch) -> None:
    """The row of low ranks is of the model that the one call makes of the same images."""
    data = Folder()
    images = torch.randn(20, 3, 32, 32)
    data.calibration = data.test = lambda _model: [mixrank.data.Batch(images, torch.arange(20) % 7, list("x" * 20))]
    monkeypatch.setattr(vit_b16, "fast_dtype", lambda: None)
    vit_b16.measure_strategies(data, tmp_path / "rows.jsonl", [vit_b16.low_ranks(0.5)], None, tmp_path)
    model = data.model()
    plan = mixrank.compress(model, data.calibration(model), keep=0.5, form="pivoted").plan
    row = vit_b16.read(tmp_path / "rows.jsonl")[-1]
    assert row["ranks"] == {layer.name: layer.rank for layer in plan.layers}
    assert row["parameters"] == plan.parameters_after
