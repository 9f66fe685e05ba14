"""How much a loss of each sparse layer counts: what its squared gradients say, corrected by what the layer really does.

Squared gradients tell the loss of a model to second order, for small changes of one layer. At a real budget the layers
lose much, and one of them moves the answers several times as far as the other for the same loss by the measure. So a
first plan is made, each of its layers alone takes the place of the dense one on images held out, and the divergence of
the logits is compared with the loss that was foretold. All layers together do not act as the sum of the single ones,
so the power :data:`POWER` of that ratio is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from mixrank.arguments import Limits
from mixrank.progress import track
from mixrank.sensitivity import measure_layers
from mixrank.sparse import PULL, Split
from mixrank.sparse_fit import TRIAL, Spending, bias_of
from mixrank.sparse_plan import RANK_SHARE
from mixrank.stats import CalibrationStats

POWER = 0.4


def weigh_layers(
    model: nn.Module,
    stats: CalibrationStats,
    batches: Iterable[Tensor],
    limits: Limits,
    rank_share: float = RANK_SHARE,
    pull: float = PULL,
    *,
    power: float = POWER,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """By layer what the losses of its entries are to be multiplied by.

    Args:
        model: the dense classifier; it is as it was afterwards.
        stats: of :func:`mixrank.sparse_fit.sparse_statistics`; those of images held out are not used.
        batches: image tensors ``[B, C, H, W]`` of the images held out; a few dozen images tell the layers apart.
        limits: the budget.
        rank_share: as for :func:`mixrank.sparse_fit.put_sparse_`.
        pull: the same.
        power: of the ratio of what was measured to what was foretold.
        dtype: run the model under autocast in this dtype.
        progress: show progress bars.

    Raises:
        InputError: a bad budget or option, or from :func:`mixrank.sensitivity.measure_layers`.
    """
    stats = stats.without_held_out()
    spending = Spending.of(model, stats.idle, limits, rank_share, pull)
    layers: dict[str, nn.Linear] = {}
    losses: dict[str, float] = {}
    entries = spending.entries(stats, progress=progress)
    for name in track(entries, "splitting weights", enabled=progress):
        if (count := entries[name]) is not None:
            found = spending.split(name, stats, count, **TRIAL)
            losses[name], layers[name] = found.loss, _dense(spending.linears[name], found)
    divergences = measure_layers(model, layers, layers.__getitem__, batches, dtype=dtype, progress=progress)
    return dict.fromkeys(entries, 1.0) | weights_of(divergences, losses, power)


def weights_of(divergences: Mapping[str, float], losses: Mapping[str, float], power: float = POWER) -> dict[str, float]:
    """A power of what was measured by what was foretold, with 1 as the geometric mean.

    A layer of which one of them is zero counts as foretold.

    Args:
        divergences: by layer, in nats.
        losses: of the same layers, in any unit.
        power: of the ratio.
    """
    logs = {
        name: math.log(divergences[name] / losses[name]) for name in losses if min(divergences[name], losses[name]) > 0
    }
    mean = sum(logs.values()) / max(1, len(logs))
    return {name: math.exp(power * (logs[name] - mean)) if name in logs else 1.0 for name in losses}


def _dense(linear: nn.Linear, found: Split) -> nn.Linear:
    """A dense layer of the split weight: it is gone through a few times only."""
    layer = nn.Linear(linear.in_features, linear.out_features, device="meta")
    for name, value in (("weight", found.weight), ("bias", bias_of(linear, found))):
        setattr(layer, name, nn.Parameter(value.to(linear.weight.device, linear.weight.dtype), requires_grad=False))
    return layer.eval()
