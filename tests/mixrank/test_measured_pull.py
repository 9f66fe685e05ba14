"""The pull that is measured on the whole compressed model."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import timm
import torch

from mixrank import InputError, compress, sweep
from mixrank.allocate import allocate
from mixrank.apply import apply_
from mixrank.calibrate import calibrate
from mixrank.decompose import FISHER_SHRINK, decompose
from mixrank.fidelity import compare, logits_of
from mixrank.measured_pull import FIRST, METRIC_PULLS, PULLS, measure_pull

RUNNING = {"dtype": None, "progress": False}


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(3)
    kinds = torch.randn(8, 3, 32, 32)
    return kinds.repeat(8, 1, 1, 1) + 0.5 * torch.randn(64, 3, 32, 32)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=7).eval()
    torch.nn.init.normal_(made.head.weight, std=0.2)
    return made


def parts(model, images, keep):
    stats = calibrate(model, [images], held_out=0.25, gradients=True)

    make = partial(decompose, model, factors="fisher")

    first = make(stats, shrink=FIRST)
    return stats, make, first, allocate(model, first, keep=keep), images[::4]


@pytest.mark.parametrize("keep", [0.7, 0.3])
def test_no_neighbour_of_the_pull_does_better_on_images_held_out(model, images, keep):
    stats, make, first, plan, apart = parts(model, images, keep)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pulls, chosen = measure_pull(model, plan, first, stats, make, [apart], RUNNING)
    pull = pulls["shrink"]
    dense = logits_of(model, [apart])

    def judged(made):
        trials = {name: each.trial for name, each in made.items()}
        return compare(logits_of(apply_(copy.deepcopy(model), plan, trials), [apart]), dense).divergence

    place = PULLS.index(pull)
    same = make(stats, shrink=pull)
    ranks = plan.ranks()
    assert ranks
    assert all(torch.equal(chosen[name].factors(r)[0], same[name].factors(r)[0]) for name, r in ranks.items())
    if pull != FIRST:  # no more than the plan needs
        assert {name: each.up_basis.shape[1] for name, each in chosen.items()} == dict.fromkeys(chosen, 0) | ranks
    least = judged(same)
    assert least <= judged(first)
    for neighbour in PULLS[max(0, place - 1) : place + 2]:
        assert neighbour == pull or judged(make(stats, shrink=neighbour)) >= least
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_with_the_metrics_pull_no_neighbour_in_either_direction_does_better(model, images):
    stats, make, first, plan, apart = parts(model, images, 0.3)
    asked = []

    def counted(of, **options):
        if of.held_out is None:
            asked.append((options["shrink"], options["fisher_shrink"]))
        return make(of, **options)

    pulls, chosen = measure_pull(model, plan, first, stats, counted, [apart], RUNNING, metric=True)
    assert len(set(asked)) == len(asked)
    assert (FIRST, FISHER_SHRINK) not in asked
    dense = logits_of(model, [apart])

    def judged(**options):
        trials = {name: each.trial for name, each in make(stats, **options).items()}
        return compare(logits_of(apply_(copy.deepcopy(model), plan, trials), [apart]), dense).divergence

    least = judged(**pulls)
    for name, grid in (("shrink", PULLS), ("fisher_shrink", METRIC_PULLS)):
        place = grid.index(pulls[name])
        for neighbour in grid[max(0, place - 1) : place + 2]:
            assert neighbour == pulls[name] or judged(**{**pulls, name: neighbour}) >= least
    same = make(stats, **pulls)
    assert all(torch.equal(chosen[name].factors(r)[1], same[name].factors(r)[1]) for name, r in plan.ranks().items())


def test_each_pull_is_made_once_and_no_further_than_the_divergence_falls(model, images):
    stats, make, first, plan, apart = parts(model, images, 0.5)
    asked = []

    def counted(of, **options):
        asked.append(options["shrink"] if of.held_out is None else "all images")
        return make(of, **options)

    pulls, _ = measure_pull(model, plan, first, stats, counted, [apart], RUNNING)
    pull = pulls["shrink"]
    assert (asked.pop() == "all images") if pull != FIRST else "all images" not in asked
    assert len(set(asked)) == len(asked)
    assert FIRST not in asked
    place, start = PULLS.index(pull), PULLS.index(FIRST)
    reached = {PULLS.index(each) for each in asked}
    wanted = {start - 1, start + 1} if place == start else {*range(min(place, start), max(place, start) + 1)}
    assert wanted - {start} <= reached
    assert all(abs(each - place) <= 1 or min(place, start) <= each <= start + 1 for each in reached)


def test_compress_and_sweep_take_it(model, images):
    with pytest.raises(InputError, match="shrink must be a number, auto or oas, but it was 'measured'"):
        decompose(model, factors="svd", shrink="measured")
    compressed, plain = copy.deepcopy(model), copy.deepcopy(model)
    result = compress(compressed, images.split(16), keep=0.4, shrink="measured")
    fixed = compress(plain, images.split(16), keep=0.4, shrink=FIRST)
    assert result.plan == fixed.plan
    pulls = {layer.shrink for layer in result.layers}
    assert len(pulls) == 1
    assert pulls <= set(PULLS)
    assert "shrink" in result.seconds
    rows = sweep(model, images.split(16), [0.4], {"a": {"shrink": "measured"}, "b": {}}).rows
    assert [row.plan for row in rows] == [rows[0].plan] * 2
    assert "shrink" in rows[0].seconds


@pytest.mark.parametrize("options", [{"held_out": 0.0}, {"sequential": True, "factors": "aware"}])
def test_without_images_held_out_or_in_sequence_it_is_refused(model, images, options):
    with pytest.raises(InputError, match="shrink='measured' needs images that are held out, and no sequential=True"):
        compress(copy.deepcopy(model), [images], keep=0.5, shrink="measured", **options)


def test_too_few_images_to_hold_any_out_are_refused(model, images):
    with pytest.raises(InputError, match="shrink='measured' needs images that are held out, but there were none"):
        compress(copy.deepcopy(model), [images[:3]], keep=0.5, shrink="measured", energy="weight")


def test_a_model_without_classes_is_refused(images):
    features = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0)
    with pytest.raises(InputError, match="shrink='measured' needs logits of classes, but VisionTransformer returns"):
        compress(features, [images], keep=0.5, shrink="measured")


def test_factors_of_the_plain_svd_have_no_pull(model):
    result = compress(copy.deepcopy(model), keep=0.5, factors="svd", energy="weight", shrink="measured")
    assert {layer.shrink for layer in result.layers} == {None}
