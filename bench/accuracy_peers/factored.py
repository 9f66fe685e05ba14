"""What the low-rank methods share: factors of every layer for every rank, ranks under one budget, and applying them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mixrank.allocate import allocate
from mixrank.apply import apply_
from mixrank.counting import count_parameters
from mixrank.decompose import LayerShape
from mixrank.errors import InputError
from mixrank.models import compressible_linears
from mixrank.plan import Plan
from mixrank_bench.accuracy_peers.statistics import Calibration, InputStats

LayerRule = Callable[[Tensor, InputStats], tuple[Tensor, Tensor]]
"""From a weight ``[N, K]`` float64 and the layer's statistics to ``down [S, K]`` and ``up [N, S]``, S = min(N, K).
The most important component comes first: factors of rank R are the first R rows of the one and columns of the other."""


@dataclass(frozen=True)
class Compressed:
    """What a method made of a model.

    Attributes:
        parameters: numbers that the whole compressed model stores, as the budget counts them.
        details: what else belongs into the row of results, in terms of JSON.
    """

    parameters: int
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PeerFactors:
    """The factors of one layer for every rank, as ``mixrank.allocate`` and ``mixrank.apply_`` take them.

    Attributes:
        shape: the sizes of the layer.
        down: ``[S, K]`` in the layer's dtype.
        up: ``[N, S]`` in the layer's dtype.
        bias: ``[N]`` or None.
        weight_energy: ``[S]`` float64, squared singular values of the weight as shares of their sum: what mixed ranks
            go by, the same for every method.
    """

    shape: LayerShape
    down: Tensor
    up: Tensor
    bias: Tensor | None
    weight_energy: Tensor

    def factors(self, rank: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return ``down [R, K]``, ``up [N, R]`` and the bias for one rank."""
        return self.down[:rank].contiguous(), self.up[:, :rank].contiguous(), self.bias


def factor_layers(model: nn.Module, calibration: Calibration, rule: LayerRule) -> dict[str, PeerFactors]:
    """Factor every compressible layer of a model by one rule, in float64; the model is not changed."""
    result = {}
    for name, linear in compressible_linears(model).items():
        weight = linear.weight.detach().double()
        down, up = rule(weight, calibration.layers[name])
        energy = torch.linalg.eigvalsh(weight @ weight.mT if len(weight) <= weight.shape[1] else weight.mT @ weight)
        energy = energy.flip(0).clamp(min=0)
        result[name] = PeerFactors(
            shape=LayerShape.of(linear, centre=False),
            down=down.to(linear.weight.dtype),
            up=up.to(linear.weight.dtype),
            bias=None if linear.bias is None else linear.bias.detach(),
            weight_energy=energy / energy.sum(),
        )
    return result


def compress_uniform(model: nn.Module, factors: Mapping[str, PeerFactors], keep: float) -> Compressed:
    """Give every layer the same share of its weights, R = floor(share N K / (N + K)), in place.

    The rule of SVD-LLM (Wang et al. 2024) and of ASVD (Yuan et al. 2023) without its search; the share is the largest
    that leaves the whole model within ``keep``.
    """
    return _apply(model, factors, allocate(model, factors, keep=keep, ranks="uniform", step=1))


def compress_mixed(model: nn.Module, factors: Mapping[str, PeerFactors], keep: float) -> Compressed:
    """Give every layer a rank by the product's mixed allocation on weight energy, in place."""
    return _apply(model, factors, allocate(model, factors, keep=keep, ranks="mixed", energy="weight"))


def _apply(model: nn.Module, factors: Mapping[str, PeerFactors], plan: Plan) -> Compressed:
    return compressed(apply_(model, plan, factors), plan)


def compressed(model: nn.Module, plan: Plan) -> Compressed:
    """What there is to tell of a model to which a plan was applied."""
    return Compressed(count_parameters(model), {"ranks": {layer.name: layer.rank for layer in plan.layers}})


def truncatable(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The singular value decomposition ``U Sigma V^T`` of ``[N, K]`` as two factors ``[N, S]`` and ``[S, K]``.

    The first R columns and rows of them multiply to ``U_R Sigma_R V_R^T``. For N <= K they are U and ``Sigma V^T``, for
    N > K ``U Sigma`` and V^T. The singular vectors of the shorter side are the eigenvectors of its Gram matrix, which
    takes a fifth of the time of an SVD, and what stands on the other side is a product with them, without a division.
    """
    if len(matrix) > matrix.shape[1]:
        right, left = truncatable(matrix.mT)
        return left.mT, right.mT
    left = torch.linalg.eigh(matrix @ matrix.mT)[1].flip(1)
    return left, left.mT @ matrix


def layer_share(model: nn.Module, keep: float) -> float:
    """The share of every compressible weight that may stay so that the whole model keeps ``keep`` of its parameters.

    Raises:
        InputError: what lies outside those weights is more than the budget already.
    """
    weights = sum(linear.weight.numel() for linear in compressible_linears(model).values())
    total = count_parameters(model)
    share = (math.floor(keep * total) - (total - weights)) / weights
    if not 0 < share <= 1:
        least = (total - weights) / total
        raise InputError(f"keep must be above {least:.4f} and at most 1 for this model, but it was {keep}")
    return share
