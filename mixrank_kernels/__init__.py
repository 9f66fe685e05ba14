"""Operators for mixed-rank models: fused low-rank linear layers, also in 8 bits or with sparse weights, and
Gram-matrix accumulation.

Importing the package registers the operators and loads the compiled extension where there is one; it
touches neither CUDA nor Triton. :mod:`mixrank_kernels.backend` tells which implementation serves a call.
"""

from __future__ import annotations

from mixrank_kernels import _register, backend
from mixrank_kernels._version import __version__
from mixrank_kernels.ops import (
    cross_gram_accumulate_,
    gram_accumulate_,
    int8_linear,
    int8_lowrank_linear,
    int8_sparse_linear,
    lowrank_linear,
    lowrank_residual_linear,
    pivoted_linear,
    sparse_linear,
)

HAS_EXTENSION: bool = _register.extension is not None

__all__ = [
    "HAS_EXTENSION",
    "__version__",
    "backend",
    "cross_gram_accumulate_",
    "gram_accumulate_",
    "int8_linear",
    "int8_lowrank_linear",
    "int8_sparse_linear",
    "lowrank_linear",
    "lowrank_residual_linear",
    "pivoted_linear",
    "sparse_linear",
]
