"""Bad arguments of every operator: refused by every implementation in the same words, eagerly and while tracing."""

from __future__ import annotations

import inspect

import pytest
import torch

from mixrank_kernels import _contents, backend, ops
from mixrank_kernels._samples import sample_inputs
from mixrank_kernels._schema import INT8_SCHEMAS, SCHEMAS, overload

LINEAR, RESIDUAL, PIVOTED = "lowrank_linear", "lowrank_residual_linear", "pivoted_linear"
SPARSE = "sparse_linear"
GRAM, CROSS = "gram_accumulate_", "cross_gram_accumulate_"


def good_arguments(op: str) -> dict[str, torch.Tensor | None]:
    return {
        LINEAR: {"x": torch.ones(3, 5), "down": torch.ones(2, 5), "up": torch.ones(4, 2), "bias": torch.ones(4)},
        RESIDUAL: {
            "x": torch.ones(3, 32),
            "down": torch.ones(2, 32),
            "up": torch.ones(48, 2),
            "bias": torch.ones(48),
            "residual_down": torch.ones(5, 32),
            "residual_up": torch.ones(48, 5),
            "crow": torch.tensor([0, 2, 2, 3]),
            "col": torch.tensor([1, 0, 1]),
            "values": torch.ones(3, 16, 16),
        },
        PIVOTED: {
            "x": torch.ones(3, 5),
            "down": torch.ones(2, 5),
            "coefficients": torch.ones(4, 2),
            "index": torch.tensor([1, 4, 0, 2, 3, 5]),
            "bias": torch.ones(6),
        },
        SPARSE: {
            "x": torch.ones(3, 13),
            "mask": torch.tensor([[3, 16], [0, 1], [128, 0], [0, 0]], dtype=torch.uint8),
            "values": torch.ones(5),
            "down": torch.ones(2, 13),
            "up": torch.ones(4, 2),
            "bias": torch.ones(4),
        },
        GRAM: {
            "gram": torch.zeros(5, 5, dtype=torch.float64),
            "x": torch.ones(3, 5),
            "row_weight": torch.ones(3),
            "column_sum": torch.zeros(5, dtype=torch.float64),
        },
        CROSS: {"cross": torch.zeros(5, 4, dtype=torch.float64), "x": torch.ones(3, 5), "z": torch.ones(3, 4)},
    }[op]


def down_calls(op: str, k: int, n: int) -> list[tuple]:
    """What all operators of linear layers refuse about x [3, k], down [2, k], bias [n] and packed."""
    return [
        (op, {"x": torch.tensor(1.0)}, r"x must have shape \[\.\.\., K\].* but it was \[\]"),
        (op, {"x": torch.ones(3, k).long()}, r"x must have one of the dtypes .* but it was (int64|Long)"),
        (op, {"x": torch.ones(3, 0), "down": torch.ones(2, 0)}, r"x must have at least one"),
        (op, {"down": torch.ones(2, k + 1)}, rf"down must have shape \[R, K\] with K = {k} .*was \[2, {k + 1}\]"),
        (op, {"down": torch.ones(k)}, rf"down must have shape \[R, K\] with K = {k} .*but it was \[{k}\]"),
        (op, {"down": torch.ones(2, k).half()}, r"down must have dtype float32 .*but it was float16"),
        (op, {"bias": torch.ones(3)}, rf"bias must have shape \[N\] with N = {n} .*but it was \[3\]"),
        (op, {"bias": torch.ones(n).bfloat16()}, r"bias must have dtype float32 .*but it was bfloat16"),
        (op, {"bias": torch.ones(n, device="meta")}, r"bias must be on cpu .*but it was on meta"),
        (op, {"packed": torch.zeros(8)}, r"packed must have dtype uint8, but it was (float32|Float)"),
        (op, {"packed": torch.zeros(2, 4).byte()}, r"packed must have shape \[bytes\], but it was \[2, 4\]"),
        (op, {"packed": torch.zeros(8).byte()[::2]}, r"packed must be contiguous, but its strides were \[2\]"),
        (op, {"packed": torch.zeros(8, device="meta").byte()}, r"packed must be on cpu .*but it was on meta"),
    ]


def factor_calls(op: str, k: int, n: int) -> list[tuple]:
    """What both operators of factors refuse about x [3, k], down [2, k], up [n, 2], bias [n] and packed."""
    return [
        *down_calls(op, k, n),
        (op, {"down": torch.ones(0, k), "up": torch.ones(n, 0)}, r"down must have at least one"),
        (op, {"up": torch.ones(n, 3)}, rf"up must have shape \[N, R\] with R = 2 .*but it was \[{n}, 3\]"),
        (op, {"up": torch.ones(0, 2)}, r"up must have at least one"),
        (op, {"up": torch.ones(n, 2).double()}, r"up must have dtype float32 .*but it was float64"),
    ]


BRANCH, BLOCKS = dict.fromkeys(("residual_down", "residual_up")), dict.fromkeys(("crow", "col", "values"))
TOGETHER = r"must be given together or not at all, but"

BAD_CALLS = [
    *factor_calls(LINEAR, 5, 4),
    *factor_calls(RESIDUAL, 32, 48),
    *down_calls(PIVOTED, 5, 6),
    (PIVOTED, {"down": torch.ones(0, 5), "coefficients": torch.ones(4, 0)}, r"down must have at least one"),
    (
        PIVOTED,
        {"coefficients": torch.ones(4, 3)},
        r"coefficients must have shape \[N - R, R\] with R = 2 \(the rows of down\), but it was \[4, 3\]",
    ),
    (PIVOTED, {"coefficients": torch.ones(8)}, r"coefficients must have shape \[N - R, R\] .*but it was \[8\]"),
    (PIVOTED, {"coefficients": torch.ones(4, 2).half()}, r"coefficients must have dtype float32 .*but it was float16"),
    (PIVOTED, {"coefficients": torch.ones(3, 2)}, r"index must have shape \[N\] with N = 5 .*but it was \[6\]"),
    (PIVOTED, {"index": torch.ones(6, 1).long()}, r"index must have shape \[N\] with N = 6 .*but it was \[6, 1\]"),
    (PIVOTED, {"index": torch.ones(6)}, r"index must have one of the dtypes int16, int32, int64, but it was float32"),
    (PIVOTED, {"index": torch.ones(12).long()[::2]}, r"index must be contiguous, but its strides were \[2\]"),
    (PIVOTED, {"index": torch.ones(6, device="meta").long()}, r"index must be on cpu .*but it was on meta"),
    *down_calls(SPARSE, 13, 4)[:2],
    (
        SPARSE,
        {"x": torch.ones(3, 0), "mask": torch.zeros(4, 0).byte(), "down": torch.ones(2, 0)},
        r"x must have at least one feature",
    ),
    *down_calls(SPARSE, 13, 4)[3:],
    (SPARSE, {"mask": torch.ones(4, 3).byte()}, r"mask must have shape \[N, ceil\(K / 8\)\] with K = 13 .*\[4, 3\]"),
    (SPARSE, {"mask": torch.ones(8).byte()}, r"mask must have shape \[N, ceil\(K / 8\)\] with K = 13 .*was \[8\]"),
    (SPARSE, {"mask": torch.ones(0, 2).byte()}, r"mask must have at least one row \(out features N\), but it had none"),
    (SPARSE, {"mask": torch.ones(4, 2).bool()}, r"mask must have dtype uint8, but it was (bool|Bool)"),
    (SPARSE, {"mask": torch.ones(4, 4).byte()[:, ::2]}, r"mask must be contiguous, but its strides were \[4, 2\]"),
    (SPARSE, {"mask": torch.ones(4, 2, device="meta").byte()}, r"mask must be on cpu .*but it was on meta"),
    (SPARSE, {"values": torch.ones(5, 1)}, r"values must have shape \[nnz\], but it was \[5, 1\]"),
    (SPARSE, {"values": torch.ones(5).half()}, r"values must have dtype float32 .*but it was float16"),
    (SPARSE, {"values": torch.ones(10)[::2]}, r"values must be contiguous, but its strides were \[2\]"),
    (SPARSE, {"values": torch.ones(5, device="meta")}, r"values must be on cpu .*but it was on meta"),
    (SPARSE, {"up": None}, rf"down, up {TOGETHER} up was missing"),
    (SPARSE, {"down": None}, rf"down, up {TOGETHER} down was missing"),
    (SPARSE, {"down": torch.ones(0, 13), "up": torch.ones(4, 0)}, r"down must have at least one row \(the rank R\)"),
    (SPARSE, {"up": torch.ones(4, 3)}, r"up must have shape \[N, R\] with N = 4 .* and R = 2 .*but it was \[4, 3\]"),
    (SPARSE, {"up": torch.ones(3, 2)}, r"up must have shape \[N, R\] with N = 4 .* and R = 2 .*but it was \[3, 2\]"),
    (SPARSE, {"up": torch.ones(4, 2).double()}, r"up must have dtype float32 .*but it was float64"),
    (RESIDUAL, {"residual_down": None}, rf"residual_down, residual_up {TOGETHER} residual_down was missing"),
    (RESIDUAL, {"residual_up": None}, rf"residual_down, residual_up {TOGETHER} residual_up was missing"),
    (RESIDUAL, BRANCH | {"crow": None}, rf"crow, col, values {TOGETHER} crow was missing"),
    (RESIDUAL, BRANCH | {"col": None}, rf"crow, col, values {TOGETHER} col was missing"),
    (RESIDUAL, {"crow": None, "values": None}, rf"crow, col, values {TOGETHER} crow, values was missing"),
    (RESIDUAL, {"residual_down": torch.ones(5, 31)}, r"residual_down must have shape \[Q, K\] with K = 32 .*\[5, 31\]"),
    (
        RESIDUAL,
        {"residual_down": torch.ones(0, 32), "residual_up": torch.ones(48, 0)},
        r"residual_down must have at least one row \(the rank Q\), but it had none",
    ),
    (RESIDUAL, {"residual_up": torch.ones(48, 4)}, r"residual_up must have shape \[N, Q\] with N = 48 .* Q = 5 .*4\]"),
    (RESIDUAL, {"residual_up": torch.ones(40, 5)}, r"residual_up must have shape \[N, Q\] with N = 48 .* Q = 5 .*5\]"),
    (RESIDUAL, {"residual_down": torch.ones(5, 32).half()}, r"residual_down must have dtype float32 .*was float16"),
    (RESIDUAL, {"residual_up": torch.ones(48, 5).double()}, r"residual_up must have dtype float32 .*was float64"),
    (RESIDUAL, {"residual_up": torch.ones(48, 5, device="meta")}, r"residual_up must be on cpu .*was on meta"),
    (RESIDUAL, {"values": torch.ones(3, 16)}, r"values must have shape \[nnz, b, b\] with b one of 16, 32, but .*16\]"),
    (RESIDUAL, {"values": torch.ones(3, 16, 32)}, r"values must have shape \[nnz, b, b\] .*but it was \[3, 16, 32\]"),
    (RESIDUAL, {"values": torch.ones(3, 8, 8)}, r"values must have shape .* one of 16, 32, but it was \[3, 8, 8\]"),
    (
        RESIDUAL,
        {"x": torch.ones(3, 40), "down": torch.ones(2, 40)} | BRANCH,
        r"x must have shape \[\.\.\., K\] with K a multiple of 16 .*but it was \[3, 40\]",
    ),
    (RESIDUAL, {"values": torch.ones(3, 32, 32)}, r"up must have shape \[N, R\] with N a multiple of 32 .*\[48, 2\]"),
    (RESIDUAL, {"crow": torch.tensor([0, 3])}, r"crow must have shape \[N / b \+ 1\] with N = 48 and b = 16.*\[2\]"),
    (RESIDUAL, {"col": torch.tensor([1, 0])}, r"col must have shape \[nnz\] with nnz = 3 .*but it was \[2\]"),
    (RESIDUAL, {"crow": torch.ones(4)}, r"crow must have one of the dtypes int32, int64, but it was float32"),
    (RESIDUAL, {"col": torch.ones(3).int()}, r"col must have dtype int64 as crow has, but it was int32"),
    (
        RESIDUAL,
        {"values": torch.ones(3, 16, 16).half()},
        r"values must have dtype float32 .*but it was float16",
    ),
    (RESIDUAL, {"crow": torch.zeros(8).long()[::2]}, r"crow must be contiguous, but its strides were \[2\]"),
    (RESIDUAL, {"col": torch.zeros(6).long()[::2]}, r"col must be contiguous, but its strides were \[2\]"),
    (RESIDUAL, {"values": torch.ones(3, 16, 32)[..., :16]}, r"values must be contiguous, but its strides were \[512,"),
    (RESIDUAL, {"values": torch.ones(3, 16, 16, device="meta")}, r"values must be on cpu .*but it was on meta"),
    (GRAM, {"gram": torch.zeros(5, 5).half()}, r"gram must have one of the dtypes .*but it was float16"),
    (GRAM, {"gram": torch.zeros(5, 6)}, r"gram must have shape \[K, K\] or \[B, K, K\], but it was \[5, 6\]"),
    (GRAM, {"gram": torch.zeros(5, 10)[:, ::2]}, r"gram must be contiguous"),
    (GRAM, {"x": torch.ones(3, 4)}, r"x must have shape \[\.\.\., K\] with K = 5 .*but it was \[3, 4\]"),
    (GRAM, {"x": torch.ones(3, 5, dtype=torch.int32)}, r"x must have one of the dtypes .*but it was int32"),
    (GRAM, {"gram": torch.zeros(2, 5, 5)}, r"x must have shape \[B, M, K\] with B = 2 and K = 5 .*but it was \[3, 5\]"),
    (GRAM, {"row_weight": torch.ones(4)}, r"row_weight must have shape \[3\] .*but it was \[4\]"),
    (GRAM, {"row_weight": torch.ones(3, dtype=torch.int64)}, r"row_weight must have one of the dtypes .*int64"),
    (GRAM, {"column_sum": torch.zeros(4, dtype=torch.float64)}, r"column_sum must have shape \[5\].*but it was \[4\]"),
    (GRAM, {"column_sum": torch.zeros(5)}, r"column_sum must have dtype float64 .*but it was float32"),
    (GRAM, {"column_sum": torch.zeros(10, dtype=torch.float64)[::2]}, r"column_sum must be contiguous"),
    (CROSS, {"cross": torch.zeros(5, 4).bfloat16()}, r"cross must have one of the dtypes float64, float32, .*bfloat16"),
    (CROSS, {"cross": torch.zeros(5)}, r"cross must have shape \[K, N\], both positive, but it was \[5\]"),
    (CROSS, {"cross": torch.zeros(5, 0)}, r"cross must have shape \[K, N\], both positive, but it was \[5, 0\]"),
    (CROSS, {"cross": torch.zeros(4, 5).mT}, r"cross must be contiguous, but its strides were \[1, 5\]"),
    (CROSS, {"x": torch.ones(3, 5).int()}, r"x must have one of the dtypes .*but it was int32"),
    (CROSS, {"x": torch.ones(3, 6)}, r"x must have shape \[\.\.\., K\] with K = 5 .*but it was \[3, 6\]"),
    (CROSS, {"z": torch.ones(3, 5)}, r"z must have shape \[3, 4\] .*but it was \[3, 5\]"),
    (CROSS, {"z": torch.ones(2, 4)}, r"z must have shape \[3, 4\] .*but it was \[2, 4\]"),
    (CROSS, {"z": torch.ones(3, 4).half()}, r"z must have dtype float32 as x has, but it was float16"),
    (CROSS, {"z": torch.ones(3, 4, device="meta")}, r"z must be on cpu as cross is, but it was on meta"),
]
IDS = [f"{op}-{'-'.join(changed)}-{i}" for i, (op, changed, _) in enumerate(BAD_CALLS)]


def each_implementation(calls: list[tuple]) -> list:
    return [
        pytest.param(name, *call, id=f"{name}-{call[0]}-{'-'.join(call[1])}-{i}")
        for i, call in enumerate(calls)
        for name in backend.available("cpu", call[0])
        if name != "cpu"
    ]


@pytest.mark.parametrize(
    ("implementation", "op", "changed", "message"), each_implementation(BAD_CALLS), indirect=["implementation"]
)
def test_bad_arguments_are_named(implementation, op, changed, message):
    with pytest.raises(RuntimeError, match=f"^{op}: {message}"):
        getattr(ops, op)(**good_arguments(op) | changed)


@pytest.mark.parametrize(("op", "changed", "message"), BAD_CALLS, ids=IDS)
def test_bad_arguments_are_named_while_tracing(op, changed, message):
    arguments = good_arguments(op) | changed
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {
            name: mode.from_tensor(tensor) if tensor is not None and tensor.device.type == "cpu" else tensor
            for name, tensor in arguments.items()
        }
        with pytest.raises(RuntimeError, match=f"{op}: {message}"):
            overload(op)(**fakes)


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


@pytest.mark.parametrize("op", SCHEMAS)
def test_the_good_arguments_are_good(op):
    getattr(ops, op)(**good_arguments(op))


@pytest.mark.parametrize("op", [*SCHEMAS, *INT8_SCHEMAS])
def test_none_for_a_tensor_is_told_by_name(op):
    call, given = getattr(ops, op), sample_inputs(op)[0].arguments()
    parameters = inspect.signature(call).parameters
    names = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
    assert len(names) > 1
    for name in names:
        with pytest.raises(RuntimeError, match=f"^{op}: {name} must be a tensor, but it was None$"):
            call(**(given | {name: None}))
