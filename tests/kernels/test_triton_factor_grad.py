"""The gradients of factors in Triton: values, ranges, determinism, gradients of their own, and where they are taken."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mixrank_kernels import backend, ops, testing, triton
from mixrank_kernels._schema import overload
from mixrank_kernels.triton import config as configs

DEVICE = "cpu" if triton.is_interpreted() else "cuda"
pytestmark = pytest.mark.skipif(
    not (triton.is_interpreted() or torch.cuda.is_available()), reason="needs TRITON_INTERPRET=1 or a CUDA device"
)
LINEAR = ("lowrank_linear", "lowrank_residual_linear")


def identify(value: object) -> str:
    return str(value).removeprefix("torch.")


def plain(x: Tensor, down: Tensor, grad: Tensor) -> Tensor:
    rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    return (rows @ down.mT).mT @ grad_rows


def operands(m: int, k: int, n: int, r: int, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, ...]:
    return tuple((torch.randn(shape) * scale).to(DEVICE, dtype) for shape in ((m, k), (r, k), (m, n)))


class Calls(TorchDispatchMode):
    """Counts the calls of ``_factor_grad``."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is overload("_factor_grad")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=identify)
@pytest.mark.parametrize(("m", "k", "n", "r"), [(1, 1, 1, 1), (5, 127, 31, 3), (127, 61, 130, 65), (1100, 20, 12, 7)])
def test_products_are_exact_on_integers(m, k, n, r, dtype):
    x, down, grad = (torch.randint(-1, 2, shape).to(DEVICE, dtype) for shape in ((m, k), (r, k), (m, n)))
    assert torch.equal(triton.factor_grad(x, down, grad), plain(x, down, grad))


@pytest.mark.parametrize("layout", [testing.every_other_row, testing.transposed, testing.slice_of_wider])
def test_any_strides_and_leading_dimensions(layout):
    x, down, grad = (
        torch.randint(-1, 2, shape).to(DEVICE, torch.float16) for shape in ((4, 5, 18), (3, 18), (4, 5, 9))
    )
    expected = plain(x, down, grad)
    assert torch.equal(triton.factor_grad(layout(x), layout(down), layout(grad)), expected)


def test_no_rows_are_zeros():
    x, down, grad = operands(0, 6, 5, 2, torch.float32)
    assert torch.equal(triton.factor_grad(x, down, grad), torch.zeros(2, 5, device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=identify)
def test_many_rows_stay_within_the_budget_and_give_the_same_bits_twice(dtype):
    x, down, grad = operands(2500, 48, 40, 24, dtype)
    first, second = (triton.factor_grad(x, down, grad) for _ in range(2))
    assert torch.equal(first, second)
    exact = plain(*(t.double() for t in (x, down, grad)))
    testing.assert_within_budget(first, exact, plain(x, down, grad), dtype)


def test_splits_that_do_not_fit_in_the_scratch_memory_grow(monkeypatch):
    monkeypatch.setattr(configs, "GRAM_ROWS_MIN", 16)
    monkeypatch.setattr(configs, "GRAM_SCRATCH_BYTES", 2 * 64 * 64 * 4)
    x, down, grad = (torch.randint(-1, 2, shape).to(DEVICE, torch.float16) for shape in ((203, 8), (3, 8), (203, 9)))
    assert torch.equal(triton.factor_grad(x, down, grad), plain(x, down, grad))


def test_the_intermediate_of_float16_has_the_range_of_fp32():
    x, down, grad = operands(70, 32, 12, 8, torch.float16, scale=2.0**9)
    grad = grad * 2.0**-22
    exact = plain(*(t.double() for t in (x, down, grad)))
    assert exact.abs().max() < torch.finfo(torch.float16).max
    assert not plain(x, down, grad).isfinite().all()
    error = (triton.factor_grad(x, down, grad).double() - exact).abs().max() / exact.abs().max()
    assert error < torch.finfo(torch.float16).eps


def test_it_has_gradients_of_every_order():
    leaves = tuple(t.requires_grad_() for t in operands(3, 2, 2, 2, torch.float64))
    with backend.use("triton"):
        assert torch.autograd.gradcheck(overload("_factor_grad"), leaves)
        assert torch.autograd.gradgradcheck(overload("_factor_grad"), leaves)


def test_it_is_a_well_formed_operator():
    leaves = tuple(t.requires_grad_() for t in operands(5, 4, 3, 2, torch.float32))
    with backend.use("triton"):
        torch.library.opcheck(overload("_factor_grad"), leaves)


@pytest.mark.parametrize("op", LINEAR)
@pytest.mark.parametrize("implementation", ["triton", "composite", "reference"])
def test_it_serves_where_triton_serves_the_operator(op, implementation):
    sample = next(s for s in testing.sample_inputs(op) if s.name in ("leading-dims", "both-leading-dims"))
    arguments = {name: None if t is None else t.to(DEVICE) for name, t in sample.arguments(torch.float32).items()}
    for name in ("down", "up"):
        arguments[name].requires_grad_()
    with backend.use(implementation), Calls() as calls:
        getattr(ops, op)(**arguments).sum().backward()
    assert calls.count == (2 if implementation == "triton" else 0)


@pytest.mark.parametrize("op", LINEAR)
def test_gradients_in_float16_stay_within_the_budget(op):
    sample = next(s for s in testing.sample_inputs(op) if s.name in ("leading-dims", "both-leading-dims"))
    given = sample.arguments(torch.float16)

    def gradients(function, dtype: torch.dtype, device: str) -> list[Tensor]:
        arguments = {
            name: None if t is None else t.to(device, dtype if t.is_floating_point() else None, copy=True)
            for name, t in given.items()
        }
        leaves = [t.requires_grad_() for t in arguments.values() if t is not None and t.is_floating_point()]
        torch.manual_seed(1)
        output = function(**arguments)
        output.backward(torch.randn(output.shape).to(device, dtype))
        return [leaf.grad.cpu() for leaf in leaves]

    with backend.use("triton"):
        actual = gradients(getattr(ops, op), torch.float16, DEVICE)
    exact, rounded = (gradients(testing.plain(op), dtype, "cpu") for dtype in (torch.float64, torch.float16))
    for ours, true, theirs in zip(actual, exact, rounded, strict=True):
        testing.assert_within_budget(ours, true, theirs, torch.float16)
