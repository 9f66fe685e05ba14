"""Structured pruning by Torch-Pruning's own recipe for timm's vision transformers (Fang et al. 2023, arXiv 2301.12900).

The library itself is called, as its example ``examples/transformers/prune_timm_vit.py`` does: group L2 norms
(``GroupMagnitudeImportance(p=2)``), the dimensions of each head and the hidden neurons, one ratio for all layers,
rounded to 2; in the form called uniform the embedding too, in the one called bottleneck only what lies inside attention
and MLP. The example goes on with 300 epochs of training, which is left out here as for all methods.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from torch import nn

from mixrank.counting import count_parameters
from mixrank.errors import InputError
from mixrank.models import preprocessing
from mixrank_bench.accuracy_peers.factored import Compressed
from mixrank_bench.accuracy_peers.statistics import Calibration

ROUND_TO = 2
STEPS = 64
"""The ratios that are tried are multiples of one part in so many."""


def prune_(model: nn.Module, ratio: float, *, bottleneck: bool) -> None:
    """Prune a vision transformer of timm by one ratio, in place."""
    import torch_pruning
    from timm.layers import Attention, Mlp

    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    ignored = [model.get_classifier()]
    if bottleneck:
        ignored += [module.fc2 for module in model.modules() if isinstance(module, Mlp)]
    pruner = torch_pruning.pruner.BasePruner(
        model,
        torch.zeros(1, *preprocessing(model)["input_size"]),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        global_pruning=False,
        pruning_ratio=ratio,
        ignored_layers=ignored,
        num_heads={module.qkv: module.num_heads for module in attentions},
        prune_num_heads=False,
        prune_head_dims=True,
        round_to=ROUND_TO,
    )
    with torch.enable_grad():
        for group in pruner.step(interactive=True):
            group.prune()
    for module in attentions:
        module.num_heads = pruner.num_heads[module.qkv]
        module.attn_dim = module.qkv.out_features // 3
        module.head_dim = module.attn_dim // module.num_heads


def prune_to_(
    model: nn.Module, size: Callable[[nn.Module], int], share: float, name: str, steps: int, *, bottleneck: bool
) -> float:
    """Prune with the smallest ratio that leaves at most a share of a size, in place; returns the ratio.

    Args:
        model: a vision transformer of timm.
        size: of a model.
        share: of the size of ``model``.
        name: what the share is called in messages.
        steps: the ratios that are tried are multiples of one part in so many.
        bottleneck: see the module.

    Raises:
        InputError: no ratio does.
    """
    whole = size(model)

    @functools.cache
    def left(step: int) -> int:
        trial = copy.deepcopy(model)
        prune_(trial, step / steps, bottleneck=bottleneck)
        return size(trial)

    # Ratios that would leave nothing of a layer leave all of it, so the highest ones can leave more than others.
    low, high = 0, next((step for step in reversed(range(steps)) if left(step) <= share * whole), 0)
    if high == 0:
        least = min(map(left, range(steps))) / whole
        raise InputError(f"{name} must be at least {least:.4f} here, but it was {share}")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if left(middle) <= share * whole else (middle, high)
    prune_(model, high / steps, bottleneck=bottleneck)
    return high / steps


def compress(model: nn.Module, _calibration: Calibration, keep: float, *, bottleneck: bool) -> Compressed:
    """Prune with the smallest ratio that leaves at most ``keep`` of the parameters, in place.

    Raises:
        InputError: no ratio does.
    """
    ratio = prune_to_(model, count_parameters, keep, "keep", STEPS, bottleneck=bottleneck)
    return Compressed(count_parameters(model), {"ratio": ratio})
