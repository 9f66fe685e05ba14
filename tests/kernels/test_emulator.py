"""The emulated instructions against numpy, and the faults of kernels that the emulator is there to show."""

from __future__ import annotations

from ctypes import c_float, c_int64, c_uint32

import numpy as np
import pytest

from . import emulator
from .emulator.primitives import BOX, NONE, ORDERS, SEEDS, aligned, box_of, check_mistake, load, unswizzled


@pytest.fixture(scope="module")
def run():
    return load()


def bits(values: np.ndarray, bf16: bool) -> np.ndarray:
    """The 16-bit patterns of values that are exact in 16 bits."""
    narrow = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return narrow if bf16 else values.astype(np.float16).view(np.uint16)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("order", ORDERS[::5])
def test_matrices_are_loaded_and_multiplied(run, transposed, bf16, order):
    a = np.arange(256).reshape(16, 16)
    b = np.arange(-128, 128).reshape(16, 16)[::-1]
    out = np.full((16, 16), np.nan, np.float32)
    stored_a, stored_b = (a.T, b) if transposed else (a, b.T)
    operands = [bits(np.ascontiguousarray(stored), bf16) for stored in (stored_a, stored_b)]
    run("run_multiply", *operands, out, transposed, bf16, order=order)
    assert np.array_equal(out, a @ b)


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("order", ORDERS)
def test_copies_fill_up_with_zeros(run, size, order):
    data = aligned((32, size), np.uint8, np.arange(1, 32 * size + 1).reshape(32, size) % 255 + 1)
    valid = (np.arange(32) * 5 % (size + 1)).astype(np.int32)
    out = np.full((32, size), 0xEE, np.uint8)
    run("run_copy_async", size, data, valid, out, True, order=order)
    assert np.array_equal(out, np.where(np.arange(size) < valid[:, None], data, 0))


def test_a_missing_wait_for_copies_shows_when_they_are_late(run):
    data, valid = aligned((32, 16), np.uint8, 7), np.full(32, 16, np.int32)
    now, late = np.zeros((32, 16), np.uint8), np.zeros((32, 16), np.uint8)
    run("run_copy_async", 16, data, valid, now, False, order=(False, 0))
    run("run_copy_async", 16, data, valid, late, False, order=(True, 0))
    assert (now == 7).all()
    assert (late == 0xFF).all()


@pytest.mark.parametrize("order", ORDERS[::5])
def test_shuffles(run, order):
    out = np.full((128, 8), np.nan, np.float32)
    run("run_shuffles", out, 1, order=order)
    t = np.arange(128)
    lane = t % 32
    expected = [
        t - lane + 3,
        t - t % 8 + 1,
        t ^ 5,
        np.where(lane & 8, t ^ 8, t),
        np.where(lane < 28, t + 4, t),
        np.where(t % 8 < 5, t + 3, t),
        t // 32 == 1,
        np.ones(128),
    ]
    assert np.array_equal(out, np.stack(expected, 1))


def test_an_empty_grid_is_refused(run):
    with pytest.raises(RuntimeError, match="the grid was 0 x 1 x 1, but must be"):
        run("run_shuffles", np.zeros((128, 8), np.float32), 0)


def test_named_barriers_hold_their_threads(run):
    sums = np.repeat([sum(range(64)), sum(range(64, 128))], 64)
    missing = []
    for order in ORDERS:
        out, without = np.zeros(128, np.int32), np.zeros(128, np.int32)
        run("run_named_barriers", out, True, order=order)
        run("run_named_barriers", without, False, order=order)
        assert np.array_equal(out, sums)
        missing.append(not np.array_equal(without, sums))
    assert all(missing)


@pytest.mark.parametrize("corner", [(0, 0, 0), (5, 3, 1), (-7, -2, 1), (90, 60, 0), (100, 0, 0), (0, 0, 2), (3, 0, -1)])
@pytest.mark.parametrize("order", ORDERS[::5])
def test_boxes_are_swizzled_and_zero_outside_the_tensor(run, corner, order):
    tensor = aligned((2, 70, 104), np.uint16, np.arange(1, 2 * 70 * 104 + 1).reshape(2, 70, 104))
    inside = tensor[:, :, :99]
    out = np.full((BOX, BOX), 0xEEEE, np.uint16)
    run("run_load_box", tensor, 99, 70, 2, 208, out, *corner, True, order=order)
    assert np.array_equal(unswizzled(out), box_of(inside, *corner))


def test_a_box_that_nobody_waits_for_shows_when_it_is_late(run):
    tensor, out = aligned((1, 64, 64), np.uint16, 7), np.zeros((BOX, BOX), np.uint16)
    with pytest.raises(RuntimeError, match="1 boxes were on their way when the block ended"):
        run("run_load_box", tensor, 64, 64, 1, 128, out, 0, 0, 0, False, order=(True, 0))
    assert (out == 0xFFFF).all()


@pytest.mark.parametrize("corner", [(0, 0, 0), (5, 3, 1), (-7, -2, 1), (90, 60, 0), (0, 0, 2)])
@pytest.mark.parametrize("order", ORDERS[::5])
def test_stored_boxes_end_with_the_tensor(run, corner, order):
    data = np.arange(BOX * BOX, dtype=np.uint16).reshape(BOX, BOX)
    out = aligned((2, 70, 104), np.uint16, 0xEEEE)
    expected = np.full((5, 400, 400), 0xEEEE, np.uint16)
    x, y, z = corner
    expected[1 + z, 100 + y : 164 + y, 100 + x : 164 + x] = data
    run("run_store_box", data, 99, 70, 2, 208, out, *corner, NONE, order=order)
    assert np.array_equal(out[:, :, :99], expected[1:3, 100:170, 100:199])
    assert (out[:, :, 99:] == 0xEEEE).all()


@pytest.mark.parametrize("late", [False, True])
def test_faults_of_stored_boxes_show(run, late):
    no_fence, no_wait, changed = 1, 2, 3
    data = np.full((BOX, BOX), 7, np.uint16)

    def stored(fault: int) -> np.ndarray:
        out = aligned((1, 64, 64), np.uint16, 1)
        run("run_store_box", data, 64, 64, 1, 128, out, 0, 0, 0, fault, order=(late, 0))
        return out

    assert (stored(no_fence) == 0xFFFF).all()
    assert (stored(changed) == (0 if late else 7)).all()
    with pytest.raises(RuntimeError, match="ended without store_wait"):
        stored(no_wait)


@pytest.fixture
def tiles() -> np.ndarray:
    return aligned((9 * BOX, BOX), np.int16, np.random.default_rng(0).integers(-999, 999, (9 * BOX, BOX)))


def pipeline(run, tiles: np.ndarray, fault: int, order) -> np.ndarray:
    out = np.full((4, 32, BOX), -1, np.int32)
    run("run_pipeline", tiles, 9, out, fault, order=order)
    return out


@pytest.mark.parametrize("order", ORDERS)
def test_a_pipeline_of_two_stages(run, tiles, order):
    expected = tiles.reshape(9, 2, 32, BOX).astype(np.int32).sum((0, 1))
    assert (pipeline(run, tiles, NONE, order) == expected).all()


@pytest.mark.parametrize("fault", [1, 2], ids=["full", "empty"])
@pytest.mark.parametrize("late", [False, True])
def test_a_pipeline_without_one_of_its_waits_fails(run, tiles, fault, late):
    expected = tiles.reshape(9, 2, 32, BOX).astype(np.int32).sum((0, 1))
    for seed in SEEDS:
        with pytest.raises((RuntimeError, AssertionError)):
            assert (pipeline(run, tiles, fault, (late, seed)) == expected).all()


@pytest.mark.parametrize("late", [False, True])
def test_waits_that_never_end_are_described(run, tiles, late):
    wrong_parity, too_many_bytes, no_init = 3, 4, 5
    with pytest.raises(RuntimeError, match=r"1 threads wait in barrier_wait for parity 0 .* 31 threads have ended"):
        pipeline(run, tiles, wrong_parity, (late, 0))
    with pytest.raises(RuntimeError, match=r"deadlock\. 128 threads wait in barrier_wait for parity 0"):
        pipeline(run, tiles, too_many_bytes, (late, 0))
    with pytest.raises(RuntimeError, match="where no barrier is"):
        pipeline(run, tiles, no_init, (late, 0))


def group_operands(n: int, steps: int, across: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Operands of integers as they lie in memory, and their product [64, n]."""
    random = np.random.default_rng(n)
    a, b = (random.integers(-64, 64, (rows, 64 * steps)) for rows in (64, n))
    stored = [m.T if across else m for m in (a, b)]
    return *stored, a @ b.T


def group(run, n: int, across: bool, bf16: bool, steps: int, fault: int, order) -> tuple[np.ndarray, np.ndarray]:
    a, b, product = group_operands(n, steps, across)
    operands = [aligned(m.shape, np.uint16, bits(m, bf16)) for m in (a, b)]
    out = np.full((64, n), -1, np.float32)
    run("run_group", *operands, out, n, 3.0, steps, across, bf16, fault, order=order)
    return out, product + 3


@pytest.mark.parametrize("n", [64, 128])
@pytest.mark.parametrize("across", [False, True], ids=["rows", "across"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp16", "bf16"])
@pytest.mark.parametrize("order", ORDERS[::3])
def test_warpgroups_multiply_boxes(run, n, across, bf16, order):
    out, expected = group(run, n, across, bf16, 3, NONE, order)
    assert np.array_equal(out, expected)


def test_faults_of_warpgroup_products_show(run):
    no_wait, early_read, no_fence, no_async_fence, too_few_waited, different_operands = range(1, 7)
    for late in (False, True):
        with pytest.raises(RuntimeError, match="ended without group_wait"):
            group(run, 64, False, True, 1, no_wait, (late, 0))
        with pytest.raises(RuntimeError, match="without a group_fence"):
            group(run, 64, False, True, 1, no_fence, (late, 0))
        out, expected = group(run, 64, False, True, 1, no_async_fence, (late, 0))
        assert np.array_equal(out, expected), "plain stores are not seen without the fence"
        with pytest.raises(RuntimeError, match="gave wgmma different operands"):
            group(run, 64, False, True, 1, different_operands, (late, 0))
        out, expected = group(run, 64, True, True, 3, too_few_waited, (late, 0))
        assert np.array_equal(out, expected) != late, "operands are read as late as the wait allows"
    early, _ = group(run, 64, False, True, 1, early_read, (True, 0))
    assert np.isnan(early).sum() == 128


MISTAKES = [
    r"deadlock\. 32 threads wait in __syncthreads for 128 threads on barrier 0\. 96 threads have ended\.",
    "load_matrices got byte 8 of shared memory, which must be a multiple of 16",
    "copy_async got byte 8 of shared memory, which must be a multiple of 16",
    "copy_async got a source that does not lie on a multiple of its 8 bytes",
    "copy_async got 16 bytes from byte 1024 of shared memory on, which has 1024",
    "memory behind the 1024 bytes of shared memory was written",
    "came to .* while other threads of its warp are in",
    "load_box got a barrier without barrier_init_fence",
    "the barrier at byte 0 was overwritten",
    "a descriptor of wgmma begins at byte 128 of shared memory, inside the pattern of the swizzle",
    "a descriptor of wgmma begins at byte 32 of shared memory, inside the pattern of the swizzle",
    "wgmma read at byte 1024 of shared memory, which has 1024",
    "a barrier of 1 arrivals got another one in the same phase",
    "named_barrier of .* threads met one of",
    "named_barrier was passed by a part of a warp",
]


@pytest.mark.parametrize("wrong", range(len(MISTAKES)))
@pytest.mark.parametrize("late", [False, True])
def test_mistakes_are_reported_and_leave_the_emulator_usable(run, wrong, late):
    check_mistake(run, "run_mistake", 1 + wrong, MISTAKES[wrong], late)


@pytest.mark.parametrize("order", ORDERS)
def test_an_overlapping_launch_sees_the_previous_one_after_its_wait(run, order):
    between, out = np.full(12 * 64, -5, np.int32), np.zeros(12 * 64, np.int32)
    run("run_dependent", between, out, NONE, order=order)
    assert np.array_equal(out, np.arange(12 * 64) + 1)


def test_an_overlapping_launch_that_does_not_wait_shows(run):
    no_wait, read_before = 1, 2
    between, out = np.full(12 * 64, -5, np.int32), np.zeros(12 * 64, np.int32)
    run("run_dependent", between, out, read_before, order=(True, 0))
    assert (out == -4).sum() == 64, "the first block reads what was there before"
    with pytest.raises(RuntimeError, match="ended without previous_launch_wait"):
        run("run_dependent", between, out, no_wait, order=(True, 0))


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("base", 8),
        ("cols", 0),
        ("rows", 2**32 + 1),
        ("batches", 0),
        ("row_bytes", 24),
        ("batch_bytes", 2**40),
        ("box_rows", 257),
    ],
)
def test_tensor_maps_are_refused_as_the_driver_refuses_them(run, name, bad):
    good = {"base": 128, "cols": 5, "rows": 6, "batches": 2, "row_bytes": 32, "batch_bytes": 192, "box_rows": 64}
    emulator.call(run.library.check_map, *map(c_int64, good.values()))
    with pytest.raises(RuntimeError, match=f"{name} was {bad}, but must be"):
        emulator.call(run.library.check_map, *map(c_int64, (good | {name: bad}).values()))


def test_pairs_are_rounded_to_nearest_even(run):
    values = np.concatenate([np.random.default_rng(0).normal(size=999), [0.0, 1e-8, np.inf, -6.0e-8]])
    values = values.astype(np.float32)
    function = run.library.pack
    function.restype, function.argtypes = c_uint32, [c_float, c_float]
    for low, high in zip(values, values[::-1], strict=True):
        wide = np.array([low, high]).view(np.uint32).astype(np.uint64)
        rounded = (wide + 0x7FFF + (wide >> 16 & 1)) >> 16
        assert function(low, high) == int(rounded[0]) | int(rounded[1]) << 16


def test_what_does_not_compile_is_shown(tmp_path):
    source = tmp_path / "wrong.cpp"
    source.write_text("int wrong() { return nothing_of_this_name; }\n")
    with pytest.raises(RuntimeError, match="nothing_of_this_name"):
        emulator.build([source], "wrong")
