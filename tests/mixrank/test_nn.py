"""MixedRankLinear and SplitLinear as replacements for nn.Linear."""

from __future__ import annotations

import copy
import io

import pytest
import timm
import torch
from torch import nn

from mixrank.errors import InputError
from mixrank.nn import MixedRankLinear, SplitLinear
from mixrank_kernels import packing


@pytest.fixture
def linear():
    return nn.Linear(24, 40)


@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 3, 5, 24), (0, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_full_rank_gives_the_outputs_of_the_linear_layer(shape, bias):
    linear = nn.Linear(24, 40, bias)
    layer = MixedRankLinear.from_linear(linear, 24)
    x = torch.randn(shape)
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-4, atol=1e-5)
    assert (layer.in_features, layer.out_features, layer.rank) == (24, 40, 24)
    assert (layer.bias is not None) == bias


@pytest.mark.parametrize(("k", "n"), [(24, 40), (40, 24), (32, 32)])
def test_without_statistics_the_weight_is_the_truncated_svd(k, n):
    linear = nn.Linear(k, n)
    u, s, vh = torch.linalg.svd(linear.weight.double())
    truncated = (u[:, :7] * s[:7]) @ vh[:7]
    layer = MixedRankLinear.from_linear(linear, 7)
    torch.testing.assert_close(layer.weight.double(), truncated, rtol=1e-5, atol=1e-6)
    assert torch.equal(layer.bias, linear.bias)


def test_merge_gives_a_plain_layer_with_the_same_weight(linear):
    layer = MixedRankLinear.from_linear(linear, 9).eval()
    merged = layer.merge()
    x = torch.randn(5, 24)
    assert type(merged) is nn.Linear
    assert not merged.training
    assert torch.equal(merged.weight, layer.weight)
    torch.testing.assert_close(merged(x), layer(x), rtol=1e-5, atol=1e-5)
    merged.bias.data.zero_()
    assert layer.bias.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_moves_between_dtypes(linear, dtype):
    layer = MixedRankLinear.from_linear(linear, 9).to(dtype)
    x = torch.randn(4, 24)
    assert layer(x.to(dtype)).dtype == dtype
    assert layer.weight.dtype == dtype
    assert layer.merge().weight.dtype == dtype
    expected = layer.double()(x.double())
    torch.testing.assert_close(layer.to(dtype)(x.to(dtype)).double(), expected, rtol=0.05, atol=0.05)


def test_deepcopy_is_independent(linear):
    layer = MixedRankLinear.from_linear(linear, 9)
    copied = copy.deepcopy(layer)
    x = torch.randn(4, 24)
    before = layer(x)
    copied.down.data.zero_()
    assert torch.equal(layer(x), before)
    assert not torch.equal(copied(x), before)


def test_state_dict_holds_the_factors_alone_and_round_trips(linear):
    layer = MixedRankLinear.from_linear(linear, 9)
    assert set(layer.state_dict()) == {"down", "up", "bias"}
    other = MixedRankLinear(24, 40, 9)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(4, 24)
    assert torch.equal(other(x), layer(x))


def saved(module: nn.Module) -> bytes:
    file = io.BytesIO()
    torch.save(module, file)
    return file.getvalue()


@torch.no_grad()
def test_factors_are_packed_once_and_leave_no_trace_in_the_layer(linear):
    packing.clear()
    layer, x = MixedRankLinear.from_linear(linear, 9), torch.randn(30, 24)
    pickled, attributes = saved(layer), set(vars(layer))
    expected = layer(x)
    assert (size := packing.nbytes()) > 0
    assert torch.equal(layer(x), expected)
    assert packing.nbytes() == size
    assert (saved(layer), set(vars(layer))) == (pickled, attributes)
    assert set(layer.state_dict()) == {"down", "up", "bias"}
    copied = copy.deepcopy(layer)
    assert packing.nbytes() == size
    layer.up.mul_(2)
    layer.bias.mul_(2)
    torch.testing.assert_close(layer(x), 2 * expected)
    assert torch.equal(copied(x), expected)
    assert packing.nbytes() == 2 * size
    del layer, copied
    assert packing.nbytes() == 0


def test_training_packs_nothing(linear):
    packing.clear()
    layer = MixedRankLinear.from_linear(linear, 9)
    layer(torch.randn(30, 24)).sum().backward()
    assert packing.nbytes() == 0


@torch.no_grad()
def test_autocast_packs_nothing(linear):
    packing.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert MixedRankLinear.from_linear(linear, 9)(torch.randn(30, 24)).dtype == torch.bfloat16
    assert packing.nbytes() == 0


@pytest.mark.parametrize("freezing", [False, True], ids=["", "freezing"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
def test_compiled_layers_pack_once_and_follow_their_parameters(linear, mode, freezing):
    packing.clear()
    torch._dynamo.reset()
    layers = [MixedRankLinear.from_linear(linear, 9), MixedRankLinear(40, 24, 5)]
    model, x = nn.Sequential(layers[0], nn.GELU(), layers[1]).eval(), torch.randn(2, 30, 24)
    with torch._inductor.config.patch(freezing=freezing):
        compiled = torch.compile(model, fullgraph=True)
        with mode():
            compiled(x)
            made = [packing.packed(layer.down, layer.up) for layer in layers]
            assert packing.nbytes() == sum(packed.nbytes for packed in made)
            torch.testing.assert_close(compiled(x), model(x))
            for change in (lambda w: w.mul_(2), lambda w: w.copy_(w.flip(0)), lambda w: setattr(w, "data", w * 3)):
                with torch.inference_mode(False), torch.no_grad():
                    for layer in layers:
                        change(layer.down)
                actual = compiled(x)
                packed = [packing.packed(layer.down, layer.up) for layer in layers]
                assert all(new is not old for new, old in zip(packed, made, strict=True))
                assert packing.nbytes() == sum(one.nbytes for one in packed)
                made = packed
                packing.clear()
                torch.testing.assert_close(actual, model(x))


def test_compiled_layers_have_gradients(linear):
    torch._dynamo.reset()
    layer = MixedRankLinear.from_linear(linear, 9)
    compiled, x = torch.compile(layer, fullgraph=True), torch.randn(31, 24, requires_grad=True)
    for trained in (list(layer.parameters()), []):
        layer.requires_grad_(bool(trained))
        packing.clear()
        ours = torch.autograd.grad(compiled(x).square().sum(), [x, *trained])
        assert packing.nbytes() == 0
        eager = torch.autograd.grad(layer(x).square().sum(), [x, *trained])
        torch.testing.assert_close(ours, eager)


@torch.no_grad()
def test_compiled_layers_under_autocast_pack_nothing(linear):
    packing.clear()
    torch._dynamo.reset()
    layer, x = MixedRankLinear.from_linear(linear, 9), torch.randn(30, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))
    assert packing.nbytes() == 0


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@torch.no_grad()
def test_exported_and_traced_layers_hold_the_plain_operator(linear, strict):
    layer, x = MixedRankLinear.from_linear(linear, 9), torch.randn(30, 24)
    expected = layer(x)
    program = torch.export.export(layer, (x,), strict=strict)
    traced = torch.fx.experimental.proxy_tensor.make_fx(layer)(x)
    for graph in (program.graph, traced.graph, torch.fx.symbolic_trace(layer).graph):
        (call,) = [node for node in graph.nodes if "mixrank_kernels" in str(node.target)]
        assert call.target is torch.ops.mixrank_kernels.lowrank_linear.default
        assert len(call.args) < 5 or call.args[4] is None
    layer.up.mul_(2)
    layer.bias.mul_(2)
    torch.testing.assert_close(traced(x), 2 * expected)


def test_trains():
    torch.manual_seed(0)
    layer, x = MixedRankLinear(8, 8, 4), torch.randn(64, 8)
    target = x @ torch.randn(8, 2) @ torch.randn(2, 8)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(200):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_fresh_factors_have_the_spread_of_a_linear_layer():
    layer, linear = MixedRankLinear(256, 512, 64), nn.Linear(256, 512)
    assert 0.8 < layer.weight.std() / linear.weight.std() < 1.25


def test_weight_is_differentiable(linear):
    layer = MixedRankLinear.from_linear(linear, 9)
    layer.weight.sum().backward()
    assert layer.down.grad.abs().sum() > 0


@pytest.mark.parametrize("rank", [0, -1, 25])
def test_a_rank_out_of_range_is_refused(linear, rank):
    message = rf"rank must be from 1 to 24 for a layer of 24 inputs and 40 outputs, but it was {rank}"
    with pytest.raises(InputError, match=message):
        MixedRankLinear.from_linear(linear, rank)
    with pytest.raises(InputError, match=message):
        MixedRankLinear(24, 40, rank)


@pytest.mark.parametrize(
    ("down", "up", "bias", "message"),
    [
        (
            torch.ones(3, 8),
            torch.ones(5, 4),
            None,
            r"down and up must have shapes .* but they were \[3, 8\] and \[5, 4\]",
        ),
        (torch.ones(8), torch.ones(5, 4), None, r"down and up must have shapes .* but they were \[8\]"),
        (torch.ones(3, 8), torch.ones(5, 3), torch.ones(4), r"bias must have shape \[5\] .* but it was \[4\]"),
        (
            torch.ones(3, 8),
            torch.ones(5, 3).half(),
            None,
            r"up must be torch.float32 .* but it was torch.float16",
        ),
        (torch.ones(6, 4), torch.ones(5, 6), None, r"rank must be from 1 to 4 .* but it was 6"),
    ],
)
def test_factors_that_do_not_fit_are_refused(down, up, bias, message):
    with pytest.raises(InputError, match=message):
        MixedRankLinear.from_factors(down, up, bias)


def test_a_wrong_input_names_what_is_wrong(linear):
    layer = MixedRankLinear.from_linear(linear, 9)
    with pytest.raises(RuntimeError, match=r"down must have shape \[R, K\] with K = 25"):
        layer(torch.ones(2, 25))
    with pytest.raises(RuntimeError, match="down must have dtype float64"):
        layer(torch.ones(2, 24).double())


@pytest.mark.parametrize("bias", [True, False])
def test_split_layer_gives_the_outputs_of_the_fused_one(bias):
    linear = nn.Linear(8, 24, bias)
    split = SplitLinear.from_linear(linear, 3)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(split(x), linear(x))
    assert torch.equal(split.weight, linear.weight)
    assert (split.bias is None) == (linear.bias is None)
    merged = split.merge()
    assert torch.equal(merged.weight, linear.weight)
    assert torch.equal(merged(x), linear(x))


def test_split_layer_with_a_bias_on_some_parts_only():
    parts = [nn.Linear(4, 3, bias=False), nn.Linear(4, 2)]
    split = SplitLinear(parts)
    x = torch.randn(7, 4)
    torch.testing.assert_close(split.merge()(x), split(x))


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match=r"sections must divide out_features = 10, but it was 3"):
        SplitLinear.from_linear(nn.Linear(4, 10), 3)
    with pytest.raises(InputError, match=r"parts must have one in_features in common, but they had \[4, 5\]"):
        SplitLinear([nn.Linear(4, 3), nn.Linear(5, 3)])


MODELS = [
    ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2}, 32),
    ("deit_small_patch16_224", {"img_size": 32, "depth": 2}, 32),
    ("swin_tiny_patch4_window7_224", {"img_size": 56, "depths": (1, 1, 1, 1)}, 56),
]


@pytest.mark.parametrize(("name", "args", "size"), MODELS, ids=[m[0] for m in MODELS])
def test_swapped_into_timm_models(name, args, size):
    """Forward, backward and torch.compile(fullgraph) of timm models with every linear layer in blocks replaced."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **args).eval()
    x = torch.randn(2, 3, size, size)
    expected = model(x)
    replaced = 0
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and not path.startswith("head"):
            full = min(module.in_features, module.out_features)
            model.set_submodule(path, MixedRankLinear.from_linear(module, full))
            replaced += 1
    assert replaced >= 8
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)
    model(x).square().sum().backward()
    factors = [p for n, p in model.named_parameters() if n.endswith((".down", ".up"))]
    assert len(factors) == 2 * replaced
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in factors)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-3, atol=1e-4)
