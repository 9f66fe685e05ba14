"""The operators as calls of the vendor's libraries (cuBLAS on CUDA tensors, MKL or oneDNN on the CPU).

What a careful user would write without kernels of their own: fp32 stays fp32 (TF32 only where PyTorch is told to use
it), products of halves are accumulated in fp32. The intermediate of bf16 factors is rounded once to bf16, as two linear
layers do; that of fp16 factors is not, because it can leave fp16's range. Alphabet as in :mod:`mixrank_kernels.ops`.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mixrank_kernels import reference

# Rows in one fp32 sum of a Gram matrix, as in the kernels.
_MAX_ROWS = 4096


def lowrank_linear(
    x: Tensor,  # [..., K]
    down: Tensor,  # [R, K]
    up: Tensor,  # [N, R]
    bias: Tensor | None = None,  # [N]
    packed: Tensor | None = None,  # [bytes], the factors once more: of no use here
) -> Tensor:  # [..., N]
    """Two products of the library."""
    if x.dtype == torch.float16:
        return reference.lowrank_linear(x, down, up, bias)
    return F.linear(F.linear(x, down), up, bias)


def lowrank_residual_linear(
    x: Tensor,  # [..., K]
    down: Tensor,  # [R, K]
    up: Tensor,  # [N, R]
    bias: Tensor | None = None,  # [N]
    residual_down: Tensor | None = None,  # [Q, K]
    residual_up: Tensor | None = None,  # [N, Q]
    crow: Tensor | None = None,  # [N / b + 1]
    col: Tensor | None = None,  # [nnz]
    values: Tensor | None = None,  # [nnz, b, b]
    packed: Tensor | None = None,  # [bytes], the weights once more: of no use here
) -> Tensor:  # [..., N]
    """Two products for the factors of both ranks side by side; with a block-sparse part, the reference."""
    if values is not None or x.dtype == torch.float16:
        return reference.lowrank_residual_linear(x, down, up, bias, residual_down, residual_up, crow, col, values)
    if residual_down is not None:
        down, up = torch.cat([down, residual_down]), torch.cat([up, cast(Tensor, residual_up)], dim=1)
    return lowrank_linear(x, down, up, bias)


def pivoted_linear(
    x: Tensor,  # [..., K]
    down: Tensor,  # [R, K]
    coefficients: Tensor,  # [N - R, R]
    index: Tensor,  # [N]
    bias: Tensor | None = None,  # [N]
    packed: Tensor | None = None,  # [bytes], the weights once more: of no use here
) -> Tensor:  # [..., N]
    """Two products of the library and a copy of their columns to their places."""
    if x.dtype == torch.float16:
        return reference.pivoted_linear(x, down, coefficients, index, bias)
    hidden = F.linear(x, down)
    parts = torch.cat([hidden, F.linear(hidden, coefficients)], dim=-1)
    y = torch.empty_like(parts).index_copy_(-1, index.long(), parts)
    return y if bias is None else y.add_(bias)


def sparse_linear(
    x: Tensor,  # [..., K]
    mask: Tensor,  # [N, ceil(K / 8)]
    values: Tensor,  # [nnz]
    down: Tensor | None = None,  # [R, K]
    up: Tensor | None = None,  # [N, R]
    bias: Tensor | None = None,  # [N]
    packed: Tensor | None = None,  # [bytes], the weights once more: of no use here
) -> Tensor:  # [..., N]
    """One product of the library with the dense weight, to which factors are added: it is rounded once to its dtype.

    Not in fp16, whose range it can leave, nor in fp64, which is for those who want every digit.
    """
    if down is not None and x.dtype in (torch.float16, torch.float64):
        return reference.sparse_linear(x, mask, values, down, up, bias)
    weight = reference.expanded(mask, values, x.shape[-1])
    if down is not None:
        weight = (weight + _wide_product(cast(Tensor, up), down)).to(x.dtype)
    return F.linear(x, weight, bias)


def gram_accumulate_(
    gram: Tensor,  # [K, K] or [B, K, K]
    x: Tensor,  # [..., K] or [B, M, K]
    row_weight: Tensor | None = None,  # x.shape[:-1]
    column_sum: Tensor | None = None,  # [K] or [B, K]
) -> None:
    """Full products of at most 4096 rows, of which one triangle is added to both sides of the diagonal."""
    rows = x if gram.dim() == 3 else x.reshape(-1, x.shape[-1])
    weights = None if row_weight is None else row_weight.reshape(*rows.shape[:-1], 1)
    wide = reference.accumulation_dtype(x.dtype)
    for start in range(0, rows.shape[-2], _MAX_ROWS):
        part = rows[..., start : start + _MAX_ROWS, :]
        weighted = part
        if weights is not None:
            part = part.to(wide)
            weighted = part * weights[..., start : start + _MAX_ROWS, :].to(wide)
        lower = _wide_product(weighted.mT, part).tril()
        gram.add_(lower).add_(lower.tril(-1).mT)
        if column_sum is not None:
            column_sum.add_(weighted.sum(-2, dtype=wide))


def cross_gram_accumulate_(
    cross: Tensor,  # [K, N]
    x: Tensor,  # [..., K]
    z: Tensor,  # [..., N]
) -> None:
    """Products of at most 4096 rows."""
    rows, targets = x.reshape(-1, x.shape[-1]), z.reshape(-1, z.shape[-1])
    for start in range(0, rows.shape[0], _MAX_ROWS):
        stop = start + _MAX_ROWS
        cross.add_(_wide_product(rows[start:stop].mT, targets[start:stop]))


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    """Left @ right in fp32 (fp64 for fp64), not rounded to the dtype of its operands."""
    wide = reference.accumulation_dtype(left.dtype)
    if left.dtype == wide:
        return left @ right
    if left.is_cuda:
        return (torch.bmm if left.dim() == 3 else torch.mm)(left, right, out_dtype=wide)
    return left.to(wide) @ right.to(wide)
