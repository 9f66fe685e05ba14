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

from mixrank.allocate import check_budget
from mixrank.apply import apply_
from mixrank.arguments import Allocation, Running, Strategy
from mixrank.calibrate import calibrate, calibrate_both
from mixrank.compress import FORM, check_energy
from mixrank.data import as_batch
from mixrank.decompose import FISHER_SHRINK, Factorisation, LayerShape, check_strategy, decompose
from mixrank.errors import InputError
from mixrank.evaluate import Evaluation, ModelSummary, evaluate, summarise
from mixrank.fidelity import Fidelity, compare
from mixrank.measured_pull import first_pull
from mixrank.models import compressible_linears, expose_qkv_, hide_qkv_, twin
from mixrank.plan import Plan
from mixrank.planning import SENSITIVITY_IMAGES, plan_and_pull, plan_ranks
from mixrank.sample import Apart, Sample
from mixrank.shrinkage import MEASURED
from mixrank.sparse_fit import put_sparse_, sparse_statistics
from mixrank.sparse_sensitivity import weigh_layers
from mixrank.stats import CalibrationStats
from mixrank.stopwatch import Stopwatch

# Options of mixrank.compress; what a preset does not name is as in that function, and layers are pivoted.
_PLAIN = {"factors": "aware", "energy": "weight", "shrink": 0.0, "form": "factors", "weighting": "none"}
STRATEGIES: dict[str, dict[str, Any]] = {
    "pivoted": {},
    "svd": _PLAIN | {"factors": "svd"},
    "svd-uniform": _PLAIN | {"factors": "svd", "ranks": "uniform"},
    "aware": _PLAIN,
    "aware-uniform": _PLAIN | {"ranks": "uniform"},
    "aware-pivoted": _PLAIN | {"form": "pivoted"},
    "output": _PLAIN | {"energy": "output"},
    "shrunk": _PLAIN | {"shrink": 0.3},
    "fisher": _PLAIN | {"factors": "fisher"},
    "sensitivity": _PLAIN | {"energy": "sensitivity"},
    "sensitivity-pivoted": _PLAIN | {"energy": "sensitivity", "form": "pivoted"},
    "sparse": {"form": "sparse"},
}
DEFAULT_STRATEGIES = ("pivoted", "sparse", "svd", "svd-uniform", "aware", "aware-pivoted", "sensitivity")
_FACTORS = {"factors": "fisher", "centre": None, "shrink": None, "fisher_shrink": FISHER_SHRINK, "weighting": None}
_RANKS = {"ranks": "mixed", "energy": None, "step": 8, "min_rank": None, "max_rank": None, "form": FORM}


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
        strategies: names of :data:`STRATEGIES`, or options of :func:`mixrank.compress` by a name of your own: those of
            the factors (``factors``, ``centre``, ``shrink``, ``fisher_shrink``; ``weighting``: None or ``"none"``) and
            of the ranks (``ranks``, ``energy``, ``step``, ``min_rank``, ``max_rank``, ``form``). Of the form
            ``"sparse"`` there are no others.
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
    chosen = _strategies(strategies)
    keeps = _keeps(keep)
    if not 0 < held_out < 1:
        raise InputError(f"held_out must be above 0 and below 1, but it was {held_out}")
    if isinstance(evaluation, Iterator):
        raise InputError("evaluation is gone through for each model, but it was an iterator: give a list or a loader")
    if isinstance(images, Iterator) and any(map(_is_sparse, chosen.values())):
        raise InputError(
            "images are gone through again for sparse weights, but they were an iterator: give a list, or other "
            "strategies"
        )
    exposed = expose_qkv_(model)
    try:
        _check(model, chosen, keeps)
        known = {(row.strategy, row.keep) for row in done}
        wanted = {(name, share) for name in chosen for share in keeps} - known
        sparse = [row for row in _rows(wanted, chosen) if _is_sparse(chosen[row[0]])]
        groups = _groups(chosen, wanted.difference(sparse))
        apart = Apart(images, held_out) if evaluation is None else None
        sample = Sample(images if apart is None else apart, sensitivity_images, seed, None)
        running: Running = {"progress": progress, "dtype": dtype}
        watch = Stopwatch()
        if groups:
            with watch.stage("calibrate"):
                weighted, alike = _calibrated(model, sample, groups, seed, running)
            calibrated = alike.all_images
        else:
            calibrated = sum(len(as_batch(item).images) for item in sample) // sample.views
        if apart is not None:
            evaluation = apart.kept
        assert evaluation is not None  # those given, or those held out
        bench = _Bench(model, evaluation, progress)
        summary, rows = summarise(model, bench.dense), list(done)

        def result() -> SweepResult:
            return SweepResult(summary, tuple(rows), calibrated, bench.dense.images)

        def note(name: str, share: float, candidate: nn.Module, plan: Plan, once: Stopwatch) -> None:
            with once.stage("evaluate"):
                score = bench.score(candidate)
            fidelity = compare(score.logits, bench.dense.logits)
            measured = (summarise(candidate, score), fidelity, plan, watch.seconds | once.seconds)
            rows.append(SweepRow(name, share, dict(chosen[name]), *measured))
            if on_row is not None:
                on_row(result())

        for factors, members in groups:
            stats = weighted if factors["weighting"] is None else alike
            make = partial(decompose, model, progress=progress, **_first(factors))
            with watch.stage("decompose"):
                made = make(stats)
            for name, share in members:
                once = Stopwatch()
                allocation: Allocation = {**_allocation(chosen[name]), "keep": share}
                suited: Mapping[str, Factorisation] = made
                if factors["shrink"] == MEASURED or (factors["shrink"] is None and stats.held_out is not None):
                    plan, _, suited = plan_and_pull(model, made, stats, make, sample, allocation, running, watch=once)
                else:
                    plan = plan_ranks(model, made, sample, allocation, running, watch=once)
                with once.stage("apply"):
                    candidate = _applied(model, plan, suited)
                note(name, share, candidate, plan, once)
        if sparse:
            watch = Stopwatch()
            with watch.stage("calibrate"):
                inputs = sparse_statistics(model, sample, held_out=None, seed=seed, **running)
            for name, share in sparse:
                once, candidate, weights = Stopwatch(), twin(model), None
                if inputs.held_out is not None:
                    with once.stage("sensitivity"):
                        weights = weigh_layers(model, inputs, sample.parts, {"keep": share}, **running)
                plan, _ = put_sparse_(candidate, inputs, share, weights=weights, watch=once, progress=progress)
                note(name, share, candidate, plan, once)
        return result()
    finally:
        hide_qkv_(model, exposed)


def _applied(model: nn.Module, plan: Plan, factorisations: Mapping[str, Factorisation]) -> nn.Module:
    return apply_(twin(model), plan, factorisations)


class _Bench:
    """The images that every model is compared on, and what the dense model makes of them."""

    def __init__(self, dense: nn.Module, batches: Iterable, progress: bool) -> None:
        self.batches, self.progress = batches, progress
        self.dense = self.score(dense)
        compare(self.dense.logits, self.dense.logits)  # what is no classifier is refused before the long work

    def score(self, model: nn.Module) -> Evaluation:
        return evaluate(model, self.batches, progress=self.progress)


def _strategies(given: Sequence[str] | Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Options by name."""
    if isinstance(given, Mapping):
        chosen = {str(name): dict(options) for name, options in given.items()}
    else:
        unknown = next((name for name in given if name not in STRATEGIES), None)
        if unknown is not None:
            raise InputError(f"strategies must be among {', '.join(STRATEGIES)}, but one was {unknown!r}")
        chosen = {name: STRATEGIES[name] for name in given}
    if not chosen:
        raise InputError("strategies must name at least one, but there was none")
    known = _FACTORS | _RANKS
    for name, options in chosen.items():
        other = next((option for option in options if option not in known), None)
        if other is not None:
            raise InputError(f"strategy {name!r} must have options among {', '.join(known)}, but one was {other!r}")
        if _is_sparse(options) and len(options) > 1:
            raise InputError(f"strategy {name!r} must have no options but the form 'sparse', but it had {options}")
        if options.get("weighting") not in (None, "none"):
            raise InputError(
                f"strategy {name!r} must have None or 'none' as weighting, but it was {options['weighting']!r}"
            )
    return chosen


def _is_sparse(options: dict[str, Any]) -> bool:
    return options.get("form") == "sparse"


def _rows(wanted: set[tuple[str, float]], chosen: Iterable[str]) -> list[tuple[str, float]]:
    """Strategy by strategy, the highest budget first."""
    return [row for name in chosen for row in sorted(wanted, key=lambda row: -row[1]) if row[0] == name]


def _keeps(given: Sequence[float]) -> tuple[float, ...]:
    keeps = tuple(dict.fromkeys(float(share) for share in given))
    if not keeps:
        raise InputError("keep must hold at least one share, but there was none")
    return keeps


def _of(options: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The options that ``defaults`` has, where they are not given as there."""
    return defaults | {name: value for name, value in options.items() if name in defaults}


def _factors(options: dict[str, Any]) -> dict[str, Any]:
    """The options of the factors, with those that :func:`mixrank.compress` takes by itself."""
    factors = _of(options, _FACTORS)
    if factors["factors"] != "fisher":
        shrink = first_pull(None) if factors["shrink"] is None else factors["shrink"]
        factors |= {"weighting": "none", "shrink": 0.0 if factors["factors"] == "svd" else shrink}
    return factors


def _first(factors: dict[str, Any]) -> Strategy:
    """The arguments of :func:`mixrank.decompose` until the pull is measured."""
    found = {name: value for name, value in factors.items() if name != "weighting"}
    return cast(Strategy, found | {"shrink": first_pull(factors["shrink"])})


def _calibrated(
    model: nn.Module, sample: Sample, groups: Sequence[tuple[dict[str, Any], Any]], seed: int, running: Running
) -> tuple[CalibrationStats, CalibrationStats]:
    """Statistics of tokens as :func:`mixrank.compress` weights them and of tokens alike, as far as they are wanted."""
    if any(factors["weighting"] is None for factors, _ in groups):
        return calibrate_both(model, sample, held_out=None, seed=seed, **running)
    fisher = any(factors["factors"] == "fisher" for factors, _ in groups)
    alike = calibrate(model, sample, held_out=None, gradients=fisher, seed=seed, **running)
    return alike, alike


def _allocation(options: dict[str, Any]) -> Allocation:
    """The options of the ranks, and the energy that :func:`mixrank.compress` takes by itself."""
    ranks = cast(Allocation, _of(options, _RANKS))
    automatic = "sensitivity" if ranks["ranks"] == "mixed" else "weight"
    return {**ranks, "energy": ranks["energy"] or automatic}


def _check(model: nn.Module, chosen: dict[str, dict[str, Any]], keeps: tuple[float, ...]) -> None:
    """Raise InputError for what can be known before the calibration."""
    linears = compressible_linears(model)
    for options in chosen.values():
        if _is_sparse(options):
            options = {"energy": "weight", "step": 1, "form": "factors"}
        centre = check_strategy(**_first(_factors(options)), calibrated=True)
        shapes = {name: LayerShape.of(linear, centre) for name, linear in linears.items()}
        ranks = _allocation(options)
        for share in keeps:
            allocation: Allocation = {**ranks, "keep": share, "max_bytes": None, "max_macs": None}
            check_budget(model, shapes, **allocation)
        check_energy(ranks["energy"], ranks["ranks"], calibrated=True, held_out=True)


def _groups(
    chosen: dict[str, dict[str, Any]], wanted: set[tuple[str, float]]
) -> list[tuple[dict[str, Any], list[tuple[str, float]]]]:
    """What is to be made, by the options of its factors, so that only one set of factors is held at a time."""
    groups: list[tuple[dict[str, Any], list[tuple[str, float]]]] = []
    for name, options in chosen.items():
        factors = _factors(options)
        rows = _rows(wanted, [name])
        same = next((members for other, members in groups if other == factors), None)
        if rows and same is None:
            groups.append((factors, rows))
        elif same is not None:
            same += rows
    return groups
