"""Checks of the operators of 8-bit weights, as :mod:`mixrank_kernels._checks` has them for the others."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from mixrank_kernels._check_argument import (
    check_device,
    check_dtype,
    check_one_of,
    check_packed,
    check_shape,
    check_together,
    check_typed,
)
from mixrank_kernels._checks import check_beside_sparse, check_mask

X = (torch.float32, torch.bfloat16, torch.float16)
# 255 * 128 times this fits into int32.
MOST_TERMS = 65536


def int8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dynamic: bool, packed: Tensor | None
) -> None:
    """Raise RuntimeError unless x [..., K], weight [N, K], scale [N], bias [N] and packed [bytes] fit together."""
    op = "int8_linear"
    _codes(op, "weight", weight, x, "NK", _features(op, x), "the last dimension of x")
    _scale(op, "scale", scale, x, "N", weight, "weight")
    _int8_bias(op, x, bias, weight.shape[0], "the rows of weight")
    check_packed(op, packed, x)


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
        check_shape(op, "index", index.dim() == 1 and index.shape[0] == n, f"[N] with N = {n} ({what})", index)
        check_typed(op, "index", index, torch.int64, x)
    check_packed(op, packed, x)


def int8_sparse_linear(
    x: Tensor,
    mask: Tensor,
    values: Tensor,
    scale: Tensor,
    down: Tensor | None,
    down_scale: Tensor | None,
    up: Tensor | None,
    up_scale: Tensor | None,
    bias: Tensor | None,
    packed: Tensor | None,
) -> None:
    """Raise RuntimeError unless mask, the codes, their scales, bias and packed fit together (shapes: see ``ops``)."""
    op = "int8_sparse_linear"
    k = _features(op, x)
    check_mask(op, mask, x)
    check_shape(op, "values", values.dim() == 1, "[nnz]", values)
    check_typed(op, "values", values, torch.int8, x)
    _scale(op, "scale", scale, x, "N", mask, "mask")
    check_together(op, {"down": down, "down_scale": down_scale, "up": up, "up_scale": up_scale})
    if down is not None:
        up = cast(Tensor, up)
        check_beside_sparse(op, down, up, mask.shape[0], k)
        check_typed(op, "down", down, torch.int8, x)
        _scale(op, "down_scale", cast(Tensor, down_scale), x, "R", down, "down")
        check_typed(op, "up", up, torch.int8, x)
        _scale(op, "up_scale", cast(Tensor, up_scale), x, "N", up, "up")
    _int8_bias(op, x, bias, mask.shape[0], "the rows of mask")
    check_packed(op, packed, x)


def _features(op: str, x: Tensor) -> int:
    check_shape(op, "x", x.dim() >= 1, "[..., K]", x)
    check_one_of(op, "x", x, X)
    k = x.shape[-1]
    torch._check(k >= 1, lambda: f"{op}: x must have at least one feature (its last dimension), but it had none")
    return k


def _codes(op: str, name: str, codes: Tensor, x: Tensor, letters: str, columns: int, what: str) -> None:
    wanted = f"[{letters[0]}, {letters[1]}] with {letters[1]} = {columns} ({what})"
    check_shape(op, name, codes.dim() == 2 and codes.shape[1] == columns, wanted, codes)
    torch._check(codes.shape[0] >= 1, lambda: f"{op}: {name} must have at least one row, but it had none")
    torch._check(
        columns <= MOST_TERMS,
        lambda: f"{op}: {name} must have at most {MOST_TERMS} columns, but it had {columns}",
    )
    check_typed(op, name, codes, torch.int8, x)


def _scale(op: str, name: str, scale: Tensor, x: Tensor, letter: str, codes: Tensor, codes_name: str) -> None:
    rows = codes.shape[0]
    wanted = f"[{letter}] with {letter} = {rows} (the rows of {codes_name})"
    check_shape(op, name, scale.dim() == 1 and scale.shape[0] == rows, wanted, scale)
    check_typed(op, name, scale, torch.float32, x)


def _int8_bias(op: str, x: Tensor, bias: Tensor | None, n: int, what: str) -> None:
    if bias is not None:
        check_shape(op, "bias", bias.dim() == 1 and bias.shape[0] == n, f"[N] with N = {n} ({what})", bias)
        check_device(op, "bias", bias, x, "x")
        check_dtype(op, "bias", bias, x.dtype, "x")
