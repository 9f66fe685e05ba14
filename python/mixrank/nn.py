"""Layers that replace ``nn.Linear``: a weight held as two thin factors, and a fused linear held in parts.

:mod:`mixrank.nn_pivoted` has the same weight in the pivoted form, :mod:`mixrank.nn_sparse` a sparse one beside factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn

from mixrank.errors import InputError
from mixrank_kernels import ops, packing

if TYPE_CHECKING:
    from mixrank.stats import LayerStats


class LinearLike(Protocol):
    """What ``nn.Linear`` and every layer that stands in for one have in common."""

    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def weight(self) -> Tensor: ...
    @property
    def bias(self) -> Tensor | None: ...


class LowRankLinear(nn.Module):
    """What the forms of a linear layer of low rank have in common: how it is called, printed and multiplied out.

    A form has ``in_features`` K, ``out_features`` N, ``rank`` R, a ``bias`` ``[N]`` or None, a ``weight`` and these. In
    :class:`mixrank.SparseLinear` factors are a part of the weight only, and R may be 0.
    """

    _operator: Callable[..., Tensor]
    """x, the weights of the form, bias and what is packed of the weights -> ``[..., N]``."""
    _self_packed: Callable[..., Tensor]
    """x, the weights of the form and bias -> ``[..., N]``; it packs by itself, in a compiled graph too."""
    _pack: Callable[..., Tensor | None]
    """The weights of the form -> what is packed of them."""

    in_features: int
    out_features: int
    rank: int
    bias: Tensor | None

    @property
    def weight(self) -> Tensor:
        """The ``[N, K]`` weight that the layer stands for."""
        raise NotImplementedError

    def _weights(self) -> tuple[Tensor | None, ...]:
        """The weights of the form, in the order of its operator, the first two there always."""
        raise NotImplementedError

    def merge(self) -> nn.Linear:
        """Return a plain ``nn.Linear`` with the same weight and bias, in the same dtype, device and mode."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight.detach())
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone())
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        weights = self._weights()
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting() and self._packs(weights):
            return self._self_packed(x, *weights, self.bias)
        return self._operator(x, *weights, self.bias, self._packed(weights))

    def _packed(self, weights: tuple[Tensor | None, ...]) -> Tensor | None:
        """The weights packed for the CPU kernels, where the call will really use them as they are now."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return None  # a graph would keep what was packed while it was traced
        return self._pack(*weights) if self._packs(weights) else None

    def _packs(self, weights: tuple[Tensor | None, ...]) -> bool:
        """Whether a call would use packed weights more than once."""
        first, second = weights[:2]
        # torch.fx traces with stand-ins of parameters; the first may be a buffer, of which it has none
        if not isinstance(first, Tensor) or not isinstance(second, Tensor) or first.device.type != "cpu":
            return False
        trains = torch.is_grad_enabled() and any(weight is not None and weight.requires_grad for weight in weights)
        return not trains and not torch.is_autocast_enabled("cpu")

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )


class MixedRankLinear(LowRankLinear):
    """A linear layer whose ``[N, K]`` weight is the product ``up @ down`` of ``[N, R]`` and ``[R, K]``.

    A drop-in for ``nn.Linear``: the same forward for any leading shape ``[..., K] -> [..., N]``, ``in_features``,
    ``out_features``, ``bias`` and a ``weight`` that is computed when asked for. It deep-copies, moves, casts and
    trains like any module.

    Args:
        in_features: K, at least 1.
        out_features: N, at least 1.
        rank: R, from 1 to min(K, N).
        bias: whether the layer adds a bias ``[N]``.
        device: where the parameters are made.
        dtype: a floating dtype.

    Raises:
        InputError: a size or the rank is outside its range.

    Example:
        >>> import torch
        >>> MixedRankLinear(8, 16, rank=2)(torch.ones(3, 5, 8)).shape
        torch.Size([3, 5, 16])
    """

    _operator = staticmethod(ops.lowrank_linear)
    _self_packed = staticmethod(packing.lowrank_linear)
    _pack = staticmethod(packing.packed)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_rank(rank, in_features, out_features)
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.down = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw factors whose product has the variance that ``nn.Linear`` starts with; the bias starts at zero."""
        with torch.no_grad():
            nn.init.normal_(self.down, std=self.in_features**-0.5)
            nn.init.normal_(self.up, std=(3 * self.rank) ** -0.5)
            if self.bias is not None:
                nn.init.zeros_(self.bias)

    @classmethod
    def from_factors(cls, down: Tensor, up: Tensor, bias: Tensor | None = None) -> MixedRankLinear:
        """Build the layer around given factors; they are used as they are, without a copy where possible.

        Args:
            down: ``[R, K]``, a floating dtype.
            up: ``[N, R]``, dtype and device of ``down``.
            bias: ``[N]`` or None, dtype and device of ``down``.

        Raises:
            InputError: shapes, dtypes or devices do not fit together, or the rank is above min(K, N).
        """
        if down.dim() != 2 or up.dim() != 2 or up.shape[1] != down.shape[0]:
            raise InputError(
                f"down and up must have shapes [R, K] and [N, R], but they were {list(down.shape)} and {list(up.shape)}"
            )
        if bias is not None and bias.shape != (up.shape[0],):
            raise InputError(f"bias must have shape [{up.shape[0]}] as up has rows, but it was {list(bias.shape)}")
        check_like(down, up=up, bias=bias)
        rank, in_features = down.shape
        layer = cls(in_features, up.shape[0], rank, bias is not None, device="meta", dtype=down.dtype)
        layer.down, layer.up = nn.Parameter(down.detach()), nn.Parameter(up.detach())
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach())
        return layer

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int, stats: LayerStats | None = None) -> MixedRankLinear:
        """Factor a trained linear layer at one rank.

        Args:
            linear: the layer, weight ``[N, K]``; it is not changed.
            rank: R, from 1 to min(K, N).
            stats: the layer's :class:`mixrank.stats.LayerStats`; with them the factors minimise the error of the
                centred outputs on the calibration images and the mean goes into the bias, without them
                the factors are the truncated SVD of the weight.

        Raises:
            InputError: the rank is outside its range, or the statistics are of another layer.
        """
        from mixrank.decompose import factorise

        check_rank(rank, linear.in_features, linear.out_features)
        factorisation = factorise(linear, stats, factors="svd" if stats is None else "aware")
        layer = cls.from_factors(*factorisation.factors(rank))
        return layer.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """The ``[N, K]`` weight that the factors stand for, computed in fp32 and rounded once; differentiable."""
        wide = torch.promote_types(self.down.dtype, torch.float32)
        return (self.up.to(wide) @ self.down.to(wide)).to(self.down.dtype)

    def _weights(self) -> tuple[Tensor, ...]:
        return self.down, self.up


class SplitLinear(nn.Module):
    """A fused linear layer held as several layers over the same input, their outputs side by side.

    timm fuses q, k and v into one ``qkv`` layer; split, each has a rank of its own.

    Args:
        parts: ``nn.Linear`` or :class:`MixedRankLinear` layers with the same ``in_features``.

    Raises:
        InputError: no part, or parts with different ``in_features``.

    Example:
        >>> SplitLinear.from_linear(nn.Linear(8, 24), sections=3)(torch.ones(5, 8)).shape
        torch.Size([5, 24])
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        sizes = {part.in_features for part in self._layers()}
        if len(sizes) != 1:
            raise InputError(f"parts must have one in_features in common, but they had {sorted(sizes)}")

    def _layers(self) -> list[LinearLike]:
        return cast(list[LinearLike], list(self.parts))  # nn.ModuleList forgets what it is a list of

    @classmethod
    def from_linear(cls, linear: nn.Linear, sections: int) -> SplitLinear:
        """Cut the rows of a linear layer into equal parts, which share its memory.

        Args:
            linear: the layer, weight ``[N, K]``.
            sections: how many parts, a divisor of N.

        Raises:
            InputError: ``out_features`` is not a multiple of ``sections``.
        """
        if sections < 1 or linear.out_features % sections:
            raise InputError(f"sections must divide out_features = {linear.out_features}, but it was {sections}")
        weights = linear.weight.detach().chunk(sections)
        biases = linear.bias.detach().chunk(sections) if linear.bias is not None else [None] * sections
        parts = []
        for weight, bias in zip(weights, biases, strict=True):
            part = nn.Linear(linear.in_features, weight.shape[0], bias is not None, device="meta")
            part.weight = nn.Parameter(weight)
            if bias is not None:
                part.bias = nn.Parameter(bias)
            parts.append(part)
        return cls(parts).train(linear.training)

    @property
    def in_features(self) -> int:
        """K, that of every part."""
        return self._layers()[0].in_features

    @property
    def out_features(self) -> int:
        """N, over all parts."""
        return sum(part.out_features for part in self._layers())

    @property
    def weight(self) -> Tensor:
        """The ``[N, K]`` weight of the fused layer."""
        return torch.cat([part.weight for part in self._layers()])

    @property
    def bias(self) -> Tensor | None:
        """The bias ``[N]`` of the fused layer, zero for parts without one, or None when no part has one."""
        layers = self._layers()
        if all(part.bias is None for part in layers):
            return None
        return torch.cat(
            [part.weight.new_zeros(part.out_features) if part.bias is None else part.bias for part in layers]
        )

    def merge(self) -> nn.Linear:
        """Return a plain ``nn.Linear`` with the same weight and bias, in the same dtype, device and mode."""
        bias = self.bias
        linear = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight.detach())
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach())
        return linear.train(self.training)

    def forward(self, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        return torch.cat([part(x) for part in self.parts], dim=-1)


def check_rank(rank: int, in_features: int, out_features: int, *, lowest: int = 1) -> None:
    """Raise InputError unless the sizes are positive and the rank lies in [lowest, min(in_features, out_features)]."""
    if in_features < 1 or out_features < 1:
        raise InputError(f"in_features and out_features must be at least 1, but were {in_features} and {out_features}")
    full = min(in_features, out_features)
    if not lowest <= rank <= full:
        raise InputError(
            f"rank must be from {lowest} to {full} for a layer of {in_features} inputs and {out_features} outputs, "
            f"but it was {rank}"
        )


def check_like(first: Tensor, called: str = "down", /, **others: Tensor | None) -> None:
    """Raise InputError unless every other tensor has the dtype and device of ``first``, which is ``called`` so."""
    for name, tensor in others.items():
        if tensor is not None and (tensor.dtype != first.dtype or tensor.device != first.device):
            raise InputError(
                f"{name} must be {first.dtype} on {first.device} as {called} is, but it was {tensor.dtype} on "
                f"{tensor.device}"
            )
