"""Allocation: budgets hold, and the greedy choice is the best one up to a step."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mixrank import InputError, MixedRankLinear, PivotedLinear, allocate, apply_, calibrate, compress, decompose
from mixrank.allocate import NEAR, check_budget, plan_of, ranks_to_measure, remaining_error
from mixrank.counting import count_bytes, count_macs, count_parameters
from mixrank.greedy import Point, greedy, lower_hull
from mixrank.sensitivity import Sensitivity

LAYERS = {"factors": MixedRankLinear, "pivoted": PivotedLinear}
BUDGETS = [0.95, 0.7, 0.5, 0.3, 0.22]


@pytest.mark.parametrize("form", ["factors", "pivoted"])
@pytest.mark.parametrize("ranks", ["mixed", "uniform"])
@pytest.mark.parametrize("energy", ["weight", "output"])
@pytest.mark.parametrize("keep", BUDGETS)
def test_the_budget_is_never_exceeded_and_nearly_used(model, factorisations, ranks, energy, keep, form):
    plan = allocate(model, factorisations, keep=keep, ranks=ranks, energy=energy, form=form)
    total = count_parameters(model)
    assert plan.parameters_before == total
    assert plan.parameters_after <= keep * total
    # Mixed ranks leave less than one step of the widest layer; uniform ranks one step of every layer.
    slack = (
        8 * (192 + 768)
        if ranks == "mixed"
        else 8 * sum(layer.in_features + layer.out_features for layer in plan.layers)
    )
    assert plan.parameters_after > keep * total - slack
    assert all(layer.rank is None or layer.rank % 8 == 0 for layer in plan.layers)
    apply_(model, plan, factorisations)
    assert count_parameters(model) == plan.parameters_after
    for layer in plan.layers:
        module = model.get_submodule(layer.name)
        assert type(module) is (nn.Linear if layer.rank is None else LAYERS[form])
        assert layer.form == ("factors" if layer.rank is None else form)
        assert (module.bias is not None) == layer.bias
        assert sum(p.numel() for p in module.parameters()) == layer.parameters_after
        assert layer.parameters_after <= layer.parameters_before


@pytest.mark.parametrize("form", ["factors", "pivoted"])
def test_budgets_in_bytes_and_macs(model, factorisations, form):
    limit = int(0.55 * count_bytes(model))
    by_bytes = apply_(copy.deepcopy(model), allocate(model, factorisations, max_bytes=limit, form=form), factorisations)
    assert 0.98 * limit < count_bytes(by_bytes) <= limit
    limit = int(0.6 * count_macs(model))
    by_macs = apply_(copy.deepcopy(model), allocate(model, factorisations, max_macs=limit, form=form), factorisations)
    assert 0.97 * limit < count_macs(by_macs) <= limit


@pytest.mark.parametrize("unit", ["keep", "max_bytes", "max_macs"])
def test_what_the_pivoted_form_costs_is_what_the_model_then_has(model, unit):
    """To the last number, byte (the index included) and multiply-accumulate."""
    factorisations = decompose(model, factors="svd")
    count = {"keep": count_parameters, "max_bytes": count_bytes, "max_macs": count_macs}[unit]
    limits = dict.fromkeys(("keep", "max_bytes", "max_macs"))
    limits[unit] = 0.6 if unit == "keep" else int(0.6 * count(model))
    shapes = {name: factorisation.shape for name, factorisation in factorisations.items()}
    options = {"ranks": "mixed", "energy": "weight", "step": 8, "form": "pivoted"}
    budget, fixed = check_budget(model, shapes, **limits, **options)
    plan = allocate(model, factorisations, **limits, form="pivoted")
    assert any(layer.rank is not None for layer in plan.layers)
    expected = fixed + sum(budget.cost(layer.name, shapes[layer.name], layer.rank) for layer in plan.layers)
    assert count(apply_(model, plan, factorisations)) == expected


def test_the_pivoted_form_has_more_rank_and_less_error_in_the_same_budget(model):
    factorisations = decompose(model, factors="svd")
    plans = {form: allocate(model, factorisations, keep=0.5, form=form) for form in ("factors", "pivoted")}

    def error(form: str) -> float:
        kept = {layer.name: layer.rank for layer in plans[form].layers if layer.rank is not None}
        return sum(1 - factorisations[name].weight_energy[:rank].sum().item() for name, rank in kept.items())

    assert error("pivoted") < 0.95 * error("factors")


def test_pivoted_ranks_reach_up_to_where_the_dense_weight_costs_no_more(model):
    """At full rank R (K + N - R) is K N; the dense weight, which has no error, takes that place."""
    factorisations = decompose(model, factors="svd")
    plan = allocate(model, factorisations, keep=0.99, form="pivoted", ranks="uniform")
    assert all(layer.rank is None or layer.rank < min(layer.in_features, layer.out_features) for layer in plan.layers)
    assert any(layer.rank is not None and layer.rank > 0.8 * layer.in_features for layer in plan.layers)
    assert all(layer.parameters_after <= layer.parameters_before for layer in plan.layers)
    whole = allocate(model, factorisations, keep=1.0, form="pivoted")
    assert all(layer.rank is None for layer in whole.layers)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(2, 12), st.integers(2, 12), st.integers(0, 2**31)), min_size=1, max_size=3))
def test_greedy_with_pivoted_costs_is_never_over_budget_and_at_most_a_layer_from_the_best(layers):
    """Costs that rise ever more slowly make the points non-convex: against exhaustive search at every budget."""
    choices = {}
    for number, (k, n, seed) in enumerate(layers):
        energy = np.sort(np.random.default_rng(seed).random(min(k, n)) ** 3)[::-1]
        left = 1 - energy.cumsum() / energy.sum()
        points = [Point(r, r * (k + n - r), max(0.0, left[r - 1])) for r in range(1, min(k, n))]
        choices[str(number)] = [*points, Point(None, k * n, 0.0)]
    most = sum(points[-1].cost for points in choices.values())
    plans = list(itertools.product(*choices.values()))
    jump = max(points[-1].cost for points in choices.values())
    for available in range(sum(points[0].cost for points in choices.values()), most + 1, 7):
        chosen = greedy(choices, available)
        assert sum(point.cost for point in chosen.values()) <= available
        best = min(
            (sum(p.error for p in plan) for plan in plans if sum(p.cost for p in plan) <= available - jump),
            default=float("inf"),
        )
        assert sum(point.error for point in chosen.values()) <= best + 1e-9


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "exactly one of keep, max_bytes and max_macs must be given"),
        ({"keep": 0.5, "max_bytes": 10}, "exactly one of keep, max_bytes and max_macs must be given"),
        ({"keep": 0}, r"keep must be in \(0, 1\], but it was 0"),
        ({"keep": 1.5}, r"keep must be in \(0, 1\], but it was 1.5"),
        ({"keep": float("nan")}, r"keep must be in \(0, 1\], but it was nan"),
        ({"keep": 0.01}, r"keep must be at least 0\.\d+ for this model and step, but it was 0.01"),
        ({"max_bytes": 1000}, r"max_bytes must be at least \d+ for this model and step, but it was 1000"),
        ({"max_macs": 1000}, r"max_macs must be at least \d+ for this model and step, but it was 1000"),
        ({"keep": 0.5, "step": 0}, "step must be at least 1, but it was 0"),
        ({"keep": 0.5, "ranks": "random"}, "ranks must be one of mixed, uniform, but it was 'random'"),
        (
            {"keep": 0.5, "energy": "solar"},
            "energy must be one of weight, output, held_out, mixed, sensitivity, but it was 'solar'",
        ),
        ({"keep": 0.5, "form": "round"}, r"form must be one of factors, pivoted(, sparse, auto)?, but it was 'round'"),
    ],
)
def test_budgets_that_cannot_be_are_refused_before_the_work(model, budget, message):
    with pytest.raises(InputError, match=message):
        allocate(model, decompose(model, factors="svd"), **budget)

    def forbidden():
        pytest.fail("calibration began")
        yield

    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=message):
        compress(model, forbidden(), split_qkv=True, **budget)
    assert model.state_dict().keys() == before.keys()


def test_the_smallest_keep_that_is_named_is_possible(model):
    factorisations = decompose(model, factors="svd")
    with pytest.raises(InputError) as raised:
        allocate(model, factorisations, keep=0.01)
    least = float(str(raised.value).split()[5])
    assert allocate(model, factorisations, keep=least).parameters_after <= least * count_parameters(model)
    with pytest.raises(InputError):
        allocate(model, factorisations, keep=least - 0.001)


def test_output_energy_needs_statistics(model):
    with pytest.raises(InputError, match="energy='output' needs calibration images"):
        allocate(model, decompose(model, factors="svd"), keep=0.5, energy="output")


@pytest.mark.parametrize("energy", ["held_out", "mixed"])
def test_energies_of_images_held_out(model, energy):
    """Each layer's points are the errors of the energy; without such images they cannot be had."""
    stats = calibrate(model, [torch.randn(10, 3, 32, 32)], held_out=0.3)
    factorisations = decompose(model, stats, shrink=0.3)
    plan = allocate(model, factorisations, keep=0.5, energy=energy)
    assert plan.options["energy"] == energy
    assert plan.parameters_after <= 0.5 * plan.parameters_before
    for made in factorisations.values():
        weight, held_out = remaining_error(made, "weight"), made.held_out_error
        expected = held_out if energy == "held_out" else (weight * held_out).sqrt()
        assert torch.equal(remaining_error(made, energy), expected)
        assert weight[0] == 1
        assert weight[-1] == pytest.approx(0, abs=1e-9)
    with pytest.raises(InputError, match=f"energy='{energy}' needs held-out images, but"):
        allocate(model, decompose(model, stats.merged()), keep=0.5, energy=energy)
    with pytest.raises(InputError, match=f"energy='{energy}' needs held-out images, but there are none"):
        compress(model, [torch.randn(6, 3, 32, 32)], keep=0.5, energy=energy, held_out=0)


@pytest.mark.parametrize("ranks", ["mixed", "uniform"])
def test_ranks_stay_within_their_limits(model, ranks):
    factorisations = decompose(model, factors="svd")
    for low, high, least, most in ((20, 100, 24, 96), (0.25, 0.3, 48, 56), (None, 64, 8, 64), (40, None, 40, 192)):
        plan = allocate(model, factorisations, keep=0.55, ranks=ranks, min_rank=low, max_rank=high)
        found = [layer.rank for layer in plan.layers]
        if high is not None:
            assert None not in found
        assert all(rank is None or least <= rank <= most for rank in found)
        assert plan.parameters_after <= 0.55 * plan.parameters_before
    free = [layer.rank for layer in allocate(model, factorisations, keep=0.55, ranks=ranks).layers]
    assert any(rank is None or not 48 <= rank <= 56 for rank in free)


def test_layers_that_no_rank_within_the_limits_makes_smaller_stay_dense(model):
    """Square layers of 192 cost less dense from rank 96 on, those with 576 or 768 outputs not yet."""
    plan = allocate(model, decompose(model, factors="svd"), keep=1.0, min_rank=100, max_rank=120)
    for layer in plan.layers:
        assert (layer.rank is None) == (layer.out_features == layer.in_features)
        assert layer.rank in (None, 104, 112, 120)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"min_rank": 0}, "min_rank must be a whole number of at least 1 or a share below 1, but it was 0"),
        ({"max_rank": 1.5}, "max_rank must be a whole number of at least 1 or a share below 1, but it was 1.5"),
        ({"min_rank": float("nan")}, "min_rank must be .*, but it was nan"),
        ({"min_rank": 64, "max_rank": 0.2}, r"min_rank=64 is above max_rank=0\.2 for layer blocks\.0\.attn\.qkv"),
        ({"max_rank": 4}, "no multiple of step=8 is a rank from 1 to 4"),
        ({"min_rank": 80}, r"keep must be at least 0\.\d+ for this model and step, but it was 0\.4"),
    ],
)
def test_limits_that_cannot_be_are_refused(model, limits, message):
    with pytest.raises(InputError, match=message):
        allocate(model, decompose(model, factors="svd"), keep=0.4, **limits)


def test_mixed_ranks_leave_less_error_than_uniform_ones(model):
    images = torch.randn(100, 3, 32, 32)  # more tokens than any rank, so that every cut leaves an error
    factorisations = decompose(model, calibrate(model, [images]))

    def error(ranks: str) -> float:
        plan = allocate(model, factorisations, keep=0.4, ranks=ranks, energy="output")
        return sum(factorisations[p.name].relative_error(p.rank) for p in plan.layers if p.rank is not None)

    assert 1e-6 < error("mixed") < error("uniform")


costs = st.lists(st.integers(1, 50), min_size=2, max_size=4)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(costs, st.integers(0, 2**31)), min_size=1, max_size=4), st.floats(0, 1))
def test_greedy_is_optimal_up_to_one_step_on_convex_errors(layers, share):
    """Against exhaustive search: the error is at most that of the best plan with one step less budget."""
    choices = {}
    for i, (step_costs, seed) in enumerate(layers):
        slopes = np.sort(np.random.default_rng(seed).random(len(step_costs)))[::-1]
        saved = slopes * step_costs
        total, left, points = 1, float(saved.sum()), [Point(0, 1, float(saved.sum()))]
        for j, (cost, gain) in enumerate(zip(step_costs, saved, strict=True)):
            total, left = total + cost, left - float(gain)
            points.append(Point(j + 1, total, max(left, 0.0)))
        choices[str(i)] = points
    least = sum(points[0].cost for points in choices.values())
    most = sum(points[-1].cost for points in choices.values())
    available = least + int(share * (most - least))
    chosen = greedy(choices, available)
    assert sum(point.cost for point in chosen.values()) <= available
    longest = max(cost for step_costs, _ in layers for cost in step_costs)
    best = min(
        sum(point.error for point in plan)
        for plan in itertools.product(*choices.values())
        if sum(point.cost for point in plan) <= max(least, available - longest)
    )
    assert sum(point.error for point in chosen.values()) <= best + 1e-9


def test_the_dense_weight_is_the_last_step():
    """Its large saving must not draw the budget before the ranks below it are paid for."""
    square = [Point(8, 10, 0.5), Point(16, 20, 0.4), Point(24, 30, 0.35), Point(None, 32, 0.0)]
    plain = [Point(8, 10, 0.6), Point(16, 20, 0.3), Point(24, 30, 0.1), Point(None, 60, 0.0)]
    chosen = greedy({"square": square, "plain": plain}, 52)
    assert (chosen["square"].rank, chosen["plain"].rank) == (16, 24)
    chosen = greedy({"square": square, "plain": plain}, 62)
    assert (chosen["square"].rank, chosen["plain"].rank) == (None, 24)


def test_the_hull_is_convex_and_below_all_points():
    points = [Point(8, 10, 0.5), Point(16, 20, 0.45), Point(24, 30, 0.2), Point(None, 35, 0.0)]
    assert [point.cost for point in lower_hull(points)] == [10, 35]


def test_sensitivity_moves_ranks_to_the_layers_that_the_logits_feel(model, images):
    factorisations = decompose(model, calibrate(model, [images], held_out=0.34))
    first = allocate(model, factorisations, keep=0.5)
    layers = [layer for layer in first.layers if layer.rank is not None]
    felt, unfelt = layers[0].name, layers[-1].name
    divergences = {layer.name: 0.01 for layer in layers} | {felt: 10.0, unfelt: 0.0}
    sensitivities = {layer.name: Sensitivity(layer.rank, divergences[layer.name]) for layer in layers}
    plan = allocate(model, factorisations, keep=0.5, energy="sensitivity", sensitivities=sensitivities)
    ranks, before = ({layer.name: layer.rank for layer in each.layers} for each in (plan, first))
    assert ranks[felt] > before[felt]
    assert ranks[unfelt] < before[unfelt]
    assert plan.parameters_after <= 0.5 * plan.parameters_before
    for layer in layers:
        assert 0.6 * layer.rank <= ranks[layer.name] <= 1.6 * layer.rank
    assert [name for name, rank in ranks.items() if rank is None] == [n for n, rank in before.items() if rank is None]


def test_a_layer_that_is_dense_can_get_a_rank_again(model):
    factorisations = decompose(model, calibrate(model, [torch.randn(60, 3, 32, 32)]))
    first = allocate(model, factorisations, keep=0.7)
    ranks = ranks_to_measure(model, factorisations, first)
    assert set(ranks) == set(factorisations)
    unfelt, *_ = [layer.name for layer in first.layers if layer.rank is None]
    sensitivities = {name: Sensitivity(rank, 0.0 if name == unfelt else 1.0) for name, rank in ranks.items()}
    second = allocate(model, factorisations, keep=0.7, energy="sensitivity", sensitivities=sensitivities)
    found = {layer.name: layer.rank for layer in second.layers}
    assert 0.6 * ranks[unfelt] <= found[unfelt] <= ranks[unfelt]
    for near in NEAR:  # and it may also stay as it is, in a later and narrower round too
        plan = allocate(model, factorisations, keep=1.0)
        unmoved = {name: Sensitivity(r, 0.0) for name, r in ranks_to_measure(model, factorisations, plan).items()}
        again = allocate(model, factorisations, keep=1.0, energy="sensitivity", sensitivities=unmoved, near=near)
        assert all(layer.rank is None for layer in again.layers)


def test_sensitivity_has_to_be_measured_first_and_at_ranks_that_can_be_chosen(model, factorisations):
    with pytest.raises(InputError, match="needs sensitivities: measure them at the ranks of an earlier plan"):
        allocate(model, factorisations, keep=0.5, energy="sensitivity")
    for near in ((0.0, 1.5), (1.2, 1.5), (0.5, 0.9), (float("nan"), 2.0)):
        with pytest.raises(InputError, match="near must be two numbers above 0"):
            allocate(model, factorisations, keep=0.5, energy="sensitivity", sensitivities={}, near=near)
    wrong = dict.fromkeys(factorisations, Sensitivity(13, 0.1))
    with pytest.raises(InputError, match="measured at rank 13, which this allocation cannot choose"):
        allocate(model, factorisations, keep=0.5, energy="sensitivity", sensitivities=wrong)


@pytest.mark.parametrize("form", ["factors", "pivoted"])
def test_a_plan_of_given_ranks_counts_what_it_will_hold(model, factorisations, form):
    ranks = {name: None if "proj" in name else 5 + index for index, name in enumerate(factorisations)}
    plan = plan_of(model, factorisations, ranks, form, {"by": "hand"})
    assert {layer.name: layer.rank for layer in plan.layers} == ranks
    assert plan.options == {"by": "hand"}
    assert count_parameters(apply_(model, plan, factorisations)) == plan.parameters_after < plan.parameters_before
