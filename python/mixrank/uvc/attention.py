"""Attention from which heads and value columns were removed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixrank.errors import InputError


class PrunedAttention(nn.Module):
    """Self-attention whose heads have value columns of their own number; otherwise timm's ``Attention``.

    Args:
        width: C, of a token.
        head_width: d, of the queries and keys of a head.
        columns: for each head, how many value columns it has, from 1 to ``head_width``.
        qkv_bias: whether q, k and v have a bias.
        proj_bias: whether the projection has one.
        attn_drop: dropout of the attention weights in training.
        proj_drop: dropout of the output in training.
        q_norm: applied to the queries ``[B, h, T, d]``; None: nothing.
        k_norm: the same for the keys.
        device: where the parameters are made.
        dtype: a floating dtype.

    Raises:
        InputError: no head, or a number of columns outside its range.

    Example:
        >>> import torch
        >>> PrunedAttention(32, 8, columns=(8, 3))(torch.ones(2, 5, 32)).shape
        torch.Size([2, 5, 32])
    """

    def __init__(
        self,
        width: int,
        head_width: int,
        columns: tuple[int, ...],
        *,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not columns or not all(1 <= count <= head_width for count in columns):
            raise InputError(f"columns must be at least one number from 1 to {head_width}, but they were {columns}")
        self.num_heads, self.head_dim, self.columns = len(columns), head_width, tuple(columns)
        self.attn_dim = self.num_heads * head_width
        self._equal = len(set(columns)) == 1  # fewer operations, which cost more than what they move
        total = sum(columns)
        factory = {"device": device, "dtype": dtype}
        self.qkv = nn.Linear(width, 2 * self.attn_dim + total, bias=qkv_bias, **factory)
        self.q_norm = nn.Identity() if q_norm is None else q_norm
        self.k_norm = nn.Identity() if k_norm is None else k_norm
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(total, width, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def _in_full_heads(self, values: Tensor) -> Tensor:
        """Values ``[B, T, sum(columns)]`` with zeros for the columns that are missing, ``[B, T, h, d]``."""
        width = self.columns[0]
        if self._equal:
            values = values.unflatten(-1, (self.num_heads, width))
            return F.pad(values, (0, self.head_dim - width)) if width < self.head_dim else values
        heads = values.split(self.columns, dim=-1)
        return torch.stack([F.pad(head, (0, self.head_dim - head.shape[-1])) for head in heads], dim=-2)

    def _without_zeros(self, heads: Tensor) -> Tensor:
        """The inverse: ``[B, T, h, d]`` without the columns that are missing, ``[B, T, sum(columns)]``."""
        if self._equal:
            return heads[..., : self.columns[0]].flatten(-2)
        return torch.cat(
            [head[..., :count] for head, count in zip(heads.unbind(-2), self.columns, strict=True)], dim=-1
        )

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        queries, keys, values = self.qkv(x).split([self.attn_dim, self.attn_dim, sum(self.columns)], dim=-1)
        queries, keys = (part.unflatten(-1, (self.num_heads, self.head_dim)) for part in (queries, keys))
        queries, keys, values = (part.transpose(1, 2) for part in (queries, keys, self._in_full_heads(values)))
        drop = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(
            self.q_norm(queries), self.k_norm(keys), values, attn_mask=attn_mask, dropout_p=drop, is_causal=is_causal
        )
        return self.proj_drop(self.proj(self._without_zeros(x.transpose(1, 2))))

    def extra_repr(self) -> str:
        return f"head_width={self.head_dim}, columns={self.columns}"
