"""Triton implementations of the operators: CUDA tensors, or CPU tensors under Triton's interpreter.

Importing this package imports Triton; ``mixrank_kernels`` itself does not import it.
"""

from mixrank_kernels.triton._common import is_interpreted
from mixrank_kernels.triton.factor_grad import factor_grad
from mixrank_kernels.triton.gram import (
    cross_gram_accumulate_,
    gram_accumulate_,
    gram_partial_kernel,
    gram_reduce_kernel,
)
from mixrank_kernels.triton.lowrank_linear import (
    lowrank_down_kernel,
    lowrank_linear,
    lowrank_residual_linear,
    lowrank_up_kernel,
)

KERNELS = (lowrank_down_kernel, lowrank_up_kernel, gram_partial_kernel, gram_reduce_kernel)

__all__ = [
    "KERNELS",
    "cross_gram_accumulate_",
    "factor_grad",
    "gram_accumulate_",
    "is_interpreted",
    "lowrank_linear",
    "lowrank_residual_linear",
]
