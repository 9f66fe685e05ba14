"""Error compensation: better on held-out images, never worse, the same after an interruption."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json

import pytest
import timm
import torch

from mixrank import MixedRankLinear, PivotedLinear, SparseLinear, compress, load, save
from mixrank.blocks import block_of, blocks_of
from mixrank.compensate import CompensationOptions, compensate_
from mixrank.errors import InputError
from mixrank.fidelity import Fidelity, compare, divergence
from mixrank.imitation import Imitation, relative_error
from mixrank.plan import LayerPlan, Plan
from mixrank.training import Training
from mixrank.views import Views, gather

OPTIONS = CompensationOptions(batch_size=8, learning_rate=2e-3, held_out=0.25, evaluations=3, min_scale=0.6)


@pytest.fixture(scope="module")
def pair():
    """A dense model with a strong head, a compressed one, and images."""
    torch.manual_seed(0)
    dense = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=7).eval()
    torch.nn.init.normal_(dense.head.weight, std=0.1)
    images = [torch.randn(16, 3, 32, 32), torch.randn(16, 3, 32, 32)]
    model = copy.deepcopy(dense)
    compress(model, images, keep=0.4, factors="aware", energy="weight", shrink=0.0, form="factors")
    return dense, model, images


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("scope", ["layer", "block", "model"])
def test_every_scope_brings_the_model_closer_on_images_that_were_not_trained_on(pair, scope):
    dense, model, images = copy.deepcopy(pair)
    before = state_of(dense)
    result = compensate_(model, dense, images, steps=12, options=dataclasses.replace(OPTIONS, scope=scope))
    assert result.after.divergence < 0.9 * result.before.divergence
    assert result.stopped == "finished"
    assert result.steps == 12
    assert result.best_step > 0
    assert [entry["step"] for entry in result.history] == [4, 8, 12]
    assert same(before, dense.state_dict())
    json.dumps(result.to_json())


def test_what_is_reported_is_what_the_model_does(pair):
    dense, model, images = copy.deepcopy(pair)
    result = compensate_(model, dense, images, steps=6, options=OPTIONS)
    held = torch.cat(images)[3::4].half().float()
    with torch.inference_mode():
        again = compare(model(held), dense(held))
    assert again.divergence == pytest.approx(result.after.divergence, rel=1e-4)
    assert again.images == result.after.images == 8


def test_only_the_factored_layers_are_trained_unless_all_is_asked_for(pair):
    dense, model, images = copy.deepcopy(pair)
    before = state_of(model)
    compensate_(model, dense, images, steps=4, options=OPTIONS)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(name.endswith((".down", ".up", ".bias")) for name in changed)
    assert not any(name.startswith(("head", "patch_embed")) or "norm" in name for name in changed)

    dense, model, images = copy.deepcopy(pair)
    compensate_(model, dense, images, steps=8, options=dataclasses.replace(OPTIONS, trained="all", learning_rate=5e-4))
    assert not torch.equal(model.head.weight, before["head.weight"])


def test_a_residual_is_trained_beside_a_frozen_base(pair):
    dense, model, images = copy.deepcopy(pair)
    before = copy.deepcopy(model)
    options = dataclasses.replace(OPTIONS, trained="residual", residual_rank=5)
    result = compensate_(model, dense, images, steps=9, options=options)
    assert result.best_step > 0
    for name, layer in model.named_modules():
        if isinstance(layer, MixedRankLinear):
            old, base = before.get_submodule(name), layer.rank - 5
            assert torch.equal(layer.down[:base], old.down[:base])
            assert torch.equal(layer.up[:, :base], old.up[:, :base])
            assert not torch.equal(layer.down[base:], old.down[base:])
            assert not torch.equal(layer.up[:, base:], old.up[:, base:])
    assert torch.equal(model.head.weight, before.head.weight)


def test_a_dense_model_in_training_mode_is_followed_without_its_dropout(pair):
    _, model, images = copy.deepcopy(pair)
    torch.manual_seed(0)
    dense = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=7, drop_rate=0.5)
    dense.load_state_dict(pair[0].state_dict())
    quiet = compensate_(copy.deepcopy(model), pair[0], images, steps=2, options=OPTIONS)
    assert compensate_(model, dense.train(), images, steps=2, options=OPTIONS).history == quiet.history
    assert dense.training


def test_layers_that_are_never_called_and_parameters_without_a_dimension_are_left_alone(pair):
    dense, model, images = copy.deepcopy(pair)
    for each in (dense, model):
        each.scale = torch.nn.Parameter(torch.tensor(2.0))
    model.idle = MixedRankLinear(8, 8, 4)
    dense.idle = model.idle.merge()
    before = state_of(model)
    compensate_(model, dense, images, steps=3, options=dataclasses.replace(OPTIONS, trained="residual"))
    assert same({name: value for name, value in before.items() if name.startswith(("idle", "scale"))}, state_of(model))


def test_steps_are_writes_that_autograd_counts(pair, monkeypatch):
    """Packed factors are known to be out of date by the version of the weights alone."""
    dense, model, images = copy.deepcopy(pair)
    look, versions = Training._look, []

    def noted(self, *arguments):
        versions.append([parameter._version for parameter in self.parameters.values()])
        return look(self, *arguments)

    monkeypatch.setattr(Training, "_look", noted)
    compensate_(model, dense, images, steps=3, options=OPTIONS)
    assert len(versions) == 3
    assert all(
        old < new for before, after in itertools.pairwise(versions) for old, new in zip(before, after, strict=True)
    )


def test_pivoted_layers_are_trained_as_factors_and_stay_pivoted(pair, tmp_path):
    dense, _, images = copy.deepcopy(pair)
    model = copy.deepcopy(dense)
    compress(model, images, keep=0.4, factors="aware", form="pivoted")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PivotedLinear)}
    before = state_of(model)
    ruined = compensate_(model, dense, images, steps=4, options=dataclasses.replace(OPTIONS, learning_rate=30.0))
    assert ruined.best_step == 0
    assert all(model.get_submodule(name) is layer for name, layer in layers.items())
    assert same(before, model.state_dict())
    kept = {"options": dataclasses.replace(OPTIONS, learning_rate=5e-4), "state": tmp_path / "state"}
    result = compensate_(model, dense, images, steps=16, **kept)
    assert result.best_step > 0
    assert all(isinstance(model.get_submodule(name), PivotedLinear) for name in layers)
    held = torch.cat(images)[3::4].half().float()
    with torch.inference_mode():
        assert compare(model(held), dense(held)).divergence == pytest.approx(result.after.divergence, rel=1e-3)


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_sparse_layers_train_and_keep_their_places(pair, tmp_path, scope):
    dense, _, images = copy.deepcopy(pair)
    model = copy.deepcopy(dense)
    for number, block in enumerate(model.blocks):
        linear = block.mlp.fc1
        weight, bias = linear.weight.detach(), linear.bias.detach()
        sparse = weight * (weight.abs() > weight.abs().quantile(0.97))
        left, values, right = torch.linalg.svd(weight - sparse, full_matrices=False)
        factors = [(values[:, None] * right)[:8].contiguous(), left[:, :8].contiguous()] if number else [None, None]
        block.mlp.fc1 = SparseLinear.from_weights(sparse, *factors, bias).eval()
    layers = [block.mlp.fc1 for block in model.blocks]
    plans = [
        LayerPlan(f"blocks.{number}.mlp.fc1", 192, 768, layer.rank, True, 1, 1, "sparse", layer.entries)
        for number, layer in enumerate(layers)
    ]
    before = [(one.mask.clone(), one.values.detach().clone()) for one in layers]
    options = dataclasses.replace(OPTIONS, scope=scope, learning_rate=1e-3)
    result = compensate_(model, dense, images, steps=12, options=options)
    assert result.best_step > 0
    assert result.after.divergence < 0.9 * result.before.divergence
    assert [block.mlp.fc1 for block in model.blocks] == layers
    for layer, (mask, values) in zip(layers, before, strict=True):
        assert torch.equal(layer.mask, mask)
        assert not torch.equal(layer.values, values)
    save(model, tmp_path / "model.safetensors", plan=Plan(tuple(plans), 2, 2))
    loaded = load(tmp_path / "model.safetensors")
    assert same(state_of(model), loaded.state_dict())
    with torch.no_grad():
        assert torch.equal(loaded(images[0]), model(images[0]))


def test_sparse_layers_have_no_residual(pair):
    dense, model, images = copy.deepcopy(pair)
    model.blocks[1].mlp.fc1 = SparseLinear(192, 768, 1000)
    before = state_of(model)
    options = dataclasses.replace(OPTIONS, trained="residual")
    with pytest.raises(InputError, match=r"trained='residual' is of layers .* but blocks\.1\.mlp\.fc1 is sparse"):
        compensate_(model, dense, images, steps=1, options=options)
    assert same(before, model.state_dict())


def test_a_learning_rate_that_ruins_the_model_leaves_it_as_it_was(pair):
    dense, model, images = copy.deepcopy(pair)
    before = state_of(model)
    result = compensate_(model, dense, images, steps=6, options=dataclasses.replace(OPTIONS, learning_rate=30.0))
    assert result.best_step == 0
    assert result.after == result.before
    assert same(before, model.state_dict())


def test_patience_ends_a_run_that_does_not_get_better(pair):
    dense, model, images = copy.deepcopy(pair)
    options = dataclasses.replace(OPTIONS, learning_rate=30.0, patience=1, evaluations=6)
    result = compensate_(model, dense, images, steps=6, options=options)
    assert result.stopped in ("patience", "diverged")
    assert result.steps <= 2


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bits(pair, tmp_path, monkeypatch):
    dense, model, images = copy.deepcopy(pair)
    whole, broken = copy.deepcopy(model), copy.deepcopy(model)
    expected = compensate_(whole, dense, images, steps=9, options=OPTIONS)

    steps, batch = [], Views.batch

    def interrupted(self, step):
        steps.append(step)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return batch(self, step)

    monkeypatch.setattr(Views, "batch", interrupted)
    before, file = state_of(broken), tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        compensate_(broken, dense, images, steps=9, options=OPTIONS, state=file)
    assert same(before, broken.state_dict())
    assert file.exists()
    result = compensate_(broken, dense, images, steps=9, options=OPTIONS, state=file)
    assert steps[6:] == list(range(3, 9)), "it goes on after the last look at the held-out images"
    assert same(whole.state_dict(), broken.state_dict())
    assert (result.history, result.after, result.best_step) == (expected.history, expected.after, expected.best_step)

    again = compensate_(copy.deepcopy(model), dense, images, steps=9, options=OPTIONS, state=file)
    assert again.steps == 9
    assert len(steps) == 12, "a finished run is not trained any further"


def test_the_state_of_another_run_is_refused(pair, tmp_path):
    dense, model, images = copy.deepcopy(pair)
    file = tmp_path / "state.safetensors"
    compensate_(copy.deepcopy(model), dense, images, steps=1, options=OPTIONS, state=file)
    options = dataclasses.replace(OPTIONS, seed=1)
    with pytest.raises(InputError, match="another run: its seed was 0, now it is 1"):
        compensate_(model, dense, images, steps=1, options=options, state=file)
    with pytest.raises(InputError, match="another run: its contents"):
        compensate_(model, dense, [torch.randn(32, 3, 32, 32)], steps=1, options=OPTIONS, state=file)
    file.write_bytes(b"nonsense")
    with pytest.raises(InputError, match="is not the state of a training run"):
        compensate_(model, dense, images, steps=1, options=OPTIONS, state=file)


def test_a_budget_of_minutes_is_kept(pair):
    dense, model, images = copy.deepcopy(pair)
    result = compensate_(model, dense, images, minutes=0.05, options=OPTIONS)
    assert result.steps >= 1
    assert result.seconds < 6


def test_modes_and_gradients_come_back_as_they_were(pair):
    dense, model, images = copy.deepcopy(pair)
    model.train()
    model.blocks[0].eval()
    model.head.weight.requires_grad_(False)
    compensate_(model, dense, images, steps=1, options=OPTIONS)
    assert model.training
    assert not model.blocks[0].training
    assert not dense.training
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["head.weight"]
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changes", "budget", "message"),
    [
        ({"scope": "head"}, {"steps": 1}, "scope must be one of layer, block, model, but it was 'head'"),
        ({"trained": "x"}, {"steps": 1}, "trained must be one of factors, residual, all, but it was 'x'"),
        ({"residual_rank": 0}, {"steps": 1}, "residual_rank must be at least 1, but it was 0"),
        ({"batch_size": 0}, {"steps": 1}, "batch_size must be at least 1, but it was 0"),
        ({"learning_rate": 0.0}, {"steps": 1}, "learning_rate must be above 0, but it was 0.0"),
        ({"mix": 1.5}, {"steps": 1}, r"mix must be in \[0, 1\], but it was 1.5"),
        ({"min_scale": 0.0}, {"steps": 1}, r"min_scale must be in \(0, 1\], but it was 0.0"),
        ({"held_out": 1.0}, {"steps": 1}, "held_out must be above 0 and below 1, but it was 1.0"),
        ({"held_out": 0.99}, {"steps": 1}, "leaves none of the 32 images to train on"),
        ({}, {}, "exactly one of steps and minutes must be given"),
        ({}, {"steps": 1, "minutes": 1.0}, "exactly one of steps and minutes must be given"),
        ({}, {"steps": 0}, "steps must be at least 1, but it was 0"),
        ({}, {"minutes": float("nan")}, "minutes must be above 0, but it was nan"),
    ],
)
def test_bad_options_are_refused_in_words(pair, changes, budget, message):
    dense, model, images = pair
    with pytest.raises(InputError, match=message):
        compensate_(model, dense, images, options=dataclasses.replace(OPTIONS, **changes), **budget)


def test_bad_models_and_images_are_refused_in_words(pair):
    dense, model, images = pair
    with pytest.raises(InputError, match="no factored layer to train: compress it first"):
        compensate_(copy.deepcopy(dense), dense, images, steps=1)
    with pytest.raises(InputError, match=r"must be torch\.float32 to be trained"):
        compensate_(copy.deepcopy(model).bfloat16(), dense, images, steps=1)
    with pytest.raises(InputError, match="at least 2 images are needed, but there were 1"):
        compensate_(model, dense, [images[0][:1]], steps=1)
    broken = images[0].clone()
    broken[3, 0, 0, 0] = torch.inf
    with pytest.raises(InputError, match=r"image .*3 has NaN, infinite or huge values"):
        compensate_(model, dense, [broken], steps=1)
    with pytest.raises(InputError, match="images must have one size"):
        gather([images[0], torch.randn(2, 3, 48, 48)], least=2)


def test_a_local_loss_keeps_its_gradient_within_the_tap(pair):
    dense, model, images = copy.deepcopy(pair)
    Imitation(model, dense, "layer", 1.0).loss(images[0]).backward()
    assert model.blocks[0].attn.qkv.down.grad is not None
    assert model.blocks[0].norm1.weight.grad is None
    assert model.patch_embed.proj.weight.grad is None
    model.zero_grad(set_to_none=True)
    Imitation(model, dense, "block", 1.0).loss(images[0]).backward()
    assert model.blocks[1].norm1.weight.grad is not None
    assert model.patch_embed.proj.weight.grad is None
    assert not model._forward_hooks
    assert not model.blocks[0]._forward_hooks
    assert not model.blocks[0]._forward_pre_hooks


def test_the_relative_error_is_one_for_a_mean_and_scales_with_each_token():
    target = torch.randn(50, 8)
    target[0] *= 1000
    assert relative_error(target.mean(0).expand_as(target), target).item() == pytest.approx(1.0, rel=0.05)
    wrong = target.clone()
    wrong[0] = target.mean(0)
    assert relative_error(wrong, target).item() == pytest.approx(1 / 50, rel=0.01)


def test_divergence_is_zero_for_equal_logits_and_matches_its_definition():
    dense, model = torch.randn(5, 7), torch.randn(5, 7)
    p, q = dense.softmax(-1), model.softmax(-1)
    assert torch.allclose(divergence(model, dense), (p * (p / q).log()).sum(-1), atol=1e-6)
    assert compare(dense, dense) == Fidelity(0.0, 100.0, 5)
    with pytest.raises(InputError, match="logits"):
        compare(dense[:, :1], dense[:, :1])


def test_views_depend_on_seed_and_step_alone_and_visit_every_image_once_a_pass():
    images = torch.arange(10.0)[:, None, None, None].expand(10, 3, 8, 8).contiguous()
    views = Views(images, 5, seed=3, min_scale=0.5)
    first, second = views.batch(0), views.batch(1)
    seen = torch.cat([first, second])[:, 0, 4, 4].round()
    assert sorted(seen.tolist()) == list(range(10))
    assert torch.equal(Views(images, 5, seed=3, min_scale=0.5).batch(1), second)
    assert not torch.equal(views.batch(2), first)
    other = Views(torch.randn(10, 3, 8, 8), 5, seed=4, min_scale=0.5)
    assert other.batch(7).shape == (5, 3, 8, 8)
    plain = Views(images, 5, seed=3, min_scale=1.0).batch(0)
    assert all((image == image[0, 0, 0]).all() for image in plain)


def test_blocks_of_vit_and_swin_hold_every_layer(pair):
    _, model, _ = pair
    assert list(blocks_of(model)) == ["blocks.0", "blocks.1"]
    swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(2, 2), num_heads=(3, 6))
    names = list(blocks_of(swin))
    assert names[:2] == ["layers.0.blocks.0", "layers.0.blocks.1"]
    assert "layers.1.downsample.reduction" in names
    assert block_of("layers.1.blocks.0.mlp.fc1", names) == "layers.1.blocks.0"


def test_mixed_views_lie_between_two_images():
    images = torch.randn(10, 3, 8, 8)
    plain = Views(images, 5, seed=3, min_scale=1.0).batch(2)
    mixed = Views(images, 5, seed=3, min_scale=1.0, mix=1.0).batch(2)
    assert torch.equal(mixed, Views(images, 5, seed=3, min_scale=1.0, mix=1.0).batch(2))
    for index in range(5):
        one, other = plain[index].flatten(), plain[(index + 1) % 5].flatten()
        share = torch.dot(mixed[index].flatten() - other, one - other) / (one - other).square().sum()
        assert 0 < share < 1
        assert torch.allclose(mixed[index].flatten(), share * one + (1 - share) * other, atol=1e-5)
    some = Views(images, 5, seed=3, min_scale=1.0, mix=0.5)
    same = [
        torch.equal(a, b)
        for step in range(40)
        for a, b in zip(some.batch(step), Views(images, 5, seed=3, min_scale=1.0).batch(step), strict=True)
    ]
    assert 70 < sum(same) < 130
