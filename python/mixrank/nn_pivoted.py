"""A linear layer of low rank in the pivoted form: R rows of its weight, and the others as combinations of these."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from mixrank.errors import InputError
from mixrank.nn import LowRankLinear, MixedRankLinear, check_like, check_rank
from mixrank.pivot import pivot
from mixrank_kernels import ops, packing

if TYPE_CHECKING:
    from mixrank.stats import LayerStats


class PivotedLinear(LowRankLinear):
    """A linear layer of rank R in ``R (K + N - R)`` numbers: less than its factors, and as many fewer multiply-adds.

    Rows ``index[:R]`` of the ``[N, K]`` weight are ``down`` ``[R, K]``, rows ``index[R:]`` are ``coefficients @ down``
    with ``coefficients`` ``[N - R, R]``. A drop-in for ``nn.Linear`` like :class:`mixrank.MixedRankLinear`. The index
    is a buffer ``[N]`` in int16 (int32 beyond 32768 outputs) that rises in both parts.

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
        >>> PivotedLinear(8, 16, rank=2)(torch.ones(3, 5, 8)).shape
        torch.Size([3, 5, 16])
    """

    index: Tensor

    _operator = staticmethod(ops.pivoted_linear)
    _self_packed = staticmethod(packing.pivoted_linear)
    _pack = staticmethod(packing.packed_pivots)

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
        self.coefficients = nn.Parameter(torch.empty(out_features - rank, rank, device=device, dtype=dtype))
        self.register_buffer("index", torch.arange(out_features, device=device, dtype=index_dtype(out_features)))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw a weight with the variance that ``nn.Linear`` starts with; the bias starts at zero."""
        with torch.no_grad():
            nn.init.normal_(self.down, std=(3 * self.in_features) ** -0.5)
            self.coefficients.normal_(std=self.rank**-0.5)
            if self.bias is not None:
                nn.init.zeros_(self.bias)

    @classmethod
    def from_pivots(
        cls, down: Tensor, coefficients: Tensor, index: Tensor, bias: Tensor | None = None
    ) -> PivotedLinear:
        """Build the layer around a weight in the pivoted form; it is used as it is, without a copy where possible.

        Args:
            down: ``[R, K]``, a floating dtype.
            coefficients: ``[N - R, R]``, dtype and device of ``down``.
            index: ``[N]``, an integer dtype, device of ``down``: the rows that ``down`` holds, then the others, rising
                in both parts.
            bias: ``[N]`` or None, dtype and device of ``down``.

        Raises:
            InputError: shapes, dtypes or devices do not fit together, or the index does not hold every row in order.
        """
        if down.dim() != 2 or coefficients.dim() != 2 or coefficients.shape[1] != down.shape[0]:
            raise InputError(
                f"down and coefficients must have shapes [R, K] and [N - R, R], but they were {list(down.shape)} and "
                f"{list(coefficients.shape)}"
            )
        rank, in_features = down.shape
        out_features = rank + coefficients.shape[0]
        for name, tensor in (("index", index), ("bias", bias)):
            if tensor is not None and tensor.shape != (out_features,):
                rows = "as down and coefficients have rows"
                raise InputError(f"{name} must have shape [{out_features}] {rows}, but it was {list(tensor.shape)}")
        check_like(down, coefficients=coefficients, bias=bias)
        check_rank(rank, in_features, out_features)
        check_index(index, rank)
        layer = cls(in_features, out_features, rank, bias is not None, device="meta", dtype=down.dtype)
        layer.down, layer.coefficients = nn.Parameter(down.detach()), nn.Parameter(coefficients.detach())
        layer.index = index.to(down.device, index_dtype(out_features))
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach())
        return layer

    @classmethod
    def from_factors(cls, down: Tensor, up: Tensor, bias: Tensor | None = None) -> PivotedLinear:
        """Build the layer with the weight ``up @ down``, the same up to rounding; the rows are chosen in float64.

        Args:
            down: ``[R, K]``, a floating dtype.
            up: ``[N, R]``, dtype and device of ``down``.
            bias: ``[N]`` or None, dtype and device of ``down``.

        Raises:
            InputError: shapes, dtypes or devices do not fit together, values are not finite, or the rank is above
                min(K, N).
        """
        MixedRankLinear.from_factors(down, up, bias)  # for its checks
        found = pivot(down, up)
        rows, coefficients = (tensor.to(down.device, down.dtype) for tensor in (found.down, found.coefficients))
        return cls.from_pivots(rows, coefficients, found.index.to(down.device), bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int, stats: LayerStats | None = None) -> PivotedLinear:
        """Bring a trained linear layer to one rank, as :meth:`mixrank.MixedRankLinear.from_linear` does.

        Args:
            linear: the layer, weight ``[N, K]``; it is not changed.
            rank: R, from 1 to min(K, N).
            stats: the layer's :class:`mixrank.calibrate.LayerStats`, or None for the truncated SVD of the weight.

        Raises:
            InputError: the rank is outside its range, or the statistics are of another layer.
        """
        factored = MixedRankLinear.from_linear(linear, rank, stats)
        return cls.from_factors(factored.down, factored.up, factored.bias).train(linear.training)

    def to_factors(self) -> MixedRankLinear:
        """The same layer, up to rounding, as the singular value decomposition of its weight gives it, in float64.

        The columns of ``up`` are orthonormal, the rows of ``down`` orthogonal, those of the largest norm first.
        """
        down, coefficients = self.down.detach().double(), self.coefficients.detach().double()
        rows = torch.cat([torch.eye(self.rank, dtype=down.dtype, device=down.device), coefficients])
        frame, triangle = torch.linalg.qr(torch.empty_like(rows).index_copy(0, self.index.long(), rows))
        left, values, right = torch.linalg.svd(triangle @ down, full_matrices=False)
        bias = None if self.bias is None else self.bias.detach().clone()
        # The decomposition returns its right factor column by column.
        down, up = (factor.to(self.down.dtype).contiguous() for factor in (values[:, None] * right, frame @ left))
        return MixedRankLinear.from_factors(down, up, bias).train(self.training)

    @property
    def weight(self) -> Tensor:
        """The ``[N, K]`` weight that the layer stands for, computed in fp32 and rounded once; differentiable."""
        wide = torch.promote_types(self.down.dtype, torch.float32)
        down = self.down.to(wide)
        rows = torch.cat([down, self.coefficients.to(wide) @ down])
        return torch.empty_like(rows).index_copy(0, self.index.long(), rows).to(self.down.dtype)

    def _weights(self) -> tuple[Tensor, ...]:
        return self.down, self.coefficients, self.index


def unpivot_(model: nn.Module) -> dict[str, PivotedLinear]:
    """Hold every layer in the pivoted form as factors, in place; returns the layers that were replaced, by name."""
    pivoted = {name: module for name, module in model.named_modules() if isinstance(module, PivotedLinear)}
    for name, layer in pivoted.items():
        model.set_submodule(name, layer.to_factors())
    return pivoted


def put_back_(model: nn.Module, pivoted: dict[str, PivotedLinear], *, trained: bool = False) -> None:
    """Undo :func:`unpivot_`: put back the layers that it returned or, if ``trained``, what became of their factors."""
    for name, layer in pivoted.items():
        factors = cast(MixedRankLinear, model.get_submodule(name))  # as unpivot_ left it
        if trained:
            layer = PivotedLinear.from_factors(factors.down, factors.up, factors.bias).train(layer.training)
        model.set_submodule(name, layer)


def index_dtype(out_features: int) -> torch.dtype:
    """The narrowest dtype that the operator takes an index of so many rows in."""
    return torch.int16 if out_features <= 2**15 else torch.int32


def check_index(index: Tensor, rank: int) -> None:
    """Raise InputError unless ``index`` holds 0 to N - 1, rising in its first ``rank`` entries and in the others."""
    if index.dtype not in (torch.int16, torch.int32, torch.int64):
        raise InputError(f"index must have one of the dtypes int16, int32, int64, but it was {index.dtype}")
    entries = index.tolist()
    parts = (entries[:rank], entries[rank:])
    if sorted(entries) != list(range(len(entries))) or any(part != sorted(part) for part in parts):
        raise InputError(
            f"index must hold 0 to {len(entries) - 1} once each, rising in its first {rank} entries and in the others, "
            "but it did not"
        )
