"""The steps together, and the plan as a document."""

from __future__ import annotations

import copy
import dataclasses
import json
import re

import pytest
import timm
import torch

import mixrank
from mixrank import InputError, allocate, apply_, compress, decompose
from mixrank.apply import restructure_
from mixrank.calibrate import calibrate, held_out_images
from mixrank.counting import count_macs, count_parameters
from mixrank.coverage import left_alone
from mixrank.models import compressible_linears, create_model, split_qkv_
from mixrank.nn import LowRankLinear
from mixrank.nn_sparse import mask_places
from mixrank.plan import LayerPlan
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
    result = compress(model, [images[:3], images[3:]], keep=0.6, split_qkv=split, form="pivoted")
    assert result.images == 6
    assert set(result.seconds) == {"calibrate", "decompose", "allocate", "sensitivity", "shrink", "apply"}
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


@pytest.mark.parametrize(
    "options",
    [
        {"weighting": "image", "shrink": "oas"},
        {"weighting": mixrank.Weighting("clip", 0.9), "shrink": "auto", "energy": "mixed"},
        {"weighting": "class", "energy": "held_out", "min_rank": 0.1, "max_rank": 0.5, "held_out": 0.4},
        {"weighting": "gradient", "factors": "fisher", "draws": 2, "seed": 3, "fisher_shrink": 0.5, "split_qkv": True},
        {"weighting": "token", "factors": "fisher", "centre": False, "energy": "output"},
    ],
    ids=lambda options: options["weighting"] if isinstance(options["weighting"], str) else "clip",
)
def test_strategies_work_together(model, images, options):
    result = compress(model, [images[:3], images[3:]], keep=0.5, **options)
    assert result.images == 6
    assert result.plan.keep <= 0.5
    for layer in result.layers:
        assert 0 <= layer.relative_error <= 1
        assert layer.held_out_error >= 0
        assert layer.rank is not None or layer.held_out_error == 0
    assert model(images).isfinite().all()
    json.dumps(result.to_json(), allow_nan=False)


def test_one_image_is_enough(model, images):
    with pytest.raises(InputError, match="shrink='auto' needs images that are held out"):
        compress(model, [images[:1]], keep=0.5, shrink="auto")
    result = compress(model, [images[:1]], keep=0.5)
    assert result.images == 1
    (note,) = result.notes
    assert note.startswith("layers are pivoted, as no other form can be tried")
    assert {layer.shrink for layer in result.layers} == {0.3}
    assert all(layer.held_out_error is None for layer in result.layers)
    assert model(images).isfinite().all()


def test_factors_by_gradients_are_of_tokens_by_gradients_with_a_measured_pull(model, images):
    """What the defaults are, option by option; other factors are of tokens alike with a fixed pull."""
    options = {"weighting": mixrank.Weighting("gradient", 1.0), "shrink": "measured", "factors": "fisher"}
    defaults, chosen = copy.deepcopy(model), copy.deepcopy(model)
    compress(defaults, [images], keep=0.4)
    compress(chosen, [images], keep=0.4, **options)
    assert torch.equal(defaults(images), chosen(images))
    for other in ({"weighting": "none"}, {"shrink": 0.9}):
        changed = copy.deepcopy(model)
        compress(changed, [images], keep=0.4, **other)
        assert not torch.equal(changed(images), chosen(images))
    aware, explicit = copy.deepcopy(model), copy.deepcopy(model)
    result = compress(aware, [images], keep=0.4, factors="aware")
    compress(explicit, [images], keep=0.4, factors="aware", weighting="none", shrink=0.3)
    assert torch.equal(aware(images), explicit(images))
    assert "shrink" not in result.seconds


def test_a_pull_that_cannot_be_measured_is_noted(model):
    """Images of two sizes are not one batch."""
    model.pos_embed, model.dynamic_img_size, model.patch_embed.strict_img_size = None, True, False
    batches = [torch.randn(5, 3, size, size) for size in (32, 32, 48, 48)]
    result = compress(copy.deepcopy(model), batches, keep=0.4, energy="weight")
    assert result.notes[0].startswith("shrink is 0.3, as it cannot be measured: sensitivity needs images of one size")
    with pytest.raises(InputError, match="images of one size"):
        compress(copy.deepcopy(model), batches, keep=0.4, energy="weight", shrink="measured")


@pytest.mark.parametrize("form", ["pivoted", "sparse"])
def test_too_few_images_are_noted_with_the_gap(model, form):
    """Of ten images with five tokens each, layers of 192 features are fitted to each single token."""
    few = compress(copy.deepcopy(model), [torch.randn(10, 3, 32, 32)], keep=0.6, form=form)
    assert len(few.notes) == 1
    assert ("larger shrink" in few.notes[0]) == (form == "pivoted")
    assert re.search(r"error is 0\.\d+ on images held out but 0\.\d+ on .* more than 10 images", few.notes[0])
    factored = [layer for layer in few.layers if layer.rank is not None]
    assert all(layer.held_out_error > layer.relative_error for layer in factored)
    more = {"shrink": 1.0} if form == "pivoted" else {}
    assert compress(model, torch.randn(400, 3, 32, 32).split(100), keep=0.6, form=form, **more).notes == []


def test_layers_that_are_never_called_stay_dense_and_are_noted(model, images):
    model.spare = torch.nn.Linear(192, 192)
    for energy in ("weight", "output"):
        result = compress(copy.deepcopy(model), [images], keep=0.6, energy=energy)
        assert "spare" not in {layer.name for layer in result.layers}
        assert result.notes[0] == "layers that were never called stay dense: spare (1 in all)"
        assert result.plan.keep <= 0.6


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_pivoted_form_computes_what_the_factors_compute(model, images, split, dtype):
    """At the same ranks, to rounding, with fewer parameters and operations."""
    model, images = model.to(dtype), images.to(dtype)
    factored = copy.deepcopy(model)
    plan = compress(model, keep=0.5, factors="svd", form="pivoted", split_qkv=split).plan
    if split:
        split_qkv_(factored)
    same = [dataclasses.replace(layer, form="factors") for layer in plan.layers]
    factorisations = decompose(factored, factors="svd")
    apply_(factored, dataclasses.replace(plan, layers=tuple(same)), factorisations)
    pivoted = [module for module in model.modules() if isinstance(module, mixrank.PivotedLinear)]
    assert len(pivoted) == sum(layer.rank is not None for layer in plan.layers) > 0
    assert not any(isinstance(module, mixrank.MixedRankLinear) for module in model.modules())
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    with torch.no_grad():
        assert (model(images) - factored(images)).norm() < tolerance * factored(images).norm()
    assert count_parameters(model) < count_parameters(factored)
    assert count_macs(model) < count_macs(factored)


def test_compress_in_the_pivoted_form_comes_back_from_a_checkpoint(images, tmp_path):
    model = create_model("vit_tiny_patch16_224", args={"img_size": 32, "depth": 2, "num_classes": 7})
    result = compress(model, [images], keep=0.6, form="pivoted")
    assert result.plan.options["form"] == "pivoted"
    assert count_parameters(model) == result.plan.parameters_after <= 0.6 * result.plan.parameters_before
    assert " pivoted " in result.plan.describe()
    mixrank.save(model, tmp_path / "model.safetensors")
    assert torch.equal(mixrank.load(tmp_path / "model.safetensors")(images), model(images))


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


@pytest.fixture
def sparse_plan(model):
    """One layer of entries beside factors, one of entries alone, one of factors, one that stays dense."""
    sizes = (k, n) = (192, 768)
    before, entries, rank = k * n + n, 50_000, 16
    after = entries + mask_places(k, n) + n
    layers = (
        LayerPlan("blocks.0.mlp.fc1", *sizes, rank, True, before, after + rank * (k + n), "sparse", entries),
        LayerPlan("blocks.1.mlp.fc1", *sizes, 0, True, before, after, "sparse", entries),
        LayerPlan("blocks.0.mlp.fc2", n, k, rank, False, k * n + k, rank * (k + n)),
        LayerPlan("blocks.1.mlp.fc2", n, k, None, True, k * n + k, k * n + k),
    )
    total = count_parameters(model)
    saved = sum(layer.parameters_before - layer.parameters_after for layer in layers)
    return mixrank.Plan(layers, total, total - saved)


def test_a_plan_of_sparse_layers_says_what_the_model_then_has(model, sparse_plan):
    macs = count_macs(model)
    restructure_(model, sparse_plan)
    assert count_parameters(model) == sparse_plan.parameters_after
    for layer in sparse_plan.layers:
        assert count_parameters(model.get_submodule(layer.name)) == layer.parameters_after
    first, second = (block.mlp.fc1 for block in model.blocks)
    assert isinstance(first, mixrank.SparseLinear)
    assert (first.entries, first.rank, second.entries, second.rank) == (50_000, 16, 50_000, 0)
    tokens, dense, factors = 5, 192 * 768, 16 * (192 + 768)
    assert count_macs(model) == macs - tokens * (3 * dense - 2 * factors - 2 * 50_000)


def test_a_plan_of_sparse_layers_round_trips_and_describes_itself(sparse_plan):
    data = json.loads(json.dumps(sparse_plan.to_json()))
    assert mixrank.Plan.from_json(data) == sparse_plan
    assert ["entries" in layer for layer in data["layers"]] == [True, True, False, False]
    assert sparse_plan.ranks() == {"blocks.0.mlp.fc1": 16, "blocks.1.mlp.fc1": 0, "blocks.0.mlp.fc2": 16}
    header, *rows, _total = [line.split() for line in sparse_plan.describe().splitlines()]
    assert header == ["layer", "K", "N", "rank", "entries", "form", "before", "after", "kept"]
    assert [row[3:-3] for row in rows] == [
        ["16", "50000", "sparse"], ["0", "50000", "sparse"], ["16", "factors"], ["dense"]
    ]  # fmt: skip
    assert len({len(line) for line in sparse_plan.describe().splitlines()[:-1]}) == 1


def test_factorisations_do_not_give_a_sparse_layer(model, sparse_plan):
    factorisations = decompose(model, factors="svd")
    with pytest.raises(
        InputError, match=r"the plan holds layer blocks\.0\.mlp\.fc1 as sparse, which its factorisation"
    ):
        apply_(model, sparse_plan, factorisations)
    assert not any(isinstance(module, LowRankLinear) for module in model.modules())
    with pytest.raises(InputError, match="form must be one of factors, pivoted, but it was 'sparse'"):
        allocate(model, factorisations, keep=0.5, form="sparse")


def test_sparse_layers_are_not_compressed_again_but_told(model, sparse_plan):
    restructure_(model, sparse_plan)
    assert "blocks.0.mlp.fc1" not in compressible_linears(model)
    told = {one.name: one for one in left_alone(model)}
    assert told["blocks.1.mlp.fc1"].reason == "it is a SparseLinear"
    assert told["blocks.1.mlp.fc1"].parameters == 50_000 + mask_places(192, 768)
    assert told["blocks.0.mlp.fc1"].parameters == 50_000 + mask_places(192, 768) + 16 * (192 + 768)
    result = compress(model, keep=0.9, factors="svd")
    assert "blocks.0.mlp.fc1" not in [layer.name for layer in result.layers]
    assert count_parameters(model) == result.plan.parameters_after


@pytest.mark.parametrize(
    "change",
    [
        {"entries": -1},
        {"entries": 10.0},
        {"entries": True},
        {"entries": None},
        {"rank": -1},
        {"rank": None},
        {"form": "factors"},
        {"form": "factors", "rank": 0, "entries": 0},
    ],
)
def test_a_foreign_plan_of_sparse_layers_is_refused(sparse_plan, change):
    data = sparse_plan.to_json()
    data["layers"][0] |= change
    with pytest.raises(
        InputError, match=r"entry for layer 'blocks\.0\.mlp\.fc1' has a field of the wrong type or range"
    ):
        mixrank.Plan.from_json(data)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("layers"),
        lambda data: data["layers"][0].pop("rank"),
        lambda data: data["layers"][0].update(rank="8"),
        lambda data: data["layers"][0].update(rank=0),
        lambda data: data["layers"][0].update(surprise=1),
        lambda data: data["layers"][0].update(form="round"),
        lambda data: data["layers"][0].update(form=None),
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
    by_weight = compress(dense, [images], keep=0.5, energy="weight")
    assert [layer.rank for layer in by_weight.plan.layers] != [layer.rank for layer in result.plan.layers]


@pytest.mark.parametrize("views", [1, 3])
def test_a_sample_is_of_the_images_that_are_held_out(views):
    class Batches(list):
        pass

    number = torch.arange(20.0)
    batches = Batches(number[:, None, None, None].repeat_interleave(views, 0).split(7))
    batches.views = views
    apart = number[held_out_images(range(20), 0.25, 1)]
    for size, expected in ((3, None), (9, apart)):
        sample = Sample(batches, size, 0, 0.25)
        list(sample)
        found = sample.images[:, 0, 0, 0]
        assert len(found.unique()) == len(found) == min(size, len(apart))
        assert set(found.tolist()) <= set(apart.tolist())
        assert expected is None or torch.equal(found.sort().values, expected)


def test_a_calibration_that_holds_others_out_than_its_sample_was_told_is_refused(model, images):
    sample = Sample([images], 3, 0, None)
    assert calibrate(model, sample, held_out=None)
    with pytest.raises(InputError, match=r"held_out must be None, as the batches were told, but it was 0\.0"):
        calibrate(model, sample)
    with pytest.raises(InputError, match=r"held_out must be 0\.25, as the batches were told, but it was None"):
        calibrate(model, Sample([images], 3, 0, 0.25), held_out=None)


def test_by_itself_it_asks_what_the_answers_feel_and_says_where_there_are_none(model, images):
    for given in (iter([images[:2], images[2:]]), [images]):
        found = compress(copy.deepcopy(model), given, keep=0.5)
        assert (found.plan.options["energy"], found.plan.options["form"]) == ("sensitivity", "pivoted")
        assert found.images == len(images)
        assert not any("no logits" in note for note in found.notes)
    same = compress(copy.deepcopy(model), [images], keep=0.5, factors="fisher", energy="sensitivity", form="pivoted")
    assert same.plan == found.plan

    args = {"img_size": 32, "depth": 2, "num_classes": 0}
    for backbone in (
        timm.create_model("vit_tiny_patch16_224", **args, global_pool="").eval(),
        timm.create_model("vit_tiny_patch16_224", **args).train(),
    ):
        found = compress(backbone, iter([images[:2], images[2:]]), keep=0.5)
        assert found.images == len(images)
        assert found.plan.options["energy"] == "weight"
        assert "returns no logits of classes" in found.notes[0]
    assert backbone.training
    assert compress(copy.deepcopy(model), [images], keep=0.5, sequential=True).plan.options["energy"] == "weight"


def test_images_of_different_sizes_go_by_the_weights_and_it_says_so():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=7, dynamic_img_size=True).eval()
    found = compress(model, [torch.randn(5, 3, 32, 32), torch.randn(5, 3, 48, 48)], keep=0.5)
    assert found.plan.options["energy"] == "weight"
    assert "ranks go by the energy of the weights, as their sensitivity cannot be measured: " in found.notes[0]


def test_a_sample_keeps_each_image_with_the_same_chance_whatever_the_batches_are():
    images = torch.arange(12.0)[:, None, None, None].expand(12, 1, 2, 2)
    counts = torch.zeros(12)
    for seed in range(600):
        samples = [Sample(images.split(size), 4, seed, 0) for size in (5, 12)]
        kept = [(list(sample), sample.images[:, 0, 0, 0])[1] for sample in samples]
        assert torch.equal(*kept)
        counts[kept[0].long()] += 1
    assert counts.sum() == 600 * 4
    assert (counts - 200).abs().max() < 60  # five standard deviations
    few = Sample([images[:2]], 4, 0, None)
    list(few)
    assert len(few.images) == 2
    with pytest.raises(InputError, match="sensitivity_images must be at least 1, but it was 0"):
        Sample([], 0, 0, None)
