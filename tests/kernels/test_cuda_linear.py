"""The CUDA kernels of linear operators on the emulator: exact, within nothing but their operands, in any order.

Operands are integers whose products and sums are exact in fp32, so one wrong index, one missing barrier or one byte
from outside an operand changes the result.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixrank_kernels import testing
from mixrank_kernels.cuda import Form, Tile

from .cuda_emulated import (
    ALL_LAYOUTS,
    BFLOAT16,
    DENSE,
    EAGER,
    FLOAT32_THREE,
    FLOAT32_TWO,
    LATE,
    LAYOUTS,
    ONE_LAUNCH,
    ORDERS,
    TWO_LAUNCHES,
    WHOLE,
    Kernels,
    Order,
    integers,
)

DTYPES = {BFLOAT16: torch.bfloat16, FLOAT32_TWO: torch.float32, FLOAT32_THREE: torch.float32}
LINEAR = [
    pytest.param(80, BFLOAT16, Form(2, Tile.MEDIUM), id="sm80-bf16"),
    pytest.param(90, BFLOAT16, Form(2, Tile.MEDIUM), id="sm90-bf16-medium"),
    pytest.param(90, BFLOAT16, Form(2, Tile.LARGE), id="sm90-bf16-large"),
    pytest.param(90, BFLOAT16, ONE_LAUNCH, id="sm90-bf16-one-launch"),
    pytest.param(80, FLOAT32_TWO, TWO_LAUNCHES, id="sm80-fp32-two"),
    pytest.param(90, FLOAT32_THREE, TWO_LAUNCHES, id="sm90-fp32-three"),
]


def factors(m: int, k: int, n: int, ranks: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, list]:
    """X and pairs of factors. In fp32 x has nine bits, so that it takes two terms; the intermediate has below 16."""
    x = integers(m, k, dtype=dtype, bound=511 if dtype == torch.float32 else 2)
    return x, [(integers(r, k, dtype=dtype), integers(n, r, dtype=dtype)) for r in ranks]


def exact_linear(x: Tensor, pairs: list, bias: Tensor | None = None, blocks: tuple | None = None) -> Tensor:
    """In fp64, but for the two roundings to the dtype: of the intermediate, and of the result."""
    out = torch.zeros(x.shape[0], pairs[0][1].shape[0], dtype=torch.float64)
    for down, up in pairs:
        hidden = x.double() @ down.double().T
        assert hidden.abs().max() < (256 if x.dtype == torch.bfloat16 else 2**16), "the intermediate is not exact"
        out += hidden @ up.double().T
    if blocks is not None:
        out += x.double() @ testing.densified(*blocks, x.shape[1]).double().T
    return (out if bias is None else out + bias.double()).to(x.dtype)


def block_sparse(n: int, k: int, b: int, dtype: torch.dtype, index: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Crow, col and values: the first row of blocks is empty, the last has two blocks at one place."""
    counts = torch.randint(1, 4, (n // b,))
    counts[0] = 0
    counts[-1] = 2
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    col = torch.randint(k // b, (int(crow[-1]),))
    col[-2:] = k // b - 1
    return crow.to(index), col.to(index), integers(len(col), b, b, dtype=dtype)


def check_linear(
    kernels: Kernels, order: Order, architecture: int, operand: int, form: Form, arguments: dict, layouts
) -> None:
    y = kernels.linear(order, architecture, operand, **arguments, layouts=layouts, form=form)
    assert torch.equal(y, exact_linear(**arguments))


# M, K, N and the ranks: one of everything, primes, tiles (16, 64, 128), their boundaries and neighbours, several chunks
# (32 in fp32, 64 in bf16), more chunks than stages.
SHAPES = [
    (1, 1, 1, (1,)),
    (1, 64, 72, (8, 8)),
    (15, 33, 61, (5, 3)),
    (16, 136, 136, (72, 16)),
    (17, 40, 264, (8, 8)),
    (63, 127, 65, (1, 63)),
    (64, 64, 128, (64,)),
    (65, 65, 129, (65, 1)),
    (127, 96, 136, (72,)),
    (128, 200, 64, (24, 16)),
    (129, 7, 130, (129,)),
    (200, 129, 63, (31, 33)),
    (257, 24, 8, (16, 72)),
    (130, 72, 520, (264, 72)),
]


@pytest.mark.parametrize(("architecture", "operand", "form"), LINEAR)
@pytest.mark.parametrize(("m", "k", "n", "ranks"), SHAPES)
def test_linear_is_exact(kernels, architecture, operand, form, m, k, n, ranks):
    x, pairs = factors(m, k, n, ranks, DTYPES[operand])
    for biased, order in enumerate((EAGER, LATE)):
        bias = integers(n, dtype=x.dtype, bound=9) if biased else None
        check_linear(kernels, order, architecture, operand, form, {"x": x, "pairs": pairs, "bias": bias}, (DENSE,))


@pytest.mark.parametrize(("architecture", "operand", "form"), LINEAR)
@pytest.mark.parametrize("layouts", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    ("m", "k", "n", "ranks"), [(3, 33, 40, (9, 7)), (70, 133, 72, (66, 5)), (130, 72, 64, (40, 16))]
)
def test_linear_reads_any_strides_and_alignment(kernels, architecture, operand, form, layouts, m, k, n, ranks):
    x, pairs = factors(m, k, n, ranks, DTYPES[operand])
    arguments = {"x": x, "pairs": pairs, "bias": integers(n, dtype=x.dtype)}
    for order in (EAGER, LATE):
        check_linear(kernels, order, architecture, operand, form, arguments, layouts)


# M, K, N, ranks, size of the blocks.
SPARSE = [
    (1, 16, 32, (3,), 16),
    (17, 48, 80, (8, 8), 16),
    (65, 96, 160, (5, 9), 32),
    (70, 96, 144, (16,), 48),
    (130, 128, 256, (8, 8), 64),
]


@pytest.mark.parametrize(("architecture", "operand", "form"), LINEAR)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize(("m", "k", "n", "ranks", "b"), SPARSE)
def test_block_sparse_residuals_are_exact(kernels, architecture, operand, form, index, m, k, n, ranks, b):
    x, pairs = factors(m, k, n, ranks, DTYPES[operand])
    blocks = block_sparse(n, k, b, x.dtype, index)
    for order, layouts in ((EAGER, (WHOLE,)), (LATE, (WHOLE,)), (EAGER, (DENSE,)), (LATE, ALL_LAYOUTS[2:])):
        check_linear(kernels, order, architecture, operand, form, {"x": x, "pairs": pairs, "blocks": blocks}, layouts)


@pytest.mark.parametrize(("architecture", "operand", "form"), LINEAR)
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_linear_is_exact_in_any_order(kernels, architecture, operand, form, order):
    x, pairs = factors(136, 328, 264, (72, 16), DTYPES[operand])
    x.clamp_(-99, 99)
    check_linear(kernels, order, architecture, operand, form, {"x": x, "pairs": pairs}, (WHOLE,))


@pytest.mark.parametrize(("architecture", "operand", "form"), LINEAR)
def test_linear_gives_the_same_bits_in_any_order(kernels, architecture, operand, form):
    x, pairs = torch.randn(70, 136), [(torch.randn(72, 136), torch.randn(40, 72))]
    x, pairs = x.to(DTYPES[operand]), [(down.to(DTYPES[operand]), up.to(DTYPES[operand])) for down, up in pairs]
    first, *others = (
        kernels.linear(order, architecture, operand, x, pairs, layouts=(WHOLE,), form=form) for order in ORDERS
    )
    assert all(torch.equal(first, other) for other in others)


FEW, SMALL, MEDIUM, LARGE = (
    f"ProductSm80<BFloat16, {tile}>"
    for tile in ("16, 32, 1, 2, 8", "32, 32, 2, 2, 6", "64, 64, 2, 2, 4", "128, 128, 2, 4, 3")
)
# Of every call: architecture, operand, launches, M, K, N, whether there is a block-sparse residual, and the rank. Large
# tiles are taken from 132 of them on, as of 1409 rows and 1408 columns; medium ones from 66 on, in boxes as of 641 rows
# and 704 columns.
CHOSEN = {
    (80, BFLOAT16, 2, 16, 16, 16, False, 8): [FEW, FEW],
    (90, BFLOAT16, 2, 16, 16, 16, True, 8): [FEW, FEW],
    (80, BFLOAT16, 2, 17, 16, 16, True, 8): [SMALL, SMALL],
    (80, BFLOAT16, 2, 321, 16, 704, True, 8): [SMALL, MEDIUM],
    (80, BFLOAT16, 2, 320, 16, 704, False, 8): [SMALL, SMALL],
    (80, BFLOAT16, 2, 1409, 16, 1408, False, 8): [SMALL, LARGE],
    (80, BFLOAT16, 2, 1409, 16, 1408, True, 8): [SMALL, LARGE],
    (80, BFLOAT16, 2, 1408, 16, 1408, False, 8): [SMALL, MEDIUM],
    (90, BFLOAT16, 2, 17, 16, 16, False, 8): [SMALL, SMALL],
    (90, BFLOAT16, 2, 641, 16, 704, False, 8): [SMALL, "ProductSm90<64, false>"],
    (90, BFLOAT16, 2, 641, 16, 704, True, 8): [SMALL, "ProductSm90<64, true>"],
    (90, BFLOAT16, 2, 640, 16, 704, False, 8): [SMALL, SMALL],
    (90, BFLOAT16, 2, 1409, 16, 1408, False, 8): [SMALL, "ProductSm90<128, false>"],
    (90, BFLOAT16, 2, 1409, 16, 1408, True, 8): [SMALL, "ProductSm90<128, true>"],
    (90, BFLOAT16, 2, 641, 16, 703, False, 8): [SMALL, MEDIUM],
    (80, FLOAT32_TWO, 2, 17, 16, 16, True, 8): ["ProductSm80<Float32<2>, 64, 64, 2, 2, 4>"] * 2,
    (90, FLOAT32_THREE, 2, 17, 16, 16, True, 8): ["ProductSm80<Float32<3>, 64, 64, 2, 2, 4>"] * 2,
    (90, BFLOAT16, 1, 17, 16, 16, False, 8): ["LinearSm90<2>"],
    (90, BFLOAT16, 1, 1, 16, 16, False, 192): ["LinearSm90<2>"],
    (90, BFLOAT16, 1, 17, 16, 16, False, 200): ["LinearSm90<4>"],
    (90, BFLOAT16, 1, 17, 16, 16, False, 456): [SMALL, SMALL],
    (90, BFLOAT16, 1, 17, 16, 16, True, 8): [SMALL, SMALL],
    (80, BFLOAT16, 1, 17, 16, 16, False, 8): [SMALL, SMALL],
}


@pytest.mark.parametrize("order", [EAGER, LATE], ids=["eager", "late"])
@pytest.mark.parametrize("case", CHOSEN, ids=str)
def test_linear_takes_the_kernel_for_the_call(kernels, case, order):
    architecture, operand, launches, m, k, n, sparse, rank = case
    form = Form(launches)
    x, pairs = factors(m, k, n, (rank, 8), DTYPES[operand])
    arguments = {"x": x, "pairs": pairs}
    if sparse:
        arguments["blocks"] = block_sparse(n, k, 16, x.dtype, torch.int64)
    check_linear(kernels, order, architecture, operand, form, arguments, (DENSE,))
    assert kernels.launched == CHOSEN[case]


@pytest.mark.parametrize(
    ("scale", "down_scale", "up_scale"), [(1, 1, 1), (1e30, 1e-30, 1), (1e-30, 1e25, 1e5), (1e30, 1, 1e-30)]
)
@pytest.mark.parametrize("shape", [(17, 5, 3, 9), (65, 130, 33, 40)], ids=str)
def test_linear_in_fp32_is_as_good_as_its_terms(kernels, shape, scale, down_scale, up_scale):
    m, k, r, n = shape
    x, down, up = torch.randn(m, k) * scale, torch.randn(r, k) * down_scale, torch.randn(n, r) * up_scale
    exact = x.double() @ down.double().T @ up.double().T
    three = kernels.linear(LATE, 80, FLOAT32_THREE, x, [(down, up)])
    testing.assert_within_budget(three, exact, x @ down.T @ up.T, torch.float32)
    two = kernels.linear(LATE, 80, FLOAT32_TWO, x, [(down, up)])
    # Two terms leave at most 2^-16 of a value; a product lacks that of either operand and the product of both second
    # terms, and there are two products. The seventh is room for fp32 sums.
    allowed = 7 * 2.0**-16 * (x.double().abs() @ down.double().abs().T @ up.double().abs().T)
    assert ((two.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize(("architecture", "operand", "form"), LINEAR)
@pytest.mark.parametrize("rows", [2, 17])
def test_an_infinite_intermediate_stays_infinite(kernels, architecture, operand, form, rows):
    x, down, up = (torch.ones(size, 8, dtype=DTYPES[operand]) for size in (rows, 8, 8))
    x[0] = float("inf")
    y = kernels.linear(EAGER, architecture, operand, x, [(down, up)], form=form)
    assert y.tolist() == [[float("inf")] * 8] + [[64.0] * 8] * (rows - 1)
