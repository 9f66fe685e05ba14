"""Checkpoints of models with fewer heads, columns, neurons and blocks: bit for bit, after further compression too."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import mixrank
from mixrank import checkpoint
from mixrank.errors import InputError
from mixrank.models import create_model
from mixrank.quantize import quantize_
from mixrank.uvc.shrink import RemainingBlock, shrink_
from mixrank.uvc.structure import BlockShape

from .checkpoint.files import assemble, assert_same, parts
from .uvc.test_shrink import MODELS, chosen, images


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def pruned(name: str = "vit", depth: int = 4):
    torch.manual_seed(0)
    architecture, args = MODELS[name]
    model = create_model(architecture, args={"img_size": 64, "depth": depth, "num_classes": 5} | args)
    return shrink_(model, chosen(model, seed=3))


@pytest.mark.parametrize("name", MODELS)
def test_a_pruned_model_comes_back_bit_for_bit(path, name):
    model = pruned(name)
    mixrank.save(model, path)
    loaded = mixrank.load(path)
    assert_same(model, loaded)
    with torch.no_grad():
        assert torch.equal(loaded(images(model)), model(images(model)))
    header = checkpoint.read_header(path)
    assert header.format == 3
    assert [block.index for block in header.blocks] == [0, 2, 3]
    again = path.with_name("again.safetensors")
    mixrank.save(loaded, again)
    assert again.read_bytes() == path.read_bytes()


def test_blocks_are_those_of_the_first_model_however_often_it_was_shrunk(path):
    model = pruned()
    kept = chosen(model, seed=4, drop=0)
    mixrank.save(shrink_(model, kept), path)
    assert [block.index for block in checkpoint.read_header(path).blocks] == [2, 3]
    assert_same(model, mixrank.load(path))


def test_a_pruned_model_is_factored_quantised_and_comes_back(path):
    model = pruned()
    mixrank.compress(model, [images(model, 8)], keep=0.7)
    mixrank.save(model, path)
    assert_same(model, mixrank.load(path))
    quantize_(model)
    mixrank.save(model, path)
    assert_same(model, mixrank.load(path))


def test_a_model_of_timm_is_known_by_how_it_was_built_before(path):
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5).eval()
    shrink_(model, chosen(model, seed=1))
    mixrank.save(model, path)
    assert_same(model, mixrank.load(path))


def block(index: int, columns: list[int], neurons: int) -> dict:
    return {"index": index, "columns": columns, "neurons": neurons}


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("all", "blocks is not a list"),
        ([], "kept must keep at least one block"),
        ([block(0, [64], 768), block(0, [64], 768)], r"blocks must rise and lie in 0 to 3, but they were \[0, 0\]"),
        ([block(4, [64], 768)], r"blocks must rise and lie in 0 to 3, but they were \[4\]"),
        ([block(0, [65], 768)], "columns of head 0 of blocks.0 must rise and lie in 0 to 63"),
        ([block(0, [1, 1, 1, 1], 768)], "blocks.0 has 3 heads, but kept names 4"),
        ([block(0, [64], 769)], "neurons of blocks.0 must rise and lie in 0 to 767"),
        ([block(0, [0], 768)], "a remaining block must have an index, columns and neurons"),
        ([block(0, [], 768)], "a remaining block must have an index, columns and neurons"),
        ([block(-1, [64], 768)], "a remaining block must have an index, columns and neurons"),
        ([block(0, [True], 768)], "a remaining block must have an index, columns and neurons"),
        ([block(0, "ab", 768)], "a remaining block must have an index, columns and neurons"),
        ([block("0", [64], 768)], "a remaining block must have an index, columns and neurons"),
        ([{"index": 0}], "a remaining block must have an index, columns and neurons"),
        ([3], "a remaining block must have an index, columns and neurons"),
        ([block(0, [64, 64, 64], 768)], "24 unexpected"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(path, blocks, message):
    mixrank.save(pruned(), path)
    entries, own, data = parts(path)
    assemble(path, entries, own | {"blocks": blocks}, data)
    with pytest.raises(InputError, match=message):
        mixrank.load(path)


def test_an_architecture_without_blocks_of_its_own_is_refused(path):
    model = create_model("resnet18", args={"num_classes": 5})
    mixrank.save(model, path)
    entries, own, data = parts(path)
    assemble(path, entries, own | {"format": 3, "blocks": [block(0, [64], 768)]}, data)
    with pytest.raises(InputError, match=r"the blocks of .* do not fit resnet18: ResNet has no blocks"):
        mixrank.load(path)


def test_what_remains_goes_to_json_and_back():
    one = RemainingBlock(3, BlockShape((64, 7), 100))
    assert RemainingBlock.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert copy.deepcopy(one) == one
