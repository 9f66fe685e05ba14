"""Layers of a model made sparse by statistics: the entries of all are chosen together, then each weight is split."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mixrank.allocate import Budget, check_budget
from mixrank.arguments import Limits
from mixrank.attributes import note_
from mixrank.calibrate import calibrate
from mixrank.decompose import LayerShape
from mixrank.errors import InputError
from mixrank.gradients import POWER
from mixrank.models import compressible_linears
from mixrank.nn_sparse import SparseLinear
from mixrank.plan import Plan
from mixrank.progress import track
from mixrank.sparse import PULL, Measures, Split, output_error, removal_costs, split
from mixrank.sparse_plan import RANK_SHARE, Prices, choose_entries, histogram, ranks_of, scaled, sparse_plan
from mixrank.stats import CalibrationStats
from mixrank.stopwatch import Stopwatch
from mixrank_kernels.reference import packed_bits

TRIAL = {"rounds": 1, "steps": 4}
"""Of splits that are made without the images held out: they only tell of layers, and none is kept."""


@dataclass(frozen=True)
class Errors:
    """Squared errors of a layer's outputs, relative to what they were.

    Attributes:
        fitted: over all images, of the weights that were fitted to them.
        held_out: over the images held out, of weights like these that were fitted to the others; None without such.
    """

    fitted: float
    held_out: float | None


def sparse_statistics(
    model: nn.Module, images: Iterable, *, gradients: bool = True, gradient_power: float | None = None, **others: Any
) -> CalibrationStats:
    """What sparse weights are fitted by: the whole covariance of the inputs of each layer, its tokens alike.

    Args:
        model: as for :func:`mixrank.calibrate.calibrate`.
        images: the same.
        gradients: of a classifier, also its squared gradients.
        gradient_power: of these; None: :data:`mixrank.gradients.POWER`.
        **others: further arguments of that function.
    """
    power = POWER if gradient_power is None else gradient_power
    return calibrate(model, images, inputs=True, gradients=gradients, gradient_power=power, **others)


@dataclass(frozen=True)
class Spending:
    """A budget and the layers of a model that share it.

    Attributes:
        linears: those that were reached, by name.
        shapes: theirs.
        ranks: of their factors.
        prices: what each costs.
        available: what they may cost together.
        pull: of the covariances.
    """

    linears: dict[str, nn.Linear]
    shapes: dict[str, LayerShape]
    ranks: dict[str, int]
    prices: dict[str, Prices]
    available: int
    pull: float

    @classmethod
    def of(cls, model: nn.Module, idle: Iterable[str], limits: Limits, rank_share: float, pull: float) -> Spending:
        """Of a dense model.

        Args:
            model: it is not changed.
            idle: names of the layers that stay dense.
            limits: the budget.
            rank_share: as for :func:`put_sparse_`.
            pull: the same.

        Raises:
            InputError: a bad budget or option.
        """
        check_sparse(rank_share, pull)
        linears = compressible_linears(model)
        shapes = {name: LayerShape.of(linear, True) for name, linear in linears.items()}
        budget, fixed = budget_of(model, shapes, limits)
        available = budget.limit - fixed - sum(budget.cost(name, shapes.pop(name), None) for name in idle)
        ranks = ranks_of(shapes, budget, available, rank_share)
        prices = {name: Prices.of(budget, name, shape, ranks[name]) for name, shape in shapes.items()}
        return cls({name: linears[name] for name in shapes}, shapes, ranks, prices, available, pull)

    def entries(
        self, stats: CalibrationStats, weights: Mapping[str, float] | None = None, *, progress: bool = False
    ) -> dict[str, int | None]:
        """How many entries each layer gets, None where it stays dense.

        Args:
            stats: of the layers; those of images held out are added.
            weights: what the losses of each layer are multiplied by; None: 1.
            progress: show a progress bar.

        Raises:
            InputError: a bad weight, or the budget is too small.
        """
        counted = {}
        for name in track(self.shapes, "weighing entries", enabled=progress):
            costs = removal_costs(self.linears[name].weight, self.measures(name, stats), self.ranks[name])
            counted[name] = histogram(costs, self.prices[name].entry)
            if weights is not None:
                counted[name] = scaled(counted[name], weights[name])
        return choose_entries(counted, self.prices, self.available)

    def measures(self, name: str, stats: CalibrationStats) -> Measures:
        """What the entries of one layer are judged by."""
        return Measures.of(self.linears[name].weight, stats.whole(name), pull=self.pull)

    def split(self, name: str, stats: CalibrationStats, entries: int, **how: int) -> Split:
        """The split of one weight with so many entries; ``how``: options of :func:`mixrank.sparse.split`."""
        return split(self.linears[name].weight, self.measures(name, stats), entries, self.ranks[name], **how)

    def errors(self, name: str, stats: CalibrationStats, found: Split) -> Errors:
        """Of the split of one weight by the statistics of all images."""
        weight, other = self.linears[name].weight, None
        if stats.held_out is not None:
            trial = self.split(name, stats.without_held_out(), int(found.kept.sum()), **TRIAL)
            other = output_error(weight, trial, stats.held_out[name])
        return Errors(output_error(weight, found, stats.whole(name)), other)


def put_sparse_(
    model: nn.Module,
    stats: CalibrationStats,
    keep: float | None = None,
    *,
    max_bytes: int | None = None,
    max_macs: int | None = None,
    rank_share: float = RANK_SHARE,
    pull: float = PULL,
    weights: Mapping[str, float] | None = None,
    watch: Stopwatch | None = None,
    progress: bool = False,
) -> tuple[Plan, dict[str, Errors]]:
    """Replace the layers of a model by sparse ones, by statistics that were made before.

    Args:
        model: a dense model; it is changed in place.
        stats: of :func:`sparse_statistics`; those of images held out count like the others.
        keep: as for :func:`mixrank.compress_sparse.compress_sparse_`.
        max_bytes: the same.
        max_macs: the same.
        rank_share: the same.
        pull: the same.
        weights: what the losses of each layer are multiplied by, see
            :func:`mixrank.sparse_sensitivity.weigh_layers`; None: squared gradients alone decide.
        watch: notes the stages ``allocate`` and ``split``.
        progress: show progress bars.

    Returns:
        The plan, and the errors of each sparse layer.

    Raises:
        InputError: a bad budget, weight or option; the model is then as it was.
    """
    watch = watch or Stopwatch()
    limits: Limits = {"keep": keep, "max_bytes": max_bytes, "max_macs": max_macs}
    with watch.stage("allocate"):
        spending = Spending.of(model, stats.idle, limits, rank_share, pull)
        entries = spending.entries(stats, weights, progress=progress)
        options = {"form": "sparse", "rank_share": rank_share, "pull": pull}
        options |= {name: value for name, value in limits.items() if value is not None}
        plan = sparse_plan(model, spending.shapes, spending.ranks, entries, options)
    errors: dict[str, Errors] = {}
    layers: dict[str, SparseLinear] = {}
    with watch.stage("split"):
        for name in track(entries, "splitting weights", enabled=progress):
            if (count := entries[name]) is not None:
                found = spending.split(name, stats, count)
                layers[name] = layer_of(spending.linears[name], found)
                errors[name] = spending.errors(name, stats, found)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    note_(model, "mixrank_plan", plan)
    return plan, errors


def check_sparse(rank_share: float, pull: float) -> None:
    """Raise InputError where one of them is outside its range."""
    if not 0 <= rank_share < 1:
        raise InputError(f"rank_share must be at least 0 and below 1, but it was {rank_share}")
    if not 0 <= pull < float("inf"):
        raise InputError(f"pull must be a number of at least 0, but it was {pull}")


def budget_of(model: nn.Module, shapes: dict[str, LayerShape], limits: Limits) -> tuple[Budget, int]:
    """The budget of a model, and what of it is not for the layers of these shapes.

    Raises:
        InputError: it is outside its range, or not one.
    """
    given: Limits = {"keep": None, "max_bytes": None, "max_macs": None, **limits}
    return check_budget(model, shapes, **given, ranks="mixed", energy="weight", step=1, form="factors")


def bias_of(linear: nn.Linear, found: Split) -> Tensor:
    """The bias of a layer of which this is left, ``[N]`` float64."""
    return found.shift if linear.bias is None else found.shift + linear.bias.detach().cpu().double()


def layer_of(linear: nn.Linear, found: Split) -> SparseLinear:
    """The layer that holds a split weight, in the dtype, device and mode of the linear layer it was of."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(linear.weight.device, linear.weight.dtype).contiguous()

    layer = SparseLinear.from_parts(
        packed_bits(found.kept).to(linear.weight.device),
        cast(found.sparse[found.kept]),
        None if found.down is None else cast(found.down),
        None if found.up is None else cast(found.up),
        cast(bias_of(linear, found)),
        in_features=linear.in_features,
    )
    return layer.train(linear.training)
