"""The steps together, and the plan as a document."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

import mixrank
from mixrank import InputError, allocate, apply_, compress, decompose
from mixrank.models import count_parameters
from mixrank.sample import Sample


def test_keeping_everything_changes_nothing(model, images):
    expected = model(images)
    for ranks in ("mixed", "uniform"):
        result = compress(copy.deepcopy(model), [images], keep=1.0, ranks=ranks)
        assert all(layer.rank is None for layer in result.plan.layers)
    compress(model, [images], keep=1.0)
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize("split", [False, True])
def test_compress_does_it_all_in_place(model, images, split):
    dense = copy.deepcopy(model)
    result = compress(model, [images[:3], images[3:]], keep=0.6, split_qkv=split)
    assert result.images == 6
    assert set(result.seconds) == {"calibrate", "decompose", "allocate", "apply"}
    assert count_parameters(model) == result.plan.parameters_after <= 0.6 * count_parameters(dense)
    assert [layer.name for layer in result.layers] == [layer.name for layer in result.plan.layers]
    assert bool(result.plan.split) == split
    for layer in result.layers:
        assert 0 <= layer.relative_error < 1
        assert layer.output_energy_kept[-1] == pytest.approx(1)
        assert sorted(layer.output_energy_kept) == layer.output_energy_kept
        assert len(layer.energy_ranks) == len(layer.weight_energy_kept) <= 33
    assert model.mixrank_plan is result.plan
    drift = (model(images) - dense(images)).norm() / dense(images).norm()
    assert drift < 0.5


def test_compress_without_images_is_plain_svd(model):
    result = compress(model, keep=0.5, factors="svd")
    assert result.images == 0
    assert all(layer.relative_error is None for layer in result.layers)


def test_a_plan_that_does_not_fit_changes_nothing(model):
    other = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3)
    factorisations = decompose(other, factors="svd")
    plan = allocate(other, factorisations, keep=0.5)
    with pytest.raises(InputError, match=r"names the layer blocks\.2\.attn\.qkv, which this model does not"):
        apply_(model, plan, factorisations)
    assert not any(isinstance(module, mixrank.MixedRankLinear) for module in model.modules())


def test_a_plan_round_trips_through_json_and_describes_itself(model):
    plan = allocate(model, decompose(model, factors="svd"), keep=0.5)
    assert mixrank.Plan.from_json(plan.to_json()) == plan
    text = plan.describe()
    assert all(layer.name in text for layer in plan.layers)
    assert f"{plan.keep:.1%} kept" in text


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("layers"),
        lambda data: data["layers"][0].pop("rank"),
        lambda data: data["layers"][0].update(rank="8"),
        lambda data: data["layers"][0].update(rank=0),
        lambda data: data["layers"][0].update(surprise=1),
        lambda data: data["layers"][0].update(in_features=-3),
        lambda data: data.update(split=[3]),
    ],
)
def test_a_foreign_plan_is_refused(model, change):
    data = allocate(model, decompose(model, factors="svd"), keep=0.5).to_json()
    change(data)
    with pytest.raises(InputError, match="the plan"):
        mixrank.Plan.from_json(data)


def test_attention_that_reads_its_weight_directly_is_compressed_too():
    """Timm's BEiT calls F.linear on the weight of qkv; compress makes it call the layer, and undoes that on failure."""
    torch.manual_seed(0)
    beit = timm.create_model("beit_base_patch16_224", img_size=32, depth=1, embed_dim=96, num_heads=3, num_classes=4)
    images = torch.randn(4, 3, 32, 32)
    with pytest.raises(InputError):
        compress(beit, [images], keep=0.01)
    assert not beit.blocks[0].attn.qkv_bias_separate
    result = compress(beit, [images], keep=0.5)
    assert "blocks.0.attn.qkv" in {layer.name for layer in result.plan.layers}
    assert beit(images).isfinite().all()


def test_ranks_by_sensitivity_need_no_second_look_at_the_images(model, images):
    stream = iter(images.split(2))
    dense = copy.deepcopy(model)
    result = compress(model, stream, keep=0.5, energy="sensitivity", sensitivity_images=4)
    assert "sensitivity" in result.seconds
    assert result.images == len(images)
    assert result.plan.keep <= 0.5
    assert result.plan.options["energy"] == "sensitivity"
    by_weight = compress(dense, [images], keep=0.5)
    assert [layer.rank for layer in by_weight.plan.layers] != [layer.rank for layer in result.plan.layers]


def test_a_sample_keeps_each_image_with_the_same_chance_whatever_the_batches_are():
    images = torch.arange(12.0)[:, None, None, None].expand(12, 1, 2, 2)
    counts = torch.zeros(12)
    for seed in range(600):
        samples = [Sample(images.split(size), 4, seed) for size in (5, 12)]
        kept = [(list(sample), sample.images[:, 0, 0, 0])[1] for sample in samples]
        assert torch.equal(*kept)
        counts[kept[0].long()] += 1
    assert counts.sum() == 600 * 4
    assert (counts - 200).abs().max() < 60  # five standard deviations
    few = Sample([images[:2]], 4, 0)
    list(few)
    assert len(few.images) == 2
    with pytest.raises(InputError, match="sensitivity_images must be at least 1, but it was 0"):
        Sample([], 0, 0)
