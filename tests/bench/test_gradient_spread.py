"""How many images squared gradients are of: what is summed, and the table."""

from __future__ import annotations

import pytest
import timm
import torch

from mixrank.calibrate import calibrate
from mixrank_bench import gradient_spread
from mixrank_bench.environment import append
from mixrank_bench.gradient_spread import effective, energies


def test_the_effective_number_counts_those_that_have_a_share():
    assert effective(torch.tensor([3.0, 3.0, 0.0, 3.0])) == pytest.approx(3.0)
    assert effective(torch.tensor([1e6, 1.0, 1.0])) == pytest.approx(1.0, abs=1e-4)


def test_energies_by_image_sum_to_what_calibration_sums():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5).eval()
    images = torch.randn(11, 3, 32, 32)
    found = energies(model, images)
    stats = calibrate(model, [images], inputs=True, gradients=True)
    assert set(found) == set(stats)
    for name, energy in found.items():
        assert energy.shape == (11,)
        assert energy.sum().item() == pytest.approx(stats[name].squares.sum().item(), rel=1e-3)


def test_the_table_has_the_least_of_each_block(tmp_path, monkeypatch):
    monkeypatch.setattr(gradient_spread, "OUT", tmp_path / "rows.jsonl")
    assert gradient_spread.spread().startswith("No run")
    for layer, count in (("blocks.1.attn.qkv", 9.0), ("blocks.0.mlp.fc1", 5.0), ("blocks.0.mlp.fc2", 7.0)):
        values = {"1": count, "0.5": count + 20, "0.25": count + 30}
        append(gradient_spread.OUT, {"layer": layer, "images": 96, "effective": values})
    lines = gradient_spread.spread().splitlines()
    assert lines[0] == "| block | of 96 images, power 1 | of 96 images, power 0.5 | of 96 images, power 0.25 |"
    assert lines[2:4] == ["| 1 | 5 | 25 | 35 |", "| 2 | 9 | 29 | 39 |"]
