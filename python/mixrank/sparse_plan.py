"""How many entries each layer keeps: one threshold, in units of the loss for each number that is stored.

The costs of removal of :func:`mixrank.sparse.removal_costs` of all layers are in one unit, so entries go in their order
until the rest fits the budget. They are counted in classes of nearly equal cost, which takes no memory to speak of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mixrank.allocate import Budget
from mixrank.counting import count_parameters
from mixrank.decompose import LayerShape
from mixrank.errors import InputError
from mixrank.nn_sparse import mask_places
from mixrank.plan import LayerPlan, Plan

RANK_SHARE = 0.2
_LOWEST, _HIGHEST = -120, 64  # log2 of the costs that are told apart
_FINENESS = 256
CLASSES = (_HIGHEST - _LOWEST) * _FINENESS
"""Of costs, so many to an octave."""


def histogram(costs: Tensor, price: float = 1.0) -> Tensor:
    """How many entries there are of each class of cost by price, ``[CLASSES]`` int64, the highest cost first.

    Args:
        costs: any shape, not negative.
        price: of storing one of these entries, above 0.
    """
    place = (costs.flatten().clamp(min=2.0**_LOWEST).log2() - math.log2(price) - _LOWEST) * _FINENESS
    return place.long().clamp(0, CLASSES - 1).bincount(minlength=CLASSES).flip(0)


def scaled(counted: Tensor, factor: float) -> Tensor:
    """The :func:`histogram` of so many times the costs; ``factor`` is above 0."""
    places = (torch.arange(CLASSES) - round(math.log2(factor) * _FINENESS)).clamp_(0, CLASSES - 1)
    return torch.zeros_like(counted).index_add_(0, places, counted)


@dataclass(frozen=True)
class Prices:
    """What a layer costs in units of the budget.

    Attributes:
        dense: as it is.
        entry: one stored entry, a number of the factors, or a weight of the dense layer.
        places: where the entries are, and the bias.
        factors: those of its rank.
    """

    dense: int
    entry: int
    places: int
    factors: int

    @classmethod
    def of(cls, budget: Budget, name: str, shape: LayerShape, rank: int) -> Prices:
        """Of a layer of this rank; the places count in parameters and bytes."""
        entry, k, n = budget.per_weight[name], shape.in_features, shape.out_features
        places = {"parameters": mask_places(k, n), "bytes": n * -(-k // 8), "macs": 0}[budget.unit]
        places += n * shape.factored_bias * budget.per_bias[name]
        return cls(budget.cost(name, shape, None), entry, places, rank * (k + n) * entry)


def ranks_of(shapes: Mapping[str, LayerShape], budget: Budget, available: int, share: float) -> dict[str, int]:
    """The ranks of the factors: the same share of every layer's numbers, in multiples of 8.

    Small layers, whose share is less than 8 ranks, have 8 where these take at most twice the share and half of all.

    Args:
        shapes: of the layers.
        budget: with what their weights cost.
        available: what they may cost.
        share: of that which the factors take, in [0, 1).
    """
    dense = sum(shape.in_features * shape.out_features * budget.per_weight[name] for name, shape in shapes.items())
    kept = min(1.0, available / dense)
    return {name: _rank_of(share, kept, *shape.sizes) for name, shape in shapes.items()}


def _rank_of(share: float, kept: float, n: int, k: int) -> int:
    numbers, step = kept * n * k, 8 * (n + k)
    steps = int(share * numbers / step)
    return 8 * (steps or int(step <= min(2 * share, 0.5) * numbers))


def choose_entries(
    histograms: Mapping[str, Tensor], prices: Mapping[str, Prices], available: int
) -> dict[str, int | None]:
    """The entries of each layer, or None where the dense weight is no dearer.

    Args:
        histograms: of the costs of each layer's entries by their price, see :func:`histogram`.
        prices: of each layer.
        available: what all layers may cost together.

    Raises:
        InputError: places and factors alone cost more.
    """
    dense: set[str] = set()
    while True:
        rest = [name for name in prices if name not in dense]
        left = available - sum(prices[name].dense for name in dense)
        left -= sum(prices[name].places + prices[name].factors for name in rest)
        if left < 0:
            raise InputError(
                f"keep, max_bytes or max_macs must leave the layers {available - left} at least, but it leaves "
                f"{available}"
            )
        spent = sum((histograms[name] * prices[name].entry for name in rest), torch.zeros(CLASSES, dtype=torch.int64))
        full = int((spent.cumsum(0) <= left).sum())  # so many classes stay whole
        chosen = {name: int(histograms[name][:full].sum()) for name in rest}
        left -= sum(chosen[name] * prices[name].entry for name in rest)
        for name in rest:  # of the next class some
            more = min(left // prices[name].entry, int(histograms[name][full])) if full < CLASSES else 0
            chosen[name], left = chosen[name] + more, left - more * prices[name].entry
        over = {name for name in rest if _cost(prices[name], chosen[name]) >= prices[name].dense}
        if not over:
            return {name: None if name in dense else chosen[name] for name in prices}
        dense |= over


def _cost(price: Prices, entries: int) -> int:
    return price.places + price.factors + entries * price.entry


def sparse_plan(
    model: nn.Module,
    shapes: Mapping[str, LayerShape],
    ranks: Mapping[str, int],
    entries: Mapping[str, int | None],
    options: dict,
) -> Plan:
    """The plan of so many entries, and of ranks, for each layer.

    Args:
        model: the dense model.
        shapes: of its layers.
        ranks: of their factors, 0 for none.
        entries: of each; None where it stays dense.
        options: for the record.
    """
    layers = []
    for name, shape in shapes.items():
        k, n, count, rank = shape.in_features, shape.out_features, entries[name], ranks[name]
        before = k * n + n * shape.bias
        if count is None:
            layers.append(LayerPlan(name, k, n, None, shape.bias, before, before))
            continue
        after = count + rank * (k + n) + mask_places(k, n) + n * shape.factored_bias
        layers.append(LayerPlan(name, k, n, rank, shape.factored_bias, before, after, "sparse", count))
    total = count_parameters(model)
    after = total - sum(layer.parameters_before - layer.parameters_after for layer in layers)
    return Plan(tuple(layers), total, after, (), options)
