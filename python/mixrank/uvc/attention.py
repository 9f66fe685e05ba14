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
        total = sum(columns)
        factory = {"device": device, "dtype": dtype}
        self.qkv = nn.Linear(width, 2 * self.attn_dim + total, bias=qkv_bias, **factory)
        self.q_norm = nn.Identity() if q_norm is None else q_norm
        self.k_norm = nn.Identity() if k_norm is None else k_norm
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(total, width, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def _in_full_heads(self, values: Tensor) -> Tensor:
        """Values ``[B, T, sum(columns)]`` with zeros for the columns that are missing, ``[B, T, h d]``."""
        parts = []
        for part in values.split(self.columns, dim=-1):
            missing = self.head_dim - part.shape[-1]
            parts += [part, part.new_zeros(()).expand(*part.shape[:-1], missing)] if missing else [part]
        return torch.cat(parts, dim=-1)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        batch, tokens, _ = x.shape
        queries, keys, values = self.qkv(x).split([self.attn_dim, self.attn_dim, sum(self.columns)], dim=-1)
        full = sum(self.columns) == self.attn_dim
        if not full:
            values = self._in_full_heads(values)
        shape = (batch, tokens, self.num_heads, self.head_dim)
        queries, keys, values = (part.reshape(shape).transpose(1, 2) for part in (queries, keys, values))
        drop = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(
            self.q_norm(queries), self.k_norm(keys), values, attn_mask=attn_mask, dropout_p=drop, is_causal=is_causal
        )
        if full:
            x = x.transpose(1, 2).reshape(batch, tokens, self.attn_dim)
        else:
            x = torch.cat([head[..., :count] for head, count in zip(x.unbind(1), self.columns, strict=True)], dim=-1)
        return self.proj_drop(self.proj(x))

    def extra_repr(self) -> str:
        return f"head_width={self.head_dim}, columns={self.columns}"
