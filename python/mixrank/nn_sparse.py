"""A linear layer with a sparse weight, any entries of it stored, and a product of factors beside it."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from mixrank.errors import InputError
from mixrank.nn import LowRankLinear, check_like, check_rank
from mixrank_kernels import ops, packing
from mixrank_kernels.reference import expanded, packed_bits, unpacked_bits

_AT_ONCE = 2**22  # entries of which it is worked out together whether they are stored
_GOLDEN = 40503  # 2^16 over the golden ratio: multiples of it are spread evenly modulo 2^16, from any of them on


class SparseLinear(LowRankLinear):
    """A linear layer whose ``[N, K]`` weight is ``S + up @ down``: S sparse without structure, the factors may be none.

    Stored are ``mask``, a buffer ``[N, ceil(K / 8)]`` in uint8 with bit k % 8 of byte k // 8 of row n set where entry
    (n, k) of S is stored, these entries row by row, k rising, in ``values`` ``[entries]``, and ``down`` ``[R, K]`` and
    ``up`` ``[N, R]``, both None at rank 0. A drop-in for ``nn.Linear`` like :class:`mixrank.MixedRankLinear`. Training
    changes the values and the factors; which entries are stored stays.

    Args:
        in_features: K, at least 1.
        out_features: N, at least 1.
        entries: how many numbers of S are stored, from 0 to N K.
        rank: R, from 0, which is without factors, to min(K, N).
        bias: whether the layer adds a bias ``[N]``.
        device: where the parameters are made.
        dtype: a floating dtype.

    Raises:
        InputError: a size, the number of entries or the rank is outside its range.

    Example:
        >>> import torch
        >>> SparseLinear(8, 16, entries=40, rank=2)(torch.ones(3, 5, 8)).shape
        torch.Size([3, 5, 16])
    """

    mask: Tensor
    values: nn.Parameter
    down: nn.Parameter | None
    up: nn.Parameter | None

    _operator = staticmethod(ops.sparse_linear)
    _self_packed = staticmethod(packing.sparse_linear)
    _pack = staticmethod(packing.packed_sparse)

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
        shapes = {
            "values": (entries,),
            "down": (rank, in_features) if rank else None,
            "up": (out_features, rank) if rank else None,
            "bias": (out_features,) if bias else None,
        }
        for name, shape in shapes.items():
            made = None if shape is None else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name, made)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Spread the entries evenly, and draw a weight with the variance that ``nn.Linear`` starts with, no bias.

        Rows differ by one entry at most, and no two rows in a row have theirs in the same columns. Of the variance, S
        and the factors have one half each where both are there.
        """
        parts = (self.entries > 0) + (self.rank > 0)
        with torch.no_grad():
            if not self.mask.is_meta:
                _spread_(self.mask, self.entries, self.in_features)
            if self.entries:
                nn.init.normal_(self.values, std=(3 * parts * self.entries / self.out_features) ** -0.5)
            if self.down is not None and self.up is not None:
                nn.init.normal_(self.down, std=self.in_features**-0.5)
                nn.init.normal_(self.up, std=(3 * parts * self.rank) ** -0.5)
            if self.bias is not None:
                nn.init.zeros_(self.bias)

    @classmethod
    def from_parts(
        cls,
        mask: Tensor,
        values: Tensor,
        down: Tensor | None = None,
        up: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        in_features: int | None = None,
    ) -> SparseLinear:
        """Build the layer around given parts; they are used as they are, without a copy where possible.

        Args:
            mask: ``[N, ceil(K / 8)]``, uint8: bit k % 8 of byte k // 8 of row n is set where entry (n, k) is stored.
            values: ``[entries]``, a floating dtype: the entries row by row, k rising, as many as bits are set.
            down: ``[R, K]`` or None, dtype and device of ``values``.
            up: ``[N, R]``, dtype and device of ``values``, given exactly when ``down`` is.
            bias: ``[N]`` or None, dtype and device of ``values``.
            in_features: K; None: the columns of ``down``, or without it all bits of a row, which are a multiple of 8.

        Raises:
            InputError: shapes, dtypes or devices do not fit together, the rank is above min(K, N), or ``mask`` has
                another number of bits than there are values or one beyond K.
        """
        if values.dim() != 1 or not values.is_floating_point():
            raise InputError(
                f"values must be a vector of a floating dtype, but it was {values.dtype} of shape {list(values.shape)}"
            )
        rank = _check_factors(down, up)
        in_features = inputs_of(mask, in_features, down=down)
        n = len(mask)
        if up is not None and len(up) != n:
            raise InputError(f"up must have shape [{n}, {rank}] as mask has rows, but it was {list(up.shape)}")
        if bias is not None and bias.shape != (n,):
            raise InputError(f"bias must have shape [{n}] as mask has rows, but it was {list(bias.shape)}")
        check_like(values, "values", down=down, up=up, bias=bias)
        check_sizes(in_features, n, min(len(values), in_features * n), rank)
        check_mask(mask, in_features, len(values))
        layer = cls(in_features, n, len(values), rank, bias is not None, device="meta", dtype=values.dtype)
        layer.mask = mask.to(values.device).contiguous()
        for name, tensor in (("values", values.contiguous()), ("down", down), ("up", up), ("bias", bias)):
            if tensor is not None:
                setattr(layer, name, nn.Parameter(tensor.detach()))
        return layer

    @classmethod
    def from_weights(
        cls, sparse: Tensor, down: Tensor | None = None, up: Tensor | None = None, bias: Tensor | None = None
    ) -> SparseLinear:
        """Build the layer around S with all its zeros; what is stored is where it is not zero.

        Args:
            sparse: S ``[N, K]``, a floating dtype.
            down: ``[R, K]`` or None, dtype and device of ``sparse``.
            up: ``[N, R]``, dtype and device of ``sparse``, given exactly when ``down`` is.
            bias: ``[N]`` or None, dtype and device of ``sparse``.

        Raises:
            InputError: shapes, dtypes or devices do not fit together, or the rank is above min(K, N).
        """
        if sparse.dim() != 2 or not sparse.is_floating_point():
            raise InputError(
                f"sparse must be a matrix of a floating dtype, but it was {sparse.dtype} of shape {list(sparse.shape)}"
            )
        rank = _check_factors(down, up)
        out_features, in_features = sparse.shape
        for name, factor, shape in (("down", down, (rank, in_features)), ("up", up, (out_features, rank))):
            if factor is not None and factor.shape != shape:
                raise InputError(f"{name} must have shape {list(shape)} beside sparse, but it was {list(factor.shape)}")
        check_like(sparse, "sparse", down=down, up=up, bias=bias)
        sparse = sparse.detach()
        stored = sparse != 0
        return cls.from_parts(packed_bits(stored), sparse[stored], down, up, bias, in_features=in_features)

    @property
    def density(self) -> float:
        """The share of the entries of S that is stored."""
        return self.entries / (self.in_features * self.out_features)

    @property
    def places(self) -> int:
        """What the mask takes in numbers of 32 bits, see :func:`mask_places`."""
        return mask_places(self.in_features, self.out_features)

    @property
    def weight(self) -> Tensor:
        """The ``[N, K]`` weight that the layer stands for, computed in fp32 and rounded once; differentiable."""
        wide = torch.promote_types(self.values.dtype, torch.float32)
        weight = expanded(self.mask, self.values.to(wide), self.in_features)
        if self.down is not None:
            weight = weight + cast(Tensor, self.up).to(wide) @ self.down.to(wide)
        return weight.to(self.values.dtype)

    def _weights(self) -> tuple[Tensor | None, ...]:
        return self.mask, self.values, self.down, self.up

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, entries={self.entries}, "
            f"rank={self.rank}, bias={self.bias is not None}"
        )


def mask_places(in_features: int, out_features: int) -> int:
    """What the mask of a sparse ``[N, K]`` weight takes in numbers of 32 bits: ``ceil(N ceil(K / 8) / 4)``.

    It counts among a model's parameters: where an entry stands has to be stored as its value has.
    """
    return -(-out_features * -(-in_features // 8) // 4)


def inputs_of(mask: Tensor, in_features: int | None, **down: Tensor | None) -> int:
    """K of a mask ``[N, ceil(K / 8)]``: the columns of ``down``, given by its name, or without it all bits of a row."""
    if mask.dim() != 2 or mask.dtype != torch.uint8:
        raise InputError(f"mask must be a uint8 matrix, but it was {mask.dtype} of shape {list(mask.shape)}")
    ((name, factor),) = down.items()
    columns = 8 * mask.shape[1] if factor is None else factor.shape[1]
    in_features = columns if in_features is None else in_features
    if factor is not None and in_features != columns:
        raise InputError(f"in_features must be {columns} as {name} has columns, but it was {in_features}")
    expected = [len(mask), -(-in_features // 8)]
    if list(mask.shape) != expected:
        raise InputError(f"mask must have shape {expected}, but it was {list(mask.shape)}")
    return in_features


def check_mask(mask: Tensor, in_features: int, entries: int) -> None:
    """Raise InputError unless a mask ``[N, ceil(K / 8)]`` has as many bits as there are entries, none beyond K."""
    bits = unpacked_bits(mask, 8 * mask.shape[1])
    if bits[:, in_features:].any():
        raise InputError(f"mask must have no bit set beyond in_features = {in_features}, but it had one")
    stored = int(bits.sum())
    if stored != entries:
        raise InputError(f"mask must have a bit for each of the {entries} values, but it had {stored}")


def _check_factors(down: Tensor | None, up: Tensor | None) -> int:
    """The rank of the factors, 0 for none, once they fit together."""
    if (down is None) != (up is None):
        given, missing = ("up", "down") if down is None else ("down", "up")
        raise InputError(f"{missing} must be given where {given} is, but it was not")
    if down is None or up is None:
        return 0
    if down.dim() != 2 or up.dim() != 2 or up.shape[1] != down.shape[0]:
        raise InputError(
            f"down and up must have shapes [R, K] and [N, R], but they were {list(down.shape)} and {list(up.shape)}"
        )
    if not down.shape[0]:
        raise InputError("down and up must have a rank of at least 1 where they are given, but it was 0")
    return down.shape[0]


def check_sizes(in_features: int, out_features: int, entries: int, rank: int) -> None:
    check_rank(rank, in_features, out_features, lowest=0)
    most = in_features * out_features
    if not 0 <= entries <= most:
        raise InputError(
            f"entries must be from 0 to {most} for a layer of {in_features} inputs and {out_features} outputs, "
            f"but it was {entries}"
        )


def _spread_(mask: Tensor, entries: int, columns: int) -> None:
    """Set as many bits of a mask ``[N, ceil(K / 8)]``, evenly over its rows and over their first ``columns`` bits."""
    n, rows = mask.shape[0], max(1, _AT_ONCE // columns)
    for start in range(0, n, rows):
        row = torch.arange(start, min(start + rows, n), device=mask.device)[:, None]
        count = (row + 1) * entries // n - row * entries // n
        shift = row * _GOLDEN % 2**16 * columns // 2**16
        column = (torch.arange(columns, device=mask.device) + shift) % columns
        stored = (column + 1) * count // columns != column * count // columns
        mask[start : start + rows] = packed_bits(stored)
