"""A sweep: many ways to compress one model, each at several budgets, from one calibration.

Statistics are shared by all strategies, factors by those that differ only in how ranks are chosen or layers are held.
Every result is compared with the dense model on images that no factor was made from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from mixrank.apply import apply_
from mixrank.arguments import Allocation, Running
from mixrank.calibrate import calibrate, calibrate_both
from mixrank.data import as_batch
from mixrank.decompose import Factorisation, decompose
from mixrank.errors import InputError
from mixrank.evaluate import Evaluation, ModelSummary, evaluate, summarise
from mixrank.fidelity import Fidelity, compare
from mixrank.models import expose_qkv_, hide_qkv_, twin
from mixrank.plan import Plan
from mixrank.planning import SENSITIVITY_IMAGES, plan_and_pull, plan_ranks
from mixrank.sample import Apart, Sample
from mixrank.shrinkage import MEASURED
from mixrank.sparse_fit import put_sparse_, sparse_statistics
from mixrank.sparse_sensitivity import weigh_layers
from mixrank.stats import CalibrationStats
from mixrank.stopwatch import Stopwatch
from mixrank.strategies import (
    DEFAULT_STRATEGIES,
    Group,
    Row,
    allocation_of,
    before_a_pull,
    budgets,
    check_strategies,
    groups_of,
    is_sparse,
    options_by_name,
    rows_of,
)


@dataclass(frozen=True)
class SweepRow:
    """One strategy at one budget.

    Attributes:
        strategy: its name.
        keep: the share of all parameters that might remain.
        options: the strategy, in terms of :func:`mixrank.compress`.
        compressed: size and work of the model, and its accuracy where the images have labels.
        fidelity: to the dense model.
        plan: the ranks.
        seconds: of the steps ``calibrate``, ``decompose``, ``allocate``, ``sensitivity`` where it was measured,
            ``apply`` and ``evaluate``; a step that rows share is in each of them.
    """

    strategy: str
    keep: float
    options: dict[str, Any]
    compressed: ModelSummary
    fidelity: Fidelity
    plan: Plan
    seconds: dict[str, float]

    @property
    def compressing(self) -> float:
        """Seconds of all steps but the evaluation: about those that this row alone would have taken."""
        return sum(seconds for step, seconds in self.seconds.items() if step != "evaluate")

    def to_json(self) -> dict:
        """Return the row in terms of JSON."""
        return asdict(self) | {"plan": self.plan.to_json(), "compressing": self.compressing}

    @classmethod
    def from_json(cls, data: dict) -> SweepRow:
        """Read what :meth:`to_json` wrote.

        Args:
            data: what it returned, through JSON or not.

        Raises:
            InputError: a field is missing, unknown or of the wrong type.
        """
        try:
            made = {
                "compressed": ModelSummary(**data["compressed"]),
                "fidelity": Fidelity(**data["fidelity"]),
                "plan": Plan.from_json(data["plan"]),
                "keep": float(data["keep"]),
                "seconds": {str(step): float(seconds) for step, seconds in data["seconds"].items()},
            }
            given = {name: value for name, value in data.items() if name != "compressing"}
            return cls(**(given | made))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"the row is not one that a sweep of this version wrote: {error!r}") from error


@dataclass(frozen=True)
class SweepResult:
    """What a sweep has found so far.

    Attributes:
        dense: the model as it came, on the same images.
        rows: in the order in which they were made, those of an earlier sweep first.
        calibration: how many images the factors were made from.
        evaluation: how many images the models were compared on.
    """

    dense: ModelSummary
    rows: tuple[SweepRow, ...]
    calibration: int
    evaluation: int

    def to_json(self) -> dict:
        """Return the result in terms of JSON."""
        return {
            "dense": self.dense.to_json(),
            "rows": [row.to_json() for row in self.rows],
            "images": {"calibration": self.calibration, "evaluation": self.evaluation},
        }


def sweep(
    model: nn.Module,
    images: Iterable,
    keep: Sequence[float],
    strategies: Sequence[str] | Mapping[str, dict[str, Any]] = DEFAULT_STRATEGIES,
    *,
    evaluation: Iterable | None = None,
    held_out: float = 0.2,
    sensitivity_images: int = SENSITIVITY_IMAGES,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    done: Sequence[SweepRow] = (),
    on_row: Callable[[SweepResult], None] | None = None,
    progress: bool = False,
) -> SweepResult:
    """Compress copies of a model by several strategies at several budgets and compare each with the model.

    Args:
        model: a classifier as for :func:`mixrank.compress`; it is left as it is.
        images: batches of calibration images as for :func:`mixrank.calibrate`; gone through once, and once more for
            sparse weights.
        keep: the budgets, shares of all parameters in (0, 1].
        strategies: names of :data:`mixrank.strategies.STRATEGIES`, or options of :func:`mixrank.compress` by a name of
            your own: those of the factors (``factors``, ``centre``, ``shrink``, ``fisher_shrink``; ``weighting``: None
            or ``"none"``) and of the ranks (``ranks``, ``energy``, ``step``, ``min_rank``, ``max_rank``, ``form``). Of
            the form ``"sparse"`` there are no others.
        evaluation: batches of the images that the models are compared on, that can be gone through again; with labels
            for accuracy. None: images that are held out of the calibration, without labels; they are kept in memory.
        held_out: their share, in (0, 1), spread evenly. Of the images that remain a fifth judges factors, as in
            :func:`mixrank.compress`, and takes part in those that are used.
        sensitivity_images: how many of the calibration images sensitivity is measured on.
        seed: of their choice, and of what is drawn for ``factors="fisher"``.
        dtype: calibrate and measure sensitivity under autocast in this dtype; models are compared without.
        done: rows of an earlier sweep of the same model and images; they are not made again.
        on_row: called with the result so far after each new row, to keep it.
        progress: show progress bars with the time left.

    Returns:
        The rows: all budgets of a strategy together, strategies with the same factors after each other.

    Raises:
        InputError: bad input, found before the long work as far as it can be; the model is as it was.

    Example:
        >>> import timm, torch
        >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
        >>> result = sweep(model, [torch.randn(10, 3, 32, 32)], [0.5], ["svd", "aware"])
        >>> [(row.strategy, row.fidelity.images) for row in result.rows]
        [('svd', 2), ('aware', 2)]
    """
    chosen = options_by_name(strategies)
    keeps = budgets(keep)
    if not 0 < held_out < 1:
        raise InputError(f"held_out must be above 0 and below 1, but it was {held_out}")
    if isinstance(evaluation, Iterator):
        raise InputError("evaluation is gone through for each model, but it was an iterator: give a list or a loader")
    if isinstance(images, Iterator) and any(map(is_sparse, chosen.values())):
        raise InputError(
            "images are gone through again for sparse weights, but they were an iterator: give a list, or other "
            "strategies"
        )
    exposed = expose_qkv_(model)
    try:
        check_strategies(model, chosen, keeps)
        wanted = {(name, share) for name in chosen for share in keeps} - {(row.strategy, row.keep) for row in done}
        sparse = [row for row in rows_of(wanted, chosen) if is_sparse(chosen[row[0]])]
        groups = groups_of(chosen, wanted.difference(sparse))
        apart = None if evaluation is not None else Apart(images, held_out)
        sample = Sample(images if apart is None else apart, sensitivity_images, seed, None)
        running: Running = {"progress": progress, "dtype": dtype}
        watch = Stopwatch()
        if groups:
            with watch.stage("calibrate"):
                weighted, alike = _calibrated(model, sample, groups, seed, running)
            calibrated = alike.all_images
        else:
            calibrated = sum(len(as_batch(item).images) for item in sample) // sample.views
        judged = cast(Iterable, evaluation) if apart is None else apart.kept
        made = _Made(model, judged, chosen, calibrated, list(done), on_row, progress)
        for group in groups:
            stats = weighted if group[0]["weighting"] is None else alike
            _low_ranks(made, sample, group, stats, running, watch)
        if sparse:
            _sparse_weights(made, sample, sparse, seed, running)
        return made.result
    finally:
        hide_qkv_(model, exposed)


class _Made:
    """The rows so far, each compared with the dense model on the same images and handed on when it is there."""

    def __init__(
        self,
        model: nn.Module,
        judged: Iterable,
        chosen: Mapping[str, dict[str, Any]],
        calibrated: int,
        rows: list[SweepRow],
        on_row: Callable[[SweepResult], None] | None,
        progress: bool,
    ) -> None:
        self.model, self.chosen = model, chosen
        self._judged, self._progress, self._on_row = judged, progress, on_row
        self._calibrated, self._rows = calibrated, rows
        self._dense = self._score(model)
        compare(self._dense.logits, self._dense.logits)  # what is no classifier is refused before the long work
        self._summary = summarise(model, self._dense)

    @property
    def result(self) -> SweepResult:
        return SweepResult(self._summary, tuple(self._rows), self._calibrated, self._dense.images)

    def add(self, row: Row, candidate: nn.Module, plan: Plan, shared: Stopwatch, watch: Stopwatch) -> None:
        """Note a model; ``shared`` and ``watch`` have the times of the steps that rows share and of its own."""
        with watch.stage("evaluate"):
            score = self._score(candidate)
        fidelity = compare(score.logits, self._dense.logits)
        seconds, (name, keep) = shared.seconds | watch.seconds, row
        options, summary = dict(self.chosen[name]), summarise(candidate, score)
        self._rows.append(SweepRow(name, keep, options, summary, fidelity, plan, seconds))
        if self._on_row is not None:
            self._on_row(self.result)

    def _score(self, model: nn.Module) -> Evaluation:
        return evaluate(model, self._judged, progress=self._progress)


def _low_ranks(
    made: _Made, sample: Sample, group: Group, stats: CalibrationStats, running: Running, shared: Stopwatch
) -> None:
    """The rows of one set of factors."""
    model, (options, rows) = made.model, group
    make = partial(decompose, model, progress=running["progress"], **before_a_pull(options))
    with shared.stage("decompose"):
        first = make(stats)
    pulled = options["shrink"] == MEASURED or (options["shrink"] is None and stats.held_out is not None)
    for row in rows:
        watch = Stopwatch()
        allocation: Allocation = {**allocation_of(made.chosen[row[0]]), "keep": row[1]}
        factors: Mapping[str, Factorisation] = first
        if pulled:
            plan, _, factors = plan_and_pull(model, first, stats, make, sample, allocation, running, watch=watch)
        else:
            plan = plan_ranks(model, first, sample, allocation, running, watch=watch)
        with watch.stage("apply"):
            candidate = apply_(twin(model), plan, factors)
        made.add(row, candidate, plan, shared, watch)


def _sparse_weights(made: _Made, sample: Sample, rows: Sequence[Row], seed: int, running: Running) -> None:
    model, shared = made.model, Stopwatch()
    with shared.stage("calibrate"):
        inputs = sparse_statistics(model, sample, held_out=None, seed=seed, **running)
    for row in rows:
        watch, candidate, weights = Stopwatch(), twin(model), None
        if inputs.held_out is not None:
            with watch.stage("sensitivity"):
                weights = weigh_layers(model, inputs, sample.parts, {"keep": row[1]}, **running)
        plan, _ = put_sparse_(candidate, inputs, row[1], weights=weights, watch=watch, progress=running["progress"])
        made.add(row, candidate, plan, shared, watch)


def _calibrated(
    model: nn.Module, sample: Sample, groups: Sequence[Group], seed: int, running: Running
) -> tuple[CalibrationStats, CalibrationStats]:
    """Statistics of tokens as :func:`mixrank.compress` weights them and of tokens alike, as far as they are wanted."""
    if any(factors["weighting"] is None for factors, _ in groups):
        return calibrate_both(model, sample, held_out=None, seed=seed, **running)
    fisher = any(factors["factors"] == "fisher" for factors, _ in groups)
    alike = calibrate(model, sample, held_out=None, gradients=fisher, seed=seed, **running)
    return alike, alike
