"""A linear layer with a sparse weight of 8 bits, and a product of factors of 8 bits beside it, for inference."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from mixrank.errors import InputError
from mixrank.nn_int8 import Int8Layer, check_bias, check_codes, check_scale
from mixrank.nn_sparse import check_mask, check_sizes, inputs_of, mask_places
from mixrank_kernels import ops, packing
from mixrank_kernels.reference import expanded


class Int8SparseLinear(Int8Layer):
    """A :class:`mixrank.SparseLinear` whose entries and factors are 8-bit codes times one scale for each of their rows.

    Stored are ``mask`` as there, ``codes`` ``[entries]`` with ``scale`` ``[N]``, and ``down_codes`` ``[R, K]``,
    ``down_scale`` ``[R]``, ``up_codes`` ``[N, R]`` and ``up_scale`` ``[N]``, all four None at rank 0. The input is not
    quantised: the kernel multiplies single entries, of which no instruction takes more at once in 8 bits. It starts
    with weights of zeros, and no entry has a place.

    Args:
        in_features: K, at least 1.
        out_features: N, at least 1.
        entries: how many numbers of the sparse weight are stored, from 0 to N K.
        rank: R, from 0, which is without factors, to min(K, N).
        bias: whether the layer adds a bias ``[N]``.
        device: where the tensors are made.
        dtype: a floating dtype, of the bias.

    Raises:
        InputError: a size, the number of entries or the rank is outside its range.

    Example:
        >>> import torch
        >>> Int8SparseLinear(8, 16, entries=0, rank=2)(torch.ones(3, 5, 8)).shape
        torch.Size([3, 5, 16])
    """

    dynamic = False
    mask: Tensor
    codes: nn.Parameter
    scale: Tensor
    down_codes: nn.Parameter | None
    down_scale: Tensor | None
    up_codes: nn.Parameter | None
    up_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        entries: int,
        rank: int = 0,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(in_features, out_features, entries, rank)
        self.in_features, self.out_features, self.entries, self.rank = in_features, out_features, entries, rank
        mask = torch.zeros(out_features, -(-in_features // 8), dtype=torch.uint8, device=device)
        self.register_buffer("mask", mask)
        self.codes = nn.Parameter(torch.zeros(entries, dtype=torch.int8, device=device), requires_grad=False)
        self.register_buffer("scale", torch.ones(out_features, dtype=torch.float32, device=device))
        for name, rows, cols in (("down_", rank, in_features), ("up_", out_features, rank)):
            if rank:
                self._add_codes(name, rows, cols, device)
            else:
                self.register_parameter(f"{name}codes", None)
                self.register_buffer(f"{name}scale", None)
        self._add_bias(bias, device, dtype)

    @classmethod
    def from_codes(
        cls,
        mask: Tensor,
        codes: Tensor,
        scale: Tensor,
        down_codes: Tensor | None = None,
        down_scale: Tensor | None = None,
        up_codes: Tensor | None = None,
        up_scale: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        in_features: int | None = None,
    ) -> Int8SparseLinear:
        """Build the layer around given codes.

        Args:
            mask: ``[N, ceil(K / 8)]``, uint8: bit k % 8 of byte k // 8 of row n is set where entry (n, k) is stored.
            codes: ``[entries]`` int8: the entries row by row, k rising, as many as bits are set.
            scale: ``[N]`` float32.
            down_codes: ``[R, K]`` int8, or None; the next three are given exactly when it is.
            down_scale: ``[R]`` float32.
            up_codes: ``[N, R]`` int8.
            up_scale: ``[N]`` float32.
            bias: ``[N]`` or None, a floating dtype.
            in_features: K; None: the columns of ``down_codes``, or without them all bits of a row.

        Raises:
            InputError: shapes or dtypes do not fit together, the rank is above min(K, N), or ``mask`` has another
                number of bits than there are codes or one beyond K.
        """
        if codes.dim() != 1 or codes.dtype != torch.int8:
            raise InputError(f"codes must be an int8 vector, but it was {codes.dtype} of shape {list(codes.shape)}")
        parts = {"down_codes": down_codes, "down_scale": down_scale, "up_codes": up_codes, "up_scale": up_scale}
        absent = [name for name, part in parts.items() if part is None]
        if absent and len(absent) < len(parts):
            raise InputError(f"{', '.join(parts)} must be given together, but {', '.join(absent)} was not")
        if not absent:
            check_codes("down_codes", cast(Tensor, down_codes), cast(Tensor, down_scale))
        in_features = inputs_of(mask, in_features, down_codes=down_codes)
        n, rank = len(mask), 0 if down_codes is None else len(down_codes)
        check_scale("codes", scale, n)
        if not absent:
            up = cast(Tensor, up_codes)
            check_codes("up_codes", up, cast(Tensor, up_scale))
            if up.shape != (n, rank):
                raise InputError(
                    f"up_codes must have shape [{n}, {rank}] as mask and down_codes have rows, but it was "
                    f"{list(up.shape)}"
                )
        check_bias(bias, n)
        check_sizes(in_features, n, min(len(codes), in_features * n), rank)
        check_mask(mask, in_features, len(codes))
        layer = cls(in_features, n, len(codes), rank, bias is not None, device="meta")
        given = {"mask": mask, "codes": codes, "scale": scale} | ({} if absent else cast(dict[str, Tensor], parts))
        layer._set(bias, **{name: tensor.contiguous() for name, tensor in given.items()})
        return layer

    @property
    def places(self) -> int:
        """What the mask takes in numbers of 32 bits, see :func:`mixrank.nn_sparse.mask_places`."""
        return mask_places(self.in_features, self.out_features)

    @property
    def sparse_codes(self) -> Tensor:
        """The codes ``[N, K]`` with zeros where no entry is stored, int8."""
        return expanded(self.mask, self.codes, self.in_features)

    @property
    def weight(self) -> Tensor:
        """The ``[N, K]`` weight that the codes stand for, fp32."""
        weight = self.sparse_codes.float() * self.scale[:, None]
        if self.down_codes is None:
            return weight
        up = cast(Tensor, self.up_codes).float() * cast(Tensor, self.up_scale)[:, None]
        return weight + up @ (self.down_codes.float() * cast(Tensor, self.down_scale)[:, None])

    def forward(self, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        factors = (self.down_codes, self.down_scale, self.up_codes, self.up_scale)
        weights = (self.mask, self.codes, self.scale, *factors)
        if self._packs_in_graph(self.codes):
            return packing.int8_sparse_linear(x, *weights, self.bias)
        packed = packing.packed_int8_sparse(*weights) if self._packs(self.codes) else None
        return ops.int8_sparse_linear(x, *weights, self.bias, packed)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, entries={self.entries}, "
            f"rank={self.rank}, bias={self.bias is not None}"
        )
