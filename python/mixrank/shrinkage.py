"""How far activation-aware factors are pulled towards the truncated SVD, against too few calibration images.

The pull ``shrink`` adds ``shrink * W W^T / tr(W W^T)`` to ``Y / tr(Y)``, Y the second moment of the outputs: a ridge on
the Gram matrix of the inputs. Tokens of one image are alike, so the size of the sample is the number of images.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mixrank.errors import InputError

AUTOMATIC = ("auto", "oas")
MEASURED = "measured"
"""What :func:`mixrank.compress` and :func:`mixrank.sweep` take besides, see :mod:`mixrank.measured_pull`."""
GRID = (math.inf, 3.0, 1.0, 0.3, 0.1, 0.0)
TIE = 1e-3  # scores this close, relatively, are the same: the difference would not repeat on other images
# Adds nothing that can be seen to an error, and orders directions that no calibration image shows by the weight.
FLOOR = 1e-8
_WEAKEST = 1e-3  # directions that the weight passes on more weakly than this, of its strongest, tell only rounding


def check_shrink(shrink: float | str) -> None:
    """Raise InputError unless ``shrink`` is a number of at least 0, ``"auto"`` or ``"oas"``."""
    if isinstance(shrink, str):
        if shrink not in AUTOMATIC:
            raise InputError(f"shrink must be a number, {' or '.join(AUTOMATIC)}, but it was {shrink!r}")
    elif not 0 <= shrink < math.inf:
        raise InputError(f"shrink must be a number of at least 0, but it was {shrink}")


def pulled(output_gram: Tensor, weight_gram: Tensor, shrink: float) -> Tensor:
    """The matrix ``[S, S]`` whose leading eigenvectors are the directions to keep.

    Args:
        output_gram: ``[S, S]``, second moment of the outputs.
        weight_gram: ``[S, S]``, ``W W^T`` in the same coordinates.
        shrink: at least 0; infinite: the directions of the weight alone.
    """
    if math.isinf(shrink):
        return unit_trace(weight_gram)
    return unit_trace(output_gram) + max(shrink, FLOOR) * unit_trace(weight_gram)


def unit_trace(symmetric: Tensor) -> Tensor:
    """The matrix divided by its trace, where that is above 0."""
    trace = symmetric.trace()
    return symmetric / trace if trace > 0 else symmetric


def strongest_of_the_best(scores: dict[float, float]) -> float:
    """Of the pulls with the lowest score (positive numbers; those within 0.1 % are ties) the strongest."""
    best = min(scores.values())
    return max(shrink for shrink, score in scores.items() if score <= best * (1 + TIE))


def oas(output_gram: Tensor, weight_values: Tensor, weight_basis: Tensor, images: int) -> float:
    """The pull that the oracle approximating shrinkage estimate of the inputs' covariance stands for.

    Chen, Wiesel, Eldar, Hero 2010, equation 23: ``(1 - rho) G + rho tr(G) / p I`` with ``rho`` from ``tr(G)``,
    ``tr(G^2)``, p and the sample size, here the number of images. G is the covariance of the inputs as far as the
    weight passes it on: ``V^T G V`` for ``W = U s V^T``, from the outputs by division by the singular values.

    Args:
        output_gram: ``[S, S]``, covariance of the outputs.
        weight_values: ``[S]``, eigenvalues of ``W W^T``, the largest first.
        weight_basis: ``[S, S]``, its eigenvectors.
        images: number of images, at least 1.

    Returns:
        The pull, infinite where the estimate is a multiple of the identity.
    """
    passed = weight_values > _WEAKEST**2 * weight_values[0]
    inverse = weight_basis[:, passed] / weight_values[passed].sqrt()
    gram = inverse.mT @ output_gram @ inverse
    p, trace, squares = len(gram), gram.trace().item(), gram.square().sum().item()
    if trace <= 0:
        return math.inf
    spread = (images + 1 - 2 / p) * (squares - trace**2 / p)
    rho = min(1.0, ((1 - 2 / p) * squares + trace**2) / spread) if spread > 0 else 1.0
    if rho >= 1:
        return math.inf
    return (rho / (1 - rho) * trace / p * weight_values.sum() / output_gram.trace()).item()


def score(errors: Tensor, ranks: int) -> float:
    """The geometric mean of the errors ``[S + 1]`` at the ranks from 1 to ``ranks``."""
    return errors[1 : ranks + 1].clamp(min=torch.finfo(errors.dtype).tiny).log().mean().exp().item()
