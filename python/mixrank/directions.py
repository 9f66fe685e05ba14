"""The directions of a layer's output space in which its weight is cut, and the error of each cut in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mixrank import shrinkage
from mixrank.errors import InputError
from mixrank.stats import LayerStats


@dataclass(frozen=True)
class Moments:
    """Of the outputs before the bias, in the coordinates of a layer's frame: second moment and mean."""

    second: Tensor  # [S, S]
    mean: Tensor  # [S]

    def about(self, point: Tensor) -> Tensor:
        """The second moment about a point [S]."""
        cross = torch.outer(self.mean, point)
        return self.second - cross - cross.mT + torch.outer(point, point)


class Space:
    """What a weight can output: its coordinates, and the weight's own directions in them, in float64."""

    def __init__(self, frame: Tensor | None, core: Tensor) -> None:
        """``frame`` and ``core`` are those of :func:`mixrank.stats.output_frame`."""
        self.frame, self.core = None if frame is None else frame.double(), core.double()
        self.weight_gram = self.core @ self.core.mT
        n, k = len(self.core) if self.frame is None else len(self.frame), self.core.shape[1]
        self.break_even = max(1, min(n * k // (n + k), min(n, k)))

    @cached_property
    def weight_directions(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues ``[S]`` and eigenvectors ``[S, S]`` of ``W W^T``, the largest first."""
        return leading(self.weight_gram)

    def moments(self, stats: LayerStats) -> Moments:
        core, frame = self.core, self.frame
        wanted = core.shape[1] if stats.side == "input" else core.shape[0] if frame is None else frame.shape[0]
        if stats.gram.shape[0] != wanted:
            raise InputError(f"statistics of the {stats.side} must be of size {wanted}, but were {stats.gram.shape[0]}")
        rows = stats.rows if stats.rows > 0 else 1.0
        second, mean = stats.gram / rows, stats.total / rows
        if stats.side == "input":
            return Moments(core @ second @ core.mT, core @ mean)
        if frame is not None:
            return Moments(frame.mT @ second @ frame, frame.mT @ mean)
        return Moments(second, mean)


@dataclass(frozen=True)
class Trial:
    """Directions made without the images held out."""

    shrink: float | str  # as given, or the best of a few
    up: Tensor  # [S, S]
    down: Tensor  # [S, S]
    mean: Tensor  # [S], of the outputs on the images that they were made from
    errors: Tensor  # [S + 1], on the images held out


@dataclass(frozen=True)
class Directions:
    """Makes directions from statistics by one strategy, and tells their errors.

    Attributes:
        space: of the layer.
        factors: ``"aware"``, ``"svd"`` or ``"fisher"``, see :mod:`mixrank.decompose`.
        centre: whether the mean of what is lost goes into the bias.
        fisher_shrink: pull of O towards the identity.
    """

    space: Space
    factors: str
    centre: bool
    fisher_shrink: float

    def metric(self, stats: LayerStats) -> Tensor | None:
        """O of ``"fisher"``, ``[S, S]`` with mean eigenvalue 1 before the identity is added; None for the others."""
        if self.factors != "fisher":
            return None
        if stats.gradient is None:
            raise InputError("factors='fisher' needs statistics with gradients, but there were none")
        size = len(stats.gradient)
        return size * shrinkage.unit_trace(stats.gradient) + self.fisher_shrink * torch.eye(size, dtype=torch.float64)

    def pull(self, moments: Moments, shrink: float | str, images: int | None) -> float:
        """The pull that ``shrink`` stands for."""
        if self.factors == "svd":
            return math.inf
        if not isinstance(shrink, str):
            return shrink
        if images is None:
            raise InputError("shrink='oas' needs statistics that know their number of images")
        return shrinkage.oas(self._used(moments), *self.space.weight_directions, images)

    def _used(self, moments: Moments) -> Tensor:
        return moments.about(moments.mean) if self.centre else moments.second

    def bases(self, moments: Moments, metric: Tensor | None, shrink: float) -> tuple[Tensor, Tensor]:
        """Up and down basis."""
        if self.factors == "svd" or (math.isinf(shrink) and metric is None):
            basis = self.space.weight_directions[1]
            return basis, basis
        gram = shrinkage.pulled(self._used(moments), self.space.weight_gram, shrink)
        if metric is None:
            basis = leading(gram)[1]
            return basis, basis
        values, vectors = torch.linalg.eigh(metric)
        half = (vectors * values.sqrt()) @ vectors.mT
        basis = leading(half @ gram @ half)[1]
        return (vectors / values.sqrt()) @ (vectors.mT @ basis), half @ basis

    def errors(self, up: Tensor, down: Tensor, moments: Moments, mean: Tensor, metric: Tensor | None = None) -> Tensor:
        """Squared error at the ranks 0 to S by the energy of all outputs, ``[S + 1]``; ``mean`` is in the bias."""
        gram = moments.about(mean) if self.centre else moments.second
        # The error of rank r is the sum of |lost_i . lost_j| over i, j >= r: what is read along i is not written.
        measured = up if metric is None else metric @ up
        lost = (up.mT @ measured) * (down.mT @ gram @ down)
        steps = lost.diagonal() + 2 * lost.triu(1).sum(1)
        energy = moments.second.trace() if metric is None else (moments.second * metric).sum()
        tails = torch.cat([steps.flip(0).cumsum(0).flip(0), steps.new_zeros(1)]).clamp(min=0)
        return tails / energy if energy > 0 else torch.zeros_like(tails)

    def tried(self, stats: LayerStats, held_out: LayerStats, shrink: float | str) -> Trial:
        """Directions that are made without the images held out, and their errors on these."""
        moments, metric, apart = self.space.moments(stats), self.metric(stats), self.space.moments(held_out)
        grid: tuple[float, ...] = shrinkage.GRID if shrink == "auto" and self.factors != "svd" else ()
        goal = self.metric(held_out)
        trials: dict[float | str, Trial] = {}
        scores: dict[float | str, float] = {}
        for each in grid or (shrink,):
            up, down = self.bases(moments, metric, self.pull(moments, each, stats.images))
            errors = self.errors(up, down, apart, moments.mean)
            judged = errors if goal is None else self.errors(up, down, apart, moments.mean, goal)
            trials[each] = Trial(each, up, down, moments.mean, errors)
            scores[each] = shrinkage.score(judged, self.space.break_even)
        return trials[shrinkage.strongest_of_the_best({pull: scores[pull] for pull in grid}) if grid else shrink]


def leading(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (none below zero) and eigenvectors, the largest first."""
    values, vectors = torch.linalg.eigh(symmetric)
    return values.flip(0).clamp(min=0), vectors.flip(1)
