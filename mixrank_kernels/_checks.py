"""Checks of the operators' arguments, shared by the fakes and by the implementations written in Python.

The C++ implementations make the same checks with the same words. Each failure names the argument, what it
was and what it must be. ``torch._check`` keeps them usable on symbolic shapes.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MASTER = (torch.float64, torch.float32)


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


def _floating(op: str, name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    torch._check(
        tensor.dtype in allowed,
        lambda: f"{op}: {name} must have one of the dtypes {_names(allowed)}, but it was {_names((tensor.dtype,))}",
    )


def _shape(op: str, name: str, condition: bool, wanted: str, tensor: Tensor) -> None:
    torch._check(condition, lambda: f"{op}: {name} must have shape {wanted}, but it was {list(tensor.shape)}")


def lowrank_linear(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> None:
    """Raise RuntimeError unless x [..., K], down [R, K], up [N, R] and bias [N] fit together."""
    op = "lowrank_linear"
    _floating(op, "x", x, FLOATING)
    _shape(op, "x", x.dim() >= 1, "[..., K]", x)
    k = x.shape[-1]
    _shape(op, "down", down.dim() == 2 and down.shape[1] == k, f"[R, K] with K = {k} (the last dimension of x)", down)
    torch._check(down.shape[0] >= 1, lambda: f"{op}: down must have at least one row (the rank R), but it had none")
    torch._check(k >= 1, lambda: f"{op}: x must have at least one feature (its last dimension), but it had none")
    r = down.shape[0]
    _shape(op, "up", up.dim() == 2 and up.shape[1] == r, f"[N, R] with R = {r} (the rows of down)", up)
    torch._check(up.shape[0] >= 1, lambda: f"{op}: up must have at least one row (out features N), but it had none")
    n = up.shape[0]
    for name, tensor in (("down", down), ("up", up)):
        _same_device(op, name, tensor, x, "x")
        _same_dtype(op, name, tensor, x.dtype, "x")
    if bias is not None:
        _shape(op, "bias", bias.dim() == 1 and bias.shape[0] == n, f"[N] with N = {n} (the rows of up)", bias)
        _same_device(op, "bias", bias, x, "x")
        _same_dtype(op, "bias", bias, x.dtype, "x")


def gram_accumulate_(gram: Tensor, x: Tensor, row_weight: Tensor | None, column_sum: Tensor | None) -> None:
    """Raise RuntimeError unless gram, x, row_weight and column_sum fit together (shapes: see ``ops``)."""
    op = "gram_accumulate_"
    _floating(op, "gram", gram, MASTER)
    _floating(op, "x", x, FLOATING)
    _shape(op, "gram", gram.dim() in (2, 3) and gram.shape[-1] == gram.shape[-2], "[K, K] or [B, K, K]", gram)
    torch._check(gram.is_contiguous(), lambda: f"{op}: gram must be contiguous, but its strides were {gram.stride()}")
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
        _floating(op, "row_weight", row_weight, FLOATING)
        rows = x.shape[:-1]
        _shape(op, "row_weight", row_weight.shape == rows, f"{list(rows)} (one weight for each row of x)", row_weight)
        _same_device(op, "row_weight", row_weight, gram, "gram")
    if column_sum is not None:
        wanted_shape = gram.shape[:-1]
        _shape(op, "column_sum", column_sum.shape == wanted_shape, f"{list(wanted_shape)}", column_sum)
        torch._check(
            column_sum.is_contiguous(),
            lambda: f"{op}: column_sum must be contiguous, but its strides were {column_sum.stride()}",
        )
        _same_device(op, "column_sum", column_sum, gram, "gram")
        _same_dtype(op, "column_sum", column_sum, gram.dtype, "gram")
