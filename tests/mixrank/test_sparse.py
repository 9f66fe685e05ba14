"""Sparse weights with factors beside them: what is judged, how a weight is split, and how a budget is spent."""

from __future__ import annotations

import itertools
import math

import pytest
import timm
import torch

from mixrank import load, save
from mixrank.calibrate import calibrate
from mixrank.compress_sparse import compress_sparse_
from mixrank.counting import count_bytes, count_macs, count_parameters
from mixrank.decompose import LayerShape, factorise
from mixrank.errors import InputError
from mixrank.fidelity import compare
from mixrank.nn_sparse import SparseLinear
from mixrank.sparse import Measures, fitted, largest, removal_costs, split
from mixrank.sparse_fit import budget_of
from mixrank.sparse_plan import Prices, choose_entries, histogram, ranks_of
from mixrank.stats import LayerStats


@pytest.fixture(scope="module")
def layer():
    torch.manual_seed(0)
    mix = torch.randn(24, 24, dtype=torch.float64) @ torch.diag(torch.linspace(0.1, 2, 24).double())
    x = torch.randn(500, 24, dtype=torch.float64) @ mix + 1
    weight, gradients = torch.randn(10, 24, dtype=torch.float64), torch.rand(10).double()
    stats = LayerStats("input", x.mT @ x, x.sum(0), 500.0, images=5, squares=500 * gradients)
    return x, weight, stats


def lost(weight, measures, found):
    whole = found.sparse + (0 if found.down is None else found.up @ found.down)
    rest = (weight - whole) * measures.scale.sqrt()[:, None]
    return (rest @ measures.covariance * rest).sum().item()


def small(depth=2, seed=0):
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=depth, num_classes=10).eval()
    torch.nn.init.normal_(model.head.weight, std=0.2)
    return model, [torch.randn(16, 3, 32, 32), torch.randn(8, 3, 32, 32)]


def test_measures_are_those_of_the_tokens(layer):
    x, weight, stats = layer
    found = Measures.of(weight, stats, pull=0.5, ridge=0.2, metric_pull=1.0)
    covariance = torch.cov(x.mT, correction=0)
    variance = covariance.diagonal()
    expected = (covariance + 0.5 * variance.diag()) / 1.5 + 0.2 * variance.mean() * torch.eye(24)
    torch.testing.assert_close(found.covariance, expected / variance.mean(), check_dtype=False)
    torch.testing.assert_close(found.mean, x.mean(0))
    squares = stats.squares / stats.squares.mean()
    torch.testing.assert_close(found.scale, (squares + 1) / 2)
    assert found.unit == pytest.approx(stats.squares.mean().item() / 5 * variance.mean().item())


def test_a_layer_that_sees_only_constants_is_judged_by_its_weight():
    x, weight = torch.ones(7, 4, dtype=torch.float64), torch.randn(3, 4)
    found = Measures.of(weight, LayerStats("input", x.mT @ x, x.sum(0), 7.0), pull=0.3, ridge=0.2)
    torch.testing.assert_close(found.covariance, 1.2 * torch.eye(4))
    assert found.scale.tolist() == [1, 1, 1]


@pytest.mark.parametrize("spread", [1e-3, 1e-5, 1e-9, 0.0])
@pytest.mark.parametrize("size", [1.0, 1e-15, 1e15])
def test_inputs_that_hardly_vary_give_finite_weights(spread, size):
    tokens = size * (torch.rand(1, 48) + spread * torch.randn(7, 48)).double()
    rounded = tokens.float() / size
    gram = size**2 * (rounded.mT @ rounded).double()  # as the kernels sum it
    stats = LayerStats("input", gram, tokens.sum(0), 7.0, images=7, squares=torch.rand(24).double())
    weight = torch.randn(24, 48)
    measures = Measures.of(weight, stats)
    found = split(weight, measures, 400, 4)
    assert found.weight.isfinite().all()
    assert 0 <= found.error < 1
    assert math.isfinite(found.loss)
    assert removal_costs(weight, measures, 4).isfinite().all()


def test_entries_are_least_squares_of_each_row(layer):
    _, weight, stats = layer
    covariance = Measures.of(weight, stats).covariance
    kept = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    found = fitted(weight, weight * kept, kept, covariance, steps=60)
    for row, goal, stored in zip(found, weight, kept, strict=True):
        inside = covariance[stored][:, stored]
        expected = torch.linalg.solve(inside, covariance[stored] @ goal)
        torch.testing.assert_close(row[stored], expected)
        assert not row[~stored].any()


def test_every_step_of_the_fit_loses_less(layer):
    _, weight, stats = layer
    covariance = Measures.of(weight, stats).covariance
    kept = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.3
    losses = []
    for steps in range(6):
        rest = weight - fitted(weight, weight * kept, kept, covariance, steps)
        losses.append((rest @ covariance * rest).sum(1))
    assert all((after <= before * (1 + 1e-9)).all() for before, after in itertools.pairwise(losses))
    assert (losses[-1] < 0.9 * losses[0]).any()


@pytest.mark.parametrize("count", [0, 1, 5, 11, 12])
def test_so_many_are_the_largest_even_where_some_are_equal(count):
    values = torch.tensor([[3.0, 1, 1, 1], [1, 1, 2, 0], [1, 1, 5, 1]])
    found = largest(values, count)
    assert found.sum() == count
    assert count in (0, 12) or values[found].min() >= values[~found].max()


def test_all_entries_are_the_weight_itself(layer):
    _, weight, stats = layer
    found = split(weight, Measures.of(weight, stats), weight.numel(), 0)
    torch.testing.assert_close(found.sparse, weight)
    assert found.error < 1e-20
    torch.testing.assert_close(found.shift, torch.zeros_like(found.shift))


def test_no_entries_are_the_best_factors(layer):
    _, weight, stats = layer
    measures = Measures.of(weight, stats, pull=0, ridge=1e-9, metric_pull=1e9)  # all rows alike, as for "aware"
    found = split(weight, measures, 0, 3)
    linear = torch.nn.Linear(24, 10, bias=False, dtype=torch.float64)
    linear.weight.data = weight
    down, up, bias = factorise(linear, stats, factors="aware").factors(3)
    torch.testing.assert_close(found.up @ found.down, up @ down, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.shift, bias, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_error_is_that_of_the_outputs(layer, rank):
    x, weight, stats = layer
    measures = Measures.of(weight, stats, pull=0, ridge=1e-12)
    found = split(weight, measures, 80, rank)
    whole = found.sparse + (0 if found.down is None else found.up @ found.down)
    missing = (x @ (weight - whole).mT - found.shift) * measures.scale.sqrt()
    outputs = (x - x.mean(0)) @ weight.mT * measures.scale.sqrt()
    assert found.error == pytest.approx((missing.square().sum() / outputs.square().sum()).item(), rel=1e-6)
    assert found.kept.sum() == 80
    assert not found.sparse[~found.kept].any()


def test_fitted_entries_lose_less_than_thresholded_ones_and_factors_help(layer):
    _, weight, stats = layer
    measures = Measures.of(weight, stats)
    plain = lost(weight, measures, split(weight, measures, 80, 0, steps=0))
    sparse = lost(weight, measures, split(weight, measures, 80, 0))
    low = torch.randn(10, 2, dtype=torch.float64) @ torch.randn(2, 24, dtype=torch.float64)
    both = split(low + weight * largest(weight.abs(), 60), measures, 80, 2, rounds=40, steps=40)
    assert sparse < 0.9 * plain
    assert both.error < 0.02, "such a sum is found again"


def test_the_cost_of_removal_is_what_one_entry_alone_loses(layer):
    _, weight, stats = layer
    measures = Measures.of(weight, stats)
    costs = removal_costs(weight, measures, 0)
    gone = weight.clone()
    gone[3, 7] = 0
    rest = (weight - gone) * measures.scale.sqrt()[:, None]
    assert costs[3, 7] == pytest.approx((rest @ measures.covariance * rest).sum().item() * measures.unit)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [((241, 0), "entries must be from 0 to 240"), ((-1, 0), "entries"), ((5, 11), "rank must be from 0 to 10")],
)
def test_sizes_that_cannot_be_are_refused(layer, arguments, said):
    _, weight, stats = layer
    with pytest.raises(InputError, match=said):
        split(weight, Measures.of(weight, stats), *arguments)


def test_statistics_of_outputs_are_refused(layer):
    _, weight, _ = layer
    stats = LayerStats("output", torch.eye(10).double(), torch.zeros(10).double(), 1.0)
    with pytest.raises(InputError, match="must be of 24 inputs"):
        Measures.of(weight, stats)


def test_a_weight_that_is_not_finite_is_refused_and_the_model_stays():
    model, batches = small(depth=1)
    weight = model.blocks[0].mlp.fc2.weight
    with torch.no_grad():
        weight[3, 4] = torch.nan
    stats = LayerStats("input", torch.eye(768).double(), torch.zeros(768).double(), 1.0)
    with pytest.raises(InputError, match=r"shape \[192, 768\] has NaN or infinite values"):
        Measures.of(weight, stats)
    with pytest.raises(InputError):
        compress_sparse_(model, batches, 0.5)
    assert isinstance(model.blocks[0].mlp.fc1, torch.nn.Linear)


def test_calibration_sums_inputs_and_squared_gradients():
    model, batches = small()
    stats = calibrate(model, batches, inputs=True, gradients=True, seed=3)
    outer = calibrate(model, batches, gradients=True, seed=3)
    seen = []
    handle = model.blocks[1].mlp.fc2.register_forward_pre_hook(lambda _m, a: seen.append(a[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    rows = torch.cat(seen).double()
    found = stats["blocks.1.mlp.fc2"]
    assert (found.side, found.gradient, found.rows) == ("input", None, len(rows))
    torch.testing.assert_close(found.gram, rows.mT @ rows, rtol=1e-4, atol=1e-3)
    # The outputs of this layer are fewer than its inputs, so outer products are in their own coordinates.
    torch.testing.assert_close(found.squares, outer["blocks.1.mlp.fc2"].gradient.diagonal(), rtol=1e-4, atol=1e-9)
    assert (found + found).squares.sum() == 2 * found.squares.sum()


def test_one_threshold_holds_for_all_layers_and_the_budget_is_spent():
    generator = torch.Generator().manual_seed(0)
    costs = {
        name: torch.rand(4000, generator=generator) * scale for name, scale in (("a", 1.0), ("b", 0.1), ("c", 9.0))
    }
    prices = {name: Prices(4000, 1, 125, 0) for name in costs}
    chosen = choose_entries({name: histogram(each) for name, each in costs.items()}, prices, 6000)
    assert sum(chosen.values()) + 3 * 125 == 6000
    least = {name: costs[name].sort(descending=True).values[chosen[name] - 1].item() for name in ("a", "c")}
    assert least["a"] == pytest.approx(least["c"], rel=0.01)
    assert chosen["b"] == 0 or costs["b"].max() > least["a"]


def test_what_is_dearer_than_the_dense_layer_stays_dense():
    high = {"a": torch.full((100,), 5.0), "b": torch.full((100,), 1.0)}
    prices = {name: Prices(100, 1, 4, 0) for name in high}
    chosen = choose_entries({name: histogram(each) for name, each in high.items()}, prices, 150)
    assert chosen == {"a": None, "b": 46}


def test_dearer_entries_go_first():
    costs = {"a": torch.rand(1000), "b": torch.rand(1000)}
    prices = {"a": Prices(10_000, 10, 0, 0), "b": Prices(1000, 1, 0, 0)}
    histograms = {name: histogram(each, prices[name].entry) for name, each in costs.items()}
    chosen = choose_entries(histograms, prices, 3000)
    assert chosen["a"] * 10 + (1000 if chosen["b"] is None else chosen["b"]) in range(2991, 3001)
    assert chosen["a"] < 250


@pytest.mark.parametrize(
    ("share", "ranks"),
    [
        (0.0, {"wide": 0, "small": 0}),
        (0.04, {"wide": 8, "small": 0}),
        (0.1, {"wide": 16, "small": 8}),
        (0.2, {"wide": 40, "small": 8}),
        (0.3, {"wide": 64, "small": 8}),
        (0.9, {"wide": 200, "small": 40}),
    ],
)
def test_ranks_are_a_share_in_eights_and_small_layers_have_eight_where_that_fits(share, ranks):
    model = torch.nn.ModuleDict({"wide": torch.nn.Linear(768, 1152), "small": torch.nn.Linear(192, 192)})
    shapes = {name: LayerShape.of(linear, True) for name, linear in model.items()}
    budget, _ = budget_of(model, shapes, {"keep": 0.5})
    weights = sum(linear.weight.numel() for linear in model.values())
    assert ranks_of(shapes, budget, weights // 2, share) == ranks


def test_eight_ranks_never_take_most_of_a_small_layer():
    model = torch.nn.ModuleDict({"small": torch.nn.Linear(64, 64)})
    shapes = {"small": LayerShape.of(model["small"], True)}
    budget, _ = budget_of(model, shapes, {"keep": 1.0})
    found = [ranks_of(shapes, budget, available, 0.4)["small"] for available in (2047, 2048, 4096)]
    assert found == [0, 8, 8]


def test_a_budget_below_the_places_is_refused():
    with pytest.raises(InputError, match="must leave the layers 8 at least, but it leaves 7"):
        choose_entries({"a": histogram(torch.rand(100))}, {"a": Prices(100, 1, 8, 0)}, 7)


@pytest.mark.parametrize("budget", [{"keep": 0.4}, {"max_bytes": 1_500_000}, {"max_macs": 2_500_000}])
def test_the_budget_is_kept_and_counted(budget, tmp_path):
    model, batches = small()
    dense, before = model(batches[0]), count_parameters(model)
    result = compress_sparse_(model, batches, **budget)
    assert result.plan.parameters_after == count_parameters(model) <= before
    spent = {"keep": result.plan.keep, "max_bytes": count_bytes(model), "max_macs": count_macs(model)}
    (name, limit), *_ = budget.items()
    assert 0.995 * limit <= spent[name] <= limit
    assert isinstance(model.blocks[0].mlp.fc1, SparseLinear)
    assert 0 < max(layer.relative_error for layer in result.layers) < 1
    save(model, tmp_path / "sparse.safetensors")
    again = load(tmp_path / "sparse.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(again(batches[0]), model(batches[0]))
        assert compare(model(batches[0]), dense).agreement > 50


def test_no_classifier_is_judged_by_its_outputs():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0).eval()
    result = compress_sparse_(model, [torch.randn(8, 3, 32, 32)], 0.5)
    assert result.plan.keep <= 0.5
    assert any("no logits" in note for note in result.notes)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"keep": 0.4, "rank_share": 1.0}, "rank_share must be at least 0 and below 1, but it was 1.0"),
        ({"keep": 0.4, "pull": -0.1}, "pull must be a number of at least 0"),
        ({"keep": 1.5}, "keep must be in"),
        ({}, "exactly one of keep, max_bytes and max_macs"),
        ({"keep": 0.01}, "keep must be at least"),
    ],
)
def test_bad_options_leave_the_model_as_it_was(options, said):
    model, batches = small(depth=1)
    before = [type(module) for module in model.modules()]
    with pytest.raises(InputError, match=said):
        compress_sparse_(model, batches, **options)
    assert [type(module) for module in model.modules()] == before
