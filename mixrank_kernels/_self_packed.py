"""The operators that pack their weights at run time and call another one: what compiled graphs hold.

A graph cannot ask for what is packed: it would keep the answer of the day it was traced. These ask at each call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mixrank_kernels import _register
from mixrank_kernels._schema import INT8_SCHEMAS, NAMESPACE, SCHEMAS, Argument, library, overload

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)


def self_packed(op: str) -> str:
    """The name of the operator that packs at run time and calls ``op``."""
    return f"_{op}_self_packed"


def define(op: str, packed_of: Callable[..., Tensor | None]) -> None:
    """Define ``_{op}_self_packed``: one more way to call ``op``, which no implementation replaces.

    Its arguments are those of ``op`` but for ``packed``: x, the weights that ``packed_of`` takes, and bias.
    """
    name, operator = self_packed(op), overload(op)

    def plain(x: Tensor, *weights: Tensor | None) -> Tensor:
        return operator(x, *weights)

    def packing(x: Tensor, *weights_and_bias: Tensor | None) -> Tensor:
        *weights, bias = weights_and_bias
        return operator(x, *weights, bias, packed_of(*weights))

    def differentiable(x: Tensor, *weights: Tensor | None) -> Tensor:
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *weights)):
            return plain(x, *weights)
        with torch._C._AutoDispatchBelowAutograd():
            return overload(name)(x, *weights)

    def with_bias(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The dispatcher leaves out a trailing argument that has its default."""
        count = len(operator._schema.arguments) - 1
        return lambda *given: function(*given, *[None] * (count - len(given)))

    library.define(name + SCHEMAS[op].replace(", Tensor? packed=None", ""), tags=_TAGS)
    library.impl(name, with_bias(packing), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", _register.fake(op), lib=library)
    library.impl(name, with_bias(differentiable), "Autograd")
    for device_type in ("CPU", "CUDA"):
        # The operator itself casts; what is packed would be of no use to it.
        library.impl(name, with_bias(plain), f"Autocast{device_type}")


def define_int8(op: str, packed_of: Callable[..., Tensor | None]) -> None:
    """Define ``_{op}_self_packed`` for an operator of 8-bit weights, whose arguments ``packed_of`` takes by name."""
    name = self_packed(op)
    library.define(name + INT8_SCHEMAS[op].replace(", Tensor? packed=None", ""), tags=_TAGS)
    library.impl(name, _int8_call(op, packed_of), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", _register.fake(op), lib=library)
    library.impl(name, _register.without_gradient(name), "Autograd")
    for device_type in ("cpu", "cuda"):
        key = "Autocast" + torch._C._dispatch_key_for_device(device_type)
        library.impl(name, _register.int8_autocast(name, device_type), key, with_keyset=True)


def _int8_call(name: str, packed_of: Callable[..., Tensor | None]) -> Callable[..., Tensor]:
    names = [argument.name for argument in overload(name)._schema.arguments][:-1]

    def call(*arguments: Argument) -> Tensor:
        given = dict(zip(names, _register.bind(name, *arguments), strict=False))
        return overload(name)(**given, packed=packed_of(**given))

    return call


def lowrank_linear(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply :func:`mixrank_kernels.lowrank_linear` with the factors packed at run time, inside a compiled graph too.

    A graph cannot ask :func:`mixrank_kernels.packing.packed` itself: it would keep the answer of the day it was
    traced. This operator asks at each call.

    Args:
        x: ``[..., K]``, float32, bfloat16, float16 or float64, any strides.
        down: ``[R, K]``, dtype of ``x``, any strides.
        up: ``[N, R]``, dtype of ``x``, any strides.
        bias: ``[N]``, dtype of ``x``, or None.

    Returns:
        ``[..., N]``: what the operator gives. Where gradients are recorded or autocast is on, it is the operator
        itself, without packing.

    Raises:
        RuntimeError: a shape, dtype or device does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> lowrank_linear(torch.ones(2, 8), torch.ones(3, 8), torch.ones(5, 3))[0, 0].item()
        24.0
    """
    return overload(self_packed("lowrank_linear"))(x, down, up, bias)


def pivoted_linear(x: Tensor, down: Tensor, coefficients: Tensor, index: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply :func:`mixrank_kernels.pivoted_linear` with the weights packed at run time, as :func:`lowrank_linear` does.

    Args:
        x: ``[..., K]``, float32, bfloat16, float16 or float64, any strides.
        down: ``[R, K]``, dtype of ``x``, any strides.
        coefficients: ``[N - R, R]``, dtype of ``x``, any strides.
        index: ``[N]``, int16, int32 or int64, contiguous.
        bias: ``[N]``, dtype of ``x``, or None.

    Returns:
        ``[..., N]``: what the operator gives.

    Raises:
        RuntimeError: as for the operator.

    Example:
        >>> import torch
        >>> pivoted_linear(torch.ones(1, 8), torch.ones(2, 8), torch.ones(1, 2), torch.tensor([0, 2, 1]))
        tensor([[ 8., 16.,  8.]])
    """
    return overload(self_packed("pivoted_linear"))(x, down, coefficients, index, bias)


def sparse_linear(
    x: Tensor,
    mask: Tensor,
    values: Tensor,
    down: Tensor | None = None,
    up: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Apply :func:`mixrank_kernels.sparse_linear` with the weights packed at run time, as :func:`lowrank_linear` does.

    Args:
        x: ``[..., K]``, float32, bfloat16, float16 or float64, any strides.
        mask: ``[N, ceil(K / 8)]``, uint8, contiguous.
        values: ``[nnz]``, dtype of ``x``, contiguous.
        down: ``[R, K]``, dtype of ``x``, any strides, or None.
        up: ``[N, R]``, dtype of ``x``, given exactly when ``down`` is.
        bias: ``[N]``, dtype of ``x``, or None.

    Returns:
        ``[..., N]``: what the operator gives.

    Raises:
        RuntimeError: as for the operator.

    Example:
        >>> import torch
        >>> sparse_linear(torch.ones(1, 3), torch.tensor([[5], [2]], dtype=torch.uint8), torch.tensor([1.0, 2.0, 4.0]))
        tensor([[3., 4.]])
    """
    return overload(self_packed("sparse_linear"))(x, mask, values, down, up, bias)


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, dynamic: bool = True) -> Tensor:
    """Apply :func:`mixrank_kernels.int8_linear` with the codes packed at run time, inside a compiled graph too.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16, any strides.
        weight: ``[N, K]``, int8, contiguous.
        scale: ``[N]``, float32, contiguous.
        bias: ``[N]``, dtype of ``x``, or None.
        dynamic: whether the rows of ``x`` are quantised too.

    Returns:
        ``[..., N]``: what the operator gives.

    Raises:
        RuntimeError: as for the operator.

    Example:
        >>> import torch
        >>> round(int8_linear(torch.ones(2, 8), torch.ones(3, 8, dtype=torch.int8), torch.ones(3))[0, 0].item(), 3)
        8.0
    """
    return overload(self_packed("int8_linear"))(x, weight, scale, bias, dynamic)


def int8_lowrank_linear(
    x: Tensor,
    down: Tensor,
    down_scale: Tensor,
    up: Tensor,
    up_scale: Tensor,
    bias: Tensor | None = None,
    dynamic: bool = True,
    index: Tensor | None = None,
) -> Tensor:
    """Apply :func:`mixrank_kernels.int8_lowrank_linear` with the codes packed at run time, as :func:`int8_linear`.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16, any strides.
        down: ``[R, K]``, int8, contiguous.
        down_scale: ``[R]``, float32, contiguous.
        up: ``[N, R]``, int8, contiguous; ``[N - R, R]`` with ``index``.
        up_scale: one for each row of ``up``, float32, contiguous.
        bias: ``[N]``, dtype of ``x``, or None.
        dynamic: whether the rows of ``x`` and of the intermediate are quantised too.
        index: ``[N]``, int64, contiguous, every number from 0 to N - 1 once; or None.

    Returns:
        ``[..., N]``: what the operator gives.

    Raises:
        RuntimeError: as for the operator.

    Example:
        >>> import torch
        >>> down, up = torch.ones(3, 8, dtype=torch.int8), torch.ones(5, 3, dtype=torch.int8)
        >>> round(int8_lowrank_linear(torch.ones(2, 8), down, torch.ones(3), up, torch.ones(5))[0, 0].item(), 3)
        24.0
    """
    return overload(self_packed("int8_lowrank_linear"))(x, down, down_scale, up, up_scale, bias, dynamic, index)


def int8_sparse_linear(
    x: Tensor,
    mask: Tensor,
    values: Tensor,
    scale: Tensor,
    down: Tensor | None = None,
    down_scale: Tensor | None = None,
    up: Tensor | None = None,
    up_scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Apply :func:`mixrank_kernels.int8_sparse_linear` with the weights packed at run time, as :func:`int8_linear`.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16, any strides.
        mask: ``[N, ceil(K / 8)]``, uint8, contiguous.
        values: ``[nnz]``, int8, contiguous.
        scale: ``[N]``, float32, contiguous.
        down: ``[R, K]``, int8, contiguous, or None.
        down_scale: ``[R]``, float32, contiguous; it and those up to ``up_scale`` are given exactly when ``down`` is.
        up: ``[N, R]``, int8, contiguous.
        up_scale: ``[N]``, float32, contiguous.
        bias: ``[N]``, dtype of ``x``, or None.

    Returns:
        ``[..., N]``: what the operator gives.

    Raises:
        RuntimeError: as for the operator.

    Example:
        >>> import torch
        >>> mask, values = torch.tensor([[5], [2]], dtype=torch.uint8), torch.tensor([1, 2, 4], dtype=torch.int8)
        >>> int8_sparse_linear(torch.ones(1, 3), mask, values, torch.tensor([1.0, 0.5]))
        tensor([[3., 2.]])
    """
    weights = (mask, values, scale, down, down_scale, up, up_scale)
    return overload(self_packed("int8_sparse_linear"))(x, *weights, bias)
