"""Checks of the operators' arguments, shared by the fakes and by the implementations written in Python.

The C++ implementations make the same checks with the same words. Each failure names the argument, what it
was and what it must be. ``torch._check`` keeps them usable on symbolic shapes.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from mixrank_kernels._check_argument import (
    check_contiguous,
    check_device,
    check_dtype,
    check_like,
    check_one_of,
    check_packed,
    check_shape,
    check_together,
    check_typed,
)

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MASTER = (torch.float64, torch.float32)
INDEX = (torch.int32, torch.int64)
PIVOTS = (torch.int16, *INDEX)
BLOCKS = (16, 32)


def _rows_and_down(op: str, x: Tensor, down: Tensor) -> None:
    check_one_of(op, "x", x, FLOATING)
    check_shape(op, "x", x.dim() >= 1, "[..., K]", x)
    k = x.shape[-1]
    check_shape(
        op, "down", down.dim() == 2 and down.shape[1] == k, f"[R, K] with K = {k} (the last dimension of x)", down
    )
    torch._check(down.shape[0] >= 1, lambda: f"{op}: down must have at least one row (the rank R), but it had none")
    torch._check(k >= 1, lambda: f"{op}: x must have at least one feature (its last dimension), but it had none")


def _factors(op: str, x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> None:
    _rows_and_down(op, x, down)
    r = down.shape[0]
    check_shape(op, "up", up.dim() == 2 and up.shape[1] == r, f"[N, R] with R = {r} (the rows of down)", up)
    torch._check(up.shape[0] >= 1, lambda: f"{op}: up must have at least one row (out features N), but it had none")
    n = up.shape[0]
    if bias is not None:
        check_shape(op, "bias", bias.dim() == 1 and bias.shape[0] == n, f"[N] with N = {n} (the rows of up)", bias)
    for name, tensor in (("down", down), ("up", up), ("bias", bias)):
        if tensor is not None:
            check_device(op, name, tensor, x, "x")
            check_dtype(op, name, tensor, x.dtype, "x")


def lowrank_linear(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None, packed: Tensor | None) -> None:
    """Raise RuntimeError unless x [..., K], down [R, K], up [N, R], bias [N] and packed [bytes] fit together."""
    _factors("lowrank_linear", x, down, up, bias)
    check_packed("lowrank_linear", packed, x)


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
    check_together(op, {"residual_down": residual_down, "residual_up": residual_up})
    check_together(op, {"crow": crow, "col": col, "values": values})
    if residual_down is not None:
        _branch(op, x, up, residual_down, cast(Tensor, residual_up))
    if values is not None:
        _blocks(op, x, up, cast(Tensor, crow), cast(Tensor, col), values)
    check_packed(op, packed, x)


def pivoted_linear(
    x: Tensor, down: Tensor, coefficients: Tensor, index: Tensor, bias: Tensor | None, packed: Tensor | None
) -> None:
    """Raise RuntimeError unless x, down, coefficients, index, bias and packed fit together (shapes: see ``ops``)."""
    op = "pivoted_linear"
    _rows_and_down(op, x, down)
    r = down.shape[0]
    fits = coefficients.dim() == 2 and coefficients.shape[1] == r
    check_shape(op, "coefficients", fits, f"[N - R, R] with R = {r} (the rows of down)", coefficients)
    n = r + coefficients.shape[0]
    fits = index.dim() == 1 and index.shape[0] == n
    check_shape(op, "index", fits, f"[N] with N = {n} (the rows of down and of coefficients)", index)
    check_one_of(op, "index", index, PIVOTS)
    check_contiguous(op, "index", index)
    check_device(op, "index", index, x, "x")
    if bias is not None:
        check_shape(
            op, "bias", bias.dim() == 1 and bias.shape[0] == n, f"[N] with N = {n} (the entries of index)", bias
        )
    for name, tensor in (("down", down), ("coefficients", coefficients), ("bias", bias)):
        if tensor is not None:
            check_device(op, name, tensor, x, "x")
            check_dtype(op, name, tensor, x.dtype, "x")
    check_packed(op, packed, x)


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
    check_one_of(op, "x", x, FLOATING)
    check_shape(op, "x", x.dim() >= 1, "[..., K]", x)
    k = x.shape[-1]
    torch._check(k >= 1, lambda: f"{op}: x must have at least one feature (its last dimension), but it had none")
    check_mask(op, mask, x)
    n = mask.shape[0]
    check_shape(op, "values", values.dim() == 1, "[nnz]", values)
    check_like(op, "values", values, x)
    check_contiguous(op, "values", values)
    check_together(op, {"down": down, "up": up})
    if down is not None:
        check_beside_sparse(op, down, cast(Tensor, up), n, k)
        check_like(op, "down", down, x)
        check_like(op, "up", cast(Tensor, up), x)
    if bias is not None:
        check_shape(op, "bias", bias.dim() == 1 and bias.shape[0] == n, f"[N] with N = {n} (the rows of mask)", bias)
        check_like(op, "bias", bias, x)
    check_packed(op, packed, x)


def check_mask(op: str, mask: Tensor, x: Tensor) -> None:
    """Raise RuntimeError unless mask is [N, ceil(K / 8)] in uint8 for x [..., K]."""
    k = x.shape[-1]
    fits = mask.dim() == 2 and mask.shape[1] == (k + 7) // 8
    check_shape(op, "mask", fits, f"[N, ceil(K / 8)] with K = {k} (the last dimension of x)", mask)
    n = mask.shape[0]
    torch._check(n >= 1, lambda: f"{op}: mask must have at least one row (out features N), but it had none")
    check_typed(op, "mask", mask, torch.uint8, x)


def check_beside_sparse(op: str, down: Tensor, up: Tensor, n: int, k: int) -> None:
    """Raise RuntimeError unless down is [R, K] and up [N, R]."""
    fits = down.dim() == 2 and down.shape[1] == k
    check_shape(op, "down", fits, f"[R, K] with K = {k} (the last dimension of x)", down)
    r = down.shape[0]
    torch._check(r >= 1, lambda: f"{op}: down must have at least one row (the rank R), but it had none")
    fits = up.dim() == 2 and up.shape[0] == n and up.shape[1] == r
    check_shape(op, "up", fits, f"[N, R] with N = {n} (the rows of mask) and R = {r} (the rows of down)", up)


def _branch(op: str, x: Tensor, up: Tensor, down: Tensor, residual_up: Tensor) -> None:
    k, n = x.shape[-1], up.shape[0]
    fits = down.dim() == 2 and down.shape[1] == k
    check_shape(op, "residual_down", fits, f"[Q, K] with K = {k} (the last dimension of x)", down)
    torch._check(
        down.shape[0] >= 1, lambda: f"{op}: residual_down must have at least one row (the rank Q), but it had none"
    )
    q = down.shape[0]
    fits = residual_up.dim() == 2 and residual_up.shape[0] == n and residual_up.shape[1] == q
    wanted = f"[N, Q] with N = {n} (the rows of up) and Q = {q} (the rows of residual_down)"
    check_shape(op, "residual_up", fits, wanted, residual_up)
    for name, tensor in (("residual_down", down), ("residual_up", residual_up)):
        check_device(op, name, tensor, x, "x")
        check_dtype(op, name, tensor, x.dtype, "x")


def _blocks(op: str, x: Tensor, up: Tensor, crow: Tensor, col: Tensor, values: Tensor) -> None:
    k, n = x.shape[-1], up.shape[0]
    fits = values.dim() == 3 and values.shape[1] == values.shape[2] and values.shape[2] in BLOCKS
    check_shape(op, "values", fits, f"[nnz, b, b] with b one of {', '.join(map(str, BLOCKS))}", values)
    nnz, b = values.shape[:2]
    check_shape(op, "x", k % b == 0, f"[..., K] with K a multiple of {b} (the size of a block of values)", x)
    check_shape(op, "up", n % b == 0, f"[N, R] with N a multiple of {b} (the size of a block of values)", up)
    fits = crow.dim() == 1 and crow.shape[0] == n // b + 1
    check_shape(op, "crow", fits, f"[N / b + 1] with N = {n} and b = {b}", crow)
    check_shape(
        op, "col", col.dim() == 1 and col.shape[0] == nnz, f"[nnz] with nnz = {nnz} (the blocks of values)", col
    )
    check_one_of(op, "crow", crow, INDEX)
    check_dtype(op, "col", col, crow.dtype, "crow")
    check_dtype(op, "values", values, x.dtype, "x")
    for name, tensor in (("crow", crow), ("col", col), ("values", values)):
        check_contiguous(op, name, tensor)
        check_device(op, name, tensor, x, "x")


def gram_accumulate_(gram: Tensor, x: Tensor, row_weight: Tensor | None, column_sum: Tensor | None) -> None:
    """Raise RuntimeError unless gram, x, row_weight and column_sum fit together (shapes: see ``ops``)."""
    op = "gram_accumulate_"
    check_one_of(op, "gram", gram, MASTER)
    check_one_of(op, "x", x, FLOATING)
    check_shape(op, "gram", gram.dim() in (2, 3) and gram.shape[-1] == gram.shape[-2], "[K, K] or [B, K, K]", gram)
    check_contiguous(op, "gram", gram)
    k = gram.shape[-1]
    torch._check(k >= 1, lambda: f"{op}: gram must have at least one row, but it had none")
    if gram.dim() == 2:
        fits, wanted = x.dim() >= 1 and x.shape[-1] == k, f"[..., K] with K = {k} (the size of gram)"
    else:
        b = gram.shape[0]
        fits = x.dim() == 3 and x.shape[0] == b and x.shape[-1] == k
        wanted = f"[B, M, K] with B = {b} and K = {k} (as gram has)"
    check_shape(op, "x", fits, wanted, x)
    check_device(op, "x", x, gram, "gram")
    if row_weight is not None:
        check_one_of(op, "row_weight", row_weight, FLOATING)
        rows = x.shape[:-1]
        check_shape(
            op, "row_weight", row_weight.shape == rows, f"{list(rows)} (one weight for each row of x)", row_weight
        )
        check_device(op, "row_weight", row_weight, gram, "gram")
    if column_sum is not None:
        wanted_shape = gram.shape[:-1]
        check_shape(op, "column_sum", column_sum.shape == wanted_shape, f"{list(wanted_shape)}", column_sum)
        check_contiguous(op, "column_sum", column_sum)
        check_device(op, "column_sum", column_sum, gram, "gram")
        check_dtype(op, "column_sum", column_sum, gram.dtype, "gram")


def cross_gram_accumulate_(cross: Tensor, x: Tensor, z: Tensor) -> None:
    """Raise RuntimeError unless cross [K, N], x [..., K] and z [..., N] fit together."""
    op = "cross_gram_accumulate_"
    check_one_of(op, "cross", cross, MASTER)
    check_one_of(op, "x", x, FLOATING)
    check_shape(
        op, "cross", cross.dim() == 2 and cross.shape[0] >= 1 and cross.shape[1] >= 1, "[K, N], both positive", cross
    )
    check_contiguous(op, "cross", cross)
    k, n = cross.shape
    check_shape(op, "x", x.dim() >= 1 and x.shape[-1] == k, f"[..., K] with K = {k} (the rows of cross)", x)
    wanted = [*x.shape[:-1], n]
    check_shape(op, "z", list(z.shape) == wanted, f"{wanted} (the rows of x, and the columns of cross)", z)
    check_dtype(op, "z", z, x.dtype, "x")
    check_device(op, "x", x, cross, "cross")
    check_device(op, "z", z, cross, "cross")
