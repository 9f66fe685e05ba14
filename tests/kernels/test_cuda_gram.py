"""The CUDA kernels of Gram matrices on the emulator: exact on small integers, in any order, as good as their terms."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mixrank_kernels import reference, testing

from .cuda_emulated import (
    EAGER,
    GRAM_BFLOAT16,
    GRAM_FLOAT16,
    GRAM_FLOAT32_THREE,
    GRAM_FLOAT32_TWO,
    LATE,
    LAYOUTS,
    ORDERS,
    WHOLE,
    Kernels,
    Order,
    integers,
)
from .test_cuda_linear import CHOSEN as LINEAR_CHOSEN

GRAM_DTYPES = {
    GRAM_BFLOAT16: torch.bfloat16,
    GRAM_FLOAT16: torch.float16,
    GRAM_FLOAT32_TWO: torch.float32,
    GRAM_FLOAT32_THREE: torch.float32,
}
GRAM = [
    pytest.param(80, GRAM_BFLOAT16, id="sm80-bf16"),
    pytest.param(90, GRAM_BFLOAT16, id="sm90-bf16"),
    pytest.param(80, GRAM_FLOAT16, id="sm80-fp16"),
    pytest.param(90, GRAM_FLOAT16, id="sm90-fp16"),
    pytest.param(80, GRAM_FLOAT32_TWO, id="sm80-fp32-two"),
    pytest.param(90, GRAM_FLOAT32_THREE, id="sm90-fp32-three"),
]


def check_gram(
    kernels: Kernels, order: Order, architecture: int, operand: int, x: Tensor, z: Tensor | None = None, *,
    weight: Tensor | None = None, summed: bool = False, master: torch.dtype = torch.float64, **how,
) -> list[int]:  # fmt: skip
    """One call against the reference; the plan. Gram begins unsymmetric, so mirroring instead of adding shows."""
    B, _, K = x.shape
    N = K if z is None else z.shape[2]
    gram = integers(B, K, N, dtype=master, bound=99)
    column_sum = integers(B, K, dtype=master, bound=99) if summed else None
    expected, sums = gram.clone(), None if column_sum is None else column_sum.clone()
    if z is None:
        reference.gram_accumulate_(expected, x, weight, sums)
    else:
        for batch in range(B):
            reference.cross_gram_accumulate_(expected[batch], x[batch], z[batch])
    plan = kernels.gram(order, architecture, operand, gram, x, z, weight, column_sum, **how)
    assert torch.equal(gram, expected)
    assert column_sum is None or torch.equal(column_sum, sums)
    return plan


def weights(batches: int, m: int) -> Tensor:
    """With nine bits, so that a weighted row takes a second term."""
    return integers(batches, m, dtype=torch.float32, bound=300)


# B, M, K: one of everything, primes, tiles (128) and steps (16, 64), their boundaries and neighbours.
GRAM_SHAPES = [(1, 1, 1), (3, 33, 61), (1, 64, 128), (2, 65, 127), (1, 63, 129), (1, 300, 200), (2, 130, 264)]


@pytest.mark.parametrize(("architecture", "operand"), GRAM)
@pytest.mark.parametrize(("batches", "m", "k"), GRAM_SHAPES)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_gram_is_exact(kernels, architecture, operand, batches, m, k, weighted):
    x = integers(batches, m, k, dtype=GRAM_DTYPES[operand], bound=4)
    weight = weights(batches, m) if weighted else None
    for order, master, summed in (
        (EAGER, torch.float64, True),
        (LATE, torch.float32, True),
        (LATE, torch.float64, False),
    ):
        check_gram(kernels, order, architecture, operand, x, weight=weight, master=master, summed=summed)


@pytest.mark.parametrize(("architecture", "operand"), GRAM)
@pytest.mark.parametrize(
    ("batches", "m", "k", "n"), [(1, 1, 1, 1), (2, 33, 130, 7), (1, 127, 64, 264), (2, 70, 136, 128)]
)
def test_cross_gram_is_exact(kernels, architecture, operand, batches, m, k, n):
    dtype = GRAM_DTYPES[operand]
    # One operand of more bits than bf16 has, where there is room for them.
    x, z = (integers(batches, m, size, dtype=dtype, bound=bound) for size, bound in ((k, 4), (n, 4)))
    if dtype == torch.float32:
        x = integers(batches, m, k, dtype=dtype, bound=511)
    for order, master in ((EAGER, torch.float64), (LATE, torch.float32)):
        check_gram(kernels, order, architecture, operand, x, z, master=master)


@pytest.mark.parametrize(("architecture", "operand"), GRAM)
@pytest.mark.parametrize("layouts", LAYOUTS.values(), ids=LAYOUTS)
def test_gram_reads_any_strides_and_alignment(kernels, architecture, operand, layouts):
    dtype = GRAM_DTYPES[operand]
    x, z = integers(2, 37, 133, dtype=dtype, bound=4), integers(2, 37, 60, dtype=dtype, bound=4)
    for order, weight in ((EAGER, None), (LATE, None), (LATE, weights(2, 37))):
        check_gram(kernels, order, architecture, operand, x, weight=weight, summed=True, layouts=layouts)
    check_gram(kernels, LATE, architecture, operand, x, z, layouts=layouts)


@pytest.mark.parametrize("operand", [GRAM_BFLOAT16, GRAM_FLOAT16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("order", ORDERS[::2], ids=str)
# An odd number of tiles, of which the last quads have some outside; two batches; both sides of a rectangle.
@pytest.mark.parametrize(("batches", "m", "k", "n"), [(1, 33, 520, 0), (2, 130, 768, 0), (1, 200, 520, 776)])
def test_quads_are_exact(kernels, operand, order, batches, m, k, n):
    x = integers(batches, m, k, dtype=GRAM_DTYPES[operand], bound=4)
    z = integers(batches, m, n, dtype=x.dtype, bound=4) if n else None
    check_gram(kernels, order, 90, operand, x, z, summed=z is None)
    assert kernels.launched[0].startswith("GramQuadSm90")


@pytest.mark.parametrize(("architecture", "operand"), GRAM)
@pytest.mark.parametrize("round_splits", [0, 1, 2])
def test_gram_of_many_splits_and_rounds(kernels, architecture, operand, round_splits):
    x = integers(2, 700, 40, dtype=GRAM_DTYPES[operand])
    for order, weight in ((EAGER, None), (LATE, None), (LATE, weights(2, 700))):
        plan = check_gram(
            kernels, order, architecture, operand, x, weight=weight, summed=True, round_splits=round_splits
        )
        assert plan == [256, 3, round_splits or 3]
        assert len(kernels.launched) == 2 * -(-3 // plan[2])


@pytest.mark.parametrize(("architecture", "operand"), GRAM)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_gram_is_symmetric_and_gives_the_same_bits_in_any_order(kernels, architecture, operand, weighted):
    x = torch.randn(1, 260, 136).to(GRAM_DTYPES[operand])
    weight = torch.rand(1, 260) if weighted else None
    grams, sums = [], []
    for order in ORDERS[::3]:
        grams.append(torch.zeros(1, 136, 136))
        sums.append(torch.zeros(1, 136))
        kernels.gram(order, architecture, operand, grams[-1], x, None, weight, sums[-1], layouts=(WHOLE,))
    assert torch.equal(grams[0], grams[0].mT)
    assert all(torch.equal(a, b) for same in (grams, sums) for a, b in pairwise(same))


@pytest.mark.parametrize(("architecture", "operand"), GRAM)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("m", [1, 300])
def test_gram_is_as_good_as_its_terms(kernels, architecture, operand, weighted, m):
    x = torch.randn(1, m, 72).to(GRAM_DTYPES[operand])
    weight = torch.rand(1, m) if weighted else None
    gram, sums = torch.zeros(1, 72, 72), torch.zeros(1, 72)
    exact, exact_sums = gram.double(), sums.double()
    reference.gram_accumulate_(exact, x.double(), None if weight is None else weight.double(), exact_sums)
    kernels.gram(LATE, architecture, operand, gram, x, None, weight, sums)
    left = x.float() if weight is None else x.float() * weight[..., None]
    testing.assert_within_budget(sums, exact_sums, left.sum(1), torch.float32)
    if operand == GRAM_FLOAT32_THREE:
        testing.assert_within_budget(gram, exact, left.mT @ x, torch.float32)
    elif not weighted and operand != GRAM_FLOAT32_TWO:
        # The emulator rounds after every term, and tensor cores do not: compared with sums row by row.
        plain = torch.zeros_like(gram)
        for row in range(m):
            plain += left[:, row, :, None] * x[:, row, None].float()
        testing.assert_within_budget(gram, exact, plain, torch.float32, rms_factor=2.0)
    else:
        # Two terms lack the rest of either operand and the product of both second terms. The fourth is room for sums.
        allowed = 4 * 2.0**-16 * (left.double().abs().mT @ x.double().abs())
        assert ((gram.double() - exact).abs() <= allowed).all()


# What a Gram call launches before it reduces, by architecture, operand, weights, K and dtype of the master.
CHOSEN = {
    (80, GRAM_BFLOAT16, False, 64): "GramSm80<BFloat16, false, 1, 1>",
    (90, GRAM_BFLOAT16, False, 63): "GramSm80<BFloat16, false, 1, 1>",
    (90, GRAM_BFLOAT16, False, 64): "GramSm90<BFloat16>",
    (90, GRAM_BFLOAT16, True, 64): "GramSm80<BFloat16, true, 2, 1>",
    (90, GRAM_BFLOAT16, False, 512): "GramSm90<BFloat16>",
    (90, GRAM_BFLOAT16, False, 520): "GramQuadSm90<BFloat16>",
    (90, GRAM_FLOAT16, False, 520): "GramQuadSm90<Float16>",
    (80, GRAM_FLOAT16, False, 64): "GramSm80<Float16, false, 1, 1>",
    (90, GRAM_FLOAT16, False, 64): "GramSm90<Float16>",
    (90, GRAM_FLOAT16, True, 64): "GramSm80<Float16, true, 2, 2>",
    (90, GRAM_FLOAT32_TWO, False, 64): "GramSm80<Float32<2>, false, 2, 2>",
    (80, GRAM_FLOAT32_TWO, True, 64): "GramSm80<Float32<2>, true, 2, 2>",
    (90, GRAM_FLOAT32_THREE, False, 64): "GramSm80<Float32<3>, false, 3, 3>",
    (80, GRAM_FLOAT32_THREE, True, 64): "GramSm80<Float32<3>, true, 3, 3>",
}
REDUCED = {torch.float32: "GramReduce<float>", torch.float64: "GramReduce<double>"}


@pytest.mark.parametrize("master", REDUCED, ids=["fp32", "fp64"])
@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_gram_takes_the_kernel_for_the_call(kernels, case, master):
    architecture, operand, weighted, k = case
    x = integers(1, 20, k, dtype=GRAM_DTYPES[operand])
    check_gram(kernels, LATE, architecture, operand, x, weight=weights(1, 20) if weighted else None, master=master)
    assert kernels.launched == [CHOSEN[case], REDUCED[master]]


def test_every_kernel_is_launched_here(kernels):
    """By the two tables, whose tests assert what is launched."""
    chosen = {name for names in LINEAR_CHOSEN.values() for name in names}
    assert chosen | set(CHOSEN.values()) | set(REDUCED.values()) == kernels.reachable
