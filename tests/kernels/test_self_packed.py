"""The operators that ask for packed weights at run time: what compiled layers call."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixrank_kernels import backend, ops, packing
from mixrank_kernels._schema import overload
from mixrank_kernels.testing import packed_bits

pytestmark = pytest.mark.usefixtures("nothing_packed")

OPERATORS = ("lowrank_linear", "pivoted_linear", "sparse_linear")
PACKED = {"lowrank_linear": packing.packed, "pivoted_linear": packing.packed_pivots}
PACKED["sparse_linear"] = packing.packed_sparse


def linear_arguments(op: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    if op == "sparse_linear":
        return sparse_arguments(dtype)
    second = {"lowrank_linear": {"up": (29, 13)}, "pivoted_linear": {"coefficients": (16, 13)}}[op]
    shapes = {"x": (2, 15, 37), "down": (13, 37)} | second
    made = {name: (torch.randn(shape) / shape[-1] ** 0.5).to(dtype) for name, shape in shapes.items()}
    if op == "pivoted_linear":
        made["index"] = torch.cat([torch.arange(1, 27, 2), torch.arange(0, 27, 2), torch.arange(27, 29)])
    return made | {"bias": torch.randn(29).to(dtype)}


def sparse_arguments(dtype: torch.dtype) -> dict[str, Tensor]:
    stored = torch.rand(29, 37) < 0.4
    shapes = {"x": (2, 15, 37), "values": (int(stored.sum()),), "down": (13, 37), "up": (29, 13), "bias": (29,)}
    made = {name: (torch.randn(shape) / 4).to(dtype) for name, shape in shapes.items()}
    return {"x": made.pop("x"), "mask": packed_bits(stored), **made}


def floating(arguments: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in arguments.items() if tensor.is_floating_point()]


def with_gradients(arguments: dict[str, Tensor]) -> dict[str, Tensor]:
    return arguments | {name: arguments[name].clone().requires_grad_() for name in floating(arguments)}


def weights(arguments: dict[str, Tensor]) -> list[Tensor]:
    return [tensor for name, tensor in arguments.items() if name not in ("x", "bias")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.operators(*OPERATORS, without=("triton", "composite", "reference"))
def test_self_packed_is_the_same_operator(implementation, op, dtype):
    arguments, self_packed, plain = linear_arguments(op, dtype), getattr(packing, op), getattr(ops, op)
    for _ in range(2):
        assert torch.equal(self_packed(**arguments), plain(**arguments))
        assert packing.nbytes() == PACKED[op](*weights(arguments)).nbytes
    without_bias = {name: tensor for name, tensor in arguments.items() if name != "bias"}
    assert torch.equal(self_packed(**without_bias), plain(**without_bias))
    ours, theirs = with_gradients(arguments), with_gradients(arguments)
    self_packed(**ours).square().sum().backward()
    plain(**theirs).square().sum().backward()
    assert all(torch.equal(ours[name].grad, theirs[name].grad) for name in floating(arguments))


@pytest.mark.parametrize("op", OPERATORS)
def test_self_packed_passes_opcheck(op):
    arguments, operator = linear_arguments(op), overload(f"_{op}_self_packed")
    torch.library.opcheck(operator, tuple(arguments.values()))
    torch.library.opcheck(operator, tuple(with_gradients(arguments).values()))
    torch.library.opcheck(operator, tuple(arguments.values())[:-1])
    wide = with_gradients(linear_arguments(op, torch.float64))
    assert torch.autograd.gradcheck(getattr(packing, op), tuple(wide.values()), fast_mode=True)


@pytest.mark.parametrize("op", OPERATORS)
def test_self_packed_casts_under_autocast(op):
    arguments = with_gradients(linear_arguments(op))
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = getattr(packing, op)(**arguments), getattr(ops, op)(**arguments)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, expected)
    actual.sum().backward()
    assert arguments["down"].grad.dtype == torch.float32
    assert packing.nbytes() == 0


@pytest.mark.parametrize("op", OPERATORS)
def test_self_packed_is_served_by_what_serves_the_operator(op):
    arguments = linear_arguments(op)
    with backend.use("reference"):
        assert torch.equal(getattr(packing, op)(**arguments), getattr(ops, op)(**arguments))


@pytest.mark.parametrize("op", OPERATORS)
def test_self_packed_names_what_does_not_fit(op):
    arguments = linear_arguments(op)
    with pytest.raises(RuntimeError, match=r"down must have shape \[R, K\] with K = 36"):
        getattr(packing, op)(**arguments | {"x": arguments["x"][..., :36]})
