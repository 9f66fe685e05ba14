"""Factors packed once for the CPU kernels, kept as long as they do not change.

The kernels read weights in a layout of their own. Without packed factors a call makes that layout anew, which with one
row costs more than the products. :func:`packed` makes it at the first call and gives the same tensor from then on. What
it gives is dropped when a factor is changed in place, gets other memory or is freed; it is no parameter, in no state
dict and never moves with a module.

A change in place is seen by the version that autograd counts. Writing through ``weight.data`` or through NumPy is not
counted; the kernels compare a sample of each weight, so one to a whole weight (``weight.data.mul_(2)``) is noticed and
the weight itself is used, but one to a few of its numbers may not be: call :func:`clear` after it, or write under
``torch.no_grad()`` to the weight itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixrank_kernels._packed_entry import PackedCache
from mixrank_kernels._self_packed import (
    define,
    define_int8,
    int8_linear,
    int8_lowrank_linear,
    int8_sparse_linear,
    lowrank_linear,
    pivoted_linear,
    sparse_linear,
)

__all__ = [
    "clear",
    "enable",
    "int8_linear",
    "int8_lowrank_linear",
    "int8_sparse_linear",
    "lowrank_linear",
    "nbytes",
    "packed",
    "packed_int8",
    "packed_int8_sparse",
    "packed_pivots",
    "packed_sparse",
    "pivoted_linear",
    "sparse_linear",
]

_cache = PackedCache()


def packed(
    down: Tensor,
    up: Tensor,
    residual_down: Tensor | None = None,
    residual_up: Tensor | None = None,
    crow: Tensor | None = None,
    col: Tensor | None = None,
    values: Tensor | None = None,
) -> Tensor | None:
    """Return the factors in the layout of the CPU kernels, for the ``packed`` argument of the operators.

    Args:
        down: ``[R, K]``, float32, bfloat16, float16 or float64, on the CPU, any strides.
        up: ``[N, R]``, dtype of ``down``, any strides.
        residual_down: ``[Q, K]``, dtype of ``down``, any strides, or None.
        residual_up: ``[N, Q]``, dtype of ``down``, given exactly when ``residual_down`` is.
        crow: ``[N / b + 1]``, int32 or int64, contiguous, or None.
        col: ``[nnz]``, dtype of ``crow``, contiguous, given exactly when ``crow`` is.
        values: ``[nnz, b, b]``, dtype of ``down``, contiguous, given exactly when ``crow`` is.

    Returns:
        An opaque uint8 tensor, the same one until a weight changes; it takes about the memory of the weights once
        more. None where it would be of no use: tensors that are not on the CPU or have no memory of their own (fake
        tensors, subclasses, those inside ``torch.func`` transforms), no extension, weights that need a gradient while
        gradients are recorded (they change at each step), weights made in inference mode (whose changes cannot be
        seen), packing turned off by :func:`enable`, or a dispatch mode that may be recording a graph, which would keep
        what is packed now.

    Raises:
        RuntimeError: the weights do not fit together; the message names the argument.

    Example:
        >>> import torch
        >>> from mixrank_kernels import ops
        >>> x, down, up = torch.ones(2, 8), torch.ones(3, 8), torch.ones(5, 3)
        >>> ops.lowrank_linear(x, down, up, packed=packed(down, up))[0, 0].item()
        24.0
    """
    weights = (down, up, residual_down, residual_up, crow, col, values)
    given = (down, up) if residual_down is values is None else tuple(w for w in weights if w is not None)
    return _packed("_pack_factors", weights, given)


def packed_pivots(down: Tensor, coefficients: Tensor, index: Tensor) -> Tensor | None:
    """Return the weights of :func:`mixrank_kernels.pivoted_linear` in the layout of the CPU kernels.

    Args:
        down: ``[R, K]``, float32, bfloat16, float16 or float64, any strides.
        coefficients: ``[N - R, R]``, dtype of ``down``, any strides.
        index: ``[N]``, int16, int32 or int64, contiguous.

    Returns:
        As :func:`packed`.

    Raises:
        RuntimeError: the weights do not fit together, or ``index`` is not valid; the message names the argument.

    Example:
        >>> import torch
        >>> from mixrank_kernels import ops
        >>> x, weights = torch.ones(1, 8), (torch.ones(2, 8), torch.ones(1, 2), torch.tensor([0, 2, 1]))
        >>> ops.pivoted_linear(x, *weights, packed=packed_pivots(*weights))
        tensor([[ 8., 16.,  8.]])
    """
    weights = (down, coefficients, index)
    return _packed("_pack_pivots", weights, weights)


def packed_sparse(mask: Tensor, values: Tensor, down: Tensor | None = None, up: Tensor | None = None) -> Tensor | None:
    """Return the weights of :func:`mixrank_kernels.sparse_linear` in the layout of the CPU kernels.

    Args:
        mask: ``[N, ceil(K / 8)]``, uint8, contiguous, on the CPU.
        values: ``[nnz]``, float32, bfloat16, float16 or float64, contiguous.
        down: ``[R, K]``, dtype of ``values``, any strides, or None.
        up: ``[N, R]``, dtype of ``values``, given exactly when ``down`` is.

    Returns:
        As :func:`packed`.

    Raises:
        RuntimeError: the weights do not fit together; the message names the argument.

    Example:
        >>> import torch
        >>> from mixrank_kernels import ops
        >>> x, weights = torch.ones(1, 3), (torch.tensor([[5], [2]], dtype=torch.uint8), torch.tensor([1.0, 2.0, 4.0]))
        >>> ops.sparse_linear(x, *weights, packed=packed_sparse(*weights))
        tensor([[3., 4.]])
    """
    weights = (mask, values, down, up)
    return _packed("_pack_sparse", weights, tuple(weight for weight in weights if weight is not None))


def _packed(pack: str, weights: tuple[Tensor | None, ...], given: tuple[Tensor, ...]) -> Tensor | None:
    """What the operator ``pack`` made of ``weights`` or makes now; ``given`` are those that are not None."""
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in given):
        return None
    if torch._C._len_torch_dispatch_stack():
        return None
    return _cache.packed(id(given[0]), given, lambda: getattr(torch.ops.mixrank_kernels, pack)(*weights))


def packed_int8(first: Tensor, second: Tensor | None = None, *, dynamic: bool) -> Tensor | None:
    """Return the codes of 8-bit weights in the layout of the CPU kernels, for the ``packed`` argument of the operators.

    Args:
        first: ``[N, K]`` int8, the ``weight`` of ``int8_linear``, or ``[R, K]``, the ``down`` of the other operator.
        second: ``[N, R]`` int8, the ``up`` of ``int8_lowrank_linear``, or None.
        dynamic: as the operator is going to be called.

    Returns:
        As :func:`packed`.

    Raises:
        RuntimeError: the weights do not fit together; the message names the argument.

    Example:
        >>> import torch
        >>> from mixrank_kernels import ops
        >>> weight = torch.ones(3, 8, dtype=torch.int8)
        >>> packed = packed_int8(weight, dynamic=True)
        >>> round(ops.int8_linear(torch.ones(2, 8), weight, torch.ones(3), packed=packed)[0, 0].item(), 3)
        8.0
    """
    if torch._C._len_torch_dispatch_stack():
        return None
    key, given = (id(first), dynamic), (first,) if second is None else (first, second)
    return _cache.packed(key, given, lambda: torch.ops.mixrank_kernels._pack_int8(first, second, dynamic))


def packed_int8_sparse(
    mask: Tensor,
    values: Tensor,
    scale: Tensor,
    down: Tensor | None = None,
    down_scale: Tensor | None = None,
    up: Tensor | None = None,
    up_scale: Tensor | None = None,
) -> Tensor | None:
    """Return the weights of :func:`mixrank_kernels.int8_sparse_linear` in the layout of the CPU kernels, in fp32.

    Args:
        mask: ``[N, ceil(K / 8)]``, uint8, contiguous, on the CPU.
        values: ``[nnz]``, int8, contiguous.
        scale: ``[N]``, float32, contiguous.
        down: ``[R, K]``, int8, contiguous, or None.
        down_scale: ``[R]``, float32, contiguous; it and those that follow are given exactly when ``down`` is.
        up: ``[N, R]``, int8, contiguous.
        up_scale: ``[N]``, float32, contiguous.

    Returns:
        As :func:`packed`; it takes 6 bytes for each code of ``values`` and 4 for each of the factors.

    Raises:
        RuntimeError: the weights do not fit together; the message names the argument.

    Example:
        >>> import torch
        >>> from mixrank_kernels import ops
        >>> mask, values = torch.tensor([[5], [2]], dtype=torch.uint8), torch.tensor([1, 2, 4], dtype=torch.int8)
        >>> weights = (mask, values, torch.tensor([1.0, 0.5]))
        >>> ops.int8_sparse_linear(torch.ones(1, 3), *weights, packed=packed_int8_sparse(*weights))
        tensor([[3., 2.]])
    """
    weights = (mask, values, scale, down, down_scale, up, up_scale)
    return _packed("_pack_int8_sparse", weights, tuple(weight for weight in weights if weight is not None))


def enable(enabled: bool) -> None:
    """Turn packing on (as it is at the start) or off for the whole process; either frees what is packed.

    Args:
        enabled: whether :func:`packed` and its like pack from now on.

    Example:
        >>> enable(False)
        >>> packed(torch.ones(2, 8), torch.ones(3, 2)) is None
        True
        >>> enable(True)
    """
    _cache.enabled = enabled
    clear()


def clear() -> None:
    """Free all packed factors; they are made anew when they are asked for.

    Example:
        >>> clear()
        >>> nbytes()
        0
    """
    _cache.entries.clear()


def nbytes() -> int:
    """Bytes that all packed factors of this process take.

    Example:
        >>> clear()
        >>> nbytes()
        0
    """
    return sum(entry.packed.nbytes for entry in list(_cache.entries.values()))


define("lowrank_linear", packed)
define("pivoted_linear", packed_pivots)
define("sparse_linear", packed_sparse)
define_int8("int8_linear", lambda *, weight, dynamic, **_: packed_int8(weight, dynamic=dynamic))
define_int8("int8_lowrank_linear", lambda *, down, up, dynamic, **_: packed_int8(down, up, dynamic=dynamic))
define_int8("int8_sparse_linear", lambda *, x, bias, **weights: packed_int8_sparse(**weights))
