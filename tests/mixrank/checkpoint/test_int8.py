"""Checkpoints of quantised models: they come back bit for bit, say what they need, and what does not fit is refused."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

import mixrank
from mixrank import checkpoint, models
from mixrank.errors import InputError
from mixrank.nn_int8 import Int8PivotedLinear
from mixrank.nn_int8_sparse import Int8SparseLinear
from mixrank.quantize import quantize_, quantized_layers

from .files import VIT, assemble, assert_same, compressed, parts


@pytest.fixture(scope="module")
def small() -> nn.Module:
    model = compressed(*VIT)
    quantize_(model, weight_only=["head"])
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("split", [False, True], ids=["fused", "split"])
@pytest.mark.parametrize("form", ["factors", "pivoted", "sparse"])
def test_a_quantised_model_comes_back_bit_for_bit(path, form, split, dtype):
    model = compressed(*VIT, split, form).to(dtype)
    quantize_(model, weight_only=["head"], skip=["blocks.1.mlp.fc1"])
    mixrank.save(model, path)
    loaded = mixrank.load(path)
    assert_same(model, loaded)
    assert quantized_layers(loaded) == quantized_layers(model) == checkpoint.read_header(path).quantization
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    mixrank.save(loaded, path)
    assert_same(model, mixrank.load(path))


def test_a_dense_model_of_timm_comes_back(path):
    model = timm.create_model(VIT[0], **VIT[1]).eval()
    quantize_(model)
    mixrank.save(model, path)
    assert_same(model, mixrank.load(path))
    assert models.model_spec(model).architecture.startswith(VIT[0])


def test_a_mask_with_another_number_of_bits_is_refused(path):
    model = compressed(*VIT, form="sparse")
    quantize_(model)
    layer = next(module for module in model.modules() if isinstance(module, Int8SparseLinear))
    layer.mask[0, 0] = ~layer.mask[0, 0]
    mixrank.save(model, path)
    assert parts(path)[1]["format"] == 4
    with pytest.raises(InputError, match=r"is broken: layer .*: mask must have a bit for each of the \d+ values"):
        mixrank.load(path)


def test_the_format_is_what_a_reader_needs(small, path):
    mixrank.save(small, path)
    assert parts(path)[1]["format"] == 2
    mixrank.save(compressed(*VIT), path)
    own = parts(path)[1]
    assert own["format"] == 1
    assert "quantization" not in own
    assert checkpoint.read_header(path).quantization == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own: own.update(quantization=["head"]), "quantization is not a dict"),
        (lambda own: own["quantization"].update(head=1), "does not say for each layer"),
        (lambda own: own["quantization"].update({"blocks.9.mlp.fc1": True}), "8-bit weights for blocks.9.mlp.fc1"),
        (lambda own: own["quantization"].update({"patch_embed.proj": True}), "8-bit weights for patch_embed.proj"),
        (lambda own: own["quantization"].pop("head"), "does not fit"),
        (lambda own: own.pop("quantization"), "does not fit"),
        (lambda own: own.update(format=1), "does not fit"),
        (lambda own: own.update(format=5), "newer than the 4"),
    ],
)
def test_headers_that_do_not_fit_are_refused(small, path, change, message):
    mixrank.save(small, path)
    entries, own, data = parts(path)
    change(own)
    assemble(path, entries, own, data)
    with pytest.raises(InputError, match=message):
        mixrank.load(path)


@pytest.mark.parametrize(("name", "dtype"), [("head.scale", torch.float64), ("head.codes", torch.uint8)], ids=str)
def test_codes_and_scales_of_another_dtype_are_refused(small, path, name, dtype):
    model = copy.deepcopy(small)
    layer = model.head
    part = name.split(".")[1]
    tensor = getattr(layer, part).to(dtype)
    setattr(layer, part, tensor if part == "scale" else nn.Parameter(tensor, requires_grad=False))
    with pytest.raises(InputError, match=rf"{name} is {dtype} instead of"):
        mixrank.save(model, path)
    assert not path.exists()


def test_an_index_that_names_a_row_twice_is_refused(path):
    model = compressed(*VIT, form="pivoted")
    quantize_(model)
    layer = next(module for module in model.modules() if isinstance(module, Int8PivotedLinear))
    layer.index[1] = layer.index[0]
    mixrank.save(model, path)
    with pytest.raises(InputError, match=r"is broken: layer .*: index must hold 0 to"):
        mixrank.load(path)
