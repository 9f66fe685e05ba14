"""The specification of every operator in plain PyTorch: same names, same signatures, no kernels.

These functions are the fallback where no kernel is built, the yardstick of the tests and a peer in the
benchmarks. Alphabet: ``M`` rows of x (tokens), ``K`` in features, ``N`` out features, ``R`` rank,
``Q`` rank of the residual, ``b`` size of a square block, ``B`` batch.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that intermediates of a product of ``dtype`` operands are held in: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def lowrank_linear(
    x: Tensor,  # [..., K]
    down: Tensor,  # [R, K]
    up: Tensor,  # [N, R]
    bias: Tensor | None = None,  # [N]
    packed: Tensor | None = None,  # [bytes], the factors once more: of no use here
) -> Tensor:  # [..., N]
    wide = accumulation_dtype(x.dtype)
    hidden = F.linear(x.to(wide), down.to(wide))
    return F.linear(hidden, up.to(wide), None if bias is None else bias.to(wide)).to(x.dtype)


def block_rows(crow: Tensor, nnz: int) -> Tensor:
    """The row of blocks that each of ``nnz`` stored blocks is in: what ``crow`` says in compressed form."""
    stored = torch.arange(nnz, dtype=crow.dtype, device=crow.device)
    return torch.searchsorted(crow, stored, right=True, out_int32=crow.dtype == torch.int32) - 1


def block_sparse_linear(
    x: Tensor,  # [..., K]
    crow: Tensor,  # [N / b + 1]
    col: Tensor,  # [nnz]
    values: Tensor,  # [nnz, b, b]
) -> Tensor:  # [..., N]
    nnz, b = values.shape[:2]
    taken = x.reshape(-1, x.shape[-1] // b, b).transpose(0, 1).index_select(0, col)  # [nnz, M, b]
    y = taken.new_zeros(crow.shape[0] - 1, taken.shape[1], b).index_add(0, block_rows(crow, nnz), taken @ values.mT)
    return y.transpose(0, 1).reshape(*x.shape[:-1], y.shape[0] * b)


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
    wide = accumulation_dtype(x.dtype)
    rows = x.to(wide)
    y = lowrank_linear(rows, down.to(wide), up.to(wide), None if bias is None else bias.to(wide))
    if residual_down is not None:
        y = y + lowrank_linear(rows, residual_down.to(wide), cast(Tensor, residual_up).to(wide))
    if values is not None:
        y = y + block_sparse_linear(rows, cast(Tensor, crow), cast(Tensor, col), values.to(wide))
    return y.to(x.dtype)


def pivoted_linear(
    x: Tensor,  # [..., K]
    down: Tensor,  # [R, K]
    coefficients: Tensor,  # [N - R, R]
    index: Tensor,  # [N], 0 to N - 1: the columns of the output that down makes, then those of the coefficients
    bias: Tensor | None = None,  # [N]
    packed: Tensor | None = None,  # [bytes], the weights once more: of no use here
) -> Tensor:  # [..., N]
    wide = accumulation_dtype(x.dtype)
    hidden = F.linear(x.to(wide), down.to(wide))
    parts = torch.cat([hidden, F.linear(hidden, coefficients.to(wide))], dim=-1)
    y = torch.empty_like(parts).index_copy(-1, index.long(), parts)
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def unpacked_bits(mask: Tensor, columns: int) -> Tensor:
    """The first ``columns`` bits of each row of ``mask`` ``[N, bytes]``, lowest of a byte first, as bool."""
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return ((mask.unsqueeze(-1) >> shifts) & 1).flatten(1)[:, :columns].bool()


def packed_bits(stored: Tensor) -> Tensor:
    """The mask ``[N, ceil(K / 8)]`` of what is True in ``stored`` ``[N, K]``."""
    n, k = stored.shape
    padded = torch.nn.functional.pad(stored.to(torch.uint8), (0, -k % 8)).reshape(n, -1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=stored.device)).sum(-1, dtype=torch.uint8)


def expanded(
    mask: Tensor,  # [N, ceil(K / 8)]
    values: Tensor,  # [nnz]
    columns: int,  # K
) -> Tensor:  # [N, K]
    """The sparse matrix with all its zeros: the bits that are set hold ``values`` row by row."""
    stored = unpacked_bits(mask, columns).flatten()
    place = stored.cumsum(0) * stored  # the first one is 1, and what is not stored 0
    return torch.cat([values.new_zeros(1), values]).index_select(0, place).reshape(mask.shape[0], columns)


def sparse_linear(
    x: Tensor,  # [..., K]
    mask: Tensor,  # [N, ceil(K / 8)]
    values: Tensor,  # [nnz]
    down: Tensor | None = None,  # [R, K]
    up: Tensor | None = None,  # [N, R]
    bias: Tensor | None = None,  # [N]
    packed: Tensor | None = None,  # [bytes], the weights once more: of no use here
) -> Tensor:  # [..., N]
    wide = accumulation_dtype(x.dtype)
    rows = x.to(wide)
    y = F.linear(rows, expanded(mask, values.to(wide), x.shape[-1]), None if bias is None else bias.to(wide))
    if down is not None:
        y = y + lowrank_linear(rows, down.to(wide), cast(Tensor, up).to(wide))
    return y.to(x.dtype)


def int8_sparse_linear(
    x: Tensor,  # [..., K]
    mask: Tensor,  # [N, ceil(K / 8)]
    values: Tensor,  # [nnz] int8
    scale: Tensor,  # [N] fp32
    down: Tensor | None = None,  # [R, K] int8
    down_scale: Tensor | None = None,  # [R] fp32
    up: Tensor | None = None,  # [N, R] int8
    up_scale: Tensor | None = None,  # [N] fp32
    bias: Tensor | None = None,  # [N]
    packed: Tensor | None = None,  # [bytes], the weights once more: of no use here
) -> Tensor:  # [..., N]
    wide = accumulation_dtype(x.dtype)
    rows = x.to(wide)
    weight = expanded(mask, values.to(wide), x.shape[-1]) * scale[:, None].to(wide)
    y = F.linear(rows, weight, None if bias is None else bias.to(wide))
    if down is not None:
        down, up = (
            cast(Tensor, codes).to(wide) * cast(Tensor, row_scale)[:, None].to(wide)
            for codes, row_scale in ((down, down_scale), (up, up_scale))
        )
        y = y + lowrank_linear(rows, down, up)
    return y.to(x.dtype)


def gram_accumulate_(
    gram: Tensor,  # [K, K] or [B, K, K]
    x: Tensor,  # [..., K] or [B, M, K]
    row_weight: Tensor | None = None,  # x.shape[:-1]
    column_sum: Tensor | None = None,  # [K] or [B, K]
) -> None:
    rows = x.to(gram.dtype) if gram.dim() == 3 else x.to(gram.dtype).reshape(-1, x.shape[-1])
    weighted = rows if row_weight is None else rows * row_weight.to(gram.dtype).reshape(*rows.shape[:-1], 1)
    lower = (weighted.mT @ rows).tril()
    gram.add_(lower + lower.tril(-1).mT)
    if column_sum is not None:
        column_sum.add_(weighted.sum(-2))


def cross_gram_accumulate_(
    cross: Tensor,  # [K, N]
    x: Tensor,  # [..., K]
    z: Tensor,  # [..., N]
) -> None:
    wide = torch.promote_types(cross.dtype, accumulation_dtype(x.dtype))
    rows, targets = x.to(wide).reshape(-1, x.shape[-1]), z.to(wide).reshape(-1, z.shape[-1])
    cross.add_(rows.mT @ targets)


def quantise_rows(
    x: Tensor,  # [..., K]
) -> tuple[Tensor, Tensor]:  # code - zero point [..., K] as fp32, scale [..., 1] fp32
    """Each row in 256 steps from its least value, or 0, to its largest, or 0: ``x`` is about the codes times the scale.

    A row that is not finite has the scale NaN, one that spans 2^-100 or less is zero.
    """
    wide = x.float()
    low, high = wide.amin(-1, keepdim=True).clamp(max=0), wide.amax(-1, keepdim=True).clamp(min=0)
    span = high - low
    steps = torch.full_like(span, 255)  # divided by as a tensor: PyTorch multiplies by the reciprocal of a number
    inverse = torch.where(span.isfinite() & (span > 2**-100), steps / span, 0)
    zero = (-low * inverse).round()
    scale = torch.where(span.isfinite(), span / steps, torch.nan)
    return ((wide * inverse).round() + zero).clamp(0, 255) - zero, scale


def int8_linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K] int8
    scale: Tensor,  # [N] fp32
    bias: Tensor | None = None,  # [N]
    dynamic: bool = True,
    packed: Tensor | None = None,  # [bytes], the weight once more: of no use here
) -> Tensor:  # [..., N]
    if dynamic:
        codes, row_scale = quantise_rows(x)
        y = F.linear(codes.double(), weight.double()).float() * (row_scale * scale)  # fp64 holds these sums exactly
    else:
        wide = accumulation_dtype(x.dtype)
        y = F.linear(x.to(wide), weight.to(wide) * scale[:, None].to(wide))
    return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)


def int8_lowrank_linear(
    x: Tensor,  # [..., K]
    down: Tensor,  # [R, K] int8
    down_scale: Tensor,  # [R] fp32
    up: Tensor,  # [N, R] int8; [N - R, R] with an index
    up_scale: Tensor,  # one for each row of up, fp32
    bias: Tensor | None = None,  # [N]
    dynamic: bool = True,
    index: Tensor | None = None,  # [N] int64
    packed: Tensor | None = None,  # [bytes], the weights once more: of no use here
) -> Tensor:  # [..., N]
    hidden = int8_linear(x.to(accumulation_dtype(x.dtype)), down, down_scale, None, dynamic)
    y = int8_linear(hidden, up, up_scale, None, dynamic)
    if index is not None:
        y = torch.cat([hidden, y], -1).index_select(-1, index.argsort())
    return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)
