"""Models as compression leaves them, and checkpoint files in parts."""

from __future__ import annotations

import copy
import json
import struct
from pathlib import Path

import timm
import torch
from torch import nn

import mixrank
from mixrank import models
from mixrank.apply import restructure_
from mixrank.nn_sparse import mask_places
from mixrank.plan import LayerPlan, Plan
from mixrank_kernels.testing import packed_bits

VIT = ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2, "num_classes": 7})
FAMILIES = {
    "vit": VIT,
    "deit_distilled": ("deit_tiny_distilled_patch16_224", VIT[1]),
    "swin": ("swin_tiny_patch4_window7_224", {"img_size": 56, "depths": [1, 1], "num_heads": [3, 6], "num_classes": 7}),
    "beit": ("beit_base_patch16_224", {"img_size": 32, "depth": 1, "num_classes": 7}),
    "eva": ("eva02_tiny_patch14_224", {"img_size": 28, "depth": 1, "num_classes": 7}),
}


def image(model: nn.Module) -> torch.Tensor:
    return torch.randn(3, *models.preprocessing(model)["input_size"])


def compressed(architecture: str, args: dict, split: bool = False, form: str = "factors") -> nn.Module:
    """A model of the shape that compression leaves, without its work: factors are random."""
    model = timm.create_model(architecture, **args).eval()
    models.expose_qkv_(model)
    like = copy.deepcopy(model)
    names = models.split_qkv_(like) if split else ()
    layers = []
    for number, (name, linear) in enumerate(models.compressible_linears(like).items()):
        n, k, bias = linear.out_features, linear.in_features, linear.bias is not None
        rank = None if number % 3 == 2 else min(8, n, k)
        if form == "sparse" and number % 3 == 1:
            rank = 0
        # A factored layer may have a bias that the dense one had not.
        numbers = 0 if rank is None else rank * (k + n - (rank if form == "pivoted" else 0))
        entries = n * k // 3 if rank is not None and form == "sparse" else 0
        numbers += entries and entries + mask_places(k, n)
        after = n * k + n * bias if rank is None else numbers + n
        layers.append(LayerPlan(name, k, n, rank, bias, n * k + n * bias, after, form, entries))
    counts = [sum(getattr(layer, f"parameters_{when}") for layer in layers) for when in ("before", "after")]
    restructure_(model, Plan(tuple(layers), *counts, split=names, options={"keep": 0.6}))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    for module in model.modules():
        if isinstance(module, mixrank.PivotedLinear):
            parts = torch.randperm(module.out_features).split([module.rank, module.out_features - module.rank])
            module.index.copy_(torch.cat([part.sort().values for part in parts]))
        elif isinstance(module, mixrank.SparseLinear):
            stored = torch.randperm(module.out_features * module.in_features) < module.entries
            module.mask.copy_(packed_bits(stored.reshape(module.out_features, module.in_features)))
    return model


def parts(path: Path) -> tuple[dict, dict, bytes]:
    """The entries of the safetensors header, our own header, the bytes of the tensors."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    entries = json.loads(content[8 : 8 + size])
    return entries, json.loads(entries["__metadata__"]["mixrank"]), content[8 + size :]


def assemble(path: Path, entries: dict, own: object, data: bytes) -> None:
    entries["__metadata__"] = {"mixrank": own if isinstance(own, str) else json.dumps(own)}
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def assert_same(model: nn.Module, other: nn.Module, *, outputs: bool = True) -> None:
    expected, found = model.state_dict(), other.state_dict()
    assert list(expected) == list(found)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert all(expected[name].dtype == found[name].dtype for name in expected)
    if outputs:
        x = image(model).to(next(model.parameters()).dtype)
        with torch.no_grad():
            assert torch.equal(model(x), other(x))
