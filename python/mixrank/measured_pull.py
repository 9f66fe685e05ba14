"""The pull of the factors towards the plain SVD that suits a model and a budget, measured on the compressed model.

The error of a layer by itself does not tell which pull serves the model with all layers replaced, whose inputs are not
those that calibration saw. So the model is compressed by the plan that was found, with factors of a few pulls that were
made without the images held out, and the one that moves the logits of these least is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from mixrank.apply import put_
from mixrank.arguments import Running
from mixrank.decompose import FISHER_SHRINK, Factorisation
from mixrank.errors import InputError
from mixrank.fidelity import compare, logits_of
from mixrank.models import twin
from mixrank.plan import Plan
from mixrank.processes import gathered
from mixrank.shrinkage import MEASURED
from mixrank.stats import CalibrationStats

PULLS = (0.0, 0.03, 0.1, 0.3, 0.6, 1.0, 2.0)
FIRST = 0.3
METRIC_PULLS = (0.2, 0.6, FISHER_SHRINK, 6.0, 20.0)
"""Of the metric of ``"fisher"``, which is not measured by default."""


def first_pull(shrink: float | str | None) -> float | str:
    """What stands for ``shrink`` until it is measured: :data:`FIRST` for ``"measured"`` and None, else itself."""
    return FIRST if shrink is None or shrink == MEASURED else shrink


def measure_pull(
    model: nn.Module,
    plan: Plan,
    first: Mapping[str, Factorisation],
    stats: CalibrationStats,
    make: Callable[..., Mapping[str, Factorisation]],
    batches: Sequence[Tensor],
    running: Running,
    *,
    metric: bool = False,
) -> tuple[dict[str, float], Mapping[str, Factorisation]]:
    """Walk from :data:`FIRST` to the neighbouring pulls of :data:`PULLS` as long as the divergence falls.

    Where the pull of the metric is measured too, it walks likewise, each of the two again where the other has moved.

    Args:
        model: the dense model, in any mode; it is left as it is.
        plan: the ranks.
        first: the factorisations with the pull :data:`FIRST`, with trials on images held out.
        stats: the statistics that these were made from.
        make: makes such factorisations of statistics, with the pull ``shrink``: :func:`mixrank.decompose.decompose`
            with some of its arguments given. It is asked for no more directions than the plan needs.
        batches: image tensors ``[B, C, H, W]`` of images held out.
        running: ``dtype`` of the autocast.
        metric: measure ``fisher_shrink`` too, from :data:`mixrank.decompose.FISHER_SHRINK` along :data:`METRIC_PULLS`.

    Returns:
        The best pulls, as arguments of ``make``, and the factorisations with these.

    Raises:
        InputError: no images were held out; the model does not return finite logits of at least two classes.
    """
    if stats.held_out is None:
        raise InputError("shrink='measured' needs images that are held out, but there were none")
    dense = twin(model).eval()
    target = logits_of(dense, batches, running["dtype"])

    def judged(trials: Mapping[str, Factorisation]) -> float:
        candidate = put_(twin(dense), plan, trials).eval()
        found = compare(logits_of(candidate, batches, running["dtype"]), target).divergence
        return gathered(found)[0]  # rounding must not part the processes

    make = partial(make, known=first, ranks=plan.ranks())
    seen, grids = stats.without_held_out(), {"shrink": PULLS} | ({"fisher_shrink": METRIC_PULLS} if metric else {})
    start = {"shrink": FIRST} | ({"fisher_shrink": FISHER_SHRINK} if metric else {})
    known = {tuple(start.values()): judged({name: made.trial or made for name, made in first.items()})}

    def divergence(pulls: dict[str, float]) -> float:
        key = tuple(pulls.values())
        if key not in known:
            known[key] = judged(make(seen, **pulls))
        return known[key]

    best, before = start, None
    while best != before:
        before = best
        for name, grid in grids.items():
            best = _walked(best, name, grid, divergence)
    return best, first if best == start else make(stats, **best, keep_trials=False)


def _walked(
    pulls: dict[str, float], name: str, grid: Sequence[float], divergence: Callable[[dict[str, float]], float]
) -> dict[str, float]:
    """The pulls with one of them moved along its grid, up or else down, as long as the divergence falls."""
    best, place = pulls, grid.index(pulls[name])
    for steps in (grid[place + 1 :], grid[:place][::-1]):
        for step in steps:
            candidate = pulls | {name: step}
            if divergence(candidate) >= divergence(best):
                break
            best = candidate
        if best != pulls:
            break
    return best
