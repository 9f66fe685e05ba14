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
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from mixrank.arguments import Bounds, Limits
from mixrank.counting import count_bytes, count_macs, count_parameters, tokens_per_layer
from mixrank.decompose import Factorisation, LayerShape
from mixrank.errors import InputError
from mixrank.greedy import Point, greedy
from mixrank.nn import SplitLinear
from mixrank.nn_pivoted import index_dtype
from mixrank.plan import LOW_RANK_FORMS, LayerPlan, Plan

if TYPE_CHECKING:
    from mixrank.sensitivity import Sensitivity

RANKS = ("mixed", "uniform")
# What an energy's error needs besides the weight.
ENERGIES = {
    "weight": None,
    "output": "calibration images",
    "held_out": "held-out images",
    "mixed": "held-out images",
    "sensitivity": "calibration images",
}
# Ranks stay within these multiples of those that sensitivity was measured at, in the first round and after it: further
# off it means little.
NEAR = ((0.6, 1.6), (0.75, 1.35))
_LEAST_DIVERGENCE = 1e-12


def remaining_error(factorisation: Factorisation, energy: str) -> Tensor | None:
    """The error that each rank from 0 to min(N, K) leaves, relative, ``[S + 1]``; None where it is not known.

    Args:
        factorisation: of the layer.
        energy: one of :data:`ENERGIES`, see :func:`allocate`.
    """
    if energy == "output":
        return factorisation.output_error
    if energy == "held_out":
        return factorisation.held_out_error
    if energy == "sensitivity":
        known = factorisation.held_out_error
        return factorisation.output_error if known is None else known
    kept = factorisation.weight_energy.cumsum(0)
    weight = torch.cat([kept.new_ones(1), (1 - kept).clamp(min=0)])
    if energy == "weight":
        return weight
    held_out = factorisation.held_out_error
    return None if held_out is None else (weight * held_out).sqrt()


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
    min_rank: float | None = None,
    max_rank: float | None = None,
    sensitivities: Mapping[str, Sensitivity] | None = None,
    near: tuple[float, float] = NEAR[0],
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
            (``"weight"``), the relative squared error of its outputs on the calibration images (``"output"``, the
            paper's objective) or on images held out (``"held_out"``), or the geometric mean of the first and the last
            (``"mixed"``), or the divergence of the logits that the layer causes (``"sensitivity"``), from what was
            measured at one rank and the held-out error at others near it.
        step: ranks are multiples of this (or the layer's full rank, if that is smaller).
        min_rank: no layer gets a lower rank: a number of at least 1, or below 1 a share of the full rank min(N, K).
        max_rank: no layer gets a higher rank or stays dense, but for those that a factorisation would not make
            smaller: a number or share as for ``min_rank``.
        sensitivities: for ``energy="sensitivity"``: what :func:`mixrank.sensitivity.measure_sensitivity` found at the
            :func:`ranks_to_measure` of an earlier plan under the same budget. Layers without an entry stay dense.
        near: ranks stay within these multiples of those that sensitivity was measured at, at most and at least 1.
        form: how layers with a rank will be held: as ``"factors"`` or in the ``"pivoted"`` form, see
            :class:`mixrank.PivotedLinear`.

    Returns:
        The plan. Its cost is never above the budget.

    Raises:
        InputError: no or several budgets, a budget outside its range or below what is possible (the message says
            the smallest possible), an unknown strategy, an energy without the statistics that it needs, limits of
            the rank that leave none.

    Example:
        >>> import timm
        >>> from mixrank import decompose
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=2)
        >>> plan = allocate(model, decompose(model, factors="svd"), keep=0.6)
        >>> plan.parameters_after <= 0.6 * plan.parameters_before
        True
    """
    shapes = {name: factorisation.shape for name, factorisation in factorisations.items()}
    limits: Limits = {"keep": keep, "max_bytes": max_bytes, "max_macs": max_macs}
    bounds: Bounds = {"step": step, "min_rank": min_rank, "max_rank": max_rank}
    budget, fixed = check_budget(model, shapes, ranks=ranks, energy=energy, form=form, **bounds, **limits)
    if ranks == "uniform":
        energy = "weight"  # plays no part
    if not 0 < near[0] <= 1 <= near[1]:
        raise InputError(f"near must be two numbers above 0, the first at most 1 and the second at least 1, not {near}")
    if energy == "sensitivity" and sensitivities is None:
        raise InputError("energy='sensitivity' needs sensitivities: measure them at the ranks of an earlier plan")
    if any(remaining_error(factorisation, energy) is None for factorisation in factorisations.values()):
        raise InputError(f"energy={energy!r} needs {ENERGIES[energy]}, but the layers were decomposed without any")
    choices = {
        name: _points(name, shape, choice, factorisations[name], budget, energy)
        for name, shape, choice in _ranks(shapes, budget, **bounds)
    }
    if energy == "sensitivity" and sensitivities is not None:
        choices = {name: _near(points, sensitivities.get(name), near) for name, points in choices.items()}
    available = budget.limit - fixed
    chosen = greedy(choices, available) if ranks == "mixed" else _uniform(choices, shapes, available, form)
    options: dict[str, object] = {"ranks": ranks, "energy": energy, "form": form}
    options |= {name: value for name, value in {**bounds, **limits}.items() if value is not None}
    return plan_of(model, factorisations, {name: point.rank for name, point in chosen.items()}, form, options)


def ranks_to_measure(model: nn.Module, factorisations: Mapping[str, Factorisation], plan: Plan) -> dict[str, int]:
    """The ranks at which sensitivity tells how to improve a plan, by layer name.

    Args:
        model: the dense model.
        factorisations: of its layers.
        plan: what :func:`allocate` made of them.

    Returns:
        The plan's ranks; for a layer that it leaves dense a rank so far below that the layer may still stay dense, or
        nothing where no rank makes it smaller.
    """
    shapes = {name: factorisation.shape for name, factorisation in factorisations.items()}
    options = dict.fromkeys(("keep", "max_bytes", "max_macs", "min_rank", "max_rank")) | plan.options
    budget, _ = check_budget(model, shapes, **options)
    planned = {layer.name: layer.rank for layer in plan.layers}
    found: dict[str, int] = {}
    for name, _, choices in _ranks(shapes, budget, options["step"], options["min_rank"], options["max_rank"]):
        known = [rank for rank in choices if rank is not None]
        if (rank := planned[name]) is not None:
            found[name] = rank
        elif known:
            found[name] = next(rank for rank in known if NEAR[-1][1] * rank >= known[-1])
    return found


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
    min_rank: float | None = None,
    max_rank: float | None = None,
    form: str,
) -> tuple[Budget, int]:
    """Check the options and the budget of :func:`allocate` from the layers' sizes alone.

    Returns:
        The budget, and the part of the dense model's cost that lies outside the layers.

    Raises:
        InputError: as :func:`allocate`.
    """
    for name, value, known in (("ranks", ranks, RANKS), ("energy", energy, ENERGIES), ("form", form, LOW_RANK_FORMS)):
        if value not in known:
            raise InputError(f"{name} must be one of {', '.join(known)}, but it was {value!r}")
    if step < 1:
        raise InputError(f"step must be at least 1, but it was {step}")
    for name, bound in (("min_rank", min_rank), ("max_rank", max_rank)):
        if bound is not None and not (0 < bound < 1 or (bound >= 1 and bound == int(bound))):
            raise InputError(f"{name} must be a whole number of at least 1 or a share below 1, but it was {bound}")
    budget = _budget(model, shapes, form, keep, max_bytes, max_macs)
    fixed = budget.total - sum(budget.cost(name, shape, None) for name, shape in shapes.items())
    choices = _ranks(shapes, budget, step, min_rank, max_rank)
    least = fixed + sum(budget.cost(name, shape, ranks_[0]) for name, shape, ranks_ in choices)
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
    assert max_macs is not None
    return Budget("macs", max_macs, count_macs(model), tokens_per_layer(model), dict.fromkeys(shapes, 0), form)


def _ranks(
    shapes: Mapping[str, LayerShape], budget: Budget, step: int, min_rank: float | None, max_rank: float | None
) -> Iterator[tuple[str, LayerShape, list[int | None]]]:
    """Each layer's choices with rising cost, the dense weight (None) last; no rank costs as much as that.

    Under a highest rank the dense weight is a choice only where there is no other.
    """
    for name, shape in shapes.items():
        full = min(shape.in_features, shape.out_features)
        lowest, highest = _limit(min_rank, full, 1), _limit(max_rank, full, full)
        if lowest > highest:
            raise InputError(f"min_rank={min_rank} is above max_rank={max_rank} for layer {name} of full rank {full}")
        dense = budget.cost(name, shape, None)
        steps = [min(rank, full) for rank in range(step, full + step, step)]
        worth = [rank for rank in steps if budget.cost(name, shape, rank) < dense]
        fitting = [rank for rank in worth if lowest <= rank <= highest]
        if worth and not fitting and max_rank is not None and lowest <= max(worth):
            raise InputError(
                f"no multiple of step={step} is a rank from {lowest} to {highest}, as min_rank and max_rank want "
                f"for layer {name}"
            )
        yield name, shape, [*fitting, *([None] if max_rank is None or not fitting else [])]


def _limit(value: float | None, full: int, default: int) -> int:
    """A limit of the rank that is given as a number, a share of the full rank or not at all."""
    if value is None:
        return default
    return min(int(value), full) if value >= 1 else max(1, round(value * full))


def _points(
    name: str, shape: LayerShape, ranks: list[int | None], factorisation: Factorisation, budget: Budget, energy: str
) -> list[Point]:
    """The layer's choices with their costs and the errors that they leave."""
    remaining = cast(Tensor, remaining_error(factorisation, energy))  # allocate has refused an energy without
    errors = [0.0 if rank is None else remaining[rank].item() for rank in ranks]
    return [Point(rank, budget.cost(name, shape, rank), error) for rank, error in zip(ranks, errors, strict=True)]


def _near(points: list[Point], sensitivity: Sensitivity | None, near: tuple[float, float]) -> list[Point]:
    """The choices near the rank that was measured, their errors in units of the divergence that it caused.

    Raises:
        InputError: the rank that was measured is not among the choices.
    """
    if sensitivity is None:
        return points[-1:]
    measured = next((point for point in points if point.rank == sensitivity.rank), None)
    if measured is None:
        raise InputError(f"sensitivity was measured at rank {sensitivity.rank}, which this allocation cannot choose")
    # Never nothing at all, so that what others leave of the budget is used.
    scale = max(sensitivity.divergence, _LEAST_DIVERGENCE) / measured.error if measured.error > 0 else 0.0
    low, high = (factor * sensitivity.rank for factor in near)
    highest = max(point.rank for point in points if point.rank is not None)
    return [
        Point(point.rank, point.cost, scale * point.error)
        for point in points
        if point is measured or (low <= point.rank <= high if point.rank is not None else highest <= high)
    ]


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


def plan_of(
    model: nn.Module,
    factorisations: Mapping[str, Factorisation],
    ranks: Mapping[str, int | None],
    form: str,
    options: dict | None = None,
) -> Plan:
    """The plan that gives each layer a rank, or None to stay dense; ``options`` are for the record."""
    layers = []
    for name, factorisation in factorisations.items():
        shape, rank = factorisation.shape, ranks[name]
        bias = shape.bias if rank is None else shape.factored_bias
        before, after = sum(parameters(shape, None, form)), sum(parameters(shape, rank, form))
        sizes = (name, shape.in_features, shape.out_features)
        layers.append(LayerPlan(*sizes, rank, bias, before, after, "factors" if rank is None else form))
    total = count_parameters(model)
    after = total - sum(layer.parameters_before - layer.parameters_after for layer in layers)
    split = tuple(name for name, module in model.named_modules() if isinstance(module, SplitLinear))
    return Plan(tuple(layers), total, after, split, options or {})
