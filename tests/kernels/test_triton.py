"""What only the Triton kernels have: the triangular schedule, exactness across tile boundaries.

Values, gradients and ``torch.compile`` are tested for all implementations alike in ``test_ops.py``. Here the operands
are small integers, whose results are exact: one wrong index changes a bit.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixrank_kernels import reference, testing, triton
from mixrank_kernels.triton import config as configs
from mixrank_kernels.triton.gram import row_schedule, triangle_tile

DTYPES = (torch.float16, torch.float32, torch.float64)

# Without the interpreter the launchers need a CUDA device.
DEVICE = "cpu" if triton.is_interpreted() else "cuda"
needs_device = pytest.mark.skipif(
    not (triton.is_interpreted() or torch.cuda.is_available()), reason="needs TRITON_INTERPRET=1 or a CUDA device"
)


def identify(value: object) -> str:
    return str(value).removeprefix("torch.")


def integers(*shape: int, dtype: torch.dtype, bound: int = 4) -> torch.Tensor:
    """Random integers small enough for every product and sum of a test to be exact in fp32."""
    return torch.randint(-bound, bound + 1, shape).to(DEVICE, dtype)


@given(st.integers(1, 60))
def test_every_tile_of_one_triangle_is_visited_once(n):
    visited = [triangle_tile.fn(i, n) for i in range(n * (n + 1) // 2)]
    assert sorted(visited) == [(row, col) for row in range(n) for col in range(row + 1)]


@given(st.integers(2, 30_000), st.data())
def test_tiles_of_large_triangles_are_distinct_and_inside(n, data):
    indices = data.draw(st.lists(st.integers(0, n * (n + 1) // 2 - 1), min_size=2, max_size=50, unique=True))
    tiles = [triangle_tile.fn(i, n) for i in indices]
    assert all(0 <= col <= row < n for row, col in tiles)
    assert len(set(tiles)) == len(tiles)


@given(st.integers(1, 10**7), st.integers(1, 2000), st.integers(0, 64), st.booleans())
def test_row_splits_cover_the_rows_and_stay_short(m, tiles, scratch_splits, one_round):
    split_rows, round_splits = row_schedule(m, tiles, scratch_splits, one_round)
    splits = -(-m // split_rows)
    assert split_rows >= 1
    assert splits <= round_splits if one_round else split_rows <= configs.GRAM_ROWS_MAX
    assert 1 <= round_splits <= max(1, scratch_splits)
    # No split is empty: an empty one would add partial sums that nobody wrote.
    assert (splits - 1) * split_rows < m <= splits * split_rows


@given(st.sampled_from(list(configs.GRAM.values())))
@settings(max_examples=20)
def test_reductions_divide_the_tiles(config):
    assert config.BK % config.BS == 0


# Prime sizes; one row; a rank that takes several chunks; each tile boundary and its neighbours.
LINEAR_SHAPES = [(1, 7, 5, 1), (63, 127, 61, 5), (17, 33, 65, 33)] + [
    (64 + d, 64 + d, 128 + d, 64 + d) for d in (-1, 0, 1)
]


@needs_device
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.parametrize(("m", "k", "n", "r"), LINEAR_SHAPES)
@pytest.mark.parametrize("form", ["chosen", "two-launches"])
def test_lowrank_linear_is_exact_on_integers(monkeypatch, form, m, k, n, r, dtype):
    if form == "two-launches":
        if m <= 16:
            pytest.skip("few rows always take one launch")
        monkeypatch.setattr(configs, "FUSED_RECOMPUTED_MACS", -1)
    x, down, up = (
        integers(m, k, dtype=dtype, bound=2),
        integers(r, k, dtype=dtype, bound=1),
        integers(n, r, dtype=dtype, bound=1),
    )
    bias = integers(n, dtype=dtype)
    assert torch.equal(triton.lowrank_linear(x, down, up, bias), reference.lowrank_linear(x, down, up, bias))


def block_sparse(n: int, k: int, b: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Crow, col and values of integers: rows of blocks without any, with many, and with two at one place."""
    counts = torch.randint(0, 4, (n // b,))
    counts[0] = 0
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).to(DEVICE)
    nnz = int(counts.sum())
    return crow, torch.randint(k // b, (nnz,)).to(DEVICE), integers(nnz, b, b, dtype=dtype, bound=1)


# M, K, N, R, Q, b: tiles of one and of many rows of blocks, which the last tile is not full of.
RESIDUAL_SHAPES = [(1, 32, 32, 5, 3, 16), (63, 128, 96, 5, 70, 32), (65, 64, 160, 33, 1, 16), (17, 96, 224, 8, 8, 32)]


@needs_device
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.parametrize(("m", "k", "n", "r", "q", "b"), RESIDUAL_SHAPES)
@pytest.mark.parametrize("parts", ["branch", "blocks", "both"])
@pytest.mark.parametrize("recomputed", [configs.FUSED_RECOMPUTED_MACS, -1], ids=["one-launch", "two-launches"])
def test_residuals_are_exact_on_integers(monkeypatch, recomputed, parts, m, k, n, r, q, b, dtype):
    monkeypatch.setattr(configs, "FUSED_RECOMPUTED_MACS", recomputed)
    x, down, up = (integers(*shape, dtype=dtype, bound=1) for shape in ((m, k), (r, k), (n, r)))
    branch = blocks = {}
    if parts != "blocks":
        branch = {"residual_down": integers(q, k, dtype=dtype, bound=1)}
        branch["residual_up"] = integers(n, q, dtype=dtype, bound=1)
    if parts != "branch":
        blocks = dict(zip(("crow", "col", "values"), block_sparse(n, k, b, dtype), strict=True))
    bias = integers(n, dtype=dtype)
    actual = triton.lowrank_residual_linear(x, down, up, bias, **branch, **blocks)
    assert torch.equal(actual, reference.lowrank_residual_linear(x, down, up, bias, **branch, **blocks))


@needs_device
@pytest.mark.parametrize("layout", [testing.every_other_row, testing.transposed, testing.slice_of_wider])
def test_residuals_read_any_strides(layout):
    shapes = {"x": (20, 32), "down": (9, 32), "up": (48, 9), "residual_down": (5, 32), "residual_up": (48, 5)}
    operands = {name: integers(*shape, dtype=torch.float16, bound=1) for name, shape in shapes.items()}
    blocks = dict(zip(("crow", "col", "values"), block_sparse(48, 32, 16, torch.float16), strict=True))
    blocks |= {name: blocks[name].int() for name in ("crow", "col")}
    expected = reference.lowrank_residual_linear(**operands, **blocks)
    views = {name: layout(operand) for name, operand in operands.items()}
    assert torch.equal(triton.lowrank_residual_linear(**views, **blocks), expected)


@needs_device
@pytest.mark.parametrize("layout", [testing.every_other_row, testing.transposed, testing.slice_of_wider])
def test_lowrank_linear_reads_any_strides(layout):
    x, down, up = (integers(*shape, dtype=torch.float16, bound=2) for shape in ((20, 36), (9, 36), (21, 9)))
    expected = reference.lowrank_linear(x, down, up)
    assert torch.equal(triton.lowrank_linear(layout(x), layout(down), layout(up)), expected)
    assert torch.equal(triton.lowrank_linear(layout(x.reshape(4, 5, 36)), down, up), expected.reshape(4, 5, 21))


@needs_device
def test_lowrank_linear_of_no_rows_is_empty():
    x, down, up = (integers(*shape, dtype=torch.float32) for shape in ((2, 0, 8), (3, 8), (5, 3)))
    assert triton.lowrank_linear(x, down, up).shape == (2, 0, 5)


@needs_device
@pytest.mark.parametrize(("scale", "up_scale"), [(2.0**10, 2.0**-14), (2.0**-10, 2.0**10)], ids=["above", "below"])
def test_the_intermediate_has_the_range_of_fp32(scale, up_scale):
    # The intermediate is about scale squared: out of fp16's range, into which the result comes back.
    x, down, up = torch.randn(20, 32) * scale, torch.randn(8, 32) * scale, torch.randn(12, 8) * up_scale
    x, down, up = (t.to(DEVICE, torch.float16) for t in (x, down, up))
    exact = reference.lowrank_linear(x.double(), down.double(), up.double())
    error = (triton.lowrank_linear(x, down, up).double() - exact).abs().max() / exact.abs().max()
    assert error < torch.finfo(torch.float16).eps


@needs_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=identify)
def test_an_infinite_intermediate_stays_infinite(dtype):
    x = torch.tensor([[float("inf")], [1.0]], device=DEVICE, dtype=dtype)
    ones = torch.ones(1, 1, device=DEVICE, dtype=dtype)
    assert triton.lowrank_linear(x, ones, ones).flatten().tolist() == [float("inf"), 1.0]


def gram_cases() -> list:
    shapes = [(1, 1), (1, 31), (5, 127), (127, 61)] + [(64 + d, 64 + d) for d in (-1, 0, 1)]
    return [
        pytest.param(m, k, weighted, id=f"M{m}-K{k}" + "-weighted" * weighted)
        for m, k in shapes
        for weighted in (False, True)
    ]


@needs_device
@pytest.mark.parametrize("master", [torch.float64, torch.float32], ids=identify)
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.parametrize(("m", "k", "weighted"), gram_cases())
def test_gram_is_exact_on_integers(m, k, weighted, dtype, master):
    x = integers(m, k, dtype=dtype)
    row_weight = integers(m, dtype=torch.float32) if weighted else None
    # Not symmetric, so that a matrix that is mirrored instead of added to shows.
    gram, column_sum = integers(k, k, dtype=master), integers(k, dtype=master)
    expected = gram.clone(), column_sum.clone()
    reference.gram_accumulate_(expected[0], x, row_weight, expected[1])
    triton.gram_accumulate_(gram, x, row_weight, column_sum)
    assert torch.equal(gram, expected[0])
    assert torch.equal(column_sum, expected[1])


@needs_device
@pytest.mark.parametrize(("k", "scratch"), [(20, 2**16), (129, 2**20)], ids=["narrow", "wide"])
def test_gram_of_many_splits_and_rounds(monkeypatch, k, scratch):
    monkeypatch.setattr(configs, "GRAM_NARROW_FEATURES", 64)
    monkeypatch.setattr(configs, "GRAM_ROWS_MIN", 32)
    monkeypatch.setattr(configs, "GRAM_ROWS_MAX", 37)
    monkeypatch.setattr(configs, "GRAM_SCRATCH_BYTES", scratch)
    x = integers(2, 101, k, dtype=torch.float16)
    gram, column_sum = torch.zeros(2, k, k, device=DEVICE), torch.zeros(2, k, device=DEVICE)
    expected = gram.clone(), column_sum.clone()
    reference.gram_accumulate_(expected[0], x, None, expected[1])
    triton.gram_accumulate_(gram, x, None, column_sum)
    assert torch.equal(gram, expected[0])
    assert torch.equal(column_sum, expected[1])


@needs_device
@pytest.mark.parametrize("layout", [testing.every_other_row, testing.transposed, testing.slice_of_wider])
@pytest.mark.parametrize("batched", [False, True], ids=["flat", "batched"])
def test_gram_reads_any_strides(layout, batched):
    x, row_weight = integers(3, 14, 18, dtype=torch.float16), integers(3, 28, dtype=torch.float32)[:, ::2]
    gram = torch.zeros((3, 18, 18) if batched else (18, 18), device=DEVICE, dtype=torch.float64)
    expected = gram.clone()
    reference.gram_accumulate_(expected, x, row_weight)
    triton.gram_accumulate_(gram, layout(x), row_weight)
    assert torch.equal(gram, expected)


@needs_device
@pytest.mark.parametrize("master", [torch.float64, torch.float32], ids=identify)
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (5, 127, 31), (127, 61, 130), (63, 64, 65), (700, 20, 12)])
def test_cross_gram_is_exact_on_integers(m, k, n, dtype, master):
    x, z = integers(m, k, dtype=dtype), integers(m, n, dtype=dtype)
    cross = integers(k, n, dtype=master)
    expected = cross.clone()
    reference.cross_gram_accumulate_(expected, x, z)
    triton.cross_gram_accumulate_(cross, x, z)
    assert torch.equal(cross, expected)
    triton.cross_gram_accumulate_(cross, testing.every_other_row(x), testing.slice_of_wider(z))
    reference.cross_gram_accumulate_(expected, x, z)
    assert torch.equal(cross, expected)


@needs_device
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_gram_is_exactly_symmetric_and_repeatable(dtype, weighted):
    x = torch.randn(90, 70).to(DEVICE, dtype)
    row_weight = torch.rand(90, device=DEVICE) if weighted else None
    grams = [torch.zeros(70, 70, device=DEVICE) for _ in range(2)]
    for gram in grams:
        triton.gram_accumulate_(gram, x, row_weight)
    assert torch.equal(grams[0], grams[0].T)
    assert torch.equal(grams[0], grams[1])


@needs_device
@pytest.mark.parametrize("shape", [(0, 6), (2, 0, 6)], ids=str)
def test_gram_of_no_rows_changes_nothing(shape):
    gram, column_sum = torch.ones(6, 6, device=DEVICE), torch.ones(6, device=DEVICE)
    triton.gram_accumulate_(gram, torch.empty(shape, device=DEVICE), None, column_sum)
    assert torch.equal(gram, torch.ones_like(gram))
    assert torch.equal(column_sum, torch.ones_like(column_sum))


@pytest.mark.skipif(not triton.is_interpreted(), reason="needs TRITON_INTERPRET=1")
def test_bfloat16_is_refused_under_the_interpreter():
    x = torch.ones(2, 4, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="x must not be bfloat16 under Triton's interpreter"):
        triton.lowrank_linear(x, x, torch.ones(3, 2, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="x must not be bfloat16 under Triton's interpreter"):
        triton.gram_accumulate_(torch.zeros(4, 4), x)


def test_without_a_device_or_the_interpreter_the_launchers_say_so(without_interpreter):
    code = (
        "import torch; from mixrank_kernels import triton; assert not triton.is_interpreted()\n"
        "try: triton.gram_accumulate_(torch.zeros(2, 2), torch.ones(3, 2))\n"
        "except RuntimeError as error: print(error)"
    )
    assert "x must be on a CUDA device" in without_interpreter("-c", code).stdout


def test_importing_the_package_does_not_import_the_kernels(without_interpreter):
    code = "import sys, mixrank_kernels; assert 'mixrank_kernels.triton' not in sys.modules"
    result = without_interpreter("-c", code)
    assert result.returncode == 0, result.stderr
