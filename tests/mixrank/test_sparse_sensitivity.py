"""How much sparse layers count: what was measured against what was foretold, and what comes of it."""

import copy
import math

import pytest
import timm
import torch

import mixrank
from mixrank.compress_sparse import compress_sparse_
from mixrank.errors import InputError
from mixrank.fidelity import compare
from mixrank.models import compressible_linears, twin
from mixrank.sample import Sample
from mixrank.sparse import Measures, output_error, split
from mixrank.sparse_fit import TRIAL, Spending, put_sparse_, sparse_statistics
from mixrank.sparse_plan import CLASSES, RANK_SHARE, histogram, scaled
from mixrank.sparse_sensitivity import POWER, weigh_layers, weights_of
from mixrank.stats import LayerStats

KEEP, PULL = 0.5, 0.3


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=7).eval()
    torch.nn.init.normal_(made.head.weight, std=0.2)
    return made


@pytest.fixture(scope="module")
def images():
    return list(torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(1)).split(6))


@pytest.fixture(scope="module")
def made(model, images):
    """Statistics with images held out, and these."""
    sample = Sample(images, 4, 0, None)
    return sparse_statistics(model, sample, held_out=None), sample.parts


def test_a_layer_counts_by_a_power_of_what_it_does_more_than_was_foretold():
    found = weights_of({"a": 4.0, "b": 1.0, "c": 0.5}, {"a": 1.0, "b": 1.0, "c": 2.0})
    assert math.prod(found.values()) == pytest.approx(1)
    assert found["a"] / found["b"] == pytest.approx(4**POWER)
    assert found["b"] / found["c"] == pytest.approx(4**POWER)


@pytest.mark.parametrize("pair", [(0.0, 1.0), (1.0, 0.0), (-1e-9, 1.0), (math.nan, 1.0)])
def test_what_tells_nothing_counts_as_foretold(pair):
    found = weights_of({"a": pair[0], "b": 8.0, "c": 2.0}, {"a": pair[1], "b": 1.0, "c": 1.0})
    assert found["a"] == 1
    assert found["b"] * found["c"] == pytest.approx(1)
    assert weights_of({"a": 0.0}, {"a": 0.0}) == {"a": 1.0}


def test_costs_are_scaled_by_class():
    costs = torch.rand(5000, generator=torch.Generator().manual_seed(0))
    for factor in (0.01, 0.5, 1.0, 3.0, 1e30):
        moved = (scaled(histogram(costs), factor) - histogram(costs * factor)).cumsum(0).abs().max()
        assert moved <= 20, "but for rounding to classes"
    assert torch.equal(scaled(histogram(costs), 1.0), histogram(costs))
    assert scaled(histogram(costs), 1e-300)[CLASSES - 1] == 5000, "none is lost where costs leave the range"


def test_layers_are_weighed_by_single_replacements_on_images_held_out(model, made):
    stats, parts = made
    weights = weigh_layers(model, stats, parts, {"keep": KEEP})
    held = torch.cat(list(parts))
    apart = torch.cat(list(torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(1)).split(6)))[4::5]
    assert {tuple(image.flatten()[:3].tolist()) for image in held} == {
        tuple(image.flatten()[:3].tolist()) for image in apart
    }
    spending = Spending.of(model, (), {"keep": KEEP}, RANK_SHARE, PULL)
    fitted = stats.without_held_out()
    entries, losses, moved = spending.entries(fitted), {}, {}
    for name, count in entries.items():
        if count is None:
            continue
        found, trial = spending.split(name, fitted, count, **TRIAL), copy.deepcopy(model)
        linear = trial.get_submodule(name)
        rest = (linear.weight - found.weight) * spending.measures(name, fitted).scale.sqrt()[:, None]
        measures = spending.measures(name, fitted)
        losses[name] = ((rest @ measures.covariance) * rest).sum().item() * measures.unit
        with torch.no_grad():
            linear.weight.copy_(found.weight)
            linear.bias += found.shift
            moved[name] = compare(trial(held), model(held)).divergence
    assert len(losses) > 4
    expected = weights_of(moved, losses)
    assert {name: weights[name] for name in expected} == pytest.approx(expected, rel=0.02)
    assert all(weights[name] == 1 for name in entries if name not in expected)


def test_a_layer_that_counts_more_keeps_more(model, made):
    stats = made[0]
    names = list(compressible_linears(model))
    plain = put_sparse_(twin(model), stats, KEEP)[0]
    plan = put_sparse_(twin(model), stats, KEEP, weights=dict.fromkeys(names, 1.0) | {"blocks.0.attn.proj": 9.0})[0]
    before, after = ({layer.name: layer.entries for layer in each.layers} for each in (plain, plan))
    assert after["blocks.0.attn.proj"] > 1.1 * before["blocks.0.attn.proj"]
    assert sum(after.values()) == pytest.approx(sum(before.values()), rel=1e-3)
    assert all(after[name] <= before[name] for name in names if name != "blocks.0.attn.proj")


def test_compress_weighs_layers_and_fits_them_to_all_images(model, images, made):
    stats, parts = made
    by_hand, at_once = twin(model), twin(model)
    put_sparse_(by_hand, stats, KEEP, weights=weigh_layers(model, stats, parts, {"keep": KEEP}))
    result = mixrank.compress(at_once, images, KEEP, form="sparse", sensitivity_images=4)
    assert result.images == 20
    assert result.seconds.keys() == {"calibrate", "sensitivity", "allocate", "split"}
    with torch.no_grad():
        torch.testing.assert_close(at_once(images[0]), by_hand(images[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"held_out": 0.0}, {"few": True}])
def test_without_images_held_out_gradients_alone_decide(model, images, options):
    batches = [images[0][:4]] if options.pop("few", False) else images
    sparse, plain = twin(model), twin(model)
    result = compress_sparse_(sparse, batches, KEEP, **options)
    assert "sensitivity" not in result.seconds
    assert all(layer.held_out_error is None for layer in result.layers)
    plan = put_sparse_(plain, sparse_statistics(model, batches), KEEP)[0]
    assert plan.layers == result.plan.layers


def test_images_of_several_sizes_cannot_be_measured_and_it_says_so():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=7, dynamic_img_size=True).eval()
    mixed = [torch.randn(5, 3, 32, 32), torch.randn(5, 3, 48, 48)]
    result = compress_sparse_(model, mixed, KEEP)
    assert any("count by their squared gradients, as they cannot be measured" in note for note in result.notes)
    assert result.plan.keep <= KEEP


def test_errors_are_those_of_the_outputs(model, images, made):
    stats = made[0]
    name = "blocks.1.mlp.fc2"
    linear, seen = model.get_submodule(name), []
    handle = linear.register_forward_pre_hook(lambda _m, a: seen.append(a[0]))
    with torch.no_grad():
        model(torch.cat(images))
    handle.remove()
    spending = Spending.of(model, (), {"keep": KEEP}, RANK_SHARE, PULL)
    result = compress_sparse_(twin(model), images, KEEP, sensitivity_images=4)
    report = next(layer for layer in result.layers if layer.name == name)
    count = next(layer.entries for layer in result.plan.layers if layer.name == name)
    apart = torch.arange(20) % 5 == 4
    found, trial = spending.split(name, stats, count), spending.split(name, stats.without_held_out(), count, **TRIAL)
    for reported, parts, tokens in (
        (report.relative_error, found, seen[0]),
        (report.held_out_error, trial, seen[0][apart]),
    ):
        rows = tokens.flatten(0, 1).double()
        lost = rows @ (linear.weight.double() - parts.weight.double()).mT - parts.shift
        expected = (lost.square().sum() / (rows @ linear.weight.double().mT).square().sum()).item()
        assert reported == pytest.approx(expected, rel=2e-3)
    assert report.held_out_error > report.relative_error


def test_an_error_is_zero_of_nothing():
    weight, tokens = torch.zeros(3, 4), torch.randn(9, 4, dtype=torch.float64)
    stats = LayerStats("input", tokens.mT @ tokens, tokens.sum(0), 9.0)
    assert output_error(weight, split(weight, Measures.of(weight, stats), 6, 0), stats) == 0


def test_a_bad_budget_is_refused(model, made):
    with pytest.raises(InputError, match="keep must be in"):
        weigh_layers(model, made[0], made[1], {"keep": 1.5})
