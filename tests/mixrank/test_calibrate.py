"""Calibration: the statistics are the second moments that they claim to be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mixrank import InputError, calibrate
from mixrank.calibrate import side_of
from mixrank.data import Batch
from mixrank.models import compressible_linears, split_qkv_


def test_statistics_are_the_second_moments_of_the_smaller_side(model, images, observed):
    stats = calibrate(model, [images[:4], images[4:]])
    assert stats.images == 6
    assert set(stats) == set(compressible_linears(model))
    for name, x in observed(model, images).items():
        linear, layer = model.get_submodule(name), stats[name]
        rows = x if side_of(linear) == "input" else x @ linear.weight.double().mT
        assert layer.side == side_of(linear)
        assert layer.gram.shape[0] == min(linear.in_features, linear.out_features)
        assert layer.rows == len(x)
        torch.testing.assert_close(layer.gram, rows.mT @ rows, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(layer.total, rows.sum(0), rtol=1e-4, atol=1e-3)


def test_parts_of_a_split_layer_share_the_statistics_of_their_input(model, images):
    fused = calibrate(model, [images])
    names = split_qkv_(model)
    split = calibrate(model, [images])
    for name in names:
        for i in range(3):
            torch.testing.assert_close(split[f"{name}.parts.{i}"].gram, fused[name].gram, rtol=1e-5, atol=1e-4)
    assert split[f"{names[0]}.parts.0"] is split[f"{names[0]}.parts.2"]


def test_calibration_leaves_the_model_as_it_was(model, images):
    model.train()
    calibrate(model, [images])
    assert model.training
    assert all(not module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_calibration_in_bfloat16_is_close(model, images):
    wide, narrow = calibrate(model, [images]), calibrate(model, [images], dtype=torch.bfloat16)
    for name in wide:
        scale = wide[name].gram.norm()
        assert (wide[name].gram - narrow[name].gram).norm() < 0.05 * scale


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named_by_layer_and_image(model, images, value):
    broken = images.clone()
    broken[4, 0, 3, 3] = value
    batches = [Batch(broken[i : i + 3], None, [f"{j}.jpg" for j in range(i, i + 3)]) for i in (0, 3)]
    with pytest.raises(InputError, match=r"of layer blocks\.0\.attn\.qkv has NaN or infinite values for 4\.jpg"):
        calibrate(model, batches)
    assert all(not module._forward_hooks for module in model.modules())


def test_calibration_without_images_or_layers_is_refused(model):
    with pytest.raises(InputError, match="at least one image"):
        calibrate(model, [])
    with pytest.raises(InputError, match=r"\(Conv2d\) has no linear layer that can be compressed"):
        calibrate(nn.Conv2d(3, 4, 3), [torch.ones(1, 3, 8, 8)])
