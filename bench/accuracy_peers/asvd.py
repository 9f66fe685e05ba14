"""ASVD: scale the input channels by how large they are, then truncate the SVD (Yuan et al. 2023, arXiv 2312.05821).

Section 3.2: ``S_ii = (mean |x_i|)^alpha``, ``W S = U Sigma V^T``, ``W ~ U_R Sigma_R V_R^T S^-1``, with the paper's
alpha = 0.5. The published code adds 1e-6 to S against a division by zero, and so do we.
"""

from __future__ import annotations

from torch import Tensor, nn

from mixrank_bench.accuracy_peers.factored import PeerFactors, factor_layers, truncatable
from mixrank_bench.accuracy_peers.statistics import Calibration, InputStats

ALPHA = 0.5
SMALLEST = 1e-6


def scale(stats: InputStats) -> Tensor:
    """The diagonal of S ``[K]``."""
    return (stats.absolute / stats.rows) ** ALPHA + SMALLEST


def factors(weight: Tensor, stats: InputStats) -> tuple[Tensor, Tensor]:
    """``down [S, K]`` and ``up [N, S]`` of one layer."""
    diagonal = scale(stats)
    up, right = truncatable(weight * diagonal)
    return right / diagonal, up


def prepare(model: nn.Module, calibration: Calibration) -> dict[str, PeerFactors]:
    """The factors of every layer."""
    return factor_layers(model, calibration, factors)
