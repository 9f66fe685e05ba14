"""What was packed for other weights, or for these before they changed: refused, or not used."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixrank_kernels import ops, packing, testing

from .test_packing import branch, factors, low_rank

pytestmark = pytest.mark.usefixtures("nothing_packed")


def refused() -> dict[str, tuple[Tensor, str]]:
    down, up = low_rank(torch.float32).values()
    right = packing.packed(down, up).clone()
    scrambled = right.clone()
    scrambled[:8] = 255
    other = [factors((13, 38), (29, 13)), factors((13, 37), (30, 13)), factors((12, 37), (29, 12))]
    made = {
        name: (packing.packed(*weights), "packed must be made from these factors, but it was made for K = ")
        for name, weights in zip(("K", "N", "R"), other, strict=True)
    }
    return made | {
        "Q": (packing.packed(**branch(torch.float32)), r"packed must be made from these factors.* Q = 7"),
        "dtype": (packing.packed(down.double(), up.double()), "packed must be made from these factors.* another dtype"),
        "cut": (right[:-64], "packed must be whole, but it was cut"),
        "header cut": (right[:8], "packed must come from mixrank_kernels.packing, but it has another content"),
        "empty": (right[:0], "packed must come from mixrank_kernels.packing, but it has another content"),
        "content": (scrambled, "packed must come from mixrank_kernels.packing, but it has another content"),
    }


@pytest.mark.parametrize("case", ["K", "N", "R", "Q", "dtype", "cut", "header cut", "empty", "content"])
def test_what_was_not_packed_from_these_factors_is_refused(isa, case):
    packed, message = refused()[case]
    with pytest.raises(RuntimeError, match=message):
        ops.lowrank_linear(torch.ones(3, 37), **low_rank(torch.float32), packed=packed)


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(RuntimeError, match=r"up must have shape \[N, R\] with R = 13"):
        packing.packed(*factors((13, 37), (29, 12)))
    assert packing.nbytes() == 0


@pytest.mark.parametrize("name", ["down", "up", "residual_down", "residual_up", "values"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_write_that_torch_does_not_count_is_noticed(name, dtype):
    sample = next(
        s
        for s in testing.sample_inputs("lowrank_residual_linear")
        if s.arguments()["values"] is not None
        and s.arguments()["residual_down"] is not None
        and s.arguments()["values"].numel() > 0
    )
    arguments = sample.arguments(dtype)
    weights = {n: t for n, t in arguments.items() if n not in ("x", "bias", "packed")}
    packed = packing.packed(**weights)
    before = ops.lowrank_residual_linear(**(arguments | {"packed": packed}))
    arguments[name].data.mul_(-2)
    after = ops.lowrank_residual_linear(**(arguments | {"packed": packed}))
    assert torch.equal(after, ops.lowrank_residual_linear(**(arguments | {"packed": None})))
    assert not torch.equal(after, before)
