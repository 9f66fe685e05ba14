"""PivotedLinear: the layer of factors in fewer numbers."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from mixrank.errors import InputError
from mixrank.nn import MixedRankLinear
from mixrank.nn_pivoted import PivotedLinear, index_dtype
from mixrank_kernels import packing


@pytest.fixture
def factored():
    return MixedRankLinear.from_linear(nn.Linear(24, 40), 9).requires_grad_(False)


@pytest.fixture
def layer(factored):
    return PivotedLinear.from_factors(factored.down, factored.up, factored.bias).requires_grad_(False)


def test_a_pivoted_layer_as_factors_is_the_same_layer():
    torch.manual_seed(0)
    layer = PivotedLinear.from_factors(torch.randn(6, 20), torch.randn(30, 6), torch.randn(30))
    factors = layer.to_factors()
    assert torch.allclose(factors.weight, layer.weight, atol=1e-5)
    assert torch.allclose(factors.up.mT @ factors.up, torch.eye(6), atol=1e-6)
    assert torch.allclose(factors.down.norm(dim=1), torch.linalg.svdvals(layer.weight.detach())[:6], rtol=1e-5)
    assert torch.equal(factors.bias, layer.bias)
    assert factors.bias is not layer.bias


@pytest.mark.parametrize("shape", [(24,), (3, 24), (2, 3, 5, 24), (0, 24)])
def test_it_gives_what_the_factors_give_in_fewer_numbers(factored, layer, shape):
    x = torch.randn(shape)
    torch.testing.assert_close(layer(x), factored(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.weight, factored.weight, rtol=1e-5, atol=1e-6)
    assert (layer.in_features, layer.out_features, layer.rank) == (24, 40, 9)
    assert sum(p.numel() for p in layer.parameters()) == 9 * (24 + 40 - 9) + 40
    assert torch.equal(layer.weight[layer.index[:9].long()], layer.down)


@pytest.mark.parametrize(("k", "n", "rank"), [(24, 40, 24), (40, 24, 24), (32, 32, 32), (1, 7, 1), (7, 1, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_full_rank_gives_the_outputs_of_the_linear_layer(k, n, rank, bias):
    linear = nn.Linear(k, n, bias).eval()
    layer = PivotedLinear.from_linear(linear, rank)
    x = torch.randn(5, k)
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-4, atol=1e-5)
    assert (layer.bias is not None) == bias
    assert not layer.training


def test_merge_gives_a_plain_layer_with_the_same_weight(layer):
    merged, x = layer.eval().merge(), torch.randn(5, 24)
    assert type(merged) is nn.Linear
    assert not merged.training
    assert torch.equal(merged.weight, layer.weight)
    torch.testing.assert_close(merged(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_moves_between_dtypes_and_keeps_its_index(layer, dtype):
    x, expected, index = torch.randn(4, 24), layer(torch.zeros(4, 24)), layer.index.clone()
    exact = copy.deepcopy(layer).double()(x.double())
    moved = layer.to(dtype)
    assert moved(x.to(dtype)).dtype == moved.weight.dtype == dtype
    assert moved.index.dtype == torch.int16
    assert torch.equal(moved.index, index)
    torch.testing.assert_close(moved(x.to(dtype)).double(), exact, rtol=0.05, atol=0.05)
    assert expected.shape == (4, 40)


def test_the_index_is_as_narrow_as_it_can_be():
    assert [index_dtype(n) for n in (1, 2**15, 2**15 + 1)] == [torch.int16, torch.int16, torch.int32]
    wide = PivotedLinear(1, 2**15 + 1, 1)
    assert wide.index.dtype == torch.int32
    assert wide(torch.ones(1)).shape == (2**15 + 1,)
    assert PivotedLinear(1, 2**15, 1)(torch.ones(1)).shape == (2**15,)


def test_state_dict_round_trips(layer):
    assert set(layer.state_dict()) == {"down", "coefficients", "index", "bias"}
    other, x = PivotedLinear(24, 40, 9).requires_grad_(False), torch.randn(30, 24)
    other(x)  # packs
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@torch.no_grad()
def test_weights_are_packed_once_and_anew_when_one_changes(layer):
    packing.clear()
    x = torch.randn(30, 24)
    first = layer(x)
    size = packing.nbytes()
    assert size > 0
    assert torch.equal(layer(x), first)
    assert packing.nbytes() == size
    layer.index.copy_(torch.arange(40))
    torch.testing.assert_close(layer(x), layer.merge()(x))
    layer.coefficients.mul_(2)
    torch.testing.assert_close(layer(x), layer.merge()(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    del layer
    packing.clear()


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@torch.no_grad()
def test_exported_and_traced_layers_hold_the_plain_operator(layer, strict):
    x = torch.randn(30, 24)
    expected = layer(x)
    program = torch.export.export(layer, (x,), strict=strict)
    traced = torch.fx.experimental.proxy_tensor.make_fx(layer)(x)
    for graph in (program.graph, traced.graph, torch.fx.symbolic_trace(layer).graph):
        (call,) = [node for node in graph.nodes if "mixrank_kernels" in str(node.target)]
        assert call.target is torch.ops.mixrank_kernels.pivoted_linear.default
    assert torch.equal(program.module()(x), expected)


@torch.no_grad()
def test_compiled_layers_pack_once_and_follow_their_weights(layer):
    packing.clear()
    torch._dynamo.reset()
    compiled, x = torch.compile(layer, fullgraph=True), torch.randn(2, 30, 24)
    torch.testing.assert_close(compiled(x), layer(x))
    size = packing.nbytes()
    assert size == packing.packed_pivots(layer.down, layer.coefficients, layer.index).nbytes
    layer.down.mul_(3)
    actual = compiled(x)
    packing.clear()
    torch.testing.assert_close(actual, layer(x))


def test_trains_also_compiled():
    torch.manual_seed(0)
    torch._dynamo.reset()
    layer, x = PivotedLinear(8, 8, 4), torch.randn(64, 8)
    target = x @ torch.randn(8, 2) @ torch.randn(2, 8)
    compiled = torch.compile(layer, fullgraph=True)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(400):
        loss = (compiled(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_weight_is_differentiable(layer):
    layer.requires_grad_().weight.sum().backward()
    assert layer.down.grad.abs().sum() > 0
    assert layer.coefficients.grad.abs().sum() > 0


def test_fresh_weights_have_the_spread_of_a_linear_layer():
    layer, linear = PivotedLinear(256, 512, 64), nn.Linear(256, 512)
    assert 0.8 < layer.weight.std() / linear.weight.std() < 1.25


DOWN, COEFFICIENTS, INDEX = torch.ones(2, 8), torch.ones(3, 2), torch.tensor([1, 4, 0, 2, 3])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"coefficients": torch.ones(3, 3)}, r"down and coefficients must have shapes .* but they were \[2, 8\] and"),
        ({"down": torch.ones(8)}, r"down and coefficients must have shapes .* but they were \[8\]"),
        ({"index": torch.arange(4)}, r"index must have shape \[5\] .* but it was \[4\]"),
        ({"bias": torch.ones(4)}, r"bias must have shape \[5\] .* but it was \[4\]"),
        ({"index": INDEX.double()}, r"index must have one of the dtypes int16, int32, int64, but it was torch.float64"),
        ({"index": torch.tensor([4, 1, 0, 2, 3])}, r"index must hold 0 to 4 once each, rising in its first 2 entries"),
        ({"index": torch.tensor([1, 1, 0, 2, 3])}, r"index must hold 0 to 4 once each"),
        ({"coefficients": COEFFICIENTS.half()}, r"coefficients must be torch.float32 .* but it was torch.float16"),
        ({"down": torch.ones(2, 1)}, r"rank must be from 1 to 1 .* but it was 2"),
    ],
)
def test_what_does_not_fit_is_refused(changed, message):
    arguments = {"down": DOWN, "coefficients": COEFFICIENTS, "index": INDEX, "bias": None}
    assert PivotedLinear.from_pivots(**arguments)(torch.ones(8)).tolist() == [16, 8, 16, 16, 8]
    with pytest.raises(InputError, match=message):
        PivotedLinear.from_pivots(**arguments | changed)


@pytest.mark.parametrize("rank", [0, -1, 25])
def test_a_rank_out_of_range_is_refused(rank):
    message = rf"rank must be from 1 to 24 for a layer of 24 inputs and 40 outputs, but it was {rank}"
    with pytest.raises(InputError, match=message):
        PivotedLinear(24, 40, rank)
    with pytest.raises(InputError, match=message):
        PivotedLinear.from_linear(nn.Linear(24, 40), rank)


def test_swapped_into_a_swin_transformer():
    """Forward and backward with every linear layer in blocks replaced, reductions without bias too."""
    torch.manual_seed(0)
    args = {"img_size": 56, "depths": (1, 1, 1, 1), "num_classes": 10}
    model = timm.create_model("swin_tiny_patch4_window7_224", **args).eval()
    x = torch.randn(2, 3, 56, 56)
    expected = model(x)
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and not path.startswith("head"):
            full = min(module.in_features, module.out_features)
            model.set_submodule(path, PivotedLinear.from_linear(module, full))
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)
    model(x).square().sum().backward()
    trained = [p for n, p in model.named_parameters() if n.endswith((".down", ".coefficients")) and p.numel()]
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in trained)
