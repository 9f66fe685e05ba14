"""A weight as a sparse matrix without structure plus a product of two thin factors, fitted to calibration images.

The weight W ``[N, K]`` becomes ``S + L``, L of rank R, S with so many entries. What both lose is judged by

    sum over rows i of o_i (w_i - s_i - l_i) C (w_i - s_i - l_i)^T,

C the covariance of the layer's inputs and o_i the mean squared gradient of the loss with respect to output i: the loss
to second order where inputs and gradients are independent (Kronecker-factored Fisher information, Martens and Grosse
2015, of which the diagonal serves on the output's side). Few images have most of that mean, so their gradients are
scaled (:mod:`mixrank.gradients`). S and L take turns (alternating thresholding, as in OATS,
Zhang and Papyan 2024, there with the diagonal of C alone): L is the best factors for ``W - S``, S keeps those entries
of ``W - L`` whose removal would cost most by themselves, ``o_i C_kk (W - L)_ik^2``. When the places are found, the
entries of S are fitted to what the removed ones leave behind by least squares, all rows at once by conjugate gradients
(Hestenes and Stiefel 1952): what a removed entry did is taken over by its neighbours, as far as their inputs are alike.

How many entries each layer gets follows from the same measure: one threshold for the cost of removal, in units of the
loss, holds for the entries of all layers; what the layers do to the answers by themselves corrects it
(:mod:`mixrank.sparse_sensitivity`).

C is estimated from few images, and a fit follows it into what these images have in common by chance. So it is pulled
towards its diagonal, and a ridge is added.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mixrank.directions import leading
from mixrank.errors import InputError
from mixrank.stats import LayerStats

PULL = 0.3
RIDGE = 0.1
METRIC_PULL = 2.0
ROUNDS = 4
STEPS = 12
CONSTANT = 1e-5
"""Of the inputs' mean square. Where their mean variance is below, the Gram matrix, whose products have rounding of
float32, does not tell it from rounding, and inputs count as constant."""


@dataclass(frozen=True)
class Measures:
    """What the entries and factors of one layer are judged by.

    Attributes:
        covariance: ``[K, K]`` of the inputs in units of their mean variance, pulled and with the ridge; float32, or
            float64 for a layer in float64.
        mean: ``[K]`` float64, of the inputs.
        scale: ``[N]`` like ``covariance``, o up to a factor: 1 for all without gradients.
        unit: what turns the loss of this layer into that of the model for one image: tokens of an image times the mean
            of o, times the mean variance; without gradients one over the energy of the outputs, so that layers count
            alike.
    """

    covariance: Tensor
    mean: Tensor
    scale: Tensor
    unit: float

    @classmethod
    def of(
        cls,
        weight: Tensor,
        stats: LayerStats,
        *,
        pull: float = PULL,
        ridge: float = RIDGE,
        metric_pull: float = METRIC_PULL,
    ) -> Measures:
        """From the statistics of :func:`mixrank.calibrate.calibrate` with ``inputs=True``.

        Args:
            weight: ``[N, K]``.
            stats: of this layer's inputs.
            pull: of C towards its diagonal, at least 0: covariances are divided by ``1 + pull``.
            ridge: what the variances gain, above 0, in units of their mean.
            metric_pull: of o towards its mean, at least 0, in units of that.

        Raises:
            InputError: statistics of outputs, or of a layer of another size; a weight that is not finite.
        """
        n, k = weight.shape
        if not weight.isfinite().all():
            raise InputError(f"the weight of a layer of shape {[n, k]} has NaN or infinite values")
        if stats.side != "input" or len(stats.total) != k:
            raise InputError(
                f"statistics must be of {k} inputs for a layer of weight {[n, k]}, but they were of {len(stats.total)} "
                f"{stats.side}s"
            )
        rows = stats.rows if stats.rows > 0 else 1.0
        mean = stats.total / rows
        covariance = stats.gram / rows - torch.outer(mean, mean)
        variance = covariance.diagonal().clamp(min=0).mean()
        if not variance > CONSTANT * stats.gram.diagonal().mean() / rows:  # what is lost is the weight itself
            covariance, variance = torch.eye(k, dtype=torch.float64), torch.ones((), dtype=torch.float64)
        covariance = covariance / variance
        diagonal = covariance.diagonal().clamp(min=0) + ridge
        covariance = (covariance / (1 + pull)).diagonal_scatter(diagonal)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        scale = torch.ones(n, dtype=torch.float64)
        if stats.squares is not None and stats.squares.sum() > 0:
            scale = (stats.squares / stats.squares.mean() + metric_pull) / (1 + metric_pull)
            unit = stats.squares.mean().item() / (stats.images or 1) * variance.item()
        else:
            wide = weight.detach().cpu().double()
            unit = 1 / max((wide @ covariance * wide).sum().item(), torch.finfo(torch.float64).tiny)
        return cls(covariance.to(dtype), mean, scale.to(dtype), unit)


@dataclass(frozen=True)
class Split:
    """A weight ``[N, K]`` in two parts.

    Attributes:
        sparse: S ``[N, K]``, in float32 or float64.
        kept: ``[N, K]`` bool, where S has entries; one of them may be zero by chance.
        down: ``[R, K]`` or None.
        up: ``[N, R]`` or None.
        shift: ``[N]``, what the bias gains: the mean of what is lost.
        error: what is lost by the measure, relative to what the weight itself does.
        loss: the same as it is, in units of the loss of the model for one image.
    """

    sparse: Tensor
    kept: Tensor
    down: Tensor | None
    up: Tensor | None
    shift: Tensor
    error: float
    loss: float

    @property
    def weight(self) -> Tensor:
        """``S + L``, ``[N, K]``."""
        return self.sparse if self.down is None or self.up is None else torch.addmm(self.sparse, self.up, self.down)


def split(
    weight: Tensor, measures: Measures, entries: int, rank: int, *, rounds: int = ROUNDS, steps: int = STEPS
) -> Split:
    """Split a weight.

    Args:
        weight: ``[N, K]``, any floating dtype; it is not changed.
        measures: of the layer.
        entries: of S, from 0 to N K.
        rank: R, from 0 to min(N, K).
        rounds: how often S and L take turns before the fit, at least 1.
        steps: of conjugate gradients.

    Raises:
        InputError: ``entries`` or ``rank`` is outside its range.
    """
    n, k = weight.shape
    if not 0 <= entries <= n * k:
        raise InputError(f"entries must be from 0 to {n * k} for a weight {[n, k]}, but it was {entries}")
    if not 0 <= rank <= min(n, k):
        raise InputError(f"rank must be from 0 to {min(n, k)} for a weight {[n, k]}, but it was {rank}")
    covariance, root = measures.covariance, measures.scale.sqrt()[:, None]
    # In these rows the measure is the same for all, so that only C is left of it.
    goal = weight.detach().cpu().to(covariance.dtype) * root
    sparse, kept = torch.zeros_like(goal), torch.zeros(goal.shape, dtype=torch.bool)
    factors = None
    for _ in range(rounds if rank and entries else 1):
        factors = _factors(goal - sparse, covariance, rank)
        rest = _less(goal, factors)
        kept = largest(rest.square() * covariance.diagonal(), entries)
        sparse = rest * kept
    sparse = fitted(_less(goal, factors), sparse, kept, covariance, steps)
    if rank and entries:
        factors = _factors(goal - sparse, covariance, rank)
        sparse = fitted(_less(goal, factors), sparse, kept, covariance, steps)
    lost = _less(goal, factors) - sparse
    energy = (goal @ covariance * goal).sum().item()
    loss = (lost @ covariance * lost).sum().item()
    error = loss / energy if energy > 0 else 0.0
    shift = (lost / root).double() @ measures.mean
    down, up = (None, None) if factors is None else (factors[0], factors[1] / root)
    return Split(sparse / root, kept, down, up, shift, error, loss * measures.unit)


def output_error(weight: Tensor, found: Split, stats: LayerStats) -> float:
    """Squared error of a layer's outputs over all tokens of some statistics, relative to what they are before the bias.

    Args:
        weight: ``[N, K]``, any floating dtype, that was split.
        found: its split, by these statistics or by others.
        stats: of the layer's inputs.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    whole = weight.detach().cpu().to(wide)
    rows = stats.rows if stats.rows > 0 else 1.0
    mean = stats.total / rows
    covariance = (stats.gram / rows - torch.outer(mean, mean)).to(wide)

    def energy(matrix: Tensor, shift: Tensor | None = None) -> float:
        middle = matrix.double() @ mean
        middle = middle if shift is None else middle - shift
        return (matrix @ covariance * matrix).sum(dtype=torch.float64).item() + middle.square().sum().item()

    outputs = energy(whole)
    return energy(whole - found.weight, found.shift) / outputs if outputs > 0 else 0.0


def removal_costs(weight: Tensor, measures: Measures, rank: int) -> Tensor:
    """What the loss of the model gains for one image where an entry alone goes, of what factors leave: ``[N, K]``.

    Args:
        weight: ``[N, K]``, any floating dtype.
        measures: of the layer.
        rank: R of the factors that take what they can first, from 0 to min(N, K).
    """
    covariance, root = measures.covariance, measures.scale.sqrt()[:, None]
    goal = weight.detach().cpu().to(covariance.dtype) * root
    rest = _less(goal, _factors(goal, covariance, rank))
    return rest.square_().mul_(covariance.diagonal() * measures.unit)


def largest(values: Tensor, count: int) -> Tensor:
    """Where the ``count`` largest of some values are, of equal ones the first: bool, in the shape of the values."""
    flat = values.flatten()
    if count == 0 or count == len(flat):
        return torch.full_like(values, count > 0, dtype=torch.bool)
    threshold = flat.kthvalue(len(flat) - count + 1).values
    found, level = flat > threshold, (flat == threshold).nonzero().flatten()
    found[level[: count - int(found.sum())]] = True
    return found.reshape(values.shape)


def fitted(goal: Tensor, start: Tensor, kept: Tensor, covariance: Tensor, steps: int) -> Tensor:
    """Entries that lose least of a goal, ``(goal - S) C (goal - S)^T`` in each row, zero where none are kept.

    Args:
        goal: ``[N, K]``.
        start: ``[N, K]``, where to begin, zero where none are kept.
        kept: ``[N, K]`` bool.
        covariance: ``[K, K]``, positive definite.
        steps: of conjugate gradients with the diagonal of C as preconditioner; each lowers the loss of every row.
    """
    diagonal, least = covariance.diagonal(), torch.finfo(goal.dtype).tiny
    found, slope = start.clone(), (goal - start) @ covariance * kept
    scaled = slope / diagonal
    direction, length = scaled, (slope * scaled).sum(1, keepdim=True)
    for _ in range(steps):
        image = direction @ covariance * kept
        step = length / (direction * image).sum(1, keepdim=True).clamp(min=least)
        found = found.addcmul_(step, direction)
        slope = slope.addcmul_(step, image, value=-1)
        scaled = slope / diagonal
        new = (slope * scaled).sum(1, keepdim=True)
        direction = scaled + new / length.clamp(min=least) * direction
        length = new
    return found


def _factors(matrix: Tensor, covariance: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """``down [R, K]`` and ``up [N, R]`` of the product that loses least of a matrix ``[N, K]`` by C; None for R = 0."""
    if rank == 0:
        return None
    if len(matrix) <= matrix.shape[1]:
        up = leading(matrix @ covariance @ matrix.mT)[1][:, :rank]
    else:
        frame, core = torch.linalg.qr(matrix)
        up = frame @ leading(core @ covariance @ core.mT)[1][:, :rank]
    return up.mT @ matrix, up


def _less(goal: Tensor, factors: tuple[Tensor, Tensor] | None) -> Tensor:
    return goal if factors is None else torch.addmm(goal, factors[1], factors[0], alpha=-1)
