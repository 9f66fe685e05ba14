"""Models of 8-bit weights: the codes, the layers, what is replaced, and how far the outputs move."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import mixrank
from mixrank import models, quantize
from mixrank.calibrate import calibrate
from mixrank.counting import count_bytes, count_macs, count_parameters
from mixrank.errors import InputError
from mixrank.nn import MixedRankLinear, SplitLinear
from mixrank.nn_int8 import Int8Linear, Int8MixedRankLinear, Int8PivotedLinear
from mixrank.nn_int8_sparse import Int8SparseLinear
from mixrank.nn_pivoted import PivotedLinear
from mixrank.nn_sparse import SparseLinear
from mixrank.quantize import quantize_, quantize_rows

SPARSE = SparseLinear.from_weights(torch.randn(40, 90) * (torch.rand(40, 90) < 0.3), bias=torch.randn(40))
BESIDE = SparseLinear.from_weights(SPARSE.weight.detach(), torch.randn(4, 90) / 10, torch.randn(40, 4))
PIVOTED = PivotedLinear.from_factors(torch.randn(12, 96) / 10, torch.randn(40, 12) / 4, torch.randn(40))
DYNAMIC = pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "weight-only"])


def restored(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return codes.float() * scale[:, None]


def test_rows_are_quantised_to_the_nearest_codes_of_the_best_scale():
    weight = torch.randn(4, 40000)  # of so many the largest is rare enough to be clipped
    codes, scale = quantize_rows(weight)
    assert (codes.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert codes.abs().max() <= 127
    error = (restored(codes, scale) - weight).square().sum(1)
    largest = weight.abs().amax(1) / 127
    for ratio in quantize.CLIPPING:
        trial = (weight / (ratio * largest)[:, None]).round().clamp(-127, 127)
        assert (error <= (restored(trial, ratio * largest) - weight).square().sum(1) * (1 + 1e-5)).all()
    assert (scale < largest).any(), "no row gained from clipping"


def test_moments_decide_which_columns_must_be_right():
    weight = torch.randn(20, 64)
    weight[:, 0] = 6.0
    unseen = torch.ones(64)
    unseen[0] = 0
    errors = [(restored(*quantize_rows(weight, moments)) - weight)[:, 1:].norm() for moments in (None, unseen)]
    assert errors[1] < 0.9 * errors[0]


def test_rows_of_zeros_and_tiny_rows_give_finite_layers():
    weight = torch.zeros(3, 4)
    weight[1], weight[2] = 1e-44, torch.tensor([1.0, -2.0, 3.0, 127.0])
    codes, scale = quantize_rows(weight)
    assert codes[:2].abs().sum() == 0
    assert codes[2].tolist() == [1, -2, 3, 127]
    assert scale.isfinite().all()
    with pytest.raises(InputError, match="must be finite"):
        quantize_rows(torch.full((2, 2), torch.nan))


@DYNAMIC
def test_a_quantised_layer_is_close_to_the_layer(dynamic):
    x = torch.randn(5, 7, 96)
    for layer in (nn.Linear(96, 40), nn.Linear(96, 40, bias=False), MixedRankLinear(96, 40, 12), PIVOTED):
        model = nn.Sequential(copy.deepcopy(layer))
        result = quantize_(model, dynamic=dynamic)
        expected = layer(x)
        with torch.no_grad():
            y = model(x)
        assert y.shape == expected.shape
        assert (y - expected).norm() < 0.02 * expected.norm()
        (report,) = result.layers
        assert report.relative_error == pytest.approx(
            ((model[0].weight - layer.weight).norm() / layer.weight.norm()).item(), rel=1e-4
        )
        assert report.dynamic is dynamic
        assert (result.bytes_before, result.bytes_after) == (count_bytes(layer), count_bytes(model))
        assert model[0].merge().weight.dtype == torch.float32
        torch.testing.assert_close(model[0].merge()(x), nn.functional.linear(x, model[0].weight, model[0].bias))


def test_the_intermediate_keeps_its_small_columns():
    """Columns of the intermediate of a thousand times less variance must not vanish in eight bits."""
    size = 10.0 ** -torch.linspace(0, 3, 16)
    layer = MixedRankLinear(64, 64, 16, bias=False)
    with torch.no_grad():
        layer.down.copy_(torch.linalg.qr(torch.randn(64, 16))[0].T * size[:, None])
        layer.up.copy_(torch.linalg.qr(torch.randn(64, 16))[0])
    model = nn.Sequential(copy.deepcopy(layer))
    quantize_(model)
    x = torch.randn(400, 64)
    with torch.no_grad():
        error = (model(x) - layer(x)) @ layer.up  # of each column of the intermediate
        signal = layer(x) @ layer.up
    assert ((error.norm(dim=0) / signal.norm(dim=0))[:12] < 0.1).all()


@pytest.fixture
def compressed(model, images):
    mixrank.compress(model, [images], keep=0.5, ranks="uniform", form="factors")
    return model


@DYNAMIC
def test_a_model_is_quantised_whole(compressed, images, dynamic):
    before = copy.deepcopy(compressed)
    result = quantize_(compressed, dynamic=dynamic)
    names = [name for name, module in before.named_modules() if isinstance(module, nn.Linear | MixedRankLinear)]
    assert [layer.name for layer in result.layers] == names
    assert "head" in names
    assert isinstance(compressed.head, Int8Linear)
    assert isinstance(compressed.blocks[0].mlp.fc1, Int8MixedRankLinear)
    assert result.skipped == {"patch_embed.proj": "it is a Conv2d"}
    with torch.inference_mode():
        expected, y = before(images), compressed(images)
    assert (y - expected).norm() < 0.1 * expected.norm()
    assert count_bytes(compressed) == result.bytes_after < 0.5 * result.bytes_before
    assert count_parameters(compressed) == count_parameters(before)
    assert count_macs(compressed) == count_macs(before)
    assert not any(parameter.requires_grad for parameter in compressed.parameters())
    for line in (*names, "patch_embed.proj: left as it is", "all bytes"):
        assert line in result.describe()
    assert quantize.quantized_layers(compressed) == dict.fromkeys(names, dynamic)


def test_sparse_layers_stay_sparse(model, images):
    mixrank.compress(model, [images], keep=0.5, form="sparse")
    before = copy.deepcopy(model)
    result = quantize_(model)
    layer, sparse = model.blocks[0].mlp.fc1, before.blocks[0].mlp.fc1
    assert isinstance(layer, Int8SparseLinear)
    assert (layer.entries, layer.rank, layer.places) == (sparse.entries, sparse.rank, sparse.places)
    assert torch.equal(layer.mask, sparse.mask)
    assert layer.mask.data_ptr() != sparse.mask.data_ptr(), "both are packed side by side"
    kinds = quantize.quantized_layers(model)
    assert kinds["head"]
    assert not kinds["blocks.0.mlp.fc1"], "its input stays as it is"
    assert count_bytes(model) == result.bytes_after < 0.6 * result.bytes_before, "but for the patch embedding"
    assert count_parameters(model) == count_parameters(before)
    assert count_macs(model) == count_macs(before)
    with torch.inference_mode():
        expected, y = before(images), model(images)
    assert (y - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("layer", [SPARSE, BESIDE], ids=["alone", "factors"])
def test_a_quantised_sparse_layer_has_the_same_places(layer):
    x, model = torch.randn(5, 7, 90), nn.Sequential(copy.deepcopy(layer))
    (report,) = quantize_(model).layers
    (made,) = model
    assert not report.dynamic
    codes, scale = quantize_rows(SPARSE.weight)
    assert torch.equal(made.sparse_codes, codes)
    assert torch.equal(made.scale, scale)
    torch.testing.assert_close(made(x), nn.functional.linear(x, made.weight, made.bias), rtol=1e-5, atol=1e-5)
    assert (made(x) - layer(x)).norm() < 0.01 * layer(x).norm()
    moved = copy.deepcopy(made).to(torch.bfloat16)
    assert (moved.scale.dtype, moved.codes.dtype) == (torch.float32, torch.int8)
    assert moved(x.bfloat16()).dtype == torch.bfloat16
    assert f"entries={layer.entries}, rank={layer.rank}" in repr(made)


@DYNAMIC
def test_pivoted_layers_stay_pivoted(model, images, dynamic):
    mixrank.compress(model, [images], keep=0.5, form="pivoted")
    before = copy.deepcopy(model)
    result = quantize_(model, dynamic=dynamic)
    layer, pivoted = model.blocks[0].mlp.fc1, before.blocks[0].mlp.fc1
    assert isinstance(layer, Int8PivotedLinear)
    assert layer.index.dtype == torch.int16
    assert torch.equal(layer.index, pivoted.index)
    assert count_parameters(model) == count_parameters(before)
    assert count_macs(model) == count_macs(before)
    assert result.bytes_after < 0.5 * result.bytes_before
    with torch.inference_mode():
        expected, y = before(images), model(images)
    assert (y - expected).norm() < 0.1 * expected.norm()


def test_layers_are_chosen_by_name(compressed):
    result = quantize_(compressed, skip=["head", "*.attn.*"], weight_only=["*.fc2"])
    kinds = quantize.quantized_layers(compressed)
    assert kinds == {f"blocks.{i}.mlp.{name}": name == "fc1" for i in (0, 1) for name in ("fc1", "fc2")}
    assert result.skipped["head"] == "skip names it"
    assert isinstance(compressed.head, nn.Linear)


@pytest.mark.parametrize("argument", ["skip", "weight_only"])
def test_a_name_that_fits_nothing_is_refused_and_nothing_changes(compressed, argument):
    before = compressed.state_dict()
    with pytest.raises(InputError, match=f"{argument} names 'blocks.7.*', which is no layer"):
        quantize_(compressed, **{argument: ["blocks.7.*"]})
    compressed.blocks[1].mlp.fc2.up.data[0, 0] = torch.inf
    with pytest.raises(InputError, match=r"layer blocks\.1\.mlp\.fc2 cannot be quantised: .* finite"):
        quantize_(compressed)
    assert compressed.state_dict().keys() == before.keys()
    assert all(parameter.requires_grad for parameter in compressed.parameters())


def test_a_model_is_quantised_once(compressed):
    quantize_(compressed)
    with pytest.raises(InputError, match="there is no layer to quantise"):
        quantize_(compressed)


def test_layers_that_promise_more_or_share_a_weight_stay():
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), Special(4, 4), nn.Embedding(3, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    result = quantize_(model)
    assert [layer.name for layer in result.layers] == ["4"]
    assert result.skipped == {
        "0": "it shares its weight with another layer",
        "1": "it shares its weight with another layer",
        "2": "it is a Special, not a plain nn.Linear",
        "3": "it is a Embedding",
    }


def test_statistics_of_the_inputs_are_used(model, images):
    stats = calibrate(model, [images])
    plain, weighted = copy.deepcopy(model), copy.deepcopy(model)
    quantize_(plain, dynamic=False)
    quantize_(weighted, dynamic=False, stats=stats)
    fc2 = "blocks.0.mlp.fc2"
    assert (
        not torch.equal(plain.get_submodule(fc2).codes, weighted.get_submodule(fc2).codes)
        or stats[fc2].side == "output"
    )
    with torch.inference_mode():
        assert (weighted(images) - model(images)).norm() < 0.05 * model(images).norm()


def test_parts_of_a_split_layer_are_quantised(model, images):
    models.split_qkv_(model)
    quantize_(model)
    assert isinstance(model.blocks[0].attn.qkv, SplitLinear)
    assert all(isinstance(part, Int8Linear) for part in model.blocks[0].attn.qkv.parts)
    with torch.inference_mode():
        assert model(images).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_cast_leaves_codes_and_scales(compressed, images, dtype):
    quantize_(compressed)
    before = {name: tensor.clone() for name, tensor in compressed.state_dict().items()}
    compressed.to(dtype)
    for name, tensor in compressed.state_dict().items():
        if name.endswith(("codes", "scale")):
            assert torch.equal(tensor, before[name])
            assert tensor.dtype == before[name].dtype
        else:
            assert tensor.dtype == dtype
    with torch.inference_mode():
        assert compressed(images.to(dtype)).dtype == dtype
    assert compressed.to("meta").head.scale.device.type == "meta"


def test_a_quantised_model_copies_and_compiles(compressed, images):
    quantize_(compressed)
    with torch.no_grad():
        expected = compressed(images)
        assert torch.equal(copy.deepcopy(compressed)(images), expected)
        torch._dynamo.reset()
        actual = torch.compile(compressed, fullgraph=True)(images)
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


def test_layers_of_codes_that_do_not_fit_are_refused():
    codes, scale = torch.zeros(4, 5, dtype=torch.int8), torch.ones(4)
    for arguments, message in (
        ((codes.float(), scale), "codes must be an int8 matrix"),
        ((codes, scale.double()), "the scale of codes must be float32"),
        ((codes, scale[:3]), r"the scale of codes must be float32 of shape \[4\]"),
        ((codes, scale, torch.ones(5)), r"bias must have shape \[4\], but it was \[5\]"),
    ):
        with pytest.raises(InputError, match=message):
            Int8Linear.from_codes(*arguments)
    with pytest.raises(InputError, match=r"up_codes must have shape \[N, 4\]"):
        Int8MixedRankLinear.from_codes(codes, scale, codes, scale)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mask": torch.ones(4, 2)}, "mask must be a uint8 matrix, but it was torch.float32"),
        ({"codes": torch.ones(4)}, "codes must be an int8 vector, but it was torch.float32"),
        ({"scale": torch.ones(3)}, r"the scale of codes must be float32 of shape \[4\]"),
        ({"down_scale": None, "up_codes": None}, "must be given together, but down_scale, up_codes was not"),
        ({"down_codes": torch.ones(2, 13)}, "down_codes must be an int8 matrix"),
        ({"up_scale": torch.ones(3)}, r"the scale of up_codes must be float32 of shape \[4\]"),
        (
            {"up_codes": torch.zeros(4, 3, dtype=torch.int8)},
            r"up_codes must have shape \[4, 2\] as mask and down_codes",
        ),
        ({"in_features": 12}, "in_features must be 13 as down_codes has columns, but it was 12"),
        ({"mask": torch.zeros(4, 3, dtype=torch.uint8)}, r"mask must have shape \[4, 2\], but it was \[4, 3\]"),
        ({"mask": torch.zeros(4, 2, dtype=torch.uint8)}, "mask must have a bit for each of the 4 values, but it had 0"),
        ({"bias": torch.ones(3)}, r"bias must have shape \[4\], but it was \[3\]"),
    ],
)
def test_sparse_codes_that_do_not_fit_are_refused(changed, message):
    mask = torch.tensor([[3, 16], [0, 1], [0, 0], [0, 0]], dtype=torch.uint8)
    arguments = {"mask": mask, "codes": torch.ones(4, dtype=torch.int8), "scale": torch.ones(4)}
    arguments |= {"down_codes": torch.ones(2, 13, dtype=torch.int8), "down_scale": torch.ones(2)}
    arguments |= {"up_codes": torch.ones(4, 2, dtype=torch.int8), "up_scale": torch.ones(4), "bias": torch.ones(4)}
    assert Int8SparseLinear.from_codes(**arguments)(torch.ones(13)).tolist() == [30.0, 28.0, 27.0, 27.0]
    with pytest.raises(InputError, match=message):
        Int8SparseLinear.from_codes(**arguments | changed)
