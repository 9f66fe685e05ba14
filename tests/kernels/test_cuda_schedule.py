"""Which block of the CUDA kernels computes what: every tile, row and chunk once."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise, product
from math import ceil

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from .cuda_emulated import Kernels

SPLIT_STEP, SPLIT_ROWS_MAX = 64, 4096
TILE, QUAD = 128, 256


def triangle(kernels: Kernels, index: int) -> tuple[int, ...]:
    return tuple(kernels.numbers("schedule_triangle", 2, index))


@given(n=st.integers(1, 60))
@settings(max_examples=30)
def test_every_tile_of_a_triangle_is_visited_once(kernels, n):
    visited = [triangle(kernels, i) for i in range(n * (n + 1) // 2)]
    assert visited == [(row, col) for row in range(n) for col in range(row + 1)]


@given(n=st.integers(2, 30_000), data=st.data())
def test_tiles_of_large_triangles_are_where_the_order_puts_them(kernels, n, data):
    row = data.draw(st.integers(0, n - 1))
    # The ends of a row are where a rounded root would be wrong first.
    col = data.draw(st.one_of(st.sampled_from((0, row)), st.integers(0, row)))
    assert triangle(kernels, row * (row + 1) // 2 + col) == (row, col)


@given(rows=st.integers(1, 30), cols=st.integers(1, 30))
@settings(max_examples=30)
def test_every_tile_of_a_rectangle_is_visited_once(kernels, rows, cols):
    visited = [tuple(kernels.numbers("schedule_rectangle", 2, i, cols)) for i in range(rows * cols)]
    assert visited == [(row, col) for row in range(rows) for col in range(cols)]


@given(rows=st.integers(1, 10**7), blocks=st.integers(1, 3000), slots=st.integers(1, 300), most=st.integers(0, 4096))
@settings(max_examples=300)
def test_splits_cover_the_rows_and_stay_short(kernels, rows, blocks, slots, most):
    split_rows, splits, round_splits = kernels.numbers("schedule_rows", 3, rows, blocks, slots, most)
    assert split_rows % SPLIT_STEP == 0
    assert 0 < split_rows <= SPLIT_ROWS_MAX
    # No split is empty: its sums would be those of nothing.
    assert (splits - 1) * split_rows < rows <= splits * split_rows
    assert 1 <= round_splits <= min(splits, max(most, 1))


@given(splits=st.integers(1, 100), waves=st.integers(1, 20), slots=st.integers(1, 300))
def test_full_waves_take_the_longest_splits(kernels, splits, waves, slots):
    """Where even the fewest splits fill the device, a shorter one only writes and reads more sums."""
    schedule = kernels.numbers("schedule_rows", 3, splits * SPLIT_ROWS_MAX, waves * slots, slots, splits)
    assert schedule == [SPLIT_ROWS_MAX, splits, splits]


@given(
    size=st.sampled_from((TILE, QUAD)),
    batches=st.integers(1, 4),
    rows=st.integers(1, 3000),
    k=st.integers(1, 1100),
    n=st.integers(1, 1100),
    cross=st.booleans(),
    split_steps=st.integers(1, 20),
    round_splits=st.integers(1, 8),
)
@settings(max_examples=40)
def test_every_split_of_every_square_has_one_block(
    kernels, size, batches, rows, k, n, cross, split_steps, round_splits
):
    n = n if cross else k
    split_rows = split_steps * SPLIT_STEP
    splits = ceil(rows / split_rows)
    places = [(row, col) for row in range(ceil(k / size)) for col in range(ceil(n / size) if cross else row + 1)]
    assume(len(places) * batches * splits < 3000)
    covered: dict[tuple, list[tuple[int, int]]] = {}
    for first in range(0, splits, round_splits):
        launched = min(round_splits, splits - first)
        found = []
        for block in range(len(places) * batches * launched):
            split, batch, row, col, first_row, last_row = kernels.numbers(
                "schedule_gram", 6, batches, rows, k, n, int(cross), size, split_rows, first, block
            )
            found.append((split, batch, (row, col)))
            covered.setdefault((batch, (row, col)), []).append((first_row, last_row))
        assert found == list(product(range(launched), range(batches), places))
    bounds = [*range(0, rows, split_rows), rows]
    assert covered == {key: list(pairwise(bounds)) for key in product(range(batches), places)}


@given(
    outputs=st.sampled_from((1, 2)),
    m=st.integers(1, 600),
    widths=st.tuples(st.integers(1, 700), st.integers(1, 700)),
    depths=st.tuples(st.integers(0, 400), st.integers(0, 400)),
    tile=st.sampled_from(((16, 64), (64, 64), (128, 64), (128, 128))),
    step=st.sampled_from((32, 64)),
)
@settings(max_examples=60)
def test_every_tile_of_a_product_sums_every_depth_once(kernels, outputs, m, widths, depths, tile, step):
    rows, cols = tile
    columns = [ceil(n / cols) for n in widths[:outputs]]
    most = sum(ceil(depth / step) for depth in depths)
    visited = []
    for block in range(ceil(m / rows) * sum(columns)):
        output, row, col, count, *chunks = kernels.numbers(
            "schedule_product", 4 + 2 * most, outputs, widths, depths, cols, step, block
        )
        visited.append((output, row, col))
        terms = [output] if outputs == 2 else [0, 1]
        expected = [(term, depth) for term in terms for depth in range(0, depths[term], step)]
        assert list(zip(chunks[: 2 * count : 2], chunks[1 : 2 * count : 2], strict=True)) == expected
    assert Counter(visited) == Counter(
        (output, row, col)
        for output in range(outputs)
        for row in range(ceil(m / rows))
        for col in range(columns[output])
    )
