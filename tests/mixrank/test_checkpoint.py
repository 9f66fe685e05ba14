from __future__ import annotations

import copy
import json
import math
import os
import resource
import struct
from pathlib import Path

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
from mixrank.plan import LayerPlan, Plan

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
        # A factored layer may have a bias that the dense one had not.
        numbers = 0 if rank is None else rank * (k + n - (rank if form == "pivoted" else 0))
        after = n * k + n * bias if rank is None else numbers + n
        layers.append(LayerPlan(name, k, n, rank, bias, n * k + n * bias, after, form))
    counts = [sum(getattr(layer, f"parameters_{when}") for layer in layers) for when in ("before", "after")]
    restructure_(model, Plan(tuple(layers), *counts, split=names, options={"keep": 0.6}))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    for module in model.modules():
        if isinstance(module, mixrank.PivotedLinear):
            parts = torch.randperm(module.out_features).split([module.rank, module.out_features - module.rank])
            module.index.copy_(torch.cat([part.sort().values for part in parts]))
    return model


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return compressed(*VIT)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "model.safetensors"


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


@pytest.mark.parametrize(
    ("split", "form"),
    [(False, "factors"), (True, "factors"), (False, "pivoted"), (True, "pivoted")],
    ids=["fused", "split", "pivoted", "split-pivoted"],
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


# What is not a checkpoint, from the outside in.


def _keep(part: slice):
    return lambda path: path.write_bytes(path.read_bytes()[part])


def _huge(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(struct.pack("<Q", 2**40) + content[8:])


def _nested(path: Path) -> None:
    text = b'{"a":' * 50_000 + b"1" + b"}" * 50_000
    path.write_bytes(struct.pack("<Q", len(text)) + text)


def _text(text: bytes):
    return lambda path: path.write_bytes(struct.pack("<Q", len(text)) + text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "model.safetensors does not exist"),
        (lambda path: (path.unlink(), path.mkdir()), "is a folder: name a file"),
        (lambda path: path.write_bytes(b""), "is cut off or not a safetensors file"),
        (lambda path: path.write_bytes(b"PK\3\4" * 100), "is cut off or not a safetensors file"),
        (_keep(slice(5)), "is cut off"),
        (_keep(slice(200)), "is cut off"),
        (_keep(slice(-1)), "is cut off"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "is broken"),
        (_huge, "is cut off"),
        (_nested, "not a safetensors file"),
        (_text(b"[]"), "not a safetensors file"),
        (_text(b"\xff\xfe\xff"), "not a safetensors file|not text"),
        (_text(b'{"__metadata__": 3}'), "not a safetensors file"),
        (_text(b'{"x": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}'), "not a safetensors file"),
        (_text(b'{"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 0]}}'), "not a safetensors file"),
        (_text(b'{"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}'), "not a safetensors file"),
        (lambda path: safetensors.torch.save_file({"a": torch.zeros(1)}, path), "was not written by mixrank"),
    ],
)
def test_files_that_are_not_checkpoints(small, path, change, message):
    mixrank.save(small, path)
    change(path)
    with pytest.raises(InputError, match=message) as caught:
        mixrank.load(path)
    assert "\n" not in str(caught.value)


def _set(**fields):
    return lambda own: own | fields


def _layer(**fields):
    def change(own: dict) -> dict:
        own["plan"]["layers"][0] |= fields
        return own

    return change


def _drop(field: str):
    return lambda own: {key: value for key, value in own.items() if key != field}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own: "{", "has a header that is not mixrank's"),
        (lambda own: '{"a":' * 50_000, "has a header that is not mixrank's"),
        (lambda own: [1], "has a header that is not mixrank's"),
        (_set(format=4), "has format 4, newer than the 3 that this version"),
        (_set(format="1"), "its format is not a version number"),
        (_drop("args"), "not mixrank's: KeyError.'args'"),
        (_set(metadata=3), "metadata is not a dict"),
        (_set(architecture="vit_tniy_patch16_224"), "is not an architecture of timm; did you mean"),
        (_set(architecture="hf-hub:someone/model"), "is not an architecture of timm"),
        (_set(args={"pretrained": True}), "'pretrained' cannot be among the arguments"),
        (_set(args={"colour": "red"}), "timm cannot build vit_tiny_patch16_224"),
        (_set(args=VIT[1] | {"depth": 10**9}), r"1000000000 blocks, but \d+ tensors"),
        (_set(args=VIT[1] | {"embed_dim": 3 * 10**6}), "but this model's has 3000000 and 9000000"),
        (_set(args=VIT[1] | {"embed_dim": 3 * 10**6}, plan=None), "of another shape"),
        (_set(args=VIT[1] | {"num_classes": 8}), r"2 of another shape \(first: head.weight, \[7, 192\] instead of \[8"),
        (_set(plan={"layers": []}), "the plan is not one that this version wrote"),
        (_set(plan=None), r"missing \(first: blocks.0"),
        (_layer(name="blocks.9.mlp.fc1"), "blocks.9.mlp.fc1, which this model does not have"),
        (_layer(name="head"), "head, which this model does not have"),
        (_layer(rank=10**9), "rank must be from 1 to 192"),
        (_layer(in_features=7), "with 7 inputs"),
        (_layer(bias=None), "has a field of the wrong type"),
        (_layer(form="round"), "has a field of the wrong type or range"),
        (_layer(form="pivoted"), r"missing \(first: blocks.0.attn.qkv.coefficients\)"),
        (_set(preprocessing={}), "the preprocessing's input_size cannot be used"),
        (_set(buffer_dtypes={"x": "float16"}), "there is no computed buffer x"),
        (_set(buffer_dtypes={"x": "float12"}), "not mixrank's: KeyError.'float12'"),
        (_set(exposed_qkv="yes"), "exposed_qkv is not a bool"),
    ],
)
def test_headers_that_do_not_fit(small, path, change, message):
    mixrank.save(small, path)
    entries, own, data = parts(path)
    assemble(path, entries, change(own), data)
    with pytest.raises(InputError, match=message) as caught:
        mixrank.load(path)
    assert "\n" not in str(caught.value)


def test_a_split_of_a_layer_that_is_not_there(path):
    mixrank.save(compressed(*VIT, split=True), path)
    entries, own, data = parts(path)
    own["plan"]["split"][0] = "blocks.0.attn.absent"
    assemble(path, entries, own, data)
    with pytest.raises(InputError, match=r"blocks\.0\.attn\.absent"):
        mixrank.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {name: t[name] for name in t if name != "norm.bias"}, r"1 missing \(first: norm.bias\)"),
        (lambda t: t | {"extra": torch.zeros(1)}, r"1 unexpected \(first: extra\)"),
        (lambda t: t | {"norm.bias": torch.zeros(191)}, r"first: norm.bias, \[191\] instead of \[192\]"),
        (lambda t: t | {"norm.bias": t["norm.bias"].int()}, "norm.bias is torch.int32 instead of torch.float32"),
    ],
)
def test_tensors_that_do_not_fit(small, path, change, message):
    mixrank.save(small, path)
    _, own, _ = parts(path)
    tensors = change(safetensors.torch.load_file(path))
    safetensors.torch.save_file(tensors, path, metadata={"mixrank": json.dumps(own)})
    with pytest.raises(InputError, match=message):
        mixrank.load(path)


# What cannot be saved, and what is left behind then.


def test_save_refuses_what_could_not_be_loaded(small, path):
    model = copy.deepcopy(small)
    model.reset_classifier(3)
    model.mixrank_spec = models.ModelSpec(*VIT)
    with pytest.raises(InputError, match=r"the model does not fit vit_tiny_patch16_224 with its plan: .* head.weight"):
        mixrank.save(model, path)
    with pytest.raises(InputError, match=r"the plan of the model does not fit|missing"):
        mixrank.save(models.create_model(*VIT[:1], args=VIT[1]), path, plan=small.mixrank_plan)
    with pytest.raises(InputError, match="metadata and plan must be in terms of JSON"):
        mixrank.save(small, path, metadata={"seen": {1}})
    with pytest.raises(InputError, match="metadata and plan must be in terms of JSON"):
        mixrank.save(small, path, metadata={"loss": float("nan")})
    with pytest.raises(InputError, match="does not say which timm architecture"):
        mixrank.save(nn.Linear(2, 2), path)
    model = models.create_model(VIT[0], args=VIT[1])
    model.norm.weight = nn.Parameter(torch.zeros(192, dtype=torch.complex64))
    with pytest.raises(InputError, match=r"norm.weight is torch.complex64, which a checkpoint cannot hold"):
        mixrank.save(model, path)
    assert not path.exists()


def test_an_explicit_plan_is_the_one_that_is_saved(small, path):
    model = copy.deepcopy(small)
    plan = Plan.from_json(model.mixrank_plan.to_json() | {"options": {"note": "mine"}})
    mixrank.save(model, path, plan=plan)
    assert checkpoint.read_header(path).plan.options == {"note": "mine"}


def _no_replace(monkeypatch):
    def fail(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "replace", fail)


def _no_sync(monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)


def _full(monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    write = safetensors.torch.save_file

    def fail(*args, **kwargs):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            write(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(safetensors.torch, "save_file", fail)


@pytest.mark.parametrize("before", [None, b"older"], ids=["new", "over"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [(_no_replace, "Operation not permitted"), (_no_sync, "Input/output error"), (_full, "File too large")],
)
def test_a_failed_save_leaves_nothing_behind_and_the_old_file_in_place(
    small, path, monkeypatch, fault, message, before
):
    if before is not None:
        path.write_bytes(before)
    fault(monkeypatch)
    with pytest.raises(InputError, match=f"model.safetensors cannot be written: .*{message}"):
        mixrank.save(small, path)
    assert [file.name for file in path.parent.iterdir()] == ([] if before is None else [path.name])
    assert before is None or path.read_bytes() == before


def test_an_interrupted_save_leaves_nothing_behind(small, path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    path.write_bytes(b"older")
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        mixrank.save(small, path)
    assert [file.read_bytes() for file in path.parent.iterdir()] == [b"older"]


@pytest.mark.parametrize(
    ("target", "message"),
    [(".", "is a folder: name a file"), ("absent/model.safetensors", "the folder .*absent does not exist")],
)
def test_places_that_cannot_be_written(small, tmp_path, target, message):
    with pytest.raises(InputError, match=message):
        mixrank.save(small, tmp_path / target)
    assert list(tmp_path.iterdir()) == []


def test_save_writes_over_a_checkpoint(small, path):
    path.write_bytes(b"older")
    mixrank.save(small, path)
    assert_same(small, mixrank.load(path))
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
