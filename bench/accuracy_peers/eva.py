"""EVA: project on the leading directions of the activations (Paischer et al. 2024, arXiv 2410.07170, section 3).

The right singular vectors ``V_R`` of the activations X are the down projection, ``down = V_R^T``; the paper starts an
adapter with them. As a compressed weight ``up = W V_R``, so that ``W ~ W V_R V_R^T``. X is not centred (the paper's
SVD of X; its code in the library peft does an incremental PCA, which takes out the mean), because a weight has nowhere
to keep a mean. Ranks are uniform; the paper's own redistribution is of a sum of ranks, not of parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixrank_bench.accuracy_peers.factored import PeerFactors, factor_layers
from mixrank_bench.accuracy_peers.statistics import Calibration, InputStats


def factors(weight: Tensor, stats: InputStats) -> tuple[Tensor, Tensor]:
    """``down [S, K]`` and ``up [N, S]`` of one layer."""
    directions = torch.linalg.eigh(stats.gram)[1].flip(1)[:, : min(weight.shape)]
    return directions.mT, weight @ directions


def prepare(model: nn.Module, calibration: Calibration) -> dict[str, PeerFactors]:
    """The factors of every layer."""
    return factor_layers(model, calibration, factors)
