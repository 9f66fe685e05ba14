"""mixrank: mixed-rank compression of vision transformers, served by fused kernels.

``compress`` does everything in one call; ``calibrate``, ``decompose``, ``allocate`` and ``apply_`` are its steps.
"""

from __future__ import annotations

from mixrank.allocate import allocate
from mixrank.apply import apply_
from mixrank.calibrate import calibrate
from mixrank.checkpoint import load, save
from mixrank.compensate import CompensationOptions, CompensationResult, compensate_
from mixrank.compress import compress
from mixrank.decompose import Factorisation, decompose
from mixrank.errors import InputError
from mixrank.evaluate import evaluate
from mixrank.models import create_model
from mixrank.nn import MixedRankLinear, SplitLinear
from mixrank.nn_int8 import Int8Linear, Int8MixedRankLinear, Int8PivotedLinear
from mixrank.nn_int8_sparse import Int8SparseLinear
from mixrank.nn_pivoted import PivotedLinear
from mixrank.nn_sparse import SparseLinear
from mixrank.plan import Plan
from mixrank.precision import fast_dtype
from mixrank.quantize import QuantizationResult, quantize_
from mixrank.result import CompressionResult
from mixrank.stats import CalibrationStats, LayerStats
from mixrank.sweep import SweepResult, SweepRow, sweep
from mixrank.weighting import Weighting
from mixrank_kernels import __version__

__all__ = [
    "CalibrationStats",
    "CompensationOptions",
    "CompensationResult",
    "CompressionResult",
    "Factorisation",
    "InputError",
    "Int8Linear",
    "Int8MixedRankLinear",
    "Int8PivotedLinear",
    "Int8SparseLinear",
    "LayerStats",
    "MixedRankLinear",
    "PivotedLinear",
    "Plan",
    "QuantizationResult",
    "SparseLinear",
    "SplitLinear",
    "SweepResult",
    "SweepRow",
    "Weighting",
    "__version__",
    "allocate",
    "apply_",
    "calibrate",
    "compensate_",
    "compress",
    "create_model",
    "decompose",
    "evaluate",
    "fast_dtype",
    "load",
    "quantize_",
    "save",
    "sweep",
]
