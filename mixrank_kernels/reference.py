"""The specification of every operator in plain PyTorch: same names, same signatures, no kernels.

These functions are the fallback where no kernel is built, the yardstick of the tests and a peer in the
benchmarks. Alphabet: ``M`` rows of x (tokens), ``K`` in features, ``N`` out features, ``R`` rank, ``B`` batch.
"""

from __future__ import annotations

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
) -> Tensor:  # [..., N]
    wide = accumulation_dtype(x.dtype)
    hidden = F.linear(x.to(wide), down.to(wide))
    return F.linear(hidden, up.to(wide), None if bias is None else bias.to(wide)).to(x.dtype)


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
