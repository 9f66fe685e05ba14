"""Ways to choose what goes: all fit the budget, and each goes by what it says."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

from mixrank.models import count_macs
from mixrank.uvc.landing import macs_of
from mixrank.uvc.primal_dual import Groups
from mixrank.uvc.shrink import shrink_
from mixrank.uvc.structure import parts_of, structure_of
from mixrank_bench import uvc


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


@pytest.mark.parametrize("bottleneck", [True, False])
def test_torch_pruning_fits_the_budget_closely(bottleneck):
    model = uvc.load(uvc.ASSETS, {})
    full = count_macs(model)
    uvc.torch_pruned_(model, 0.5, bottleneck=bottleneck)
    assert 0.47 < count_macs(model) / full <= 0.5
    with torch.no_grad():
        assert model(torch.zeros(1, 1, 28, 28)).isfinite().all()
