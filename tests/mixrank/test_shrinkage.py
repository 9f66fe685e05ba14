"""Shrinkage, held-out errors and the two-sided form: every number against what it is the closed form of."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mixrank import InputError, LayerStats, calibrate, decompose
from mixrank.decompose import factorise
from mixrank.shrinkage import GRID, oas, score, strongest_of_the_best


def statistics(linear: nn.Linear, x: torch.Tensor, images: int | None = None) -> LayerStats:
    """Of the smaller side, for inputs ``[tokens, K]``."""
    rows = x if linear.out_features > linear.in_features else x @ linear.weight.detach().double().mT
    side = "input" if rows is x else "output"
    return LayerStats(side, rows.mT @ rows, rows.sum(0), len(x), images=images)


@pytest.mark.parametrize("factors", ["svd", "aware", "fisher"])
@pytest.mark.parametrize("centre", [False, True])
def test_the_held_out_error_is_that_of_factors_made_without_these_images(model, observed, factors, centre):
    model = model.double()
    images = torch.randn(10, 3, 32, 32).double()
    stats = calibrate(model, [images], held_out=0.2, gradients=factors == "fisher")
    strategy = {"factors": factors, "centre": centre, "shrink": 0.1}
    both = decompose(model, stats, **strategy)
    merged = decompose(model, stats.merged(), **strategy)
    stats.held_out = None
    without = decompose(model, stats, **strategy)
    for name, x in observed(model, images[[4, 9]]).items():
        linear = model.get_submodule(name)
        outputs = x @ linear.weight.mT
        assert torch.equal(both[name].up_basis, merged[name].up_basis)
        assert torch.equal(both[name].output_error, merged[name].output_error)
        assert merged[name].held_out_error is None
        for rank in (1, 24, 150):
            down, up, bias = without[name].factors(rank)
            lost = outputs + linear.bias - (x @ down.mT @ up.mT + bias)
            measured = (lost.square().sum() / outputs.square().sum()).item()
            assert both[name].relative_error(rank, held_out=True) == pytest.approx(measured, rel=1e-5, abs=1e-9)
        assert both[name].held_out_error[-1] == 0


@pytest.mark.parametrize("centre", [False, True])
def test_fisher_factors_have_the_least_error_in_their_metric(model, images, observed, centre):
    """Both errors against the factors themselves; in the metric against an SVD of the weight between square roots."""
    model, images = model.double(), images.double()
    stats = calibrate(model, [images], gradients=True)
    fisher = decompose(model, stats, factors="fisher", centre=centre, fisher_shrink=0.2)
    aware = decompose(model, stats, factors="aware", centre=centre)
    for name, x in observed(model, images).items():
        linear, made = model.get_submodule(name), fisher[name]
        outputs = x @ linear.weight.mT
        used = outputs - outputs.mean(0) if centre else outputs
        size = len(stats[name].gradient)
        metric = stats[name].gradient / stats[name].gradient.trace() * size + 0.2 * torch.eye(size).double()
        half = torch.linalg.cholesky(metric)
        frame = torch.eye(size).double() if made.frame is None else made.frame
        values = torch.linalg.svdvals(used @ frame @ half).square()
        energy = (outputs @ frame @ half).square().sum()
        for rank in (4, 60):
            down, up, bias = made.factors(rank)
            lost = outputs + linear.bias - (x @ down.mT @ up.mT + bias)
            measured = (lost.square().sum() / outputs.square().sum()).item()
            assert made.relative_error(rank) == pytest.approx(measured, rel=1e-6)
            in_metric = ((lost @ frame @ half).square().sum() / energy).item()
            assert made.fisher_error[rank].item() == pytest.approx(in_metric, rel=1e-6)
            assert in_metric == pytest.approx((values[rank:].sum() / energy).item(), rel=1e-5, abs=1e-9)
            assert made.relative_error(rank) >= aware[name].relative_error(rank) - 1e-12


def test_fisher_factors_in_a_flat_metric_are_the_aware_ones(model, images):
    stats = calibrate(model, [images], gradients=True)
    flat, aware = decompose(model, stats, factors="fisher", fisher_shrink=1e9), decompose(model, stats)
    for name in aware:
        torch.testing.assert_close(flat[name].output_error, aware[name].output_error, rtol=1e-4, atol=1e-9)


def test_auto_takes_the_pull_with_the_least_error_on_images_held_out(model):
    images = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    stats = calibrate(model, [images], held_out=0.3)
    chosen = decompose(model, stats, shrink="auto")
    fixed = {shrink: decompose(model, stats, shrink=shrink) for shrink in GRID if math.isfinite(shrink)}
    pulls = set()
    for name, made in chosen.items():
        linear = model.get_submodule(name)
        ranks = linear.in_features * linear.out_features // (linear.in_features + linear.out_features)
        best = score(made.held_out_error, ranks)
        assert best <= 1.001 * min(score(other[name].held_out_error, ranks) for other in fixed.values())
        if math.isfinite(made.shrink):
            assert torch.equal(made.up_basis, fixed[made.shrink][name].up_basis)
        pulls.add(made.shrink)
    assert len(pulls) > 1
    assert max(pulls) > 0


def test_ties_go_to_the_stronger_pull():
    assert strongest_of_the_best({math.inf: 1.1, 3.0: 1.0009, 0.3: 1.0, 0.0: 1.0005}) == 3.0
    assert strongest_of_the_best({math.inf: 1.0, 0.0: 1.0}) == math.inf


def test_oas_is_the_estimate_for_the_inputs():
    """Against the published formula for the covariance of the inputs themselves; the pull in terms of both traces."""
    torch.manual_seed(0)
    weight = torch.randn(20, 20).double()
    x = torch.randn(50, 20).double() * torch.linspace(3, 0.1, 20)
    gram, weight_gram = x.mT @ x / 50, weight @ weight.mT
    values, basis = (found.flip(-1) for found in torch.linalg.eigh(weight_gram))
    output = weight @ gram @ weight.mT
    p, trace, squares = 20, gram.trace(), gram.square().sum()
    for n in (5, 50, 5000):
        rho = ((1 - 2 / p) * squares + trace**2) / ((n + 1 - 2 / p) * (squares - trace**2 / p))
        found = oas(output, values, basis, n)
        if rho >= 1:
            assert found == math.inf
            continue
        shrunk = (1 - rho) * gram + rho * trace / p * torch.eye(20)
        ours = output / output.trace() + found * weight_gram / weight_gram.trace()
        torch.testing.assert_close(ours / ours.trace(), (u := weight @ shrunk @ weight.mT) / u.trace())
    assert oas(output, values, basis, 5) > oas(output, values, basis, 50) > oas(output, values, basis, 5000) > 0
    assert oas(torch.zeros(20, 20).double(), values, basis, 5) == math.inf


def test_oas_pulls_less_with_more_images(model, images):
    images = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    few, many = (decompose(model, calibrate(model, [images[:n]]), shrink="oas") for n in (8, 40))
    assert all(few[name].shrink >= many[name].shrink > 0 for name in few)
    assert any(few[name].shrink > many[name].shrink for name in few)


def test_directions_that_no_image_shows_are_ordered_by_the_weight():
    """Statistics of rank 3: what is left of the rank goes where the weight is largest, as for the plain SVD."""
    torch.manual_seed(0)
    linear = nn.Linear(24, 16)
    linear.weight.data *= torch.linspace(3, 0.1, 16)[:, None]
    x = torch.zeros(40, 24).double()
    x[:, :3] = torch.randn(40, 3).double()
    made = factorise(linear, statistics(linear, x), centre=False)
    assert made.relative_error(3) < 1e-9
    down, up, _ = made.factors(8)
    rest = linear.weight.double()[:, 3:]
    seen = torch.linalg.qr(linear.weight.double()[:, :3])[0]
    best = torch.linalg.svdvals(rest - seen @ (seen.mT @ rest))[5:].square().sum()
    lost = (linear.weight.double() - up.double() @ down.double())[:, 3:].square().sum()
    assert lost < 1.1 * best


@pytest.mark.parametrize("factors", ["aware", "fisher"])
@pytest.mark.parametrize("sizes", [(12, 8), (8, 12)], ids=str)
@pytest.mark.parametrize("shrink", [0.0, "auto", "oas"])
def test_dead_and_constant_channels_are_harmless(factors, sizes, shrink):
    torch.manual_seed(0)
    linear = nn.Linear(*sizes)
    linear.weight.data[2] = 0
    inputs = torch.randn(60, sizes[0]).double()
    inputs[:, 0], inputs[:, 1] = 0, 5
    gradient = torch.zeros(8, 8).double()
    for x in (inputs, inputs[:1].expand(60, -1), torch.zeros_like(inputs)):
        first, second = (
            LayerStats(**statistics(linear, part, 30).__dict__ | {"gradient": gradient}) for part in x.split(30)
        )
        made = factorise(linear, first, held_out=second, factors=factors, shrink=shrink)
        for rank in (1, 5, 8):
            assert all(tensor.isfinite().all() for tensor in made.factors(rank))
            assert 0 <= made.relative_error(rank) <= 1
            assert made.relative_error(rank, held_out=True) >= 0
        down, up, bias = made.factors(8)
        outputs = x @ linear.weight.double().mT + linear.bias
        torch.testing.assert_close(x @ down.double().mT @ up.double().mT + bias, outputs, rtol=0, atol=1e-5)


def test_shrinkage_that_cannot_be_is_refused(model, images):
    with pytest.raises(InputError, match="shrink must be a number, auto or oas, but it was 'lots'"):
        decompose(model, factors="svd", shrink="lots")
    with pytest.raises(InputError, match="shrink='auto' needs images that are held out"):
        decompose(model, calibrate(model, [images]), shrink="auto")
    with pytest.raises(InputError, match="fisher_shrink must be a number above 0, but it was 0"):
        decompose(model, factors="fisher", fisher_shrink=0)
    with pytest.raises(InputError, match="factors='fisher' with centre=True needs calibration images"):
        decompose(model, factors="fisher")
    with pytest.raises(InputError, match=r"layer blocks.0.attn.qkv: factors='fisher' needs statistics with gradients"):
        decompose(model, calibrate(model, [images]), factors="fisher")
    linear = nn.Linear(8, 8)
    with pytest.raises(InputError, match="shrink='oas' needs statistics that know their number of images"):
        factorise(linear, statistics(linear, torch.randn(5, 8).double()), shrink="oas")
