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

    taken: Tensor | None
    spread: Tensor | None

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
        self._place_columns()

    def _place_columns(self) -> None:
        """Where columns stand in heads of full width, on the CPU until the module moves; none are missing: None."""
        total = sum(self.columns)
        if total == self.attn_dim:
            self.register_buffer("taken", None)
            self.register_buffer("spread", None)
            return
        heads = enumerate(self.columns)
        taken = torch.tensor([head * self.head_dim + i for head, count in heads for i in range(count)])
        spread = torch.full((self.attn_dim,), total)  # the column of zeros that stands behind the values
        spread[taken] = torch.arange(total)
        self.register_buffer("taken", taken, persistent=False)
        self.register_buffer("spread", spread, persistent=False)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        batch, tokens, _ = x.shape
        queries, keys, values = self.qkv(x).split([self.attn_dim, self.attn_dim, sum(self.columns)], dim=-1)
        if self.spread is not None:
            values = F.pad(values, (0, 1)).index_select(-1, self.spread)
        shape = (batch, tokens, self.num_heads, self.head_dim)
        queries, keys, values = (part.reshape(shape).transpose(1, 2) for part in (queries, keys, values))
        drop = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(
            self.q_norm(queries), self.k_norm(keys), values, attn_mask=attn_mask, dropout_p=drop, is_causal=is_causal
        )
        x = x.transpose(1, 2).reshape(batch, tokens, self.attn_dim)
        if self.taken is not None:
            x = x.index_select(-1, self.taken)
        return self.proj_drop(self.proj(x))

    def extra_repr(self) -> str:
        return f"head_width={self.head_dim}, columns={self.columns}"
