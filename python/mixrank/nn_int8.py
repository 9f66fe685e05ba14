"""Linear layers of 8-bit weights, for inference: what :func:`mixrank.quantize_` puts in the place of the others.

:mod:`mixrank.nn_int8_sparse` has the one with a sparse weight.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mixrank.errors import InputError
from mixrank.nn import check_rank
from mixrank.nn_pivoted import check_index, index_dtype
from mixrank_kernels import ops, packing


class Int8Layer(nn.Module):
    """What the layers have in common: codes are parameters without gradients, scales are buffers that stay fp32."""

    dynamic: bool
    in_features: int
    out_features: int
    rank: int | None = None
    bias: nn.Parameter | None

    def _add_codes(self, name: str, rows: int, cols: int, device: torch.device | str | None) -> None:
        codes = torch.zeros(rows, cols, dtype=torch.int8, device=device)
        self.register_parameter(f"{name}codes", nn.Parameter(codes, requires_grad=False))
        self.register_buffer(f"{name}scale", torch.ones(rows, dtype=torch.float32, device=device))

    def _add_bias(self, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        zeros = torch.zeros(self.out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if zeros is None else nn.Parameter(zeros, requires_grad=False))

    def _set(self, bias: Tensor | None, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            setattr(self, name, nn.Parameter(tensor, requires_grad=False) if tensor.dtype == torch.int8 else tensor)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The ``[N, K]`` weight that the codes stand for, fp32."""
        raise NotImplementedError

    def merge(self) -> nn.Linear:
        """Return a plain ``nn.Linear`` with the weight that the codes stand for, in the dtype of the bias."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        dtype = torch.float32 if self.bias is None else self.bias.dtype
        linear.weight = nn.Parameter(self.weight.to(dtype), requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return linear.train(self.training)

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        # Scales belong to the codes, whatever the dtype of the model: a cast only moves them.
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def _packed(self, first: Tensor, second: Tensor | None = None) -> Tensor | None:
        """The codes packed for the CPU kernels, where the call will really use them as they are now."""
        return packing.packed_int8(first, second, dynamic=self.dynamic) if self._packs(first) else None

    def _packs(self, codes: Tensor) -> bool:
        usable = isinstance(codes, Tensor) and codes.device.type == "cpu"
        # A graph would keep what was packed while it was traced.
        return usable and not torch.compiler.is_compiling() and not torch.jit.is_tracing()

    def _packs_in_graph(self, codes: Tensor) -> bool:
        return torch.compiler.is_compiling() and not torch.compiler.is_exporting() and codes.device.type == "cpu"

    def extra_repr(self) -> str:
        rank = "" if self.rank is None else f"rank={self.rank}, "
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {rank}bias={self.bias is not None}, "
            f"dynamic={self.dynamic}"
        )


class Int8Linear(Int8Layer):
    """A linear layer whose ``[N, K]`` weight is 8-bit ``codes`` times one ``scale`` for each output.

    The same forward as ``nn.Linear``: ``[..., K] -> [..., N]``. It starts with a weight of zeros.

    Args:
        in_features: K, at least 1.
        out_features: N, at least 1.
        bias: whether the layer adds a bias ``[N]``.
        dynamic: whether the rows of the input are quantised too, see :func:`mixrank_kernels.int8_linear`.
        device: where the tensors are made.
        dtype: a floating dtype, of the bias.

    Raises:
        InputError: a size is outside its range.

    Example:
        >>> import torch
        >>> Int8Linear(8, 16)(torch.ones(3, 5, 8)).shape
        torch.Size([3, 5, 16])
    """

    codes: nn.Parameter
    scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        dynamic: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_rank(1, in_features, out_features)
        self.in_features, self.out_features, self.dynamic = in_features, out_features, dynamic
        self._add_codes("", out_features, in_features, device)
        self._add_bias(bias, device, dtype)

    @classmethod
    def from_codes(
        cls, codes: Tensor, scale: Tensor, bias: Tensor | None = None, *, dynamic: bool = True
    ) -> Int8Linear:
        """Build the layer around given codes.

        Args:
            codes: ``[N, K]`` int8.
            scale: ``[N]`` float32.
            bias: ``[N]`` or None, a floating dtype.
            dynamic: see the class.

        Raises:
            InputError: shapes or dtypes do not fit together.
        """
        check_codes("codes", codes, scale)
        check_bias(bias, len(codes))
        layer = cls(codes.shape[1], len(codes), bias is not None, dynamic=dynamic, device="meta")
        layer._set(bias, codes=codes.contiguous(), scale=scale.contiguous())
        return layer

    @property
    def weight(self) -> Tensor:
        """The ``[N, K]`` weight that the codes stand for, fp32."""
        return self.codes.float() * self.scale[:, None]

    def forward(self, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        if self._packs_in_graph(self.codes):
            return packing.int8_linear(x, self.codes, self.scale, self.bias, self.dynamic)
        return ops.int8_linear(x, self.codes, self.scale, self.bias, self.dynamic, self._packed(self.codes))


class _Int8LowRankLayer(Int8Layer):
    """A layer of low rank in either form: constructed alike, and served by the same operator."""

    rank: int
    down_codes: nn.Parameter
    down_scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        dynamic: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_rank(rank, in_features, out_features)
        self.in_features, self.out_features, self.rank, self.dynamic = in_features, out_features, rank, dynamic
        self._add_codes("down_", rank, in_features, device)
        self._add_second(device)
        self._add_bias(bias, device, dtype)

    def _add_second(self, device: torch.device | str | None) -> None:
        """Add what the form has beside ``down``."""
        raise NotImplementedError


class Int8MixedRankLinear(_Int8LowRankLayer):
    """A :class:`mixrank.nn.MixedRankLinear` whose factors are 8-bit codes times one scale for each of their rows.

    It starts with factors of zeros.

    Args:
        in_features: K, at least 1.
        out_features: N, at least 1.
        rank: R, from 1 to min(K, N).
        bias: whether the layer adds a bias ``[N]``.
        dynamic: whether the rows of the input and of the intermediate are quantised too, see
            :func:`mixrank_kernels.int8_lowrank_linear`.
        device: where the tensors are made.
        dtype: a floating dtype, of the bias.

    Raises:
        InputError: a size or the rank is outside its range.

    Example:
        >>> import torch
        >>> Int8MixedRankLinear(8, 16, rank=2)(torch.ones(3, 5, 8)).shape
        torch.Size([3, 5, 16])
    """

    up_codes: nn.Parameter
    up_scale: Tensor

    def _add_second(self, device: torch.device | str | None) -> None:
        self._add_codes("up_", self.out_features, self.rank, device)

    @classmethod
    def from_codes(
        cls,
        down_codes: Tensor,
        down_scale: Tensor,
        up_codes: Tensor,
        up_scale: Tensor,
        bias: Tensor | None = None,
        *,
        dynamic: bool = True,
    ) -> Int8MixedRankLinear:
        """Build the layer around given codes.

        Args:
            down_codes: ``[R, K]`` int8.
            down_scale: ``[R]`` float32.
            up_codes: ``[N, R]`` int8.
            up_scale: ``[N]`` float32.
            bias: ``[N]`` or None, a floating dtype.
            dynamic: see the class.

        Raises:
            InputError: shapes or dtypes do not fit together, or the rank is above min(K, N).
        """
        check_codes("down_codes", down_codes, down_scale)
        check_codes("up_codes", up_codes, up_scale)
        if up_codes.shape[1] != len(down_codes):
            raise InputError(
                f"up_codes must have shape [N, {len(down_codes)}] as down_codes has rows, but it was "
                f"{list(up_codes.shape)}"
            )
        check_bias(bias, len(up_codes))
        rank, in_features = down_codes.shape
        layer = cls(in_features, len(up_codes), rank, bias is not None, dynamic=dynamic, device="meta")
        tensors = {"down_codes": down_codes, "down_scale": down_scale, "up_codes": up_codes, "up_scale": up_scale}
        layer._set(bias, **{name: tensor.contiguous() for name, tensor in tensors.items()})
        return layer

    @property
    def weight(self) -> Tensor:
        """The ``[N, K]`` weight that the codes stand for, fp32."""
        return (self.up_codes.float() * self.up_scale[:, None]) @ (self.down_codes.float() * self.down_scale[:, None])

    def forward(self, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        operands = (self.down_codes, self.down_scale, self.up_codes, self.up_scale, self.bias, self.dynamic)
        if self._packs_in_graph(self.down_codes):
            return packing.int8_lowrank_linear(x, *operands)
        return ops.int8_lowrank_linear(x, *operands, None, self._packed(self.down_codes, self.up_codes))


class Int8PivotedLinear(_Int8LowRankLayer):
    """A :class:`mixrank.PivotedLinear` whose rows and coefficients are 8-bit codes times one scale for each row.

    It starts with a weight of zeros.

    Args:
        in_features: K, at least 1.
        out_features: N, at least 1.
        rank: R, from 1 to min(K, N).
        bias: whether the layer adds a bias ``[N]``.
        dynamic: whether the rows of the input and of the intermediate are quantised too, see
            :func:`mixrank_kernels.int8_lowrank_linear`.
        device: where the tensors are made.
        dtype: a floating dtype, of the bias.

    Raises:
        InputError: a size or the rank is outside its range.

    Example:
        >>> import torch
        >>> Int8PivotedLinear(8, 16, rank=2)(torch.ones(3, 5, 8)).shape
        torch.Size([3, 5, 16])
    """

    coefficients_codes: nn.Parameter
    coefficients_scale: Tensor
    index: Tensor

    def _add_second(self, device: torch.device | str | None) -> None:
        self._add_codes("coefficients_", self.out_features - self.rank, self.rank, device)
        index = torch.arange(self.out_features, device=device, dtype=index_dtype(self.out_features))
        self.register_buffer("index", index)

    @classmethod
    def from_codes(
        cls,
        down_codes: Tensor,
        down_scale: Tensor,
        coefficients_codes: Tensor,
        coefficients_scale: Tensor,
        index: Tensor,
        bias: Tensor | None = None,
        *,
        dynamic: bool = True,
    ) -> Int8PivotedLinear:
        """Build the layer around given codes.

        Args:
            down_codes: ``[R, K]`` int8.
            down_scale: ``[R]`` float32.
            coefficients_codes: ``[N - R, R]`` int8.
            coefficients_scale: ``[N - R]`` float32.
            index: ``[N]``, as for :meth:`mixrank.PivotedLinear.from_pivots`.
            bias: ``[N]`` or None, a floating dtype.
            dynamic: see the class.

        Raises:
            InputError: shapes or dtypes do not fit together, the rank is above min(K, N), or the index does not hold
                every row in order.
        """
        check_codes("down_codes", down_codes, down_scale)
        check_codes("coefficients_codes", coefficients_codes, coefficients_scale)
        rank, in_features = down_codes.shape
        if coefficients_codes.shape[1] != rank:
            raise InputError(
                f"coefficients_codes must have shape [N - {rank}, {rank}] as down_codes has rows, but it was "
                f"{list(coefficients_codes.shape)}"
            )
        out_features = rank + len(coefficients_codes)
        if index.shape != (out_features,):
            raise InputError(f"index must have shape [{out_features}], but it was {list(index.shape)}")
        check_index(index, rank)
        check_bias(bias, out_features)
        layer = cls(in_features, out_features, rank, bias is not None, dynamic=dynamic, device="meta")
        tensors = {"down_codes": down_codes, "down_scale": down_scale}
        tensors |= {"coefficients_codes": coefficients_codes, "coefficients_scale": coefficients_scale}
        layer._set(bias, **{name: tensor.contiguous() for name, tensor in tensors.items()})
        layer.index = index.to(down_codes.device, index_dtype(out_features))
        return layer

    @property
    def weight(self) -> Tensor:
        """The ``[N, K]`` weight that the codes stand for, fp32."""
        down = self.down_codes.float() * self.down_scale[:, None]
        rows = torch.cat([down, (self.coefficients_codes.float() * self.coefficients_scale[:, None]) @ down])
        return torch.empty_like(rows).index_copy(0, self.index.long(), rows)

    def forward(self, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        operands = (self.down_codes, self.down_scale, self.coefficients_codes, self.coefficients_scale, self.bias)
        index = self.index.long()
        if self._packs_in_graph(self.down_codes):
            return packing.int8_lowrank_linear(x, *operands, self.dynamic, index)
        packed = self._packed(self.down_codes, self.coefficients_codes)
        return ops.int8_lowrank_linear(x, *operands, self.dynamic, index, packed)


def check_codes(name: str, codes: Tensor, scale: Tensor) -> None:
    """Raise InputError unless ``codes`` are an int8 matrix with one fp32 scale for each of its rows."""
    if codes.dim() != 2 or codes.dtype != torch.int8:
        raise InputError(f"{name} must be an int8 matrix, but it was {codes.dtype} of shape {list(codes.shape)}")
    check_scale(name, scale, len(codes))


def check_scale(name: str, scale: Tensor, rows: int) -> None:
    """Raise InputError unless there is one fp32 scale for each of ``rows``."""
    if scale.shape != (rows,) or scale.dtype != torch.float32:
        raise InputError(
            f"the scale of {name} must be float32 of shape [{rows}], but it was {scale.dtype} of shape "
            f"{list(scale.shape)}"
        )


def check_bias(bias: Tensor | None, rows: int) -> None:
    """Raise InputError unless the bias is None or has ``rows`` entries."""
    if bias is not None and bias.shape != (rows,):
        raise InputError(f"bias must have shape [{rows}], but it was {list(bias.shape)}")
