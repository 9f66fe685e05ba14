"""Sequential calibration: every layer is the best answer to the inputs that it really gets."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from mixrank import InputError, MixedRankLinear, allocate, compress, decompose
from mixrank.blocks import find_blocks
from mixrank.models import compressible_linears
from mixrank.sequential import compress_blocks_


def planned(model: nn.Module, keep: float = 0.5, **options):
    return allocate(model, decompose(model, factors="svd"), keep=keep, **options)


def inputs_and_outputs(model: nn.Module, images: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What every factored or dense layer of the blocks gets and gives, ``[tokens, K]`` and ``[tokens, N]``."""
    seen = {}
    handles = [
        module.register_forward_hook(
            lambda _m, a, o, name=name: seen.update({name: (a[0].flatten(0, -2), o.flatten(0, -2))})
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | MixedRankLinear) and "blocks" in name
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("centre", [True, False])
def test_factors_are_the_best_ones_for_the_drifted_inputs(model, centre):
    """Against reduced-rank regression of the dense outputs on the inputs that the compressed prefix gives.

    For a ridge near 0 nothing of this rank comes closer; more tokens than features make the solution unique.
    """
    model = model.double()
    images = torch.randn(200, 3, 32, 32).double()
    dense, plan = copy.deepcopy(model), planned(model, 0.4)
    made, count = compress_blocks_(
        model, images.split(70), plan, ridge=1e-10, strategy={"factors": "aware", "centre": centre}
    )
    assert count == 200
    true, given = inputs_and_outputs(dense, images), inputs_and_outputs(model, images)
    ranks = {layer.name: layer.rank for layer in plan.layers if layer.rank is not None}
    assert set(made) == set(ranks)
    for name, rank in ranks.items():
        x, ours = given[name]
        bias = dense.get_submodule(name).bias
        y = true[name][1] if centre else true[name][1] - bias
        ours = ours if centre else ours - bias
        if centre:
            assert (ours.mean(0) - y.mean(0)).abs().max() < 1e-8
            x, y, ours = x - x.mean(0), y - y.mean(0), ours - ours.mean(0)
        fitted = x @ torch.linalg.lstsq(x, y, driver="gelsd").solution
        tail = torch.linalg.svdvals(fitted)[rank:].square().sum()
        best = (y - fitted).square().sum() + tail
        assert (ours - y).square().sum().item() == pytest.approx(best.item(), rel=1e-3)


def test_without_drift_and_loss_nothing_changes(model, images):
    """The first layer sees no drift, and a strong ridge holds every weight: the factors are those of the plain way."""
    plan = planned(model)
    plain = copy.deepcopy(model)
    result = compress(
        plain, [images], keep=0.5, held_out=0, factors="aware", energy="weight", shrink=0.0, form="factors"
    )
    compress_blocks_(model, [images], plan, ridge=1e12)
    assert result.plan.layers == plan.layers
    first = plan.layers[0]
    got, expected = model.get_submodule(first.name), plain.get_submodule(first.name)
    torch.testing.assert_close(got.weight, expected.weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(got.bias, expected.bias, rtol=1e-3, atol=1e-3)


def test_drift_is_answered(model):
    """The layers of the compressed model come closer to the outputs of the dense ones than without."""
    images = torch.randn(120, 3, 32, 32)
    dense, plain = copy.deepcopy(model), copy.deepcopy(model)
    compress(plain, images.split(60), keep=0.4, held_out=0, factors="aware", energy="weight", form="factors")
    compress(model, images.split(60), keep=0.4, sequential=True, form="factors")
    true = inputs_and_outputs(dense, images)

    def distance(compressed: nn.Module) -> float:
        found = inputs_and_outputs(compressed, images)
        return sum(((y - found[name][1]).norm() / y.norm()).item() for name, (_, y) in true.items())

    assert distance(model) < distance(plain)


@pytest.mark.parametrize("energy", ["weight", "output"])
def test_compress_in_sequence(model, images, energy):
    result = compress(model, [images[:2], images[2:]], keep=0.5, sequential=True, energy=energy, split_qkv=True)
    assert result.images == 6
    assert ("calibrate" in result.seconds) == (energy == "output")
    assert "sequential" in result.seconds
    for layer in result.layers:
        module = model.get_submodule(layer.name)
        assert isinstance(module, nn.Linear) if layer.rank is None else module.rank == layer.rank
        assert layer.rank is None or 0 <= layer.relative_error < 1
    assert model.mixrank_plan is result.plan
    assert model(images).isfinite().all()


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("swin_tiny_patch4_window7_224", {"window_size": 7, "depths": (1, 1), "num_heads": (1, 2), "embed_dim": 32}),
        ("eva02_base_patch14_224", {"depth": 2, "embed_dim": 96, "num_heads": 4}),
        ("vit_tiny_patch16_224", {"depth": 1}),
    ],
)
def test_other_architectures(name, args):
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=28, num_classes=3, **args).eval()
    images = torch.randn(5, 3, 28, 28)
    result = compress(model, [images[:3], images[3:]], keep=0.6, sequential=True, dtype=torch.bfloat16)
    assert any(layer.rank is not None for layer in result.layers)
    assert model(images).isfinite().all()


def test_buffers_in_bfloat16_are_close(model, images):
    plan, wide, narrow = planned(model), copy.deepcopy(model), copy.deepcopy(model)
    compress_blocks_(wide, [images], plan)
    compress_blocks_(narrow, [images], plan, buffer_dtype=torch.bfloat16)
    with torch.no_grad():
        difference = (wide(images) - narrow(images)).norm() / wide(images).norm()
    assert 0 < difference < 0.1


class Chain(nn.Module):
    """Blocks over the pixels of an image; ``call`` says how the i-th of them is called."""

    def __init__(self, call=lambda block, x, i: block(x)) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.call = call

    def forward(self, images):
        x = images.flatten(2).mT
        for i, block in enumerate(self.blocks):
            x = self.call(block, x, i)
        return x.mean(1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x, shift=None):
        y = self.fc(x)
        return x + y if shift is None else x + y + shift


def test_blocks_are_found_with_their_arguments():
    shift = torch.ones(3)
    blocks = find_blocks(Chain(lambda block, x, i: block(x, shift=shift)), torch.randn(2, 3, 4, 4))
    assert list(blocks.modules) == ["blocks.0", "blocks.1", "blocks.2"]
    assert all(torch.equal(keywords["shift"], shift) for keywords in blocks.keywords.values())


@pytest.mark.parametrize(
    "call",
    [
        lambda block, x, i: block(2 * x),
        lambda block, x, i: block(x, x),
        lambda block, x, i: block(x, shift=x),
        lambda block, x, i: block(block(x)),
    ],
    ids=["between", "two tensors", "shift of the image", "twice"],
)
def test_blocks_that_are_no_chain_are_refused(call):
    with pytest.raises(
        InputError, match=r"needs blocks that pass one tensor from each to the next, but blocks\.\d of Chain"
    ):
        find_blocks(Chain(call), torch.randn(2, 3, 4, 4))


def test_what_sequential_calibration_cannot_do_is_refused(model, images):
    before = copy.deepcopy(model.state_dict())
    for message, options in (
        ("takes factors='aware' or 'svd'", {"factors": "fisher"}),
        ("takes factors='aware' or 'svd'", {"weighting": "token"}),
        ("takes factors='aware' or 'svd'", {"shrink": "auto"}),
        ("ridge must be a number above 0, but it was 0", {"ridge": 0}),
        ("goes through the images twice", {"energy": "output"}),
        (r"images of one size, but they had \[3, 32, 32\] and \[3, 48, 48\]", {}),
    ):
        batches = iter([images, torch.zeros(1, 3, 48, 48)])
        with pytest.raises(InputError, match=message):
            compress(model, batches, keep=0.5, sequential=True, **options)
    with pytest.raises(InputError, match="sequential=True needs calibration images"):
        compress(model, keep=0.5, sequential=True, factors="svd")
    with pytest.raises(InputError, match="needs a ModuleList of blocks that holds every layer, but Linear has none"):
        find_blocks(nn.Linear(3, 3), images)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_model_is_as_it_was_after_a_failure(model, images):
    """The second block's input is not finite: the first block, compressed by then, is restored."""
    layers = compressible_linears(model)
    last = model.blocks[1].mlp.fc2
    spoil = last.register_forward_pre_hook(lambda _m, a: (a[0] * float("nan"),))
    with pytest.raises(InputError, match=r"the input of layer blocks\.1\.mlp\.fc2 has NaN or infinite values"):
        compress(model, [images], keep=0.5, sequential=True)
    spoil.remove()
    assert all(model.get_submodule(name) is layer for name, layer in layers.items())
    assert all(not module._forward_pre_hooks for module in model.modules())
