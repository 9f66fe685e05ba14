"""Work of the operators, for ``torch.utils.flop_counter.FlopCounterMode``; importing this module registers it.

It is a module of its own because PyTorch's counter imports Triton, and importing the package must not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

__all__ = ["FlopCounterMode"]

Shape: TypeAlias = Sequence[int]


@register_flop_formula(
    [torch.ops.mixrank_kernels.lowrank_linear, torch.ops.mixrank_kernels._lowrank_linear_self_packed]
)
def lowrank_linear(
    x_shape: Shape, down_shape: Shape, up_shape: Shape, *_rest: object, out_shape: object = None, **_kwargs: object
) -> int:
    """Two operations for every multiply-accumulate: ``2 * M * R * (K + N)``."""
    rank, k = down_shape
    return 2 * math.prod(x_shape[:-1]) * rank * (k + up_shape[0])


@register_flop_formula(torch.ops.mixrank_kernels.lowrank_residual_linear)
def lowrank_residual_linear(
    x_shape: Shape,
    down_shape: Shape,
    up_shape: Shape,
    bias_shape: Shape | None = None,
    residual_down_shape: Shape | None = None,
    residual_up_shape: Shape | None = None,
    crow_shape: Shape | None = None,
    col_shape: Shape | None = None,
    values_shape: Shape | None = None,
    *_packed: object,
    out_shape: object = None,
    **_kwargs: object,
) -> int:
    """That of the factors, of the residual's factors, and of the blocks that are stored: ``2 * M * nnz * b * b``."""
    total = lowrank_linear(x_shape, down_shape, up_shape)
    if residual_down_shape is not None:
        assert residual_up_shape is not None
        total += lowrank_linear(x_shape, residual_down_shape, residual_up_shape)
    if values_shape is not None:
        total += 2 * math.prod(x_shape[:-1]) * math.prod(values_shape)
    return total


@register_flop_formula(
    [torch.ops.mixrank_kernels.pivoted_linear, torch.ops.mixrank_kernels._pivoted_linear_self_packed]
)
def pivoted_linear(
    x_shape: Shape,
    down_shape: Shape,
    coefficients_shape: Shape,
    *_rest: object,
    out_shape: object = None,
    **_kwargs: object,
) -> int:
    """That of the two products, of which the first one makes R of the N columns: ``2 * M * R * (K + N - R)``."""
    return lowrank_linear(x_shape, down_shape, coefficients_shape)


@register_flop_formula([torch.ops.mixrank_kernels.sparse_linear, torch.ops.mixrank_kernels._sparse_linear_self_packed])
def sparse_linear(
    x_shape: Shape,
    mask_shape: Shape,
    values_shape: Shape,
    down_shape: Shape | None = None,
    up_shape: Shape | None = None,
    *_rest: object,
    out_shape: object = None,
    **_kwargs: object,
) -> int:
    """That of the stored entries, ``2 * M * nnz``, and of the factors: ``2 * M * R * (K + N)``."""
    total = 2 * math.prod(x_shape[:-1]) * values_shape[0]
    if down_shape is not None:
        assert up_shape is not None
        total += lowrank_linear(x_shape, down_shape, up_shape)
    return total


@register_flop_formula(torch.ops.mixrank_kernels.gram_accumulate_)
def gram_accumulate_(
    gram_shape: Shape, x_shape: Shape, *_rest: object, out_shape: object = None, **_kwargs: object
) -> int:
    """One triangle with its diagonal: ``M * K * (K + 1)``."""
    return math.prod(x_shape) * (gram_shape[-1] + 1)


@register_flop_formula(torch.ops.mixrank_kernels.cross_gram_accumulate_)
def cross_gram_accumulate_(
    cross_shape: Shape, x_shape: Shape, z_shape: Shape, *_rest: object, out_shape: object = None, **_kwargs: object
) -> int:
    """Two operations for every multiply-accumulate: ``2 * M * K * N``."""
    return 2 * math.prod(x_shape) * z_shape[-1]


@register_flop_formula([torch.ops.mixrank_kernels.int8_linear, torch.ops.mixrank_kernels._int8_linear_self_packed])
def int8_linear(
    x_shape: Shape, weight_shape: Shape, *_rest: object, out_shape: object = None, **_kwargs: object
) -> int:
    """Two operations for every multiply-accumulate, whatever it is made in: ``2 * M * K * N``."""
    return 2 * math.prod(x_shape) * weight_shape[0]


@register_flop_formula(
    [torch.ops.mixrank_kernels.int8_sparse_linear, torch.ops.mixrank_kernels._int8_sparse_linear_self_packed]
)
def int8_sparse_linear(
    x_shape: Shape,
    mask_shape: Shape,
    values_shape: Shape,
    scale_shape: Shape,
    down_shape: Shape | None = None,
    down_scale_shape: Shape | None = None,
    up_shape: Shape | None = None,
    *_rest: object,
    out_shape: object = None,
    **_kwargs: object,
) -> int:
    """As for :func:`sparse_linear`."""
    return sparse_linear(x_shape, mask_shape, values_shape, down_shape, up_shape)


@register_flop_formula(
    [torch.ops.mixrank_kernels.int8_lowrank_linear, torch.ops.mixrank_kernels._int8_lowrank_linear_self_packed]
)
def int8_lowrank_linear(
    x_shape: Shape,
    down_shape: Shape,
    down_scale_shape: Shape,
    up_shape: Shape,
    *_rest: object,
    out_shape: object = None,
    **_kwargs: object,
) -> int:
    """That of both factors: ``2 * M * R * (K + rows of up)``."""
    return lowrank_linear(x_shape, down_shape, up_shape)
