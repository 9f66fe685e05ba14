"""Removing parts at once, without training: all groups that the loss needs least for what they cost."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mixrank.uvc.importance import Inputs, importance_of, take_over_
from mixrank.uvc.landing import kept_by, land, macs_of
from mixrank.uvc.primal_dual import BlockVariables, Groups, groups_of
from mixrank.uvc.shrink import shrink_
from mixrank.uvc.structure import Structure, parts_of, structure_of

_HALVINGS = 60
_WIDEST = 40.0  # of the logarithm of a threshold, to both sides


def prune_once_(
    model: nn.Module, found: Sequence[tuple[Inputs, Inputs]], budget: float, multiple: int = 1
) -> nn.Module:
    """Remove heads, columns and neurons of the least importance for each multiply-add, in place; the others take over.

    Args:
        model: as for :func:`mixrank.uvc.run.compress_uvc_`.
        found: what :func:`mixrank.uvc.importance.observe` saw of it.
        budget: share of the multiply-adds that may remain, in (0, 1).
        multiple: as :func:`mixrank.uvc.landing.land` takes it.

    Returns:
        ``model``.

    Raises:
        InputError: as :func:`mixrank.uvc.landing.land`. The model is then as it was.
    """
    parts, structure = parts_of(model), structure_of(model)
    groups = groups_of(parts, [importance_of(*pair) for pair in zip(parts, found, strict=True)])
    gates = torch.ones(len(parts))
    kept = land(structure, groups, below_a_threshold(structure, groups, budget), gates, budget, multiple)
    take_over_(parts, kept, found)
    return shrink_(model, kept)


def below_a_threshold(structure: Structure, groups: Sequence[Groups], budget: float) -> list[BlockVariables]:
    """The shares that remove all groups of less importance for each multiply-add than the least number that fits."""
    of_column = structure.block_macs(0, 1, 0)

    def share(importance: Tensor, macs: Tensor, threshold: float) -> Tensor:
        below = int((importance < threshold * macs).sum())
        return torch.tensor((below - 0.5) / len(importance) if below else 0.0, dtype=torch.float64)

    def shares(threshold: float) -> list[BlockVariables]:
        found = []
        for one in groups:
            each = torch.tensor(float(of_column), dtype=torch.float64)
            widths = torch.tensor([float((norms >= threshold * each).sum()) for norms in one.columns])
            columns = torch.stack([share(norms, each, threshold) for norms in one.columns])
            heads = structure.block_macs(1, 0, 0) + of_column * widths.clamp(min=1).double()
            found.append(
                BlockVariables(share(one.heads, heads, threshold), columns, share(one.neurons, each, threshold))
            )
        return found

    low, high = -_WIDEST, _WIDEST
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        kept = [kept_by(one, found) for one, found in zip(groups, shares(math.exp(middle)), strict=True)]
        low, high = (low, middle) if macs_of(structure, kept) <= budget * structure.macs() else (middle, high)
    return shares(math.exp(high))
