"""A small vision transformer with the spectra of a trained one, and images for it."""

from __future__ import annotations

import copy
import functools

import pytest
import timm
import torch
from torch import nn

from mixrank import calibrate, decompose
from mixrank.models import compressible_linears


def make_model(**args) -> nn.Module:
    """A model of its own for each caller; the spectra are computed once."""
    return copy.deepcopy(_made(**args))


@functools.cache
def _made(**args) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=7, **args).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            # A decaying spectrum and biases that matter, as in trained models.
            u, _, vh = torch.linalg.svd(torch.randn(module.weight.shape), full_matrices=False)
            decay = torch.arange(1, u.shape[1] + 1) ** -0.7
            module.weight.data = 3 * (u * decay) @ vh
            module.bias.data = torch.randn(module.bias.shape) * 0.2
    return model


@pytest.fixture(scope="session")
def images():
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1)) + 0.3


@pytest.fixture
def model():
    return make_model()


@pytest.fixture(scope="session")
def factorisations(images):
    """What the small model's layers are decomposed to without options; not to be changed."""
    model = make_model()
    return decompose(model, calibrate(model, [images]))


@pytest.fixture
def observed():
    return observed_inputs


def observed_inputs(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inputs of every compressible layer, ``[tokens, K]`` in float64."""
    seen: dict[str, torch.Tensor] = {}
    handles = [
        linear.register_forward_hook(lambda _m, a, _o, name=name: seen.update({name: a[0].flatten(0, -2).double()}))
        for name, linear in compressible_linears(model).items()
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return seen
