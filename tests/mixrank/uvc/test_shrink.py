"""Heads, columns, neurons and blocks removed: answers as of the masked model, multiply-adds as foretold."""

from __future__ import annotations

import copy
import random

import pytest
import timm
import torch
from torch import nn

from mixrank import InputError, compress
from mixrank.counting import count_macs, count_parameters
from mixrank.uvc.attention import PrunedAttention
from mixrank.uvc.shrink import KeptBlock, mask_, shrink_
from mixrank.uvc.structure import BlockParts, parts_of, register_reader, structure_of

MODELS = {
    "vit": ("vit_tiny_patch16_224", {}),
    "deit distilled": ("deit_tiny_distilled_patch16_224", {}),
    "register tokens": ("vit_betwixt_patch16_reg4_gap_256", {"embed_dim": 96, "num_heads": 3}),
    "scaled, normed": ("vit_tiny_patch16_224", {"init_values": 1e-1, "qk_norm": True, "qkv_bias": False}),
}


def build(name: str, depth: int = 3) -> nn.Module:
    torch.manual_seed(0)
    architecture, args = MODELS[name]
    model = timm.create_model(architecture, img_size=64, depth=depth, num_classes=5, **args).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def chosen(model: nn.Module, seed: int, drop: int | None = 1) -> list[KeptBlock | None]:
    """A random choice of what stays; block ``drop`` goes."""
    source, kept = random.Random(seed), []
    for index, part in enumerate(parts_of(model)):
        columns = [tuple(i for i in range(count) if source.random() < 0.6) for count in part.columns]
        columns[source.randrange(len(columns))] = ()
        columns[0] = columns[0] or (1,)
        neurons = tuple(i for i in range(part.mlp.fc1.out_features) if source.random() < 0.5)
        kept.append(None if index == drop else KeptBlock(tuple(columns), neurons))
    return kept


def images(model: nn.Module, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_the_shrunken_model_answers_as_the_masked_one(name):
    model = build(name)
    kept = chosen(model, seed=3)
    masked, shrunk = mask_(copy.deepcopy(model), kept), shrink_(copy.deepcopy(model), kept)
    x = images(model)
    with torch.no_grad():
        expected, found, before = masked(x), shrunk(x), model(x)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (found - before).abs().max() > 1e-2 * before.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_multiply_adds_and_parameters_are_those_of_what_stays(name):
    model = build(name)
    structure = structure_of(model)
    assert structure.macs() == count_macs(model)
    kept = chosen(model, seed=4)
    shrunk = shrink_(copy.deepcopy(model), kept)
    after = structure_of(shrunk)
    assert after.blocks == tuple(one.shape for one in kept if one is not None)
    assert after.fixed_macs == structure.fixed_macs
    assert after.macs() == count_macs(shrunk) < structure.macs()
    gone = 0
    for part, one in zip(parts_of(model), kept, strict=True):
        if one is None:
            gone += count_parameters(model.get_submodule(part.name))
            continue
        width, bias = structure.width, part.attention.qkv.bias is not None
        heads = sum(not columns for columns in one.columns)
        columns = sum(part.columns) - sum(one.shape.columns)
        rows = 2 * heads * structure.head_width + columns
        gone += rows * (width + bias) + columns * width
        gone += (part.mlp.fc1.out_features - len(one.neurons)) * (2 * width + 1)
    assert count_parameters(shrunk) == count_parameters(model) - gone


def test_counts_may_be_tensors_and_carry_gradients():
    structure = structure_of(build("vit"))
    counts = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (2.5, 100.0, 300.0)]
    structure.block_macs(*counts).backward()
    t, c, d = structure.tokens, structure.width, structure.head_width
    assert [count.grad.item() for count in counts] == [2 * t * c * d + 2 * t * t * d, 2 * t * c, 2 * t * c]


def test_what_was_shrunk_shrinks_again_and_all_of_it_kept_changes_nothing():
    model = build("vit")
    once = shrink_(copy.deepcopy(model), chosen(model, seed=5))
    again = chosen(once, seed=6, drop=None)
    masked, twice = mask_(copy.deepcopy(once), again), shrink_(copy.deepcopy(once), again)
    x = images(model)
    with torch.no_grad():
        assert (twice(x) - masked(x)).abs().max() < 1e-5 * masked(x).abs().max()
        everything = [
            KeptBlock(tuple(tuple(range(n)) for n in part.columns), tuple(range(part.mlp.fc1.out_features)))
            for part in parts_of(model)
        ]
        same = shrink_(copy.deepcopy(model), everything)
        assert torch.equal(same(x), model(x))
    assert type(same.blocks[0].attn) is type(model.blocks[0].attn)


def test_a_shrunken_model_trains_compiles_exports_moves_and_is_compressed():
    model = build("vit")
    shrunk = shrink_(model, chosen(model, seed=7))
    x = images(model)
    with torch.no_grad():
        expected = shrunk(x)
        exported = torch.export.export(shrunk, (x,)).module()(x)
        compiled = torch.compile(shrunk, fullgraph=True, backend="aot_eager")(x)
    assert (exported - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (compiled - expected).abs().max() < 1e-5 * expected.abs().max()
    assert copy.deepcopy(shrunk).double()(x.double()).dtype == torch.float64
    shrunk.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in shrunk.parameters())
    smaller = compress(copy.deepcopy(shrunk).eval(), [x], keep=0.7)
    assert smaller.plan.keep <= 0.7


def test_frozen_weights_stay_frozen_and_modes_stay():
    model = build("vit").train()
    model.blocks[0].attn.qkv.weight.requires_grad_(False)
    shrink_(model, chosen(model, seed=8))
    assert not model.blocks[0].attn.qkv.weight.requires_grad
    assert model.blocks[0].attn.proj.weight.requires_grad
    assert all(module.training for module in model.modules())


def test_what_does_not_fit_is_refused_and_changes_nothing():
    model = build("vit")
    before = copy.deepcopy(model.state_dict())
    kept = chosen(model, seed=9, drop=None)
    good = kept[0]
    bad = {
        "kept must have an entry for each of the 3 blocks, but it had 2": kept[:2],
        "kept must keep at least one block, but it kept none": [None] * 3,
        "blocks.2 has 3 heads, but kept names 1": [*kept[:2], KeptBlock(((1,),), (1,))],
        "kept must keep at least one head of blocks.2": [*kept[:2], KeptBlock(((), (), ()), (1,))],
        "kept must keep at least one neuron of blocks.2": [*kept[:2], KeptBlock(good.columns, ())],
        r"columns of head 1 of blocks.2 must rise and lie in 0 to 63, but they were \(64,\)": [
            *kept[:2],
            KeptBlock(((0,), (64,), ()), (1,)),
        ],
        r"neurons of blocks.2 must rise and lie in 0 to 767, but they were \(2, 1\)": [
            *kept[:2],
            KeptBlock(good.columns, (2, 1)),
        ],
    }
    for message, wrong in bad.items():
        for change in (shrink_, mask_):
            with pytest.raises(InputError, match=message):
                change(model, wrong)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(InputError, match=r"columns must be at least one number from 1 to 8, but they were \(9,\)"):
        PrunedAttention(32, 8, (9,))


@pytest.mark.parametrize(
    ("architecture", "args", "message"),
    [
        ("resnet18", {}, "ResNet has no blocks that heads, neurons and blocks can be removed from"),
        ("vit_tiny_patch16_224", {"scale_mlp_norm": True}, "blocks.0.mlp.norm must be absent"),
        ("vit_tiny_patch16_224", {"scale_attn_norm": True}, "blocks.0.attn.norm must be absent"),
        ("vit_giant_patch14_dinov2", {"embed_dim": 48, "num_heads": 2}, "blocks.0.mlp must be timm's Mlp"),
        ("vit_base_patch16_plus_240", {"block_fn": "parallel"}, "blocks.0 must be a Block or ResPostBlock"),
    ],
)
def test_an_architecture_without_support_says_what_is_missing(architecture, args, message):
    if args.get("block_fn") == "parallel":
        from timm.models.vision_transformer import ParallelScalingBlock

        args = {"block_fn": ParallelScalingBlock, "embed_dim": 48, "num_heads": 2}
    if architecture != "resnet18":
        args = args | {"depth": 1}
    model = timm.create_model(architecture, **args)
    with pytest.raises(InputError, match=message):
        parts_of(model)


def test_further_architectures_can_be_added(monkeypatch):
    from mixrank.uvc import structure

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build("vit", depth=2)
            self.blocks = self.inner.blocks

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    monkeypatch.setattr(structure, "_READERS", list(structure._READERS))

    @register_reader
    def read(model: nn.Module) -> list[BlockParts] | None:
        if not isinstance(model, Other):
            return None
        return [BlockParts(f"blocks.{i}", block.attn, block.mlp) for i, block in enumerate(model.blocks)]

    model = Other()
    assert [part.name for part in parts_of(model)] == ["blocks.0", "blocks.1"]
    kept = chosen(model, seed=2, drop=None)
    x = images(model)
    masked = mask_(copy.deepcopy(model), kept)
    with torch.no_grad():
        expected = masked(x)
        found = shrink_(model, kept)(x)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
