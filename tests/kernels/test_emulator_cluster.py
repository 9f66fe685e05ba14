"""The emulated instructions of clusters against numpy, and the faults of kernels that they are there to show."""

from __future__ import annotations

import numpy as np
import pytest

from .emulator.primitives import BOX, NONE, ORDERS, SEEDS, aligned, box_of, check_mistake, load, unswizzled


@pytest.fixture(scope="module")
def run():
    return load()


def exchange(run, blocks: int, fault: int, late: bool) -> None:
    """The blocks of three clusters send each other their tiles, in three rounds; asserts that all get all of them."""
    tiles = np.random.default_rng(blocks).integers(1, 2**31, (3, blocks, 3, 256), dtype=np.int32)
    for seed in SEEDS:
        out = np.zeros((3, blocks, 3, blocks, 256), np.int32)
        run("run_exchange", tiles, out, 3, blocks, 3, fault, order=(late, seed))
        assert (out == tiles.swapaxes(1, 2)[:, None]).all()


@pytest.mark.parametrize(("blocks", "late"), [(2, False), (2, True), (4, False), (4, True)])
def test_blocks_of_a_cluster_exchange_tiles(run, blocks, late):
    exchange(run, blocks, NONE, late)


EXCHANGE_FAULTS = {
    "no barrier first": (1, False, "where no barrier is"),
    "no barrier between": (2, False, "assert"),
    "no barrier last": (3, True, "copies to or from the block were on their way when it ended"),
    "a block ends at once": (4, False, "has ended|on their way when it ended|deadlock"),
    "no fence": (5, False, "assert"),
    "changed too early": (6, True, "assert"),
    "not sent": (7, False, r"In block \(\d, 0, 0\): 64 threads wait in cluster_barrier\. In block \(\d, 0, 0\): 64"),
}


@pytest.mark.parametrize("blocks", [2, 4])
@pytest.mark.parametrize("fault", EXCHANGE_FAULTS)
def test_faults_of_exchanges_show(run, blocks, fault):
    number, only_late, message = EXCHANGE_FAULTS[fault]
    for late in {only_late, True}:
        with pytest.raises((RuntimeError, AssertionError), match=message):
            exchange(run, blocks, number, late)


def test_the_barrier_of_a_cluster_waits_for_all_threads_that_have_not_ended(run):
    expected = np.tile(np.where(np.arange(64) < [[64], [32]], 10, 0), (12, 1))
    for order in ORDERS:
        for waits in (True, False):
            out = np.zeros((24, 64), np.int32)
            run("run_ranks", np.zeros(24, np.int32), out, 8, 3, waits, order=order)
            assert np.array_equal(out, expected) == waits
    with pytest.raises(RuntimeError, match="the grid's x was 6, but must be a multiple of the 4 blocks of a cluster"):
        run("run_ranks", np.zeros(6, np.int32), np.zeros((6, 64), np.int32), 6, 1, True)


BOX_BYTES = BOX * BOX * 2


def load_to_blocks(run, blocks: int, sender: int, all_wait: bool, late: bool, expected: int = BOX_BYTES) -> None:
    """Asserts that a box, of which a part is outside the tensor, comes to these blocks of four and to no other."""
    tensor = aligned((1, 70, 72), np.uint16, np.arange(1, 70 * 72 + 1).reshape(1, 70, 72))
    box, none = box_of(tensor, 9, -3, 0), np.full((BOX, BOX), 0xFFFF)
    for seed in SEEDS:
        out = np.zeros((4, BOX, BOX), np.uint16)
        run("run_load_to_blocks", tensor, 72, 70, out, 9, -3, sender, blocks, expected, all_wait, order=(late, seed))
        for rank in range(4):
            assert np.array_equal(unswizzled(out[rank]), box if blocks >> rank & 1 else none)


@pytest.mark.parametrize("blocks", range(1, 16))
@pytest.mark.parametrize("late", [False, True])
def test_a_box_comes_to_the_blocks_of_its_mask(run, blocks, late):
    load_to_blocks(run, blocks, blocks % 4, True, late)


def test_a_box_comes_to_each_of_its_blocks_at_a_time_of_its_own(run):
    load_to_blocks(run, 0b101, 2, False, False)
    with pytest.raises((RuntimeError, AssertionError), match=r"1 boxes were on their way when the block ended|assert"):
        load_to_blocks(run, 0b101, 2, False, True)


@pytest.mark.parametrize("expected", [BOX_BYTES - 16, BOX_BYTES + 16])
@pytest.mark.parametrize("late", [False, True])
def test_a_phase_ends_only_with_the_bytes_that_it_expects(run, late, expected):
    with pytest.raises(RuntimeError, match=r"deadlock\..* 64 threads wait in barrier_wait for parity 0"):
        load_to_blocks(run, 0b101, 2, True, late, expected)


@pytest.fixture(scope="module")
def tiles() -> np.ndarray:
    return aligned((3, 9, 64, 128), np.int16, np.random.default_rng(0).integers(-999, 999, (3, 9, 64, 128)))


def share(run, tiles: np.ndarray, fault: int, order) -> None:
    """The two blocks of a cluster for each batch bring each other halves of nine tiles; asserts that both sum them."""
    out = np.full((3, 2, 64, 128), -1, np.int32)
    run("run_shared_pipeline", tiles, 3, 9, out, fault, order=order)
    assert (out == tiles.sum(1, dtype=np.int32)[:, None]).all()


@pytest.mark.parametrize("order", ORDERS)
def test_blocks_share_the_boxes_of_a_pipeline(run, tiles, order):
    share(run, tiles, NONE, order)


@pytest.mark.parametrize("order", ORDERS)
def test_a_stage_that_only_one_of_two_blocks_has_released_shows(run, tiles, order):
    released_to_itself, peer_not_released = 1, 2
    with pytest.raises(AssertionError):
        share(run, tiles, released_to_itself, order)
    with pytest.raises(RuntimeError, match=r"In block \(\d, 0, 0\): .* 1 threads wait in barrier_wait for parity 0 "):
        share(run, tiles, peer_not_released, order)


SHARED_FAULTS = {
    "not shared": (3, "64 threads wait in barrier_wait for parity 0"),
    "no first barrier": (4, "where no barrier is"),
    "no last barrier": (5, "barrier_arrive_at was called for block .*, which has ended"),
}


@pytest.mark.parametrize("fault", SHARED_FAULTS)
@pytest.mark.parametrize("order", ORDERS)
def test_faults_of_shared_pipelines_show(run, tiles, fault, order):
    number, message = SHARED_FAULTS[fault]
    with pytest.raises(RuntimeError, match=message):
        share(run, tiles, number, order)


MISTAKES = [
    r"block \(0, 0, 0\), thread 0: rank was 2, but must be 0 to 1",
    "bytes was 24, but must be a positive multiple of 16",
    "copy_to_block got byte 8 of shared memory, which must be a multiple of 16",
    "copy_to_block got 32 bytes from byte 1008 of shared memory on, which has 1024",
    r"block \(1, 0, 0\): copy_to_block got a barrier without barrier_init_fence",
    r"block \(0, 0, 0\), thread 0: copy_to_block was called for block \(1, 0, 0\), which has ended",
    "rank was -1, but must be 0 to 1",
    r"block \(1, 0, 0\): barrier_arrive_at got a barrier without barrier_init_fence",
    r"barrier_arrive_at was called for block \(1, 0, 0\), which has ended",
    r"block \(1, 0, 0\): a barrier of 3 arrivals got another one in the same phase",
    r"block \(1, 0, 0\): barrier_arrive_at got byte 1016 of shared memory, where no barrier is",
    "blocks was 0, but must be 1 to 3",
    "blocks was 5, but must be 1 to 3",
    "load_box_to_blocks got byte 128 of shared memory, which must be a multiple of 1024",
    r"block \(1, 0, 0\): load_box_to_blocks got a barrier without barrier_init_fence",
    r"load_box_to_blocks was called for block \(1, 0, 0\), which has ended",
    r"In block \(1, 0, 0\): 32 threads wait in __syncthreads .* 32 threads wait in cluster_barrier\.",
]


@pytest.mark.parametrize("wrong", range(len(MISTAKES)))
@pytest.mark.parametrize("late", [False, True])
def test_mistakes_in_clusters_are_reported_and_leave_the_emulator_usable(run, wrong, late):
    check_mistake(run, "run_cluster_mistake", 1 + wrong, MISTAKES[wrong], late)
