"""Gates: open they change nothing, shut they skip, and samples follow the distribution that the logits say."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

from mixrank import InputError
from mixrank.uvc.gates import Gates, gated


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=5).eval()


def test_open_gates_change_nothing_and_shut_ones_skip(model):
    x = torch.randn(2, 3, 32, 32)
    shorter = copy.deepcopy(model)
    del shorter.blocks[1]
    with torch.no_grad():
        with gated(model.blocks, torch.ones(3)):
            assert torch.allclose(model(x), copy.deepcopy(model)(x), atol=1e-6)
        with gated(model.blocks, torch.tensor([1.0, 0.0, 1.0])):
            skipped = model(x)
        assert torch.allclose(skipped, shorter(x), atol=1e-6)
    assert not any(block._forward_hooks for block in model.blocks)


def test_gradients_reach_the_gates_and_are_right(model):
    x, double = torch.randn(2, 3, 32, 32).double(), copy.deepcopy(model).double()

    def loss(values: torch.Tensor) -> torch.Tensor:
        with gated(double.blocks, values):
            return double(x).square().sum()

    values = torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (values,))


def test_samples_are_of_the_binary_concrete_distribution():
    torch.manual_seed(0)
    gates, count = Gates(3).double(), 4000
    assert gates.probability().tolist() == pytest.approx([torch.sigmoid(torch.tensor(2.0)).item()] * 3)
    with torch.no_grad():
        gates.logits.copy_(torch.tensor([0.0, -2.0, 3.0]))
        drawn = torch.stack([gates.sample(torch.rand(3, dtype=torch.float64)) for _ in range(count)])
    assert ((drawn > 0.5).double().mean(0) - gates.probability()).abs().max() < 4 * 0.5 / count**0.5
    # The logit of a sample times the temperature is that of the probability plus logistic noise.
    logit, spread = drawn.logit() * gates.temperature, torch.pi / 3**0.5
    assert (logit.mean(0) - gates.logits).abs().max() < 4 * spread / count**0.5
    assert (logit.std(0) - spread).abs().max() < 0.1
    gates.sample(torch.rand(3, dtype=torch.float64)).sum().backward()
    assert gates.logits.grad.abs().min() > 0


def test_the_ends_of_the_random_numbers_are_finite():
    for uniform in (torch.zeros(2), torch.ones(2)):
        sample = Gates(2).sample(uniform)
        assert sample.isfinite().all()
        sample.sum().backward()


def test_steps_and_logits_are_limited():
    gates = Gates(3)
    gates.step_(torch.tensor([0.5, 100.0, -0.25]), rate=0.2)
    assert gates.logits.tolist() == pytest.approx([1.9, 1.8, 2.05])
    for _ in range(100):
        gates.step_(torch.tensor([1.0, 1.0, -1.0]), rate=0.2)
    assert gates.logits.tolist() == [-4.0, -4.0, 4.0]


def test_bad_arguments_are_refused(model):
    with pytest.raises(InputError, match="count must be at least 1, but it was 0"):
        Gates(0)
    with pytest.raises(InputError, match=r"temperature must be above 0, but it was 0\.0"):
        Gates(1, temperature=0.0)
    with pytest.raises(InputError, match="values must be 3 numbers, one for each block, but they were 2"):
        gated(model.blocks, torch.ones(2)).__enter__()
