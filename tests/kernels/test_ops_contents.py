"""What is in the operators' tensors and where they lie: indices, masks and pivots that are none, shared memory."""

from __future__ import annotations

import pytest
import torch

from mixrank_kernels import _contents, backend, ops

from .test_ops_errors import CROSS, GRAM, PIVOTED, RESIDUAL, SPARSE, each_implementation, good_arguments

BAD_INDICES = [
    (RESIDUAL, {"crow": torch.tensor(crow), "col": torch.tensor(col)}, message)
    for crow, col, message in [
        ([1, 2, 2, 3], [1, 0, 1], r"crow must begin with 0, but it began with 1"),
        ([0, 2, 2, 4], [1, 0, 1], r"crow must end with 3 \(the blocks of values\), but it ended with 4"),
        ([0, 2, 2, 2], [1, 0, 1], r"crow must end with 3 \(the blocks of values\), but it ended with 2"),
        ([0, 2, 1, 3], [1, 0, 1], r"crow must never fall, but it fell after entry 1"),
        ([0, 9, 2, 3], [1, 0, 1], r"crow must never fall, but it fell after entry 1"),
        ([0, -1, 2, 3], [1, 0, 1], r"crow must never fall, but it fell after entry 0"),
        ([0, 2, 2, 3], [1, 2, 1], r"col must be at least 0 and less than 2 \(K / b\), but it was 2"),
        ([0, 2, 2, 3], [1, 0, -1], r"col must be at least 0 and less than 2 \(K / b\), but it was -1"),
    ]
]


ORDER = r"index must hold 0 to 5 once each, rising in its first 2 entries \(the rows of down\) and in the others, but"
BAD_PIVOTS = [
    (PIVOTED, {"index": torch.tensor(entries)}, rf"{ORDER} {missing} was missing or out of order")
    for entries, missing in [
        ([4, 1, 0, 2, 3, 5], 1),
        ([1, 4, 0, 3, 2, 5], 2),
        ([1, 4, 0, 2, 3, 4], 5),
        ([1, 4, 0, 2, 3, 6], 5),
        ([-1, 4, 0, 2, 3, 5], 1),
        ([1, 1, 0, 2, 3, 5], 4),
        ([0, 1, 2, 3, 4, 2**15 - 1], 5),
    ]
]


@pytest.mark.parametrize("index", [torch.int16, torch.int32, torch.int64], ids=["int16", "int32", "int64"])
@pytest.mark.parametrize("rows", [3, 30])
@pytest.mark.parametrize(
    ("implementation", "op", "changed", "message"), each_implementation(BAD_PIVOTS), indirect=["implementation"]
)
def test_pivots_out_of_order_are_named(implementation, op, changed, message, rows, index):
    arguments = good_arguments(op) | {"x": torch.ones(rows, 5), "index": changed["index"].to(index)}
    with pytest.raises(RuntimeError, match=f"^{op}: {message}"):
        ops.pivoted_linear(**arguments)


COUNTED = r"values must have shape \[nnz\] with nnz = {} \(the bits of mask\), but it was \[{}\]"
BEYOND = "mask must have no bit set beyond K = 13, but row {} had one"
BAD_MASKS = [
    (SPARSE, {"mask": torch.tensor(rows, dtype=torch.uint8), "values": torch.ones(count)}, message)
    for rows, count, message in [
        ([[3, 16], [0, 1], [128, 0], [0, 0]], 4, COUNTED.format(5, 4)),
        ([[3, 16], [0, 1], [128, 0], [0, 0]], 6, COUNTED.format(5, 6)),
        ([[0, 0], [0, 0], [0, 0], [0, 0]], 1, COUNTED.format(0, 1)),
        ([[3, 16], [0, 1], [0, 32], [0, 0]], 5, BEYOND.format(2)),
        ([[3, 16], [0, 128], [0, 1], [0, 0]], 5, BEYOND.format(1)),
    ]
]


@pytest.mark.parametrize("rows", [3, 30])
@pytest.mark.parametrize(
    ("implementation", "op", "changed", "message"), each_implementation(BAD_MASKS), indirect=["implementation"]
)
def test_masks_that_do_not_fit_the_values_are_named(implementation, op, changed, message, rows):
    with pytest.raises(RuntimeError, match=f"^{op}: {message}"):
        ops.sparse_linear(**good_arguments(op) | {"x": torch.ones(rows, 13)} | changed)


def test_a_mask_is_read_once_and_again_after_a_write(monkeypatch):
    read = []
    original = _contents._read_mask
    monkeypatch.setattr(_contents, "_read_mask", lambda *arguments: read.append(1) or original(*arguments))
    arguments = good_arguments(SPARSE)
    with backend.use("reference"):
        for _ in range(3):
            ops.sparse_linear(**arguments)
        assert len(read) == 1
        arguments["mask"][3, 0] = 1
        for _ in range(2):
            with pytest.raises(RuntimeError, match="with nnz = 6"):
                ops.sparse_linear(**arguments)
        ops.sparse_linear(**arguments | {"values": torch.ones(6)})
        # The same bits, but one of them is beyond another number of features.
        fewer = {"x": torch.ones(3, 12), "down": None, "up": None}
        with pytest.raises(RuntimeError, match="beyond K = 12, but row 0 had one"):
            ops.sparse_linear(**arguments | {"values": torch.ones(6)} | fewer)


def test_pivots_are_read_once_and_again_after_a_write(monkeypatch):
    read = []
    original = _contents._read_pivots
    monkeypatch.setattr(_contents, "_read_pivots", lambda *arguments: read.append(1) or original(*arguments))
    arguments = good_arguments(PIVOTED)
    with backend.use("reference"):
        for _ in range(3):
            ops.pivoted_linear(**arguments)
        assert len(read) == 1
        arguments["index"][0] = 4
        for _ in range(2):
            with pytest.raises(RuntimeError, match="1 was missing or out of order"):
                ops.pivoted_linear(**arguments)
        # The same entries, but another number of them are pivots.
        index = torch.tensor([1, 4, 0, 2, 3, 5])
        ops.pivoted_linear(**arguments | {"index": index})
        more = {"down": torch.ones(3, 5), "coefficients": torch.ones(3, 3), "index": index}
        with pytest.raises(RuntimeError, match="0 was missing or out of order"):
            ops.pivoted_linear(**arguments | more)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize(
    ("implementation", "op", "changed", "message"), each_implementation(BAD_INDICES), indirect=["implementation"]
)
def test_bad_indices_are_named(implementation, op, changed, message, index):
    arguments = good_arguments(op) | {name: tensor.to(index) for name, tensor in changed.items()}
    with pytest.raises(RuntimeError, match=f"^{op}: {message}"):
        getattr(ops, op)(**arguments)


def test_indices_are_read_once_and_again_after_a_write(monkeypatch):
    read = []
    original = _contents._read_indices
    monkeypatch.setattr(_contents, "_read_indices", lambda *arguments: read.append(1) or original(*arguments))
    crow, col = torch.tensor([0, 2, 2, 3]), torch.tensor([1, 0, 1])
    arguments = good_arguments(RESIDUAL) | {"crow": crow, "col": col}
    with backend.use("reference"):
        for _ in range(3):
            ops.lowrank_residual_linear(**arguments)
        assert len(read) == 1
        col[1] = 5
        with pytest.raises(RuntimeError, match="col must be at least 0 and less than 2"):
            ops.lowrank_residual_linear(**arguments)
        with pytest.raises(RuntimeError, match="col must be at least 0 and less than 2"):
            ops.lowrank_residual_linear(**arguments)
        ops.lowrank_residual_linear(**arguments | {"col": torch.tensor([1, 0, 1])})
        assert len(read) == 4


def overlapping_calls() -> list[tuple]:
    buffer = torch.zeros(60)
    square, rows = buffer[:16].view(4, 4), buffer[8:28].view(5, 4)
    apart = rows.clone()
    return [
        (GRAM, {"gram": square, "x": rows}, "gram must not share memory with x"),
        (GRAM, {"gram": square, "x": apart, "row_weight": buffer[10:15]}, "gram must not share memory with row_weight"),
        (GRAM, {"gram": square, "x": rows[3:], "column_sum": buffer[20:24]}, "column_sum must not share memory with x"),
        (GRAM, {"gram": square, "x": apart, "column_sum": buffer[12:16]}, "column_sum must not share memory with gram"),
        (
            GRAM,
            {"gram": square, "x": apart, "row_weight": buffer[40:45], "column_sum": buffer[44:48]},
            "column_sum must not share memory with row_weight",
        ),
        (CROSS, {"cross": square, "x": rows, "z": apart}, "cross must not share memory with x"),
        (CROSS, {"cross": square, "x": apart, "z": rows}, "cross must not share memory with z"),
    ]


@pytest.mark.parametrize(
    ("implementation", "op", "arguments", "message"),
    each_implementation(overlapping_calls()),
    indirect=["implementation"],
)
def test_memory_shared_with_an_accumulator_is_refused(implementation, op, arguments, message):
    before = {name: tensor.clone() for name, tensor in arguments.items()}
    with pytest.raises(RuntimeError, match=f"^{op}: {message}, but they overlap"):
        getattr(ops, op)(**arguments)
    assert all(torch.equal(arguments[name], before[name]) for name in arguments)


@pytest.mark.operators(GRAM, CROSS)
def test_neighbours_in_one_buffer_do_not_overlap(implementation, op):
    buffer = torch.ones(16 + 20 + 20)
    given = {"x": buffer[16:36].view(5, 4)} | ({"z": buffer[36:].view(5, 4)} if op == CROSS else {})
    getattr(ops, op)(buffer[:16].view(4, 4), **given)
    assert torch.equal(buffer[:16], torch.full((16,), 6.0))
    getattr(ops, op)(buffer[:16].view(4, 4), **{name: tensor[:0] for name, tensor in given.items()})
    assert torch.equal(buffer[:16], torch.full((16,), 6.0))
