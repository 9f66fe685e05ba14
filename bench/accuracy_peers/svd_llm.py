"""SVD-LLM: whiten the inputs, then truncate the SVD (Wang et al. 2024, arXiv 2403.07378, section 3.1, algorithm 1).

``S S^T = X X^T`` by Cholesky, ``W S = U Sigma V^T``, ``W ~ U_R Sigma_R V_R^T S^-1``. A truncated singular value is then
the output error that it causes (theorem 3.2). Where ``X X^T`` is not positive definite, the published code adds
``(1e-6 - smallest eigenvalue) I`` to it. The later low-rank update is not part of this.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixrank_bench.accuracy_peers.factored import PeerFactors, factor_layers, truncatable
from mixrank_bench.accuracy_peers.statistics import Calibration, InputStats

SMALLEST = 1e-6


def whitening(gram: Tensor) -> Tensor:
    """The lower triangular S ``[K, K]`` with ``S S^T`` = ``gram``, moved to positive definite if it is not."""
    root, failed = torch.linalg.cholesky_ex(gram)
    if failed:
        lift = SMALLEST - torch.linalg.eigvalsh(gram)[0]
        root = torch.linalg.cholesky(gram + lift * torch.eye(len(gram), dtype=gram.dtype))
    return root


def factors(weight: Tensor, stats: InputStats) -> tuple[Tensor, Tensor]:
    """``down [S, K]`` and ``up [N, S]`` of one layer."""
    root = whitening(stats.gram)
    up, right = truncatable(weight @ root)
    return torch.linalg.solve_triangular(root, right, upper=False, left=False), up


def prepare(model: nn.Module, calibration: Calibration) -> dict[str, PeerFactors]:
    """The factors of every layer."""
    return factor_layers(model, calibration, factors)
