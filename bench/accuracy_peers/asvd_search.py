"""ASVD's sensitivity-based search of the ranks (Yuan et al. 2023, arXiv 2312.05821, section 3.3, algorithm 1).

Every layer alone is cut to 0.1, 0.2 ... 0.9 of its weights, and the damage to the model is measured on a few
calibration samples. All pairs of layer and share are sorted by damage; a threshold, found by bisection, says from where
on they are applied, each layer taking its smallest share; a layer without any stays dense. The damage is perplexity in
the paper. A classifier without labels has none, so its place is taken by the cross-entropy with the dense model's own
predictions, which differs from the mean KL measured here by a constant.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mixrank.counting import count_parameters
from mixrank.errors import InputError
from mixrank.fidelity import divergence
from mixrank.models import compressible_linears
from mixrank.nn import MixedRankLinear
from mixrank_bench.accuracy_peers import asvd
from mixrank_bench.accuracy_peers.blocks import check_blocks, first_inputs, run_block, run_from
from mixrank_bench.accuracy_peers.factored import Compressed, PeerFactors
from mixrank_bench.accuracy_peers.statistics import Calibration

SHARES = tuple(tenths / 10 for tenths in range(1, 10))
SAMPLES = 32


@dataclass(frozen=True)
class Searchable:
    """The factors of every layer, and the damage of each (layer name, share) alone."""

    factors: dict[str, PeerFactors]
    damage: dict[tuple[str, float], float]


def rank_of(linear: nn.Linear, share: float) -> int:
    """The rank that leaves a layer this share of its weights, rounded down, at least 1."""
    return max(1, int(share * linear.weight.numel()) // (linear.in_features + linear.out_features))


def sensitivity(
    model: nn.Module, factors: Mapping[str, PeerFactors], images: list[Tensor], *, dtype: torch.dtype | None = None
) -> dict[tuple[str, float], float]:
    """Mean KL(dense || model with this layer cut to this share) over the images; the model comes back as it was."""
    damage = {}
    states = first_inputs(model, images, dtype=dtype)
    dense = torch.cat([run_from(model, 0, state, dtype=dtype) for state in states])
    for number, block in enumerate(check_blocks(model)):
        for local, linear in compressible_linears(block).items():
            name = f"blocks.{number}.{local}"
            for share in SHARES:
                layer = MixedRankLinear.from_factors(*factors[name].factors(rank_of(linear, share)))
                model.set_submodule(name, layer)
                try:
                    logits = torch.cat([run_from(model, number, state, dtype=dtype) for state in states])
                finally:
                    model.set_submodule(name, linear)
                damage[name, share] = divergence(logits, dense).mean().item()
        states = run_block(block, states, dtype=dtype)
    return damage


def search(model: nn.Module, damage: Mapping[tuple[str, float], float], keep: float) -> dict[str, float]:
    """The share of each layer that is to be cut so that the whole model keeps at most ``keep`` of its parameters.

    Raises:
        InputError: the smallest shares of all layers are more than the budget.
    """
    linears = compressible_linears(model)
    total = count_parameters(model)
    ordered = sorted(damage, key=damage.__getitem__, reverse=True)

    def shares(first: int) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, share in ordered[first:]:
            found[name] = min(share, found.get(name, 1.0))
        return found

    def parameters(first: int) -> int:
        saved = 0
        for name, share in shares(first).items():
            linear = linears[name]
            saved += linear.weight.numel() - rank_of(linear, share) * (linear.in_features + linear.out_features)
        return total - saved

    fitting = bisect.bisect_right(range(len(ordered) + 1), keep * total, key=parameters)
    if fitting == 0:
        raise InputError(f"keep must be at least {parameters(0) / total:.4f} for this search, but it was {keep}")
    return shares(fitting - 1)


def prepare(model: nn.Module, calibration: Calibration) -> Searchable:
    """Factor every layer and measure how much each cut of it alone does to the model."""
    factors = asvd.prepare(model, calibration)
    images = torch.cat(calibration.images)[:SAMPLES].split(16)
    return Searchable(factors, sensitivity(model, factors, list(images), dtype=calibration.dtype))


def compress(model: nn.Module, prepared: Searchable, keep: float) -> Compressed:
    """Cut the layers that the search names, in place."""
    linears = compressible_linears(model)
    ranks: dict[str, int | None] = dict.fromkeys(linears)
    ranks |= {name: rank_of(linears[name], share) for name, share in search(model, prepared.damage, keep).items()}
    for name, rank in ranks.items():
        if rank is not None:
            model.set_submodule(name, MixedRankLinear.from_factors(*prepared.factors[name].factors(rank)))
    return Compressed(count_parameters(model), {"ranks": ranks})
