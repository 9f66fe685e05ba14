"""The layers whose speed stands for OATS': the sizes of its paper, and the product that they claim."""

from __future__ import annotations

import copy
import json

import pytest
import timm
import torch
from torch import nn

from mixrank.models import compressible_linears
from mixrank.nn_sparse import SparseLinear
from mixrank_bench import tables_peers, vit_b16_oats_speed
from mixrank_bench.accuracy_peers import oats
from mixrank_bench.accuracy_peers.factored import layer_share
from mixrank_bench.vit_b16_oats_speed import SparsePlusLowRank, ours, sparse_


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=7).eval()


@pytest.mark.parametrize("hold", [SparsePlusLowRank, ours])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_adds_its_sparse_and_its_low_rank_product(bias, hold):
    dense = torch.randn(12, 20) * (torch.rand(12, 20) < 0.3)
    up, down = torch.randn(12, 3), torch.randn(3, 20)
    added = torch.randn(12) if bias else None
    x = torch.randn(2, 5, 20)
    found = hold(dense, up, down, added)(x)
    torch.testing.assert_close(found, nn.functional.linear(x, dense + up @ down, added))


def test_layers_have_the_sizes_of_the_method_and_stay_near_the_weights():
    dense = small_model()
    model = sparse_(copy.deepcopy(dense), 0.5)
    share = layer_share(dense, 0.5)
    for name, linear in compressible_linears(dense).items():
        layer = model.get_submodule(name)
        rank, entries = oats.sizes(*linear.weight.shape, share)
        assert layer.down.shape == (rank, linear.in_features)
        assert layer.up.shape == (linear.out_features, rank)
        assert layer.sparse.values().numel() == entries * linear.out_features
        held = layer.sparse.to_dense() + layer.up @ layer.down
        assert (held - linear.weight).norm() < linear.weight.norm()
    images = torch.randn(2, 3, 32, 32)
    assert model(images).shape == dense(images).shape
    held = sparse_(copy.deepcopy(dense), 0.5, ours).blocks[1].mlp.fc1
    assert isinstance(held, SparseLinear)
    assert (held.rank, held.entries) == (oats.sizes(768, 192, share)[0], oats.sizes(768, 192, share)[1] * 768)


def test_the_table_tells_the_speed_of_the_last_run_beside_the_dense_model(tmp_path, monkeypatch):
    path = tmp_path / "speed.jsonl"
    monkeypatch.setattr(vit_b16_oats_speed, "OUT", path)
    assert tables_peers.sparse_speed() == tables_peers.NO_RUN
    environment = {"cpu": "c", "threads": 2, "torch": "2", "timm": "1", "commit": "abc", "date": "2026-01-01"}
    rates = {"dense": 8.0, "OATS, keep 0.5": 4.0, "keep 0.5, low ranks": 12.0}
    rows = [("dense", 1.0), *rates.items()]
    spread = {"low": 1.0, "high": 20.0, "batch": 8, "threads": 2, "environment": environment}
    path.write_text("".join(json.dumps({"model": m, "images_per_second": r} | spread) + "\n" for m, r in rows))
    table = tables_peers.sparse_speed()
    assert "| OATS, keep 0.5 | 4.00 | 1.00 - 20.00 | 0.50x |" in table
    assert "| keep 0.5, low ranks | 12.00 | 1.00 - 20.00 | 1.50x |" in table
