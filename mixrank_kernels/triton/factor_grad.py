"""(x @ down^T)^T @ grad, the gradient of up^T in y = (x @ down^T) @ up^T; that of down is the same with swapped roles.

Shapes: x [..., K] and grad [..., N] of M rows each, down [R, K], product [R, N] contiguous; any strides of the
operands, which have one dtype: bf16, fp16, fp32 or fp64. ``lowrank_down_kernel`` writes x @ down^T, and the Gram
kernels contract it with grad over ranges of rows whose sums they add in order: the result does not depend on timing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixrank_kernels.triton._common import as_rows, launch_guard
from mixrank_kernels.triton.config import LOWRANK, operand_class
from mixrank_kernels.triton.gram import product_over_rows
from mixrank_kernels.triton.lowrank_linear import launch_down


def factor_grad(
    x: Tensor,  # [..., K]
    down: Tensor,  # [R, K]
    grad: Tensor,  # [..., N]
) -> Tensor:  # [R, N]
    """(x @ down^T)^T @ grad in the dtype of the operands, the intermediate in that dtype too, but fp32 for fp16.

    Raises:
        RuntimeError: the tensors are not on CUDA and the interpreter is off, or it is on and they are bfloat16.
    """
    r, k = down.shape
    m = x.numel() // k
    with launch_guard("factor_grad", x):
        if m == 0:
            return grad.new_zeros((r, grad.shape[-1]))
        # One rounding to bf16 is what two linear layers do; in fp16 the intermediate could overflow.
        hidden = x.new_empty((m, r), dtype=torch.float32 if x.dtype == torch.float16 else x.dtype)
        launch_down(hidden, 0, as_rows(x), down, LOWRANK[operand_class(x.dtype), "down"])
        return product_over_rows(hidden, grad)
