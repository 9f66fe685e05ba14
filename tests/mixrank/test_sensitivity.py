"""Sensitivity: the divergence of the logits with one layer replaced, measured without touching the model."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

from mixrank import MixedRankLinear, allocate, calibrate, decompose
from mixrank.allocate import ranks_to_measure
from mixrank.errors import InputError
from mixrank.fidelity import compare
from mixrank.sensitivity import measure_sensitivity


def prepared(model, images):
    factorisations = decompose(model, calibrate(model, [images], held_out=0.5))
    return factorisations, ranks_to_measure(model, factorisations, allocate(model, factorisations, keep=0.5))


def test_it_is_the_divergence_with_the_layer_replaced_and_the_model_stays_as_it_was(model, images):
    factorisations, ranks = prepared(model, images)
    before, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    model.train()
    found = measure_sensitivity(model, ranks, factorisations, images.split(4))
    assert model.training
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.eval()
    with torch.inference_mode():
        dense = model(images)
    assert set(found) == set(ranks)
    for name, rank in ranks.items():
        replaced = copy.deepcopy(model)
        replaced.set_submodule(name, MixedRankLinear.from_factors(*factorisations[name].trial.factors(rank)))
        with torch.inference_mode():
            expected = compare(replaced(images), dense).divergence
        assert found[name].rank == rank
        assert found[name].divergence == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_blocks_before_the_layer_are_not_run_again(model, images):
    factorisations, ranks = prepared(model, images)
    calls = []
    model.blocks[0].norm1.register_forward_hook(lambda *_: calls.append(0))
    measure_sensitivity(model, ranks, factorisations, [images])
    first = sum(name.startswith("blocks.0.") for name in ranks)
    assert len(calls) == 1 + first


def test_swin_with_layers_between_its_blocks(images):
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        window_size=4,
        depths=(1, 1),
        num_heads=(2, 4),
        embed_dim=32,
        num_classes=5,
    ).eval()
    factorisations, ranks = prepared(model, images)
    found = measure_sensitivity(model, ranks, factorisations, [images])
    assert "layers.1.downsample.reduction" in found
    assert all(0 <= sensitivity.divergence < 1 for sensitivity in found.values())


def test_no_image_and_no_logits_are_refused_in_words(model, images):
    factorisations, ranks = prepared(model, images)
    with pytest.raises(InputError, match="at least one image"):
        measure_sensitivity(model, ranks, factorisations, [])
    model.reset_classifier(1)
    with pytest.raises(InputError, match="at least two classes"):
        measure_sensitivity(model, ranks, factorisations, [images])
    assert isinstance(model.blocks[0].attn.qkv, torch.nn.Linear)
