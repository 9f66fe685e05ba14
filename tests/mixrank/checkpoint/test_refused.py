"""Files that are no checkpoints, or none that fit, from the outside in."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch

import mixrank
from mixrank.errors import InputError

from .files import VIT, assemble, compressed, parts


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
        (_set(format=5), "has format 5, newer than the 4 that this version"),
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
        (_layer(form="sparse"), r"missing \(first: blocks.0.attn.qkv.values\)"),
        (_layer(form="sparse", entries=-1), "has a field of the wrong type or range"),
        (_layer(form="sparse", entries=10**9), "entries must be from 0 to 110592"),
        (_layer(form="sparse", rank=None, entries=1), "has a field of the wrong type or range"),
        (_layer(entries=1), "has a field of the wrong type or range"),
        (_layer(rank=0), "has a field of the wrong type or range"),
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
