"""Bad arguments of every operator: refused by every implementation in the same words, eagerly and while tracing."""

from __future__ import annotations

import inspect

import pytest
import torch

from mixrank_kernels import backend, ops
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
