"""Checkpoints come back bit for bit."""

from __future__ import annotations

import json
import math

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

import mixrank
from mixrank import checkpoint, models
from mixrank.apply import restructure_
from mixrank.counting import count_bytes
from mixrank.errors import InputError
from mixrank.nn_sparse import mask_places
from mixrank.plan import LayerPlan, Plan
from mixrank.uvc.shrink import KeptBlock, shrink_

from .files import FAMILIES, VIT, assemble, assert_same, compressed, image, parts


@pytest.mark.parametrize(
    ("split", "form"),
    [(False, "factors"), (True, "factors"), (False, "pivoted"), (True, "pivoted"), (False, "sparse"), (True, "sparse")],
    ids=["fused", "split", "pivoted", "split-pivoted", "sparse", "split-sparse"],
)
@pytest.mark.parametrize(("architecture", "args"), FAMILIES.values(), ids=FAMILIES)
def test_a_compressed_model_comes_back_bit_for_bit(path, architecture, args, split, form):
    model = compressed(architecture, args, split, form)
    random = torch.get_rng_state()
    mixrank.save(model, path, metadata={"top1": 81.5})
    loaded = mixrank.load(path)
    assert torch.equal(torch.get_rng_state(), random)
    assert_same(model, loaded)
    assert not loaded.training
    assert loaded.mixrank_plan == model.mixrank_plan
    assert models.model_spec(loaded) == models.model_spec(model)
    assert models.preprocessing(loaded) == models.preprocessing(model)


def test_what_compress_returns_comes_back_bit_for_bit(path):
    # EVA's qkv layers have no bias until the mean of what they lose is put into one.
    architecture, args = FAMILIES["eva"]
    model = models.create_model(architecture, args=args)
    assert models.expose_qkv_(model) == ("blocks.0.attn.qkv",)
    mixrank.compress(model, [image(model)], keep=0.4, ranks="uniform", centre=True)
    assert model.blocks[0].attn.qkv.bias is not None
    mixrank.save(model, path)
    assert_same(model, mixrank.load(path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", ["vit", "eva"])
def test_the_dtype_is_the_one_that_was_saved(path, family, dtype):
    # Of EVA, the rotary position embedding is a buffer that is computed, not saved.
    model = compressed(*FAMILIES[family]).to(dtype)
    mixrank.save(model, path)
    loaded = mixrank.load(path)
    assert_same(model, loaded)
    assert {name: buffer.dtype for name, buffer in loaded.named_buffers()} == {
        name: buffer.dtype for name, buffer in model.named_buffers()
    }


def test_a_model_that_was_not_compressed(path):
    model = models.create_model(VIT[0], args=VIT[1])
    mixrank.save(model, path)
    loaded = mixrank.load(path)
    assert_same(model, loaded)
    assert loaded.mixrank_plan is None
    mixrank.save(loaded, path)
    assert_same(model, mixrank.load(path))


def test_plans_from_before_there_were_forms_are_of_factors(small, path):
    mixrank.save(small, path)
    entries, own, data = parts(path)
    for layer in own["plan"]["layers"]:
        del layer["form"]
    assemble(path, entries, own, data)
    loaded = mixrank.load(path)
    assert_same(small, loaded)
    assert loaded.mixrank_plan == small.mixrank_plan


def test_the_index_of_a_pivoted_layer_is_saved_in_int16(path):
    model = compressed(*VIT, form="pivoted")
    mixrank.save(model, path)
    infos = checkpoint.read_header(path).tensors
    indices = [info for name, info in infos.items() if name.endswith(".index")]
    assert len(indices) == sum(isinstance(module, mixrank.PivotedLinear) for module in model.modules())
    assert {info.dtype for info in indices} == {torch.int16}
    assert count_bytes(model) == sum(math.prod(i.shape) * i.dtype.itemsize for i in infos.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.flip(0), "index must hold 0 to 575 once each, rising in its first 8 entries"),
        (lambda index: index + 1, "index must hold 0 to 575 once each"),
        (lambda index: index.int(), "index is torch.int32 instead of torch.int16"),
        (lambda index: index[:-1], r"first: blocks.0.attn.qkv.index, \[575\] instead of \[576\]"),
    ],
)
def test_an_index_that_is_none_is_refused(path, change, message):
    mixrank.save(compressed(*VIT, form="pivoted"), path)
    _, own, _ = parts(path)
    tensors = safetensors.torch.load_file(path)
    tensors["blocks.0.attn.qkv.index"] = change(tensors["blocks.0.attn.qkv.index"])
    safetensors.torch.save_file(tensors, path, metadata={"mixrank": json.dumps(own)})
    with pytest.raises(InputError, match=message):
        mixrank.load(path)


def test_the_bytes_of_a_file_with_sparse_layers_are_those_counted(path):
    model = compressed(*VIT, form="sparse")
    mixrank.save(model, path)
    header = checkpoint.read_header(path)
    masks = [info for name, info in header.tensors.items() if name.endswith(".mask")]
    assert len(masks) == sum(isinstance(module, mixrank.SparseLinear) for module in model.modules()) > 0
    assert {info.dtype for info in masks} == {torch.uint8}
    assert count_bytes(model) == sum(math.prod(i.shape) * i.dtype.itemsize for i in header.tensors.values())
    assert header.plan == model.mixrank_plan
    assert header.format == 4


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "mask",
            lambda mask: mask & 0xFE,
            r"layer blocks.0.attn.qkv: mask must have a bit for each of the 36864 values",
        ),
        ("mask", lambda mask: mask.to(torch.int8), "mask is torch.int8 instead of torch.uint8"),
        ("mask", lambda mask: mask[:, 1:], r"first: blocks.0.attn.qkv.mask, \[576, 23\] instead of \[576, 24\]"),
        ("values", lambda values: values[1:], r"first: blocks.0.attn.qkv.values, \[36863\] instead of \[36864\]"),
    ],
)
def test_a_mask_that_does_not_fit_its_values_is_refused(path, name, change, message):
    mixrank.save(compressed(*VIT, form="sparse"), path)
    _, own, _ = parts(path)
    tensors = safetensors.torch.load_file(path)
    tensors[f"blocks.0.attn.qkv.{name}"] = change(tensors[f"blocks.0.attn.qkv.{name}"]).contiguous()
    safetensors.torch.save_file(tensors, path, metadata={"mixrank": json.dumps(own)})
    with pytest.raises(InputError, match=message):
        mixrank.load(path)


def test_files_without_sparse_layers_do_not_speak_of_entries(small, path):
    mixrank.save(small, path)
    own = parts(path)[1]
    assert own["format"] == 1
    assert not any("entries" in layer for layer in own["plan"]["layers"])


def test_a_pruned_model_with_sparse_layers_comes_back_bit_for_bit(path):
    model = models.create_model(VIT[0], args=VIT[1])
    shrink_(model, [KeptBlock((tuple(range(64)), (), (0, 3)), tuple(range(0, 768, 2))), None])
    k, n = 192, 384
    layer = LayerPlan(
        "blocks.0.mlp.fc1", k, n, 0, True, n * k + n, n * k // 2 + mask_places(k, n) + n, "sparse", n * k // 2
    )
    restructure_(model, Plan((layer,), 1, 1))
    mixrank.quantize_(model)
    mixrank.save(model, path)
    assert checkpoint.read_header(path).format == 4
    assert_same(model, mixrank.load(path))


def test_equal_models_give_equal_bytes(small, path, tmp_path):
    mixrank.save(small, path, metadata={"b": 1, "a": [2]})
    mixrank.save(mixrank.load(path), tmp_path / "again", metadata={"a": [2], "b": 1})
    assert path.read_bytes() == (tmp_path / "again").read_bytes()


def test_preprocessing_is_saved_even_where_timm_would_say_otherwise(path):
    overlay = {"mean": (0.1, 0.2, 0.3), "crop_pct": 1.0}
    model = timm.create_model(VIT[0], **VIT[1], pretrained_cfg_overlay=overlay).eval()
    mixrank.save(model, path)
    assert models.preprocessing(mixrank.load(path))["mean"] == [0.1, 0.2, 0.3]
    assert models.preprocessing(mixrank.load(path)) == models.preprocessing(model)


def test_tensors_that_share_memory_are_saved_under_each_name(path):
    model = models.create_model(VIT[0], args=VIT[1])
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    model.blocks[1].norm1.weight = nn.Parameter(torch.ones(200)[4:196])
    model.head.weight = nn.Parameter(torch.randn(192, 7).T)
    mixrank.save(model, path)
    # Not the outputs: a matrix product may sum in another order where a weight is laid out in another way.
    assert_same(model, mixrank.load(path), outputs=False)


def test_the_header_is_read_without_the_tensors(small, path):
    mixrank.save(small, path, metadata={"top1": 81.5})
    header = checkpoint.read_header(path)
    assert (header.format, header.library_version) == (1, mixrank.__version__)
    assert header.architecture.startswith("vit_tiny_patch16_224")
    assert header.args == VIT[1]
    assert header.plan == small.mixrank_plan
    assert header.metadata == {"top1": 81.5}
    assert {name: (info.dtype, info.shape) for name, info in header.tensors.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in small.state_dict().items()
    }


def test_a_loaded_model_does_not_depend_on_the_file(small, path):
    mixrank.save(small, path)
    loaded = mixrank.load(path)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert_same(small, loaded)


def test_load_puts_the_model_on_a_device(small, path):
    mixrank.save(small, path)
    assert {parameter.device.type for parameter in mixrank.load(path, "meta").parameters()} == {"meta"}
    with pytest.raises(InputError, match="cannot be put on the device 'toaster'"):
        mixrank.load(path, "toaster")
