"""The operator that asks for packed factors at run time: what compiled layers call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixrank_kernels import backend, ops, packing


@pytest.fixture(autouse=True)
def _nothing_packed():
    packing.clear()
    yield
    packing.clear()


SELF_PACKED = torch.ops.mixrank_kernels._lowrank_linear_self_packed.default


def linear_arguments(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    shapes = {"x": (2, 15, 37), "down": (13, 37), "up": (29, 13), "bias": (29,)}
    return {name: (torch.randn(shape) / shape[-1] ** 0.5).to(dtype) for name, shape in shapes.items()}


def with_gradients(arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone().requires_grad_() for name, tensor in arguments.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.operators("lowrank_linear", without=("triton", "composite", "reference"))
def test_self_packed_is_the_same_operator(implementation, dtype):
    arguments = linear_arguments(dtype)
    for _ in range(2):
        assert torch.equal(packing.lowrank_linear(**arguments), ops.lowrank_linear(**arguments))
        assert packing.nbytes() == packing.packed(arguments["down"], arguments["up"]).nbytes
    ours, theirs = with_gradients(arguments), with_gradients(arguments)
    packing.lowrank_linear(**ours).square().sum().backward()
    ops.lowrank_linear(**theirs).square().sum().backward()
    assert all(torch.equal(ours[name].grad, theirs[name].grad) for name in arguments)


def test_self_packed_passes_opcheck():
    arguments = linear_arguments()
    torch.library.opcheck(SELF_PACKED, tuple(arguments.values()))
    torch.library.opcheck(SELF_PACKED, tuple(with_gradients(arguments).values()))
    torch.library.opcheck(SELF_PACKED, tuple(arguments.values())[:3])
    assert torch.autograd.gradcheck(
        packing.lowrank_linear, tuple(with_gradients(linear_arguments(torch.float64)).values())
    )


def test_self_packed_casts_under_autocast():
    arguments = with_gradients(linear_arguments())
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = packing.lowrank_linear(**arguments), ops.lowrank_linear(**arguments)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, expected)
    actual.sum().backward()
    assert arguments["down"].grad.dtype == torch.float32
    assert packing.nbytes() == 0


def test_self_packed_is_served_by_what_serves_the_operator():
    arguments = linear_arguments()
    with backend.use("reference"):
        assert torch.equal(packing.lowrank_linear(**arguments), ops.lowrank_linear(**arguments))


def test_self_packed_names_what_does_not_fit():
    arguments = linear_arguments()
    with pytest.raises(RuntimeError, match=r"down must have shape \[R, K\] with K = 36"):
        packing.lowrank_linear(arguments["x"][..., :36], arguments["down"], arguments["up"])
