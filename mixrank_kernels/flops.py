"""Work of the operators, for ``torch.utils.flop_counter.FlopCounterMode``; importing this module registers it.

It is a module of its own because PyTorch's counter imports Triton, and importing the package must not.
"""

from __future__ import annotations

import math

import torch
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

__all__ = ["FlopCounterMode"]


@register_flop_formula(torch.ops.mixrank_kernels.lowrank_linear)
def lowrank_linear(x_shape, down_shape, up_shape, *_bias, out_shape=None, **_kwargs) -> int:
    """Two operations for every multiply-accumulate: ``2 * M * R * (K + N)``."""
    rank, k = down_shape
    return 2 * math.prod(x_shape[:-1]) * rank * (k + up_shape[0])


@register_flop_formula(torch.ops.mixrank_kernels.gram_accumulate_)
def gram_accumulate_(gram_shape, x_shape, *_rest, out_shape=None, **_kwargs) -> int:
    """One triangle with its diagonal: ``M * K * (K + 1)``."""
    return math.prod(x_shape) * (gram_shape[-1] + 1)
