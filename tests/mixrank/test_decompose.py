"""Decomposition: every strategy against its closed form."""

from __future__ import annotations

import itertools

import pytest
import timm
import torch
from torch import nn

import mixrank
from mixrank import InputError, calibrate, decompose
from mixrank.decompose import factorise
from mixrank.models import split_qkv_
from mixrank.stats import LayerStats

STRATEGIES = list(itertools.product(["svd", "aware"], [False, True], [False, True]))


@pytest.mark.parametrize(("factors", "centre", "split"), STRATEGIES)
def test_the_layer_error_is_its_closed_form(model, images, factors, centre, split, observed):
    """Measured squared output error on the calibration images against ``relative_error``, for every strategy."""
    model, images = model.double(), images.double()
    if split:
        split_qkv_(model)
    stats = calibrate(model, [images])
    factorisations = decompose(model, stats, factors=factors, centre=centre)
    for name, x in observed(model, images).items():
        linear = model.get_submodule(name)
        outputs = x @ linear.weight.double().mT
        for rank in (8, 64, 184):
            down, up, bias = factorisations[name].factors(rank)
            approximate = (x @ down.double().mT) @ up.double().mT + bias.double() - linear.bias.double()
            measured = ((outputs - approximate).square().sum() / outputs.square().sum()).item()
            assert factorisations[name].relative_error(rank) == pytest.approx(measured, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("centre", [False, True])
def test_aware_factors_are_optimal(model, images, centre, observed):
    """No other factors of the same rank (and bias, if centred) have a smaller error: checked against a whitened SVD."""
    model, images = model.double(), images.double()
    stats = calibrate(model, [images])
    aware = decompose(model, stats, factors="aware", centre=centre)
    plain = decompose(model, stats, factors="svd", centre=centre)
    for name, x in observed(model, images).items():
        outputs = x @ model.get_submodule(name).weight.double().mT
        energy = outputs.square().sum()
        used = outputs - outputs.mean(0) if centre else outputs
        tail = torch.linalg.svdvals(used)[16:].square().sum() / energy
        assert aware[name].relative_error(16) == pytest.approx(tail.item(), rel=1e-6)
        assert aware[name].relative_error(16) <= plain[name].relative_error(16)


def test_svd_factors_are_the_truncated_svd(model):
    for name, factorisation in decompose(model, factors="svd").items():
        weight = model.get_submodule(name).weight.double()
        values = torch.linalg.svdvals(weight)
        down, up, bias = factorisation.factors(24)
        error = (up.double() @ down.double() - weight).square().sum()
        assert error.item() == pytest.approx(values[24:].square().sum().item(), rel=1e-4)
        torch.testing.assert_close(
            factorisation.weight_energy, values.square() / values.square().sum(), rtol=1e-6, atol=1e-9
        )
        assert torch.equal(bias, model.get_submodule(name).bias)
        assert factorisation.relative_error(24) is None


def test_a_singular_gram_matrix_is_harmless():
    """Fewer tokens than features: factors at a rank above that of the data reproduce the outputs exactly."""
    torch.manual_seed(0)
    linear, x = nn.Linear(32, 48), torch.randn(5, 32)
    x64 = x.double()
    stats = LayerStats("input", x64.mT @ x64, x64.sum(0), 5)
    factorisation = factorise(linear, stats, centre=False)
    layer = mixrank.MixedRankLinear.from_factors(*factorisation.factors(5))
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-4, atol=1e-5)
    assert factorisation.relative_error(5) < 1e-12


def test_a_weight_or_input_of_zeros_is_harmless():
    linear = nn.Linear(8, 8)
    linear.weight.data.zero_()
    stats = LayerStats("output", torch.zeros(8, 8).double(), torch.zeros(8).double(), 4)
    factorisation = factorise(linear, stats)
    assert factorisation.relative_error(1) == 0
    assert all(tensor.isfinite().all() for tensor in factorisation.factors(3))


def test_the_mean_goes_into_the_bias_even_where_there_was_none():
    linear = nn.Linear(16, 12, bias=False)
    x = (torch.randn(200, 16) * 0.1 + torch.randn(16)).double()
    y = x @ linear.weight.double().mT
    stats = LayerStats("output", y.mT @ y, y.sum(0), 200)
    down, up, bias = factorise(linear, stats).factors(2)
    error = y - (x @ down.double().mT @ up.double().mT + bias.double())
    torch.testing.assert_close(error.mean(0), torch.zeros(12).double(), rtol=0, atol=1e-6)


def test_strategies_that_cannot_be_are_refused(model, images):
    with pytest.raises(InputError, match="factors must be one of aware, svd, fisher, but it was 'magic'"):
        decompose(model, factors="magic")
    with pytest.raises(InputError, match="factors='aware' with centre=True needs calibration images"):
        decompose(model, factors="aware")
    with pytest.raises(InputError, match="factors='svd' with centre=True needs calibration images"):
        decompose(model, factors="svd", centre=True)
    other = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    with pytest.raises(InputError, match=r"statistics have no layer blocks\.1\.attn\.qkv"):
        decompose(model, calibrate(other, [images]))
    wider = timm.create_model("vit_small_patch16_224", img_size=32, depth=2)
    with pytest.raises(InputError, match=r"layer blocks\.0\.attn\.qkv: statistics of the input must be of size 192"):
        decompose(model, calibrate(wider, [images]))


def test_shrinking_leads_from_aware_factors_to_svd(model, images):
    stats = calibrate(model, [images])
    name, rank = "blocks.0.mlp.fc1", 16
    weight = model.get_submodule(name).weight.double()
    plain = decompose(model, factors="svd")[name]

    def weight_error(shrink: float) -> float:
        down, up, _ = decompose(model, stats, shrink=shrink)[name].factors(rank)
        return (up.double() @ down.double() - weight).square().sum().item()

    best = (1 - plain.weight_energy[:rank].sum().item()) * weight.square().sum().item()
    errors = [weight_error(shrink) for shrink in (0.0, 0.3, 3.0, 1e6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1.01 * best
    assert errors[-1] == pytest.approx(best, rel=1e-4)


def test_known_factorisations_lend_what_depends_on_the_weight_alone(model, images):
    stats = calibrate(model, [images], held_out=0.5, gradients=True)
    first, plain = decompose(model, stats, factors="fisher"), decompose(model, stats, factors="fisher", shrink=0.3)
    for name, made in decompose(model, stats, factors="fisher", shrink=0.3, known=first).items():
        assert made.frame is first[name].frame is made.trial.frame
        assert made.core is first[name].core is made.trial.core
        assert torch.equal(made.weight_energy, plain[name].weight_energy)
        for ours, theirs in ((made, plain[name]), (made.trial, plain[name].trial)):
            assert all(itertools.starmap(torch.equal, zip(ours.factors(24), theirs.factors(24), strict=True)))
    wider = timm.create_model("vit_small_patch16_224", img_size=32, depth=2)
    with pytest.raises(
        InputError, match=r"known must be of this model, but it has no layer blocks\.0\.attn\.qkv of its"
    ):
        decompose(wider, factors="svd", known=first)


def test_no_more_directions_are_kept_than_are_asked_for(model, images):
    stats = calibrate(model, [images], held_out=0.5, gradients=True)
    for factors in ("aware", "fisher"):
        whole = decompose(model, stats, factors=factors)
        first, second, *others = whole
        few = decompose(model, stats, factors=factors, ranks={first: 24, second: 1})
        assert few.keys() == whole.keys()
        for name, rank in ((first, 24), (second, 1)):
            for one, all_of_them in ((few[name], whole[name]), (few[name].trial, whole[name].trial)):
                assert one.up_basis.shape[1] == one.down_basis.shape[1] == rank
                assert (one.down_basis is one.up_basis) == (factors == "aware")
                assert one.up_basis.untyped_storage().nbytes() == one.up_basis.nbytes
                for found, expected in zip(one.factors(rank), all_of_them.factors(rank), strict=True):
                    assert torch.equal(found, expected)
            assert few[name].relative_error(100) == whole[name].relative_error(100)
        with pytest.raises(InputError, match="rank must be at most 24, as no more directions were kept, but it was 25"):
            few[first].factors(25)
        assert all(few[name].up_basis.shape[1] == 0 for name in others)


@pytest.mark.parametrize(("dtype", "kept"), [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)])
def test_what_is_kept_is_as_wide_as_the_weight_and_at_least_float32(model, dtype, kept):
    made = decompose(model.to(dtype), factors="svd")["blocks.0.mlp.fc1"]
    assert {made.frame.dtype, made.core.dtype, made.up_basis.dtype, made.down_basis.dtype} == {kept}
    assert made.weight_energy.dtype == torch.float64
    down, up, _ = made.factors(192)
    assert down.dtype == up.dtype == dtype
    weight = model.get_submodule("blocks.0.mlp.fc1").weight
    torch.testing.assert_close(made.frame @ made.core, weight.to(kept), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shrink", [-0.1, float("nan"), float("inf")])
def test_a_shrink_out_of_range_is_refused(model, shrink):
    with pytest.raises(InputError, match=f"shrink must be a number of at least 0, but it was {shrink}"):
        decompose(model, factors="svd", shrink=shrink)
