"""The importance of groups against derivatives taken by hand, and what stays takes over what goes."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from mixrank.gradients import probes
from mixrank.uvc.importance import RIDGE, importance_of, observe, squared_norms, take_over_
from mixrank.uvc.options import UVCOptions
from mixrank.uvc.primal_dual import Groups, groups_of
from mixrank.uvc.run import compress_uvc_
from mixrank.uvc.shrink import KeptBlock, mask_
from mixrank.uvc.structure import parts_of

SEED = 3
IMAGES = 32


class Scaled(nn.Module):
    """A projection with a factor on each of its columns."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.factors = linear, torch.ones(linear.in_features, requires_grad=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x * self.factors)


def layers(model: nn.Module) -> list[nn.Linear]:
    """The projections in the order of what :func:`observe` returns."""
    return [layer for part in parts_of(model) for layer in (part.attention.proj, part.mlp.fc2)]


def first_images(data) -> torch.Tensor:
    return torch.cat([images for images, _ in data.epoch(0)])[:IMAGES]


@pytest.fixture
def found(model, data):
    return observe(model.train(), data, IMAGES - 1, seed=SEED, dtype=None)  # rounded up to whole batches


def test_importance_is_the_squared_derivative_by_a_factor_on_each_group(model, data, found):
    assert model.training
    scaled = copy.deepcopy(model).eval()
    modules = []
    for block in scaled.blocks:
        block.attn.proj, block.mlp.fc2 = Scaled(block.attn.proj), Scaled(block.mlp.fc2)
        modules += [block.attn.proj, block.mlp.fc2]
    columns = [torch.zeros(module.linear.in_features, dtype=torch.float64) for module in modules]
    heads = torch.zeros(len(scaled.blocks), 3, dtype=torch.float64)
    for number, image in enumerate(first_images(data)):
        logits = scaled(image[None])
        probe = probes(logits.detach(), [number], 1, SEED)[0, 0]
        slopes = torch.autograd.grad((logits[0] * probe).sum(), [module.factors for module in modules])
        for total, slope in zip(columns, slopes, strict=True):
            total += slope.double().square()
        heads += torch.stack([slope.double().view(3, -1).sum(1) for slope in slopes[::2]]).square()
    seen = [sums for pair in found for sums in pair]
    for sums, expected in zip(seen, columns, strict=True):
        assert sums.images == IMAGES
        torch.testing.assert_close(sums.columns, expected, rtol=1e-3, atol=1e-3 * expected.mean().item())
    torch.testing.assert_close(torch.stack([pair[0].heads for pair in found]), heads, rtol=1e-3, atol=1e-6)


def test_sums_of_inputs_are_those_of_a_pass(model, data, found):
    inputs: list[torch.Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda _m, arguments: inputs.append(arguments[0])) for layer in layers(model)
    ]
    with torch.no_grad():
        model.eval()(first_images(data))
    for handle in handles:
        handle.remove()
    for sums, x in zip([sums for pair in found for sums in pair], inputs, strict=True):
        x = x.flatten(0, 1).double()
        assert sums.rows == len(x)
        torch.testing.assert_close(sums.gram, x.T @ x, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(sums.total, x.sum(0), rtol=1e-4, atol=1e-3)


def test_importance_follows_the_norms_and_is_in_one_unit(model, found):
    parts = parts_of(model)
    importance = [importance_of(*pair) for pair in zip(parts, found, strict=True)]
    attention, mlp = found[1]
    groups = groups_of(parts, importance)
    assert all(one.comparable for one in groups)
    families = [family for one in groups for family in one.families()]
    assert torch.stack([family.sum() for family in families]).mean().item() == pytest.approx(1)
    unit = (mlp.columns / IMAGES / groups[1].neurons).mean()
    torch.testing.assert_close(groups[1].neurons * unit, mlp.columns / IMAGES)
    torch.testing.assert_close(torch.cat(groups[1].columns) * unit, attention.columns / IMAGES)
    torch.testing.assert_close(groups[1].heads * unit, attention.heads / IMAGES)
    with torch.no_grad():
        parts[1].mlp.fc2.weight[:, 5] /= 2
    halved = Groups.of(parts[1]).weighed(importance[1])
    assert halved.neurons[5].item() * 4 == pytest.approx((mlp.columns[5] / IMAGES).item())
    assert halved.neurons[6].item() == pytest.approx((mlp.columns[6] / IMAGES).item())
    assert not groups_of(parts)[0].comparable
    assert torch.equal(groups_of(parts)[0].neurons, squared_norms(parts[0])[1])


def everything(model: nn.Module) -> list[KeptBlock | None]:
    return [KeptBlock((tuple(range(16)),) * 3, tuple(range(192))) for _ in model.blocks]


def test_what_stays_takes_over_by_least_squares_with_a_ridge(model, found):
    kept, neurons = everything(model), tuple(range(0, 192, 2))
    kept[1], kept[2] = KeptBlock(kept[1].columns, neurons), None
    before, weight = copy.deepcopy(model), model.blocks[1].mlp.fc2.weight.detach().double()
    take_over_(parts_of(model), kept, found)
    sums, goes = found[1][1], list(range(1, 192, 2))
    mean = sums.total / sums.rows
    covariance = sums.gram / sums.rows - torch.outer(mean, mean)
    ridge = RIDGE * covariance.diagonal().mean()
    # The least of |x_G W_G - x_S D|^2 + ridge |D|^2 over D, where its slope is zero.
    change = model.blocks[1].mlp.fc2.weight.detach().double()[:, neurons] - weight[:, neurons]
    slope = change @ covariance[neurons, :][:, neurons] - weight[:, goes] @ covariance[goes][:, neurons]
    torch.testing.assert_close(slope, -ridge * change, rtol=1e-3, atol=1e-6)
    bias = before.blocks[1].mlp.fc2.bias.double() + weight[:, goes] @ mean[goes] - change @ mean[list(neurons)]
    torch.testing.assert_close(model.blocks[1].mlp.fc2.bias.double(), bias, rtol=1e-4, atol=1e-5)
    # Where nothing goes, and where all goes, nothing changes.
    for index in (0, 2, 3):
        for name, value in before.blocks[index].state_dict().items():
            assert torch.equal(value, model.blocks[index].state_dict()[name])


@pytest.mark.parametrize("bias", [True, False])
def test_the_outputs_change_less_where_what_stays_takes_over(model, data, bias):
    if not bias:
        for layer in layers(model):
            layer.bias = None
    found = observe(model, data, 128, seed=SEED, dtype=torch.bfloat16)
    kept = [KeptBlock((tuple(range(0, 16, 2)),) * 3, tuple(range(96))) for _ in model.blocks]
    masked, taken = copy.deepcopy(model), copy.deepcopy(model)
    take_over_(parts_of(taken), kept, found)
    x = first_images(data)
    with torch.no_grad():
        expected, plain, better = model(x), mask_(masked, kept)(x), mask_(taken, kept)(x)
    assert (better - expected).norm() < 0.7 * (plain - expected).norm()


def test_a_search_goes_by_importance_or_by_norms_alone(model, data, validation):
    options = UVCOptions(epochs=5, learning_rate=1e-3, ema=0.9, budget=0.3, multiple=4)
    results = {}
    for observed in (0, 64):
        results[observed] = compress_uvc_(
            copy.deepcopy(model), data, options=dataclasses.replace(options, observed=observed), validation=validation
        )
    assert results[0].blocks != results[64].blocks
    assert all(0.99 * 0.3 <= each.macs_after / each.macs_before <= 0.3 for each in results.values())
