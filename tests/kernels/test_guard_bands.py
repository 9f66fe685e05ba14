"""No kernel writes outside its output, and nothing outside an input reaches the result, wherever the operands begin.

Every operand lies in a buffer of its own, at each distance in elements from a multiple of 64 bytes, with guard bands
around it. What the operators allocate is made such a view too, by taking PyTorch's place when they ask for memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod

import pytest
import torch
from torch import Tensor

from mixrank_kernels import ops, packing, reference, testing

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LINEAR, RESIDUAL, PIVOTED = "lowrank_linear", "lowrank_residual_linear", "pivoted_linear"
SPARSE = "sparse_linear"
GRAM, CROSS = "gram_accumulate_", "cross_gram_accumulate_"
CHANGED = {GRAM: ("gram", "column_sum"), CROSS: ("cross",)}
# Around an input: in place of NaN no valid index, and bytes that are NaN in any dtype.
NOTHING = {torch.int64: -1, torch.uint8: 0xFF}
CACHE_LINE, BAND = 64, 256  # bytes; a band holds every vector of a tile's row

# Around the rows of a tile (6, 12) and the switch from dot products to packed weights (24 rows).
ROWS = (1, 2, 23, 24, 25, 37)
# K, N, R: tiny, primes, and one below, on and above the columns of a tile (8, 16, 32) and its blocks of terms (64).
LINEAR_SIZES = ((1, 1, 1), (5, 2, 7), (13, 7, 9), (63, 15, 17), (64, 32, 8), (65, 33, 31), (67, 127, 61))
# K, N, R, Q, b: the same, but blocks of b must divide K and N.
RESIDUAL_SIZES = (
    (5, 2, 7, 1, 0),
    (65, 33, 31, 9, 0),
    (16, 16, 1, 0, 16),
    (32, 48, 7, 0, 16),
    (64, 32, 9, 17, 32),
    (96, 64, 33, 5, 32),
)
# K, N, R: the same, with every row a pivot, and ranks around a piece of a row block (384).
PIVOTED_SIZES = (
    (1, 1, 1),
    (5, 2, 1),
    (13, 16, 9),
    (63, 32, 17),
    (64, 40, 8),
    (65, 64, 31),
    (9, 421, 389),
    (8, 400, 384),
)
# K, N, R (0: no factors): the same, with more than one chunk of features (128) and group of rows (128).
SPARSE_SIZES = (
    (1, 1, 0),
    (5, 2, 1),
    (13, 16, 9),
    (64, 32, 17),
    (65, 31, 0),
    (129, 33, 31),
    (9, 130, 2),
)
# Few tokens, and around the lanes and the vectors of a tile of them.
SPARSE_ROWS = (1, 3, 7, 33, 66, 129)
GRAM_SIZES = ((1,), (7,), (8,), (9,), (15,), (17,), (31,), (32,), (33,), (67,))
CROSS_SIZES = ((1, 1), (7, 5), (8, 32), (17, 9), (33, 31), (31, 67))


class Banded:
    """A tensor ``offset`` elements into a buffer, with at least 256 bytes on both sides of it that hold ``poison``."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, offset: int, poison: float) -> None:
        band = BAND // dtype.itemsize
        self.buffer = torch.full((band + offset + prod(shape) + band,), poison, dtype=dtype)
        assert self.buffer.data_ptr() % CACHE_LINE == 0
        self.tensor = self.buffer[band + offset : band + offset + prod(shape)].view(shape)
        self.before = self.outside()

    def outside(self) -> Tensor:
        start, end = self.tensor.storage_offset(), self.tensor.storage_offset() + self.tensor.numel()
        return torch.cat([self.buffer[:start], self.buffer[end:]]).view(torch.uint8)

    def assert_untouched(self) -> None:
        assert torch.equal(self.outside(), self.before), "a byte outside the output was written"


class Allocations:
    """Serves what the kernels allocate from banded buffers and remembers them."""

    def __init__(self) -> None:
        self.offset, self.poison, self.made = 0, 0.0, []

    def new_empty(self, like: Tensor, size: list[int], dtype: torch.dtype | None = None, **_options: object) -> Tensor:
        dtype = dtype or like.dtype
        banded = Banded(tuple(size), dtype, self.offset, self.poison)
        banded.tensor.fill_(NOTHING.get(dtype, float("nan")))
        self.made.append(banded)
        return banded.tensor


@pytest.fixture
def allocations() -> Iterator[Allocations]:
    served = Allocations()
    library = torch.library.Library("aten", "IMPL")
    library.impl("new_empty", served.new_empty, "CPU")
    yield served
    library._destroy()


@pytest.fixture(params=[1, 4], ids=["one thread", "four threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Threads also decide how the work is divided: with more of them than row blocks by columns."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def integers(*shape: int, high: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randint(-high, high + 1, shape).to(dtype)


def linear_arguments(m: int, k: int, n: int, r: int) -> dict[str, Tensor]:
    return {
        "x": integers(m, k, high=4),
        "down": integers(r, k, high=1),
        "up": integers(n, r, high=1),
        "bias": integers(n, high=4),
    }


def pivoted_arguments(m: int, k: int, n: int, r: int) -> dict[str, Tensor]:
    places = torch.randperm(n)
    return {
        "x": integers(m, k, high=4),
        "down": integers(r, k, high=1),
        # Few of them, or sums would not be numbers of every dtype.
        "coefficients": integers(n - r, r, high=1) * (torch.arange(r) < 8),
        "index": torch.cat([places[:r].sort().values, places[r:].sort().values]),
        "bias": integers(n, high=4),
    }


def sparse_arguments(m: int, k: int, n: int, r: int) -> dict[str, Tensor | None]:
    stored = torch.rand(n, k) < 0.3
    return {
        "x": integers(m, k, high=4),
        "mask": testing.packed_bits(stored),
        "values": integers(int(stored.sum()), high=2),
        "down": integers(r, k, high=1) if r else None,
        # Few of them, or sums would not be numbers of every dtype.
        "up": integers(n, r, high=1) * (torch.arange(r) < 6) if r else None,
        "bias": integers(n, high=4),
    }


def residual_arguments(m: int, k: int, n: int, r: int, q: int, b: int) -> dict[str, Tensor | None]:
    arguments = linear_arguments(m, k, n, r)
    if q:
        arguments |= {"residual_down": integers(q, k, high=1), "residual_up": integers(n, q, high=1)}
    if b:
        col = torch.arange(n // b) % (k // b)
        arguments |= {"crow": torch.arange(n // b + 1), "col": col, "values": integers(len(col), b, b, high=1)}
    return arguments


def gram_arguments(m: int, k: int, master: torch.dtype) -> dict[str, Tensor]:
    return {
        "gram": integers(k, k, high=9, dtype=master),
        "x": integers(m, k, high=4),
        "row_weight": integers(m, high=2),
        "column_sum": integers(k, high=9, dtype=master),
    }


def cross_arguments(m: int, k: int, n: int, master: torch.dtype) -> dict[str, Tensor]:
    return {"cross": integers(k, n, high=9, dtype=master), "x": integers(m, k, high=4), "z": integers(m, n, high=4)}


def calls(op: str) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Every number of rows with every size, numbered so that all the numbers meet each of either."""
    make, sizes = {
        LINEAR: (linear_arguments, LINEAR_SIZES),
        RESIDUAL: (residual_arguments, RESIDUAL_SIZES),
        PIVOTED: (pivoted_arguments, PIVOTED_SIZES),
        SPARSE: (sparse_arguments, SPARSE_SIZES),
        GRAM: (gram_arguments, GRAM_SIZES),
        CROSS: (cross_arguments, CROSS_SIZES),
    }[op]
    masters = [(torch.float64,), (torch.float32,)] if op in CHANGED else [()]
    for (i, m), (j, size), master in product(
        enumerate(SPARSE_ROWS if op == SPARSE else ROWS), enumerate(sizes), masters
    ):
        yield (i + j) % len(ROWS), make(m, *size, *master)


def pack(arguments: dict[str, Tensor], allocations: Allocations) -> Tensor:
    """The weights as the operator takes them packed, once more with guard bands around what is written."""
    allocations.offset, allocations.poison, allocations.made = 0, 0x5A, []
    make = packing.packed_pivots if "index" in arguments else packing.packed
    make = packing.packed_sparse if "mask" in arguments else make
    packed = make(**{name: value for name, value in arguments.items() if name not in ("x", "bias")})
    assert [one.tensor.data_ptr() for one in allocations.made] == [packed.data_ptr()]
    allocations.made[0].assert_untouched()
    return packed


def check(
    op: str, arguments: dict[str, Tensor], expected: list[Tensor], offset: int, poison: float, allocations: Allocations
) -> None:
    """Run ``op`` with every operand at an offset of its own, NaN around the inputs, ``poison`` around the outputs."""
    changed, banded = CHANGED.get(op, ()), {}
    for place, (name, value) in enumerate(arguments.items()):
        if value is None:
            continue
        around = poison if name in changed else NOTHING.get(value.dtype, float("nan"))
        # What is packed is only used where it begins with a cache line, as what PyTorch allocates does.
        shift = 0 if name == "packed" else (offset + 5 * place) % (CACHE_LINE // value.dtype.itemsize)
        banded[name] = Banded(tuple(value.shape), value.dtype, shift, around)
        banded[name].tensor.copy_(value)
    allocations.offset, allocations.poison, allocations.made = offset, poison, []
    output = getattr(ops, op)(**{name: operand.tensor for name, operand in banded.items()})
    if changed:
        outputs = [banded[name] for name in changed]
        assert allocations.made == []
    else:
        outputs = allocations.made
        assert [one.tensor.data_ptr() for one in outputs] == [output.data_ptr()], "the output was allocated elsewhere"
    for one, exact in zip(outputs, expected, strict=True):
        assert torch.equal(one.tensor, exact.to(one.tensor.dtype))
        one.assert_untouched()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.operators(without=("triton", "composite", "reference"))
def test_nothing_outside_the_operands_is_written_or_used(implementation, op, dtype, threads, allocations):
    torch.manual_seed(0)
    for first, arguments in calls(op):
        kept = (*CHANGED.get(op, ()), "crow", "col", "index", "mask")
        cast = {n: value if n in kept or value is None else value.to(dtype) for n, value in arguments.items()}
        expected = list(testing.run(getattr(reference, op), testing.exact(cast)))
        operands = [cast] if op in CHANGED else [cast, cast | {"packed": pack(cast, allocations)}]
        for offset in range(first, CACHE_LINE // dtype.itemsize, len(ROWS)):
            # Whatever is stored over -0.0 or added to it changes its bits; only NaN shows what is read.
            for poison in (-0.0, float("nan")) if op in CHANGED else (-0.0,):
                for given in operands:
                    check(op, given, expected, offset, poison, allocations)
