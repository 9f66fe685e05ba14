"""Allocation: one budget for the whole model, spent where it saves the most error.

Each layer offers a few points (cost, error): a factorisation at every multiple of ``step``, and the dense weight, which
has no error. What a rank costs depends on the form that the layer will have: R (K + N) numbers as factors; in the
pivoted form R (K + N - R), which are fewer than those of the dense weight up to full rank. The greedy allocation of
Azizi, Nazemi and Pedram (2024) always takes the step that saves most error per unit of cost. The errors of different
layers add up and each falls convexly with the rank, so among factorisations that is the best plan up to one step. In
the pivoted form cost rises ever more slowly, so some ranks can lie above the hull of the others: they are passed over,
unless the budget ends there. The dense weight is the last step of a layer and is not anticipated: the error it saves at
once would draw the budget to a few dense layers. The budget is never exceeded.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mixrank.decompose import Factorisation, LayerShape
from mixrank.errors import InputError
from mixrank.models import count_bytes, count_macs, count_parameters, preprocessing
from mixrank.nn import SplitLinear
from mixrank.nn_pivoted import index_dtype
from mixrank.plan import FORMS, LayerPlan, Plan

RANKS = ("mixed", "uniform")
ENERGIES = ("weight", "output")


@dataclass(frozen=True)
class Point:
    """One choice for one layer: a rank (None: dense), what it costs, and the error that it leaves."""

    rank: int | None
    cost: int
    error: float


@dataclass(frozen=True)
class Budget:
    """A limit in one unit, what the dense model costs in it, and what one weight and one bias of each layer cost.

    ``form`` is that of layers with a rank; their index, which is no parameter, costs only bytes.
    """

    unit: str
    limit: int
    total: int
    per_weight: dict[str, int]
    per_bias: dict[str, int]
    form: str

    def cost(self, name: str, shape: LayerShape, rank: int | None) -> int:
        weights, bias = parameters(shape, rank, self.form)
        n, has_index = shape.out_features, rank is not None and self.form == "pivoted"
        index = n * index_dtype(n).itemsize if has_index and self.unit == "bytes" else 0
        return weights * self.per_weight[name] + bias * self.per_bias[name] + index


def parameters(shape: LayerShape, rank: int | None, form: str) -> tuple[int, int]:
    """How many weights and biases a layer holds at one rank in one form, or dense for None."""
    k, n = shape.in_features, shape.out_features
    if rank is None:
        return k * n, n * shape.bias
    return rank * (k + n - (rank if form == "pivoted" else 0)), n * shape.factored_bias


def allocate(
    model: nn.Module,
    factorisations: Mapping[str, Factorisation],
    *,
    keep: float | None = None,
    max_bytes: int | None = None,
    max_macs: int | None = None,
    ranks: str = "mixed",
    energy: str = "weight",
    step: int = 8,
    form: str = "factors",
) -> Plan:
    """Choose a rank, or the dense weight, for every layer under one budget.

    Exactly one of ``keep``, ``max_bytes`` and ``max_macs`` is given.

    Args:
        model: the dense model.
        factorisations: what :func:`mixrank.decompose.decompose` returned for it.
        keep: share of *all* parameters of the model that may remain, in (0, 1].
        max_bytes: bytes of parameters and persistent buffers that may remain.
        max_macs: multiply-accumulate operations for one image that may remain.
        ranks: ``"mixed"``, or ``"uniform"``: the same share of every layer.
        energy: what the error of a layer means for mixed ranks: the share of its squared singular values that is cut
            (``"weight"``), or the relative squared error of its outputs on the calibration images (``"output"``, the
            paper's objective).
        step: ranks are multiples of this (or the layer's full rank, if that is smaller).
        form: how layers with a rank will be held: as ``"factors"`` or in the ``"pivoted"`` form, see
            :class:`mixrank.PivotedLinear`.

    Returns:
        The plan. Its cost is never above the budget.

    Raises:
        InputError: no or several budgets, a budget outside its range or below what is possible (the message says
            the smallest possible), an unknown strategy, ``energy="output"`` without statistics.

    Example:
        >>> import timm
        >>> from mixrank import decompose
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=2)
        >>> plan = allocate(model, decompose(model, factors="svd"), keep=0.6)
        >>> plan.parameters_after <= 0.6 * plan.parameters_before
        True
    """
    shapes = {name: factorisation.shape for name, factorisation in factorisations.items()}
    limits = {"keep": keep, "max_bytes": max_bytes, "max_macs": max_macs}
    budget, fixed = check_budget(model, shapes, ranks=ranks, energy=energy, step=step, form=form, **limits)
    if ranks == "mixed" and energy == "output" and any(f.output_energy is None for f in factorisations.values()):
        raise InputError("energy='output' needs calibration statistics, but the layers were decomposed without any")
    choices = {
        name: _points(name, shape, choice, factorisations[name], budget, energy)
        for name, shape, choice in _ranks(shapes, budget, step)
    }
    available = budget.limit - fixed
    chosen = greedy(choices, available) if ranks == "mixed" else _uniform(choices, shapes, available, form)
    options = {"ranks": ranks, "energy": energy, "step": step, "form": form} | {
        name: value for name, value in limits.items() if value is not None
    }
    return _plan(model, shapes, chosen, form, options)


def check_budget(
    model: nn.Module,
    shapes: Mapping[str, LayerShape],
    *,
    keep: float | None,
    max_bytes: int | None,
    max_macs: int | None,
    ranks: str,
    energy: str,
    step: int,
    form: str,
) -> tuple[Budget, int]:
    """Check the options and the budget of :func:`allocate` from the layers' sizes alone.

    Returns:
        The budget, and the part of the dense model's cost that lies outside the layers.

    Raises:
        InputError: as :func:`allocate`.
    """
    for name, value, known in (("ranks", ranks, RANKS), ("energy", energy, ENERGIES), ("form", form, FORMS)):
        if value not in known:
            raise InputError(f"{name} must be one of {', '.join(known)}, but it was {value!r}")
    if step < 1:
        raise InputError(f"step must be at least 1, but it was {step}")
    budget = _budget(model, shapes, form, keep, max_bytes, max_macs)
    fixed = budget.total - sum(budget.cost(name, shape, None) for name, shape in shapes.items())
    least = fixed + sum(budget.cost(name, shape, ranks_[0]) for name, shape, ranks_ in _ranks(shapes, budget, step))
    if least > budget.limit:
        raise InputError(_too_small(budget, least, keep))
    return budget, fixed


def _too_small(budget: Budget, least: int, keep: float | None) -> str:
    if keep is not None:
        share = math.ceil(1e4 * least / budget.total) / 1e4
        return f"keep must be at least {share:.4f} for this model and step, but it was {keep}"
    return f"max_{budget.unit} must be at least {least} for this model and step, but it was {budget.limit}"


def _budget(
    model: nn.Module,
    shapes: Mapping[str, LayerShape],
    form: str,
    keep: float | None,
    max_bytes: int | None,
    max_macs: int | None,
) -> Budget:
    if sum(value is not None for value in (keep, max_bytes, max_macs)) != 1:
        raise InputError("exactly one of keep, max_bytes and max_macs must be given")
    once = dict.fromkeys(shapes, 1)
    if keep is not None:
        if not 0 < keep <= 1:
            raise InputError(f"keep must be in (0, 1], but it was {keep}")
        total = count_parameters(model)
        return Budget("parameters", math.floor(keep * total), total, once, once, form)
    if max_bytes is not None:
        sizes = {name: shape.element_size for name, shape in shapes.items()}
        return Budget("bytes", max_bytes, count_bytes(model), sizes, sizes, form)
    return Budget("macs", max_macs, count_macs(model), tokens_per_layer(model), dict.fromkeys(shapes, 0), form)


def tokens_per_layer(model: nn.Module) -> dict[str, int]:
    """How many rows one image sends through every linear layer, found by one forward pass over an empty image."""
    rows: dict[str, int] = {}

    def count(name: str):
        def hook(_module: nn.Module, arguments: tuple[Tensor, ...], _output: Tensor) -> None:
            rows[name] = rows.get(name, 0) + arguments[0].numel() // arguments[0].shape[-1]

        return hook

    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    handles = [module.register_forward_hook(count(name)) for name, module in linears.items()]
    training = model.training
    parameter = next(model.parameters())
    try:
        with torch.inference_mode():
            size = preprocessing(model)["input_size"]
            model.eval()(torch.zeros(1, *size, device=parameter.device, dtype=parameter.dtype))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return {name: rows.get(name, 0) for name in linears}


def _ranks(
    shapes: Mapping[str, LayerShape], budget: Budget, step: int
) -> Iterator[tuple[str, LayerShape, list[int | None]]]:
    """Each layer's choices with rising cost, the dense weight (None) last; no rank costs as much as that."""
    for name, shape in shapes.items():
        full = min(shape.in_features, shape.out_features)
        dense = budget.cost(name, shape, None)
        steps = (min(rank, full) for rank in range(step, full + step, step))
        yield name, shape, [*(rank for rank in steps if budget.cost(name, shape, rank) < dense), None]


def _points(
    name: str, shape: LayerShape, ranks: list[int | None], factorisation: Factorisation, budget: Budget, energy: str
) -> list[Point]:
    """The layer's choices with their costs and the errors that they leave."""
    if energy == "weight" or factorisation.output_energy is None:
        kept = factorisation.weight_energy.cumsum(0)
    else:
        kept = 1 - factorisation.centred_share * (1 - factorisation.output_energy.cumsum(0))
    errors = [0.0 if rank is None else max(0.0, 1 - kept[rank - 1].item()) for rank in ranks]
    return [Point(rank, budget.cost(name, shape, rank), error) for rank, error in zip(ranks, errors, strict=True)]


def greedy(choices: dict[str, list[Point]], available: int) -> dict[str, Point]:
    """One point for each layer, costing ``available`` at most: always the step that saves most error per cost.

    A step that does not fit is followed as far as the budget goes, and its layer is closed.
    """
    chosen = {name: points[0] for name, points in choices.items()}
    available -= sum(point.cost for point in chosen.values())
    paths = {name: steps(points) for name, points in choices.items()}
    heap: list[tuple[float, int, str]] = []

    def offer(order: int, name: str) -> None:
        if paths[name]:
            heapq.heappush(heap, (_slope(chosen[name], paths[name][0]), order, name))

    for order, name in enumerate(choices):
        offer(order, name)
    while heap:
        _, order, name = heapq.heappop(heap)
        step = paths[name].pop(0)
        if step.cost - chosen[name].cost <= available:
            best = step
            available -= best.cost - chosen[name].cost
            chosen[name] = best
            offer(order, name)
        else:
            best = max(
                (point for point in choices[name] if point.cost - chosen[name].cost <= available),
                key=lambda point: point.cost,
            )
            if best.cost > chosen[name].cost:
                available -= best.cost - chosen[name].cost
                chosen[name] = best
    return chosen


def steps(points: list[Point]) -> list[Point]:
    """The points after the first that the greedy choice visits: the hull of the ranks, and the dense weight last."""
    return [*lower_hull(points[:-1])[1:], points[-1]] if len(points) > 1 else []


def lower_hull(points: list[Point]) -> list[Point]:
    """The points on the lower convex hull of (cost, error), cost rising, error falling strictly."""
    hull: list[Point] = []
    for point in points:
        if hull and point.error >= hull[-1].error:
            continue
        while len(hull) >= 2 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(start: Point, end: Point) -> float:
    return (end.error - start.error) / (end.cost - start.cost)


def _uniform(
    choices: dict[str, list[Point]], shapes: Mapping[str, LayerShape], available: int, form: str
) -> dict[str, Point]:
    """The largest share of every layer's weights, the same for all, that fits the budget."""
    shares = {
        name: [parameters(shapes[name], p.rank, form)[0] / parameters(shapes[name], None, form)[0] for p in points]
        for name, points in choices.items()
    }

    def at(share: float) -> dict[str, Point]:
        return {name: points[max(bisect.bisect_right(shares[name], share) - 1, 0)] for name, points in choices.items()}

    # A plan only changes where some layer's rank does, so these shares are all that need to be tried.
    ordered = sorted({0.0, 1.0}.union(*shares.values()))
    fitting = bisect.bisect_right(ordered, available, key=lambda share: sum(point.cost for point in at(share).values()))
    return at(ordered[max(fitting - 1, 0)])


def _plan(
    model: nn.Module, shapes: Mapping[str, LayerShape], chosen: dict[str, Point], form: str, options: dict
) -> Plan:
    layers = []
    for name, shape in shapes.items():
        rank = chosen[name].rank
        bias = shape.bias if rank is None else shape.factored_bias
        before, after = sum(parameters(shape, None, form)), sum(parameters(shape, rank, form))
        sizes = (name, shape.in_features, shape.out_features)
        layers.append(LayerPlan(*sizes, rank, bias, before, after, "factors" if rank is None else form))
    total = count_parameters(model)
    after = total - sum(layer.parameters_before - layer.parameters_after for layer in layers)
    split = tuple(name for name, module in model.named_modules() if isinstance(module, SplitLinear))
    return Plan(tuple(layers), total, after, split, options)
