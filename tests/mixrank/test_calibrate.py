"""Calibration: the statistics are the second moments that they claim to be."""

from __future__ import annotations

from unittest import mock

import pytest
import timm
import torch
from torch import Tensor, nn

from mixrank import InputError, calibrate
from mixrank.accumulate import side_of
from mixrank.data import Batch
from mixrank.decompose import factorise
from mixrank.models import compressible_linears, split_qkv_
from mixrank_kernels import ops


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


class Branches(nn.Module):
    """Three layers over the patches of an image ``[B, 3, T, T]``; ``inputs`` says what each of them receives."""

    def __init__(self, inputs, sizes=(12, 12, 12)) -> None:
        super().__init__()
        self.inputs = inputs
        self.branches = nn.ModuleList(nn.Linear(12, size) for size in sizes)

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, T, T] -> []
        x = nn.functional.pixel_unshuffle(images, 2).flatten(2).mT + 0.5
        return sum(branch(self.inputs(x, i)).sum() for i, branch in enumerate(self.branches))


def count_grams(model: nn.Module, batches: list[Tensor]):
    """The statistics of a model, and the number of Gram matrices that were accumulated for them."""
    with mock.patch.object(ops, "gram_accumulate_", wraps=ops.gram_accumulate_) as accumulate:
        return calibrate(model, iter(batches)), accumulate.call_count


def assert_direct(stats, model: nn.Module, batches: list[Tensor], observed) -> None:
    """Compare statistics with the second moments of what every layer receives or gives."""
    for name in stats:
        linear, layer = model.get_submodule(name), stats[name]
        rows = torch.cat([observed(model, batch)[name] for batch in batches])
        if layer.side == "output":
            rows = rows @ linear.weight.double().mT
        assert layer.rows == len(rows)
        torch.testing.assert_close(layer.gram, rows.mT @ rows, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(layer.total, rows.sum(0), rtol=1e-4, atol=1e-3)


def test_layers_with_the_same_input_share_one_gram_matrix_of_it(observed):
    args = {"img_size": 28, "depth": 1, "embed_dim": 96, "num_heads": 4, "num_classes": 0}
    model = timm.create_model("eva02_base_patch14_224", **args).eval()
    batches = [torch.randn(3, 3, 28, 28), torch.randn(2, 3, 28, 28)]
    stats, calls = count_grams(model, batches)
    q, k, v = (stats[f"blocks.0.attn.{part}_proj"] for part in "qkv")
    assert q is k is v
    assert q.side == "input"
    assert stats["blocks.0.mlp.fc1_g"] is stats["blocks.0.mlp.fc1_x"]
    assert stats["blocks.0.attn.proj"].side == stats["blocks.0.mlp.fc2"].side == "output"
    assert list(stats) == list(compressible_linears(model))
    assert calls == 4 * len(batches)
    assert_direct(stats, model, batches, observed)


def test_factors_from_shared_inputs_are_those_from_outputs():
    """Layers without a shared input are calibrated on their outputs; a copy of the input makes them so."""
    shared = Branches(lambda x, _: x).double()
    apart = Branches(lambda x, _: x.clone()).double()
    apart.load_state_dict(shared.state_dict())
    images = torch.randn(4, 3, 16, 16).double()
    (inputs, once), (outputs, thrice) = count_grams(shared, [images]), count_grams(apart, [images])
    assert (once, thrice) == (1, 3)
    for name in inputs:
        assert (inputs[name].side, outputs[name].side) == ("input", "output")
        linear = shared.get_submodule(name)
        a, b = (factorise(linear, stats[name]) for stats in (inputs, outputs))
        torch.testing.assert_close(a.output_error, b.output_error, rtol=1e-9, atol=1e-12)
        for rank in (1, 5, 11):
            (down_a, up_a, bias_a), (down_b, up_b, bias_b) = a.factors(rank), b.factors(rank)
            torch.testing.assert_close(up_a @ down_a, up_b @ down_b, rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(bias_a, bias_b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("sizes", "calls"),
    [((4, 5, 6), 3), ((4, 8, 8), 3), ((4, 8, 9), 1), ((4, 5, 13), 1), ((13, 14, 15), 1)],
    ids=str,
)
def test_a_shared_input_is_taken_only_where_it_is_cheaper(sizes, calls, observed):
    model, images = Branches(lambda x, _: x, sizes), torch.randn(2, 3, 8, 8)
    stats, counted = count_grams(model, [images])
    assert counted == calls
    assert_direct(stats, model, [images], observed)


@pytest.mark.parametrize(
    "inputs",
    [
        lambda x, i: x if i == 0 else x.add_(1),
        lambda x, i: x.clone(),
        lambda x, i: x[:, i:],
        lambda x, i: x[:, :4] if i == 0 else x.flip(1)[:, :4],
    ],
    ids=["changed in place", "copies", "slices", "freed memory"],
)
def test_inputs_that_only_look_the_same_are_kept_apart(inputs, observed):
    model, images = Branches(inputs, (13, 13, 13)), torch.randn(2, 3, 8, 8)
    stats, calls = count_grams(model, [images])
    assert calls == 3
    assert_direct(stats, model, [images], observed)


def test_a_layer_that_is_called_twice_is_calibrated_alone():
    class Twice(Branches):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) + self.branches[0](images.new_ones(1, 4, 12)).sum()

    model, images = Twice(lambda x, _: x), torch.randn(2, 3, 8, 8)
    stats, calls = count_grams(model, [images])
    assert calls == 3
    assert stats["branches.0"].side == "output"
    assert stats["branches.0"].rows == 2 * 16 + 4
    assert stats["branches.1"] is stats["branches.2"]
    assert stats["branches.1"].rows == 2 * 16


def test_inputs_that_are_shared_at_one_image_size_only(observed):
    """The third layer leaves the common sums when it first receives something else, and keeps what they had."""
    model = Branches(lambda x, i: x if i < 2 or x.shape[1] == 16 else x[:, 1:])
    batches = [torch.randn(2, 3, 8, 8), torch.randn(3, 3, 12, 12), torch.randn(1, 3, 8, 8), torch.randn(2, 3, 12, 12)]
    stats, calls = count_grams(model, batches)
    assert calls == 1 + 2 + 2 + 2
    assert stats["branches.0"] is stats["branches.1"] is not stats["branches.2"]
    assert_direct(stats, model, batches, observed)
    assert_direct(calibrate(model, batches[1:]), model, batches[1:], observed)


def test_an_ordinary_vision_transformer_has_one_gram_matrix_for_each_layer(model, images):
    stats, calls = count_grams(model, [images[:4], images[4:]])
    assert calls == 2 * len(stats)
    assert len({id(layer) for layer in stats.values()}) == len(stats)


def test_values_that_are_not_finite_in_a_shared_input_are_named():
    images = torch.randn(3, 3, 8, 8)
    images[1, 0, 2, 2] = float("nan")
    with pytest.raises(InputError, match=r"the input of layer branches\.0 has NaN or infinite values for b\.jpg"):
        calibrate(Branches(lambda x, _: x), [Batch(images, None, ["a.jpg", "b.jpg", "c.jpg"])])


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
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
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


@pytest.mark.parametrize("share", [0.2, 0.25, 1 / 3, 0.5, 0.9])
def test_images_that_are_held_out_are_spread_evenly_whatever_the_batches_are(model, share):
    images = torch.randn(20, 3, 32, 32)
    whole = calibrate(model, [images])
    parts = [calibrate(model, images.split(size), held_out=share) for size in (1, 7, 20)]
    for stats in parts:
        assert stats.held_out.images == int(20 * share + 1e-6)
        assert stats.images + stats.held_out.images == stats.merged().images == 20
        assert stats.merged().held_out is None
        for name in whole:
            assert stats[name].rows + stats.held_out[name].rows == whole[name].rows
            torch.testing.assert_close(stats.merged()[name].gram, whole[name].gram, rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(stats.merged()[name].total, whole[name].total, rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(stats.held_out[name].gram, parts[0].held_out[name].gram, rtol=1e-5, atol=1e-4)


def test_merged_statistics_share_what_the_parts_share(model):
    names = split_qkv_(model)
    merged = calibrate(model, [torch.randn(4, 3, 32, 32)], held_out=0.5).merged()
    assert merged[f"{names[0]}.parts.0"] is merged[f"{names[0]}.parts.2"]


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_shares_that_cannot_be_held_out_are_refused(model, images, share):
    with pytest.raises(InputError, match=f"held_out must be at least 0 and below 1, but it was {share}"):
        calibrate(model, [images], held_out=share)


def test_too_few_images_to_hold_any_out_are_refused(model, images):
    with pytest.raises(InputError, match=r"held_out=0\.2 needs more images, but there were 4"):
        calibrate(model, [images[:4]], held_out=0.2)


def test_views_of_an_image_stay_together_and_count_once(model):
    """Two views of each of ten images: every fifth image is held out with both, whatever the batches are."""
    images = torch.randn(20, 3, 32, 32)

    class Views(list):
        views = 2

    for size in (20, 7, 1):
        stats = calibrate(model, Views(images.split(size)), held_out=0.2)
        assert (stats.images, stats.held_out.images, stats.all_images) == (8, 2, 10)
        name = "blocks.0.mlp.fc1"
        alone = calibrate(model, [images[[8, 9, 18, 19]]])
        torch.testing.assert_close(stats.held_out[name].gram, alone[name].gram, rtol=1e-5, atol=1e-4)
        assert (stats[name].images, stats.held_out[name].images) == (8, 2)


def test_by_default_a_fifth_of_enough_images_is_held_out(model, images):
    assert calibrate(model, [images[:4]], held_out=None).held_out is None
    stats = calibrate(model, [images], held_out=None)
    assert (stats.images, stats.held_out.images) == (5, 1)


def test_a_layer_that_is_never_called_is_named_and_has_no_statistics(images):
    model, x = Branches(lambda x, _: x), torch.randn(5, 3, 8, 8)
    model.spare = nn.Linear(12, 12)
    stats = calibrate(model, [x], held_out=0.2)
    assert stats.idle == stats.merged().idle == ("spare",)
    assert list(stats) == list(stats.held_out) == ["branches.0", "branches.1", "branches.2"]

    class Nothing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(3, 3)

        def forward(self, images: Tensor) -> Tensor:
            return images

    with pytest.raises(InputError, match=r"layer spare \(1 in all\) was never called, so there are no statistics"):
        calibrate(Nothing(), [x])


def test_a_layer_that_is_called_for_some_images_only_keeps_its_sums():
    """The larger images do not reach the third layer, which shared its input with the others until then."""

    class Sometimes(Branches):
        def forward(self, images: Tensor) -> Tensor:
            x = nn.functional.pixel_unshuffle(images, 2).flatten(2).mT
            return sum(branch(x).sum() for branch in self.branches[: 3 if images.shape[-1] == 8 else 2])

    model, small, large = Sometimes(lambda x, _: x), torch.randn(3, 3, 8, 8), torch.randn(2, 3, 12, 12)
    for batches in ([small, large, small], [large, small, small]):
        stats = calibrate(model, batches)
        assert (stats["branches.0"].rows, stats["branches.2"].rows) == (6 * 16 + 2 * 36, 6 * 16)
        assert stats["branches.0"] is stats["branches.1"]
        alone = calibrate(model, [small, small])["branches.2"]
        again = factorise(model.branches[2], stats["branches.2"])
        torch.testing.assert_close(factorise(model.branches[2], alone).output_error, again.output_error)
