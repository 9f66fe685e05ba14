"""Checks of the operators' arguments, shared by the fakes and by the implementations written in Python.

The C++ implementations make the same checks with the same words. Each failure names the argument, what it
was and what it must be. ``torch._check`` keeps them usable on symbolic shapes.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MASTER = (torch.float64, torch.float32)
INDEX = (torch.int32, torch.int64)
PIVOTS = (torch.int16, *INDEX)
BLOCKS = (16, 32)
INT8_X = (torch.float32, torch.bfloat16, torch.float16)
# 255 * 128 times this fits into int32.
MOST_TERMS = 65536


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _same_device(op: str, name: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
    torch._check(
        tensor.device == like.device,
        lambda: f"{op}: {name} must be on {like.device} as {like_name} is, but it was on {tensor.device}",
    )


def _same_dtype(op: str, name: str, tensor: Tensor, dtype: torch.dtype, like_name: str) -> None:
    torch._check(
        tensor.dtype == dtype,
        lambda: (
            f"{op}: {name} must have dtype {_names((dtype,))} as {like_name} has, but it was {_names((tensor.dtype,))}"
        ),
    )


def _one_of(op: str, name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    torch._check(
        tensor.dtype in allowed,
        lambda: f"{op}: {name} must have one of the dtypes {_names(allowed)}, but it was {_names((tensor.dtype,))}",
    )


def _shape(op: str, name: str, condition: bool, wanted: str, tensor: Tensor) -> None:
    torch._check(condition, lambda: f"{op}: {name} must have shape {wanted}, but it was {list(tensor.shape)}")


def _contiguous(op: str, name: str, tensor: Tensor) -> None:
    torch._check(
        tensor.is_contiguous(), lambda: f"{op}: {name} must be contiguous, but its strides were {list(tensor.stride())}"
    )


def _rows_and_down(op: str, x: Tensor, down: Tensor) -> None:
    _one_of(op, "x", x, FLOATING)
    _shape(op, "x", x.dim() >= 1, "[..., K]", x)
    k = x.shape[-1]
    _shape(op, "down", down.dim() == 2 and down.shape[1] == k, f"[R, K] with K = {k} (the last dimension of x)", down)
    torch._check(down.shape[0] >= 1, lambda: f"{op}: down must have at least one row (the rank R), but it had none")
    torch._check(k >= 1, lambda: f"{op}: x must have at least one feature (its last dimension), but it had none")


def _factors(op: str, x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> None:
    _rows_and_down(op, x, down)
    r = down.shape[0]
    _shape(op, "up", up.dim() == 2 and up.shape[1] == r, f"[N, R] with R = {r} (the rows of down)", up)
    torch._check(up.shape[0] >= 1, lambda: f"{op}: up must have at least one row (out features N), but it had none")
    n = up.shape[0]
    if bias is not None:
        _shape(op, "bias", bias.dim() == 1 and bias.shape[0] == n, f"[N] with N = {n} (the rows of up)", bias)
    for name, tensor in (("down", down), ("up", up), ("bias", bias)):
        if tensor is not None:
            _same_device(op, name, tensor, x, "x")
            _same_dtype(op, name, tensor, x.dtype, "x")


def _packed(op: str, packed: Tensor | None, x: Tensor) -> None:
    if packed is not None:
        torch._check(
            packed.dtype == torch.uint8,
            lambda: f"{op}: packed must have dtype uint8, but it was {_names((packed.dtype,))}",
        )
        _shape(op, "packed", packed.dim() == 1, "[bytes]", packed)
        _contiguous(op, "packed", packed)
        _same_device(op, "packed", packed, x, "x")


def lowrank_linear(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, packed: Tensor | None) -> None:
    """Raise RuntimeError unless x [..., K], down [R, K], up [N, R], bias [N] and packed [bytes] fit together."""
    _factors("lowrank_linear", x, down, up, bias)
    _packed("lowrank_linear", packed, x)


def lowrank_residual_linear(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    residual_down: Tensor | None,
    residual_up: Tensor | None,
    crow: Tensor | None,
    col: Tensor | None,
    values: Tensor | None,
    packed: Tensor | None,
) -> None:
    """Raise RuntimeError unless the factors, the residual's parts and packed fit together (shapes: see ``ops``)."""
    op = "lowrank_residual_linear"
    _factors(op, x, down, up, bias)
    _together(op, {"residual_down": residual_down, "residual_up": residual_up})
    _together(op, {"crow": crow, "col": col, "values": values})
    if residual_down is not None:
        _branch(op, x, up, residual_down, cast(Tensor, residual_up))
    if values is not None:
        _blocks(op, x, up, cast(Tensor, crow), cast(Tensor, col), values)
    _packed(op, packed, x)


def pivoted_linear(
    x: Tensor, down: Tensor, coefficients: Tensor, index: Tensor, bias: Tensor | None, packed: Tensor | None
) -> None:
    """Raise RuntimeError unless x, down, coefficients, index, bias and packed fit together (shapes: see ``ops``)."""
    op = "pivoted_linear"
    _rows_and_down(op, x, down)
    r = down.shape[0]
    fits = coefficients.dim() == 2 and coefficients.shape[1] == r
    _shape(op, "coefficients", fits, f"[N - R, R] with R = {r} (the rows of down)", coefficients)
    n = r + coefficients.shape[0]
    fits = index.dim() == 1 and index.shape[0] == n
    _shape(op, "index", fits, f"[N] with N = {n} (the rows of down and of coefficients)", index)
    _one_of(op, "index", index, PIVOTS)
    _contiguous(op, "index", index)
    _same_device(op, "index", index, x, "x")
    if bias is not None:
        _shape(op, "bias", bias.dim() == 1 and bias.shape[0] == n, f"[N] with N = {n} (the entries of index)", bias)
    for name, tensor in (("down", down), ("coefficients", coefficients), ("bias", bias)):
        if tensor is not None:
            _same_device(op, name, tensor, x, "x")
            _same_dtype(op, name, tensor, x.dtype, "x")
    _packed(op, packed, x)


def sparse_linear(
    x: Tensor,
    mask: Tensor,
    values: Tensor,
    down: Tensor | None,
    up: Tensor | None,
    bias: Tensor | None,
    packed: Tensor | None,
) -> None:
    """Raise RuntimeError unless x, mask, values, the factors, bias and packed fit together (shapes: see ``ops``)."""
    op = "sparse_linear"
    _one_of(op, "x", x, FLOATING)
    _shape(op, "x", x.dim() >= 1, "[..., K]", x)
    k = x.shape[-1]
    torch._check(k >= 1, lambda: f"{op}: x must have at least one feature (its last dimension), but it had none")
    fits = mask.dim() == 2 and mask.shape[1] == (k + 7) // 8
    _shape(op, "mask", fits, f"[N, ceil(K / 8)] with K = {k} (the last dimension of x)", mask)
    n = mask.shape[0]
    torch._check(n >= 1, lambda: f"{op}: mask must have at least one row (out features N), but it had none")
    _typed(op, "mask", mask, torch.uint8, x)
    _shape(op, "values", values.dim() == 1, "[nnz]", values)
    _like(op, "values", values, x)
    _contiguous(op, "values", values)
    _together(op, {"down": down, "up": up})
    if down is not None:
        _shape(
            op, "down", down.dim() == 2 and down.shape[1] == k, f"[R, K] with K = {k} (the last dimension of x)", down
        )
        r, up = down.shape[0], cast(Tensor, up)
        torch._check(r >= 1, lambda: f"{op}: down must have at least one row (the rank R), but it had none")
        fits = up.dim() == 2 and up.shape[0] == n and up.shape[1] == r
        _shape(op, "up", fits, f"[N, R] with N = {n} (the rows of mask) and R = {r} (the rows of down)", up)
        _like(op, "down", down, x)
        _like(op, "up", up, x)
    if bias is not None:
        _shape(op, "bias", bias.dim() == 1 and bias.shape[0] == n, f"[N] with N = {n} (the rows of mask)", bias)
        _like(op, "bias", bias, x)
    _packed(op, packed, x)


def _like(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    _same_device(op, name, tensor, x, "x")
    _same_dtype(op, name, tensor, x.dtype, "x")


def _together(op: str, parts: dict[str, Tensor | None]) -> None:
    absent = [name for name, tensor in parts.items() if tensor is None]
    torch._check(
        len(absent) in (0, len(parts)),
        lambda: f"{op}: {', '.join(parts)} must be given together or not at all, but {', '.join(absent)} was missing",
    )


def _branch(op: str, x: Tensor, up: Tensor, down: Tensor, residual_up: Tensor) -> None:
    k, n = x.shape[-1], up.shape[0]
    fits = down.dim() == 2 and down.shape[1] == k
    _shape(op, "residual_down", fits, f"[Q, K] with K = {k} (the last dimension of x)", down)
    torch._check(
        down.shape[0] >= 1, lambda: f"{op}: residual_down must have at least one row (the rank Q), but it had none"
    )
    q = down.shape[0]
    fits = residual_up.dim() == 2 and residual_up.shape[0] == n and residual_up.shape[1] == q
    wanted = f"[N, Q] with N = {n} (the rows of up) and Q = {q} (the rows of residual_down)"
    _shape(op, "residual_up", fits, wanted, residual_up)
    for name, tensor in (("residual_down", down), ("residual_up", residual_up)):
        _same_device(op, name, tensor, x, "x")
        _same_dtype(op, name, tensor, x.dtype, "x")


def _blocks(op: str, x: Tensor, up: Tensor, crow: Tensor, col: Tensor, values: Tensor) -> None:
    k, n = x.shape[-1], up.shape[0]
    fits = values.dim() == 3 and values.shape[1] == values.shape[2] and values.shape[2] in BLOCKS
    _shape(op, "values", fits, f"[nnz, b, b] with b one of {', '.join(map(str, BLOCKS))}", values)
    nnz, b = values.shape[:2]
    _shape(op, "x", k % b == 0, f"[..., K] with K a multiple of {b} (the size of a block of values)", x)
    _shape(op, "up", n % b == 0, f"[N, R] with N a multiple of {b} (the size of a block of values)", up)
    fits = crow.dim() == 1 and crow.shape[0] == n // b + 1
    _shape(op, "crow", fits, f"[N / b + 1] with N = {n} and b = {b}", crow)
    _shape(op, "col", col.dim() == 1 and col.shape[0] == nnz, f"[nnz] with nnz = {nnz} (the blocks of values)", col)
    _one_of(op, "crow", crow, INDEX)
    _same_dtype(op, "col", col, crow.dtype, "crow")
    _same_dtype(op, "values", values, x.dtype, "x")
    for name, tensor in (("crow", crow), ("col", col), ("values", values)):
        _contiguous(op, name, tensor)
        _same_device(op, name, tensor, x, "x")


def int8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dynamic: bool, packed: Tensor | None
) -> None:
    """Raise RuntimeError unless x [..., K], weight [N, K], scale [N], bias [N] and packed [bytes] fit together."""
    op = "int8_linear"
    _codes(op, "weight", weight, x, "NK", _features(op, x), "the last dimension of x")
    _scale(op, "scale", scale, x, "N", weight, "weight")
    _int8_bias(op, x, bias, weight.shape[0], "the rows of weight")
    _packed(op, packed, x)


def int8_lowrank_linear(
    x: Tensor,
    down: Tensor,
    down_scale: Tensor,
    up: Tensor,
    up_scale: Tensor,
    bias: Tensor | None,
    dynamic: bool,
    index: Tensor | None,
    packed: Tensor | None,
) -> None:
    """Raise RuntimeError unless the codes, their scales, bias, index and packed fit together (shapes: see ``ops``)."""
    op = "int8_lowrank_linear"
    _codes(op, "down", down, x, "RK", _features(op, x), "the last dimension of x")
    _scale(op, "down_scale", down_scale, x, "R", down, "down")
    _codes(op, "up", up, x, "NR", down.shape[0], "the rows of down")
    _scale(op, "up_scale", up_scale, x, "N", up, "up")
    n, what = up.shape[0], "the rows of up"
    if index is not None:
        n, what = n + down.shape[0], "the rows of down and of up"
    _int8_bias(op, x, bias, n, what)
    if index is not None:
        _shape(op, "index", index.dim() == 1 and index.shape[0] == n, f"[N] with N = {n} ({what})", index)
        _typed(op, "index", index, torch.int64, x)
    _packed(op, packed, x)


def _features(op: str, x: Tensor) -> int:
    _shape(op, "x", x.dim() >= 1, "[..., K]", x)
    _one_of(op, "x", x, INT8_X)
    k = x.shape[-1]
    torch._check(k >= 1, lambda: f"{op}: x must have at least one feature (its last dimension), but it had none")
    return k


def _typed(op: str, name: str, tensor: Tensor, dtype: torch.dtype, x: Tensor) -> None:
    torch._check(
        tensor.dtype == dtype,
        lambda: f"{op}: {name} must have dtype {_names((dtype,))}, but it was {_names((tensor.dtype,))}",
    )
    _contiguous(op, name, tensor)
    _same_device(op, name, tensor, x, "x")


def _codes(op: str, name: str, codes: Tensor, x: Tensor, letters: str, columns: int, what: str) -> None:
    wanted = f"[{letters[0]}, {letters[1]}] with {letters[1]} = {columns} ({what})"
    _shape(op, name, codes.dim() == 2 and codes.shape[1] == columns, wanted, codes)
    torch._check(codes.shape[0] >= 1, lambda: f"{op}: {name} must have at least one row, but it had none")
    torch._check(
        columns <= MOST_TERMS,
        lambda: f"{op}: {name} must have at most {MOST_TERMS} columns, but it had {columns}",
    )
    _typed(op, name, codes, torch.int8, x)


def _scale(op: str, name: str, scale: Tensor, x: Tensor, letter: str, codes: Tensor, codes_name: str) -> None:
    rows = codes.shape[0]
    wanted = f"[{letter}] with {letter} = {rows} (the rows of {codes_name})"
    _shape(op, name, scale.dim() == 1 and scale.shape[0] == rows, wanted, scale)
    _typed(op, name, scale, torch.float32, x)


def _int8_bias(op: str, x: Tensor, bias: Tensor | None, n: int, what: str) -> None:
    if bias is not None:
        _shape(op, "bias", bias.dim() == 1 and bias.shape[0] == n, f"[N] with N = {n} ({what})", bias)
        _same_device(op, "bias", bias, x, "x")
        _same_dtype(op, "bias", bias, x.dtype, "x")


def gram_accumulate_(gram: Tensor, x: Tensor, row_weight: Tensor | None, column_sum: Tensor | None) -> None:
    """Raise RuntimeError unless gram, x, row_weight and column_sum fit together (shapes: see ``ops``)."""
    op = "gram_accumulate_"
    _one_of(op, "gram", gram, MASTER)
    _one_of(op, "x", x, FLOATING)
    _shape(op, "gram", gram.dim() in (2, 3) and gram.shape[-1] == gram.shape[-2], "[K, K] or [B, K, K]", gram)
    _contiguous(op, "gram", gram)
    k = gram.shape[-1]
    torch._check(k >= 1, lambda: f"{op}: gram must have at least one row, but it had none")
    if gram.dim() == 2:
        fits, wanted = x.dim() >= 1 and x.shape[-1] == k, f"[..., K] with K = {k} (the size of gram)"
    else:
        b = gram.shape[0]
        fits = x.dim() == 3 and x.shape[0] == b and x.shape[-1] == k
        wanted = f"[B, M, K] with B = {b} and K = {k} (as gram has)"
    _shape(op, "x", fits, wanted, x)
    _same_device(op, "x", x, gram, "gram")
    if row_weight is not None:
        _one_of(op, "row_weight", row_weight, FLOATING)
        rows = x.shape[:-1]
        _shape(op, "row_weight", row_weight.shape == rows, f"{list(rows)} (one weight for each row of x)", row_weight)
        _same_device(op, "row_weight", row_weight, gram, "gram")
    if column_sum is not None:
        wanted_shape = gram.shape[:-1]
        _shape(op, "column_sum", column_sum.shape == wanted_shape, f"{list(wanted_shape)}", column_sum)
        _contiguous(op, "column_sum", column_sum)
        _same_device(op, "column_sum", column_sum, gram, "gram")
        _same_dtype(op, "column_sum", column_sum, gram.dtype, "gram")


def cross_gram_accumulate_(cross: Tensor, x: Tensor, z: Tensor) -> None:
    """Raise RuntimeError unless cross [K, N], x [..., K] and z [..., N] fit together."""
    op = "cross_gram_accumulate_"
    _one_of(op, "cross", cross, MASTER)
    _one_of(op, "x", x, FLOATING)
    _shape(
        op, "cross", cross.dim() == 2 and cross.shape[0] >= 1 and cross.shape[1] >= 1, "[K, N], both positive", cross
    )
    _contiguous(op, "cross", cross)
    k, n = cross.shape
    _shape(op, "x", x.dim() >= 1 and x.shape[-1] == k, f"[..., K] with K = {k} (the rows of cross)", x)
    wanted = [*x.shape[:-1], n]
    _shape(op, "z", list(z.shape) == wanted, f"{wanted} (the rows of x, and the columns of cross)", z)
    _same_dtype(op, "z", z, x.dtype, "x")
    _same_device(op, "x", x, cross, "cross")
    _same_device(op, "z", z, cross, "cross")
