"""CorDA: decompose the weight along the covariance of its inputs (Yang et al. 2024, arXiv 2406.05223, section 3.2).

``C = X X^T``, ``W C = U Sigma V^T``, ``W = U Sigma V^T C^-1``. The paper trains some of the components as an adapter
and keeps the others; here the leading ones are the compressed weight, and the others are dropped. As in the published
code (and in the library peft) C is first damped by 0.01 times the mean of its diagonal. That code doubles the damping
until the inverse of its fp32 matrix is accurate; in float64 it is at once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixrank_bench.accuracy_peers.factored import PeerFactors, factor_layers, truncatable
from mixrank_bench.accuracy_peers.statistics import Calibration, InputStats

DAMPING = 0.01


def covariance(stats: InputStats) -> Tensor:
    """The damped second moment of the inputs ``[K, K]``."""
    second = stats.gram / stats.rows
    return second + DAMPING * second.diagonal().mean() * torch.eye(len(second), dtype=second.dtype)


def factors(weight: Tensor, stats: InputStats) -> tuple[Tensor, Tensor]:
    """``down [S, K]`` and ``up [N, S]`` of one layer."""
    damped = covariance(stats)
    up, right = truncatable(weight @ damped)
    return torch.linalg.solve(damped, right, left=False), up


def prepare(model: nn.Module, calibration: Calibration) -> dict[str, PeerFactors]:
    """The factors of every layer."""
    return factor_layers(model, calibration, factors)
