"""Weights of calibration tokens: the statistics are the weighted sums that they claim to be."""

from __future__ import annotations

import importlib

import pytest
import timm
import torch
from torch import Tensor, nn

from mixrank import InputError, Weighting, calibrate
from mixrank.calibrate import calibrate_both
from mixrank.decompose import decompose
from mixrank.gradients import backward, held_bytes, probes
from mixrank.models import compressible_linears
from mixrank.stats import output_frame

BY_OUTPUT = [
    Weighting("none"),
    Weighting("image"),
    Weighting("token"),
    Weighting("clip"),
    Weighting("clip", 1.1),
    Weighting("clip", 0.3),
    Weighting("class"),
    Weighting("class", 0.25),
]


def expected(weighting: Weighting, y: Tensor) -> Tensor:
    """The weights of outputs before the bias ``[B, T, N]``, the first of the T tokens the class token."""
    lengths = y.norm(dim=-1)
    match weighting.kind:
        case "image":
            return (1 / lengths.square().sum(1, keepdim=True)).expand_as(lengths)
        case "token":
            return 1 / lengths.square()
        case "clip":
            level = weighting.value
            limit = level * lengths.square().quantile(0.5, 1, True).sqrt() if level >= 1 else None
            limit = lengths.square().quantile(level, 1, True).sqrt() if limit is None else limit
            return (lengths.minimum(limit) / lengths).square()
        case "class":
            weights = torch.ones_like(lengths)
            weights[:, 0] = weighting.value * (lengths.shape[1] - 1)
            return weights
    return torch.ones_like(lengths)


def assert_weighted(layer, linear: nn.Linear, x: Tensor, weights: Tensor) -> None:
    """Compare a layer's statistics with the weighted sums over its inputs ``[B, T, K]``."""
    rows = x if layer.side == "input" else x @ linear.weight.double().mT
    rows, weights = rows.flatten(0, 1), weights.flatten()[:, None]
    gram = rows.mT @ (weights * rows)
    assert layer.rows == pytest.approx(weights.sum().item(), rel=1e-4)
    torch.testing.assert_close(layer.gram, gram, rtol=1e-3, atol=1e-5 * gram.abs().max().item())
    total = (weights * rows).sum(0)
    torch.testing.assert_close(layer.total, total, rtol=1e-3, atol=1e-4 * total.abs().max().item())


@pytest.mark.parametrize("weighting", BY_OUTPUT, ids=str)
def test_statistics_are_weighted_sums_whatever_the_batches_are(model, images, observed, weighting):
    stats = [calibrate(model, images.split(size), weighting=weighting) for size in (6, 4)]
    for name, x in observed(model, images).items():
        linear, x = model.get_submodule(name), x.unflatten(0, (len(images), -1))
        weights = expected(weighting, x @ linear.weight.double().mT)
        for each in stats:
            assert_weighted(each[name], linear, x, weights)


@pytest.mark.parametrize("kind", ["image", "clip", "class"])
def test_weights_hold_for_images_held_out_too(model, images, kind):
    whole, parts = (calibrate(model, [images], weighting=kind, held_out=share).merged() for share in (0, 0.5))
    for name in whole:
        assert parts[name].rows == pytest.approx(whole[name].rows)
        torch.testing.assert_close(parts[name].gram, whole[name].gram, rtol=1e-4, atol=1e-3)


def test_layers_share_an_input_only_where_its_tokens_weigh_the_same():
    args = {"img_size": 28, "depth": 1, "embed_dim": 96, "num_heads": 4, "num_classes": 3}
    model = timm.create_model("eva02_base_patch14_224", **args).eval()
    images = torch.randn(3, 3, 28, 28)
    for kind, shared in (("none", True), ("class", True), ("token", False)):
        stats = calibrate(model, [images], weighting=kind)
        assert (stats["blocks.0.attn.q_proj"] is stats["blocks.0.attn.k_proj"]) == shared


def test_windows_count_for_their_image():
    """Swin hands its layers windows ``[B * windows, T, C]``; relative errors are still those of images."""
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=28, window_size=7, depths=(1, 1), num_heads=(1, 2)
    )
    seen = []
    linear = model.layers[0].blocks[0].attn.qkv
    images = torch.randn(2, 3, 28, 28) * torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    with linear.register_forward_hook(lambda _m, a, _o: seen.append(a[0])), torch.no_grad():
        model.eval()(images)
    layer = calibrate(model, [images], weighting="image")["layers.0.blocks.0.attn.qkv"]
    x = seen[0].reshape(2, -1, linear.in_features).double()
    energy = (x @ linear.weight.double().mT).square().sum((1, 2))
    torch.testing.assert_close(
        layer.gram, sum(e.mT @ e / w for e, w in zip(x, energy, strict=True)), rtol=1e-3, atol=1e-6
    )


def test_tokens_without_output_have_no_weight():
    output = torch.zeros(2, 3, 4)
    output[0, 1] = 2.0
    for kind in ("image", "token"):
        weights = Weighting(kind).of_tokens(output, None, 2, 1)
        assert weights[0, 1] == 1 / 16
        assert weights[1].abs().sum() == 0
    assert Weighting("clip").of_tokens(output + 1, torch.ones(4), 2, 1).isfinite().all()
    assert Weighting("image").of_tokens(output[:, :0], None, 2, 1).shape == (2, 0)


def direct_gradients(model: nn.Module, images: Tensor, probe: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs, and gradients with respect to the outputs, ``[B, T, ...]``, of the logits along a probe, by layer."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        linear.register_forward_hook(lambda _m, a, o, name=name: seen.update({name: (a[0].detach(), o)}))
        for name, linear in compressible_linears(model).items()
    ]
    with torch.enable_grad():
        gradients = torch.autograd.grad((model(images) * probe).sum(), [output for _, output in seen.values()])
    for handle in handles:
        handle.remove()
    return {name: (x, g) for (name, (x, _)), g in zip(seen.items(), gradients, strict=True)}


@pytest.mark.parametrize("draws", [1, 3])
def test_gradients_weight_tokens_and_are_summed(model, images, draws):
    """Ten images, so that they pass in two chunks; probes do not depend on the batches."""
    images = torch.cat([images, images.flip(3)])[:10]
    stats = [
        calibrate(model, images.split(size), weighting="gradient", gradients=True, draws=draws, seed=5)
        for size in (10, 3)
    ]
    with torch.no_grad():
        drawn = probes(model(images), list(range(10)), draws, seed=5)
    runs = [direct_gradients(model, images, drawn[:, i]) for i in range(draws)]
    for name, linear in compressible_linears(model).items():
        x = runs[0][name][0].double()
        gradients = [run[name][1].double() for run in runs]
        weights = sum(g.square().sum(-1) for g in gradients) / draws
        frame = output_frame(linear.weight)[0]
        fisher = sum(g.flatten(0, 1).mT @ g.flatten(0, 1) for g in gradients) / draws
        fisher = fisher if frame is None else frame.double().mT @ fisher @ frame.double()
        for each in stats:
            assert_weighted(each[name], linear, x, weights)
            torch.testing.assert_close(each[name].gradient, fisher, rtol=1e-3, atol=1e-4 * fisher.abs().max().item())


@pytest.mark.parametrize(("held", "passes"), [(2.5, [2, 2, 2]), (0.5, [1] * 6), (100, [6])])
def test_fewer_images_pass_at_once_where_a_pass_holds_much(model, images, monkeypatch, held, passes):
    module, seen = importlib.import_module("mixrank.calibrate"), []
    whole = calibrate(model, [images[:6]], weighting="gradient", gradients=True)

    def counted(model, images, *others):
        seen.append(len(images))
        backward(model, images, *others)

    monkeypatch.setattr(module, "HELD", int(held * held_bytes(model, images[:1])))
    monkeypatch.setattr(module, "backward", counted)
    for name, layer in calibrate(model, [images[:6]], weighting="gradient", gradients=True).items():
        assert layer.rows == pytest.approx(whole[name].rows, rel=1e-4)
        # Entries whose terms cancel have the rounding of those that do not.
        rounding = 5e-6 * whole[name].gradient.abs().max().item()
        torch.testing.assert_close(layer.gradient, whole[name].gradient, rtol=0, atol=rounding)
    assert seen == passes


def test_what_a_pass_holds_is_what_the_way_back_reads():
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 5), nn.Sigmoid())
    wanted = 4 * 3 * (6 + 5)  # GELU reads its input, the sigmoid its output; inputs serve weights, which are not asked
    assert held_bytes(model, torch.randn(3, 4)) == wanted
    assert all(parameter.requires_grad for parameter in model.parameters())
    writes = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 6))
    images = -torch.ones(3, 4)
    assert held_bytes(writes, images) == 4 * 3 * 4
    assert torch.equal(images, -torch.ones(3, 4))


@pytest.mark.parametrize("held_out", [0.0, 0.5])
def test_a_level_adds_so_much_of_the_mean_weight_to_each_token(model, images, held_out):
    alone, alike = (
        calibrate(model, [images], weighting=weighting, gradients=True, held_out=held_out)
        for weighting in ("gradient", "none")
    )
    both = calibrate(model, [images], weighting=Weighting("gradient", 0.5), gradients=True, held_out=held_out)
    for stats in zip(alone.items(), alike.values(), both.values(), strict=True):
        (name, weighted), plain, mixed = stats
        pull = 0.5 * weighted.rows / plain.rows
        assert mixed.rows == pytest.approx(1.5 * weighted.rows)
        for sums in ("gram", "total"):
            wanted = getattr(weighted, sums) + pull * getattr(plain, sums)
            found = getattr(mixed, sums)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item(), msg=name)
        assert torch.equal(mixed.gradient, weighted.gradient)


def test_layers_that_do_not_see_the_images_count_their_tokens_alike(images):
    """The biases of positions that Swin v2 computes depend on no image, so that no gradient comes to them."""
    torch.manual_seed(0)
    args = {"img_size": 32, "window_size": 4, "depths": (1,), "num_heads": (2,), "embed_dim": 32, "num_classes": 5}
    swin = timm.create_model("swinv2_tiny_window8_256", **args).eval()
    name = "layers.0.blocks.0.attn.cpb_mlp.0"
    mixed, plain, alone = (
        calibrate(swin, [images], weighting=weighting, gradients=True, held_out=0.5)
        for weighting in (Weighting("gradient", 1.0), "none", "gradient")
    )
    assert name in alone.idle
    assert mixed.idle == plain.idle == ()
    for part, same in ((mixed, plain), (mixed.held_out, plain.held_out)):
        assert torch.equal(part[name].gram, same[name].gram)
        assert part[name].rows == same[name].rows
    made = decompose(swin, mixed, factors="fisher")[name]
    assert made.factors(2)[0].isfinite().all()


def test_both_statistics_come_from_one_pass(model, images):
    seen = []
    model.register_forward_hook(lambda *_: seen.append(1))
    automatic, alike = calibrate_both(model, [images], held_out=0.5, seed=2)
    passes = len(seen)
    wanted = [
        calibrate(model, [images], weighting=weighting, gradients=True, held_out=0.5, seed=2)
        for weighting in (Weighting("gradient", 1.0), "none")
    ]
    assert len(seen) == 3 * passes
    for found, alone in zip((automatic, alike), wanted, strict=True):
        assert found.images == alone.images
        for one, other in ((found, alone), (found.held_out, alone.held_out)):
            for name in one:
                for sums in ("gram", "total", "gradient"):
                    assert torch.equal(getattr(one[name], sums), getattr(other[name], sums)), name
                assert one[name].rows == other[name].rows


def test_gradients_beside_other_weights_change_no_statistics(model, images):
    plain, both = (calibrate(model, [images], gradients=gradients) for gradients in (False, True))
    for name in plain:
        assert plain[name].gradient is None
        assert both[name].gradient.trace() > 0
        torch.testing.assert_close(plain[name].gram, both[name].gram, rtol=1e-5, atol=1e-5)


def test_gradients_leave_the_model_as_it_was(model, images):
    model.head.weight.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    calibrate(model.train(), [images], weighting="gradient")
    assert model.training
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not module._forward_hooks for module in model.modules())


def test_probes_have_the_second_moment_of_the_gradients_of_drawn_labels():
    logits = torch.tensor([[0.0, 2.0, -1.0, 1.0]]).expand(800, 4)
    found = probes(logits, list(range(800)), 50, seed=1)
    share = logits[0].softmax(0)
    flat = found.flatten(0, 1)
    torch.testing.assert_close(flat.mean(0), torch.zeros(4), rtol=0, atol=0.01)
    torch.testing.assert_close(flat.mT @ flat / len(flat), share.diag() - torch.outer(share, share), rtol=0, atol=0.01)
    torch.testing.assert_close(found.sum(-1), torch.zeros(800, 50), rtol=0, atol=1e-6)
    assert torch.equal(probes(logits[7:9], [7, 8], 50, seed=1), found[7:9])
    assert not torch.equal(probes(logits, list(range(800)), 50, seed=2), found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "heavy"}, "weighting must be one of none, image, token, clip, class, gradient, but it was 'heavy'"),
        ({"kind": "token", "level": 2}, "weighting 'token' takes no level, but it was 2"),
        ({"kind": "clip", "level": 0}, "the level of weighting 'clip' must be a number above 0, but it was 0"),
        ({"kind": "class", "level": float("nan")}, "must be a number above 0, but it was nan"),
        (
            {"kind": "gradient", "level": -1},
            "the level of weighting 'gradient' must be a number at least 0, but it was -1",
        ),
        ({"kind": "gradient", "level": float("inf")}, "must be a number at least 0, but it was inf"),
    ],
)
def test_weightings_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Weighting(**arguments)


def test_weights_that_the_model_cannot_give_are_refused(model, images):
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=28, window_size=7, depths=(1,), num_heads=(1,))
    with pytest.raises(InputError, match="'class' needs a model with a class token, but SwinTransformer has none"):
        calibrate(swin, [images], weighting="class")
    with pytest.raises(InputError, match="draws must be at least 1, but it was 0"):
        calibrate(model, [images], draws=0)
    features = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0, global_pool="")
    with pytest.raises(
        InputError, match=r"gradients need a model that returns logits .*, but it returned \[6, 5, 192\]"
    ):
        calibrate(features, [images], weighting="gradient")
    images = images.clone()
    images[4, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="gradients need finite logits, but those for image 4 are not"):
        calibrate(model, [images], weighting="gradient")
