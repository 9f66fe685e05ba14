"""SparseLinear: any entries of the weight, and factors beside them or none."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import mixrank
from mixrank.errors import InputError
from mixrank.nn_sparse import SparseLinear, mask_places
from mixrank_kernels import packing

K, N, ENTRIES, RANK = 27, 40, 301, 3


@pytest.fixture(params=[0, RANK], ids=["alone", "factors"])
def rank(request):
    return request.param


@pytest.fixture
def layer(rank):
    return filled(SparseLinear(K, N, ENTRIES, rank)).requires_grad_(False)


def filled(layer: SparseLinear) -> SparseLinear:
    """With entries at random places, and a bias."""
    stored = torch.zeros(layer.out_features * layer.in_features, dtype=torch.bool)
    stored[torch.randperm(len(stored))[: layer.entries]] = True
    sparse = stored.reshape(layer.out_features, layer.in_features) * torch.randn(layer.out_features, layer.in_features)
    bias = None if layer.bias is None else torch.randn(layer.out_features)
    made = SparseLinear.from_weights(sparse, layer.down, layer.up, bias)
    assert made.entries == layer.entries
    return made.train(layer.training)


@pytest.mark.parametrize("shape", [(K,), (3, K), (2, 3, 5, K), (0, K)])
def test_it_gives_what_the_dense_weight_gives(layer, rank, shape):
    x = torch.randn(shape)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)
    assert (layer.in_features, layer.out_features, layer.rank, layer.entries) == (K, N, rank, ENTRIES)
    assert sum(p.numel() for p in layer.parameters()) == ENTRIES + rank * (K + N) + N
    assert layer.mask.shape == (N, 4)
    assert layer.density == ENTRIES / (K * N)
    assert f"entries={ENTRIES}, rank={rank}, bias=True" in repr(layer)


@pytest.mark.parametrize(("k", "n"), [(8, 5), (1, 1), (27, 40)])
@pytest.mark.parametrize("bias", [True, False])
def test_what_is_not_zero_is_stored(k, n, bias):
    sparse = torch.randn(n, k) * (torch.rand(n, k) < 0.4)
    down, up, b = torch.randn(1, k), torch.randn(n, 1), torch.randn(n) if bias else None
    layer = SparseLinear.from_weights(sparse, down, up, b)
    assert layer.entries == sparse.count_nonzero()
    assert torch.equal(layer.values, sparse[sparse != 0])
    torch.testing.assert_close(layer.weight, sparse + up @ down)
    assert torch.equal(SparseLinear.from_weights(sparse).weight, sparse)
    assert (layer.bias is not None) == bias
    same = SparseLinear.from_parts(layer.mask, layer.values, down, up, b)
    assert torch.equal(same.weight, layer.weight)
    assert same.values.data_ptr() == layer.values.data_ptr()
    assert same.mask is layer.mask


def test_inputs_are_as_many_as_the_mask_has_bits_unless_told():
    layer = SparseLinear(K, N, ENTRIES)
    parts = (layer.mask, layer.values)
    assert SparseLinear.from_parts(*parts).in_features == 32
    assert SparseLinear.from_parts(*parts, in_features=K).in_features == K


@pytest.mark.parametrize("entries", [0, 1, N - 1, N, ENTRIES, K * N])
def test_fresh_entries_are_spread_over_the_rows(entries):
    stored = SparseLinear(K, N, entries).weight != 0
    assert stored.sum() == entries
    assert stored.sum(1).max() - stored.sum(1).min() <= 1


@pytest.mark.parametrize("entries", [512 * 256 // 4, 512 * 256 // 2, 512 * 256 // 2 + 99])
def test_fresh_entries_are_spread_over_the_columns(entries):
    columns = (SparseLinear(256, 512, entries).weight != 0).sum(0)
    assert columns.max() < 1.1 * columns.min()


@pytest.mark.parametrize(("entries", "rank"), [(1000, 0), (60_000, 0), (131072, 0), (40_000, 16), (0, 32)])
def test_fresh_weights_have_the_spread_of_a_linear_layer(entries, rank):
    layer, linear = SparseLinear(256, 512, entries, rank), nn.Linear(256, 512)
    assert 0.8 < layer.weight.std() / linear.weight.std() < 1.25
    assert layer.bias.abs().max() == 0


def test_merge_gives_a_plain_layer_with_the_same_weight(layer):
    merged, x = layer.eval().merge(), torch.randn(5, K)
    assert type(merged) is nn.Linear
    assert not merged.training
    assert torch.equal(merged.weight, layer.weight)
    torch.testing.assert_close(merged(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_moves_between_dtypes_and_keeps_its_mask(layer, dtype):
    x, mask = torch.randn(4, K), layer.mask.clone()
    exact = copy.deepcopy(layer).double()(x.double())
    moved = layer.to(dtype)
    assert moved(x.to(dtype)).dtype == moved.weight.dtype == dtype
    assert moved.mask.dtype == torch.uint8
    assert torch.equal(moved.mask, mask)
    torch.testing.assert_close(moved(x.to(dtype)).double(), exact, rtol=0.05, atol=0.1)


def test_state_dict_copies_and_pickles_give_the_same_layer(layer, rank):
    assert set(layer.state_dict()) == {"mask", "values", "bias"} | ({"down", "up"} if rank else set())
    other, x = SparseLinear(K, N, ENTRIES, rank).requires_grad_(False), torch.randn(30, K)
    other(x)  # packs
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    with pytest.raises(RuntimeError, match="size mismatch for values"):
        SparseLinear(K, N, ENTRIES + 1, rank).load_state_dict(layer.state_dict())


@torch.no_grad()
def test_weights_are_packed_once_and_anew_when_one_changes(layer):
    packing.clear()
    x = torch.randn(30, K)
    first = layer(x)
    size = packing.nbytes()
    assert size > 0
    assert torch.equal(layer(x), first)
    assert packing.nbytes() == size
    layer.mask.copy_(SparseLinear(K, N, ENTRIES).mask)
    torch.testing.assert_close(layer(x), layer.merge()(x), rtol=1e-5, atol=1e-5)
    layer.values.mul_(2)
    torch.testing.assert_close(layer(x), layer.merge()(x), rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    del layer
    packing.clear()


def test_weights_that_train_are_not_packed(layer):
    packing.clear()
    layer.requires_grad_()(torch.randn(30, K)).sum().backward()
    assert packing.nbytes() == 0


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
@torch.no_grad()
def test_exported_and_traced_layers_hold_the_plain_operator(layer, strict):
    x = torch.randn(30, K)
    expected = layer(x)
    program = torch.export.export(layer, (x,), strict=strict)
    traced = torch.fx.experimental.proxy_tensor.make_fx(layer)(x)
    for graph in (program.graph, traced.graph, torch.fx.symbolic_trace(layer).graph):
        (call,) = [node for node in graph.nodes if "mixrank_kernels" in str(node.target)]
        assert call.target is torch.ops.mixrank_kernels.sparse_linear.default
    assert torch.equal(program.module()(x), expected)


@torch.no_grad()
def test_compiled_layers_pack_once_and_follow_their_weights(layer):
    packing.clear()
    torch._dynamo.reset()
    compiled, x = torch.compile(layer, fullgraph=True), torch.randn(2, 30, K)
    torch.testing.assert_close(compiled(x), layer(x))
    size = packing.nbytes()
    assert size == packing.packed_sparse(layer.mask, layer.values, layer.down, layer.up).nbytes
    layer.values.mul_(3)
    actual = compiled(x)
    packing.clear()
    torch.testing.assert_close(actual, layer(x))


def test_trains_also_compiled_and_keeps_its_places(rank):
    torch._dynamo.reset()
    layer, teacher = SparseLinear(16, 16, 100, rank), SparseLinear(16, 16, 100, rank)
    nn.init.normal_(teacher.values)
    x = torch.randn(128, 16)
    target, mask = teacher(x).detach(), layer.mask.clone()
    compiled = torch.compile(layer, fullgraph=True)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    losses = []
    for _ in range(200):
        loss = (compiled(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]
    assert torch.equal(layer.mask, mask)


def test_weight_is_differentiable(layer):
    layer.requires_grad_().weight.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for name, p in layer.named_parameters() if name != "bias")


@pytest.mark.parametrize(("k", "n", "places"), [(32, 40, 40), (27, 40, 40), (8, 1, 1), (8, 5, 2), (9, 3, 2)])
def test_places_are_the_words_of_the_mask(k, n, places):
    layer = SparseLinear(k, n, 1)
    assert layer.places == mask_places(k, n) == -(-layer.mask.numel() // 4) == places


MASK, VALUES = torch.tensor([[5], [2], [0]], dtype=torch.uint8), torch.tensor([1.0, 2.0, 4.0])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mask": MASK.int()}, r"mask must be a uint8 matrix, but it was torch.int32 of shape \[3, 1\]"),
        ({"mask": MASK[0]}, r"mask must be a uint8 matrix, but it was torch.uint8 of shape \[1\]"),
        ({"mask": MASK[:2]}, r"up must have shape \[2, 2\] as mask has rows, but it was \[3, 2\]"),
        ({"mask": MASK.repeat(1, 2)}, r"mask must have shape \[3, 1\], but it was \[3, 2\]"),
        ({"mask": MASK + 8}, r"mask must have no bit set beyond in_features = 3, but it had one"),
        ({"values": VALUES[:2]}, r"mask must have a bit for each of the 2 values, but it had 3"),
        ({"values": torch.ones(100)}, r"mask must have a bit for each of the 100 values, but it had 3"),
        ({"values": VALUES[None]}, r"values must be a vector of a floating dtype, but it was .* of shape \[1, 3\]"),
        ({"values": VALUES.int()}, r"values must be a vector of a floating dtype, but it was torch.int32"),
        ({"up": None}, r"up must be given where down is, but it was not"),
        ({"down": None}, r"down must be given where up is, but it was not"),
        ({"up": torch.ones(3, 3)}, r"down and up must have shapes .* but they were \[2, 3\] and \[3, 3\]"),
        ({"down": torch.ones(0, 3), "up": torch.ones(3, 0)}, r"down and up must have a rank of at least 1"),
        ({"down": torch.ones(4, 3), "up": torch.ones(3, 4)}, r"rank must be from 0 to 3 .* but it was 4"),
        ({"up": torch.ones(3, 2).half()}, r"up must be torch.float32 on cpu as values is, but it was torch.float16"),
        ({"bias": torch.ones(4)}, r"bias must have shape \[3\] .* but it was \[4\]"),
        ({"in_features": 4}, r"in_features must be 3 as down has columns, but it was 4"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changed, message):
    parts = {"mask": MASK, "values": VALUES, "down": torch.ones(2, 3), "up": torch.ones(3, 2), "bias": torch.ones(3)}
    assert SparseLinear.from_parts(**parts)(torch.ones(3)).tolist() == [10, 11, 7]
    with pytest.raises(InputError, match=message):
        SparseLinear.from_parts(**parts | changed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(3),), r"sparse must be a matrix of a floating dtype, but it was torch.float32 of shape \[3\]"),
        ((torch.ones(3, 4).int(),), r"sparse must be a matrix of a floating dtype, but it was torch.int32"),
        ((torch.ones(3, 4), torch.ones(2, 3), torch.ones(3, 2)), r"down must have shape \[2, 4\] .* was \[2, 3\]"),
        ((torch.ones(3, 4), torch.ones(2, 4), torch.ones(4, 2)), r"up must have shape \[3, 2\] .* was \[4, 2\]"),
        ((torch.ones(3, 4).half(), None, None, torch.ones(3)), r"bias must be torch.float16 .* as sparse is"),
        ((torch.ones(3, 4), torch.ones(2, 4)), "up must be given where down is"),
        ((torch.ones(3, 0),), "in_features and out_features must be at least 1, but were 0 and 3"),
    ],
)
def test_weights_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        SparseLinear.from_weights(*arguments)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 40, 1), "in_features and out_features must be at least 1, but were 0 and 40"),
        ((24, 40, -1), "entries must be from 0 to 960 for a layer of 24 inputs and 40 outputs, but it was -1"),
        ((24, 40, 961), "entries must be from 0 to 960 for a layer of 24 inputs and 40 outputs, but it was 961"),
        ((24, 40, 10, 25), "rank must be from 0 to 24 for a layer of 24 inputs and 40 outputs, but it was 25"),
        ((24, 40, 10, -1), "rank must be from 0 to 24 for a layer of 24 inputs and 40 outputs, but it was -1"),
    ],
)
def test_sizes_out_of_range_are_refused(sizes, message):
    with pytest.raises(InputError, match=message):
        SparseLinear(*sizes)


def test_only_this_layer_may_be_without_factors():
    for kind in (mixrank.MixedRankLinear, mixrank.PivotedLinear):
        with pytest.raises(InputError, match="rank must be from 1 to 24"):
            kind(24, 40, 0)


def test_swapped_into_a_swin_transformer():
    """Forward and backward with every linear layer in blocks replaced, reductions without bias too."""
    torch.manual_seed(0)
    args = {"img_size": 56, "depths": (1, 1, 1, 1), "num_classes": 10}
    model = timm.create_model("swin_tiny_patch4_window7_224", **args).eval()
    x = torch.randn(2, 3, 56, 56)
    expected = model(x)
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and not path.startswith("head"):
            small = module.weight.detach().abs() < module.weight.abs().median()
            left, values, right = torch.linalg.svd(module.weight.detach() * small, full_matrices=False)
            factors = values[:, None] * right, left
            bias = None if module.bias is None else module.bias.detach()
            model.set_submodule(path, SparseLinear.from_weights(module.weight * ~small, *factors, bias))
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)
    model(x).square().sum().backward()
    trained = [p for n, p in model.named_parameters() if n.endswith((".values", ".down", ".up"))]
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in trained)
