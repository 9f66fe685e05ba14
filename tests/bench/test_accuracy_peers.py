"""Every published method does what its defining equation says, within the budget."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from mixrank.compress import compress
from mixrank.counting import count_parameters
from mixrank.decompose import factorise
from mixrank.errors import InputError
from mixrank.fidelity import divergence
from mixrank.models import compressible_linears
from mixrank.stats import LayerStats
from mixrank_bench.accuracy_peers import asvd, asvd_search, corda, eva, oats, statistics, structured, svd_llm
from mixrank_bench.accuracy_peers.factored import compress_mixed, compress_uniform, layer_share, truncatable
from mixrank_bench.accuracy_peers.methods import METHODS
from mixrank_bench.accuracy_peers.statistics import Calibration, InputStats, input_statistics

SHAPES = {"wide": (12, 20), "tall": (20, 12), "square": (16, 16)}


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=7).eval()


def images() -> list[Tensor]:
    return list((torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1)) + 0.3).split(3))


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return Calibration(images(), input_statistics(small_model(), images()))


def observe(model: nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """The inputs of every layer, ``[tokens, K]`` in float64."""
    seen: dict[str, list[Tensor]] = {name: [] for name in compressible_linears(model)}
    for name, linear in compressible_linears(model).items():
        linear.register_forward_hook(lambda _m, a, _o, name=name: seen[name].append(a[0].flatten(0, -2).double()))
    with torch.inference_mode():
        for batch in batches:
            model(batch)
    return {name: torch.cat(parts) for name, parts in seen.items()}


def layer(shape: str) -> tuple[Tensor, Tensor, InputStats]:
    """A weight ``[N, K]``, tokens ``[M, K]`` with channels of very different size, and their statistics."""
    n, k = SHAPES[shape]
    weight = torch.randn(n, k, dtype=torch.float64)
    x = torch.randn(200, k, dtype=torch.float64) @ torch.randn(k, k, dtype=torch.float64) * torch.logspace(-2, 1, k)
    x = x.double() + 0.5
    return weight, x, InputStats(x.mT @ x, x.sum(0), x.abs().sum(0), len(x))


def truncated(matrix: Tensor, rank: int) -> Tensor:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] * values[:rank] @ right[:rank]


def product(factors: tuple[Tensor, Tensor], rank: int) -> Tensor:
    down, up = factors
    return up[:, :rank] @ down[:rank]


def test_statistics_are_the_moments_of_the_inputs(calibration):
    for name, x in observe(small_model(), images()).items():
        found = calibration.layers[name]
        assert found.rows == len(x)
        torch.testing.assert_close(found.gram, x.mT @ x, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(found.absolute, x.abs().sum(0), rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(found.total, x.sum(0), rtol=1e-4, atol=1e-3)


def test_statistics_survive_a_file_and_are_refused_for_other_images(calibration, tmp_path):
    path = tmp_path / "statistics.safetensors"
    statistics.save(path, calibration.layers, {"seed": 0}, logits=torch.ones(2, 3))
    layers, others = statistics.load(path, {"seed": 0})
    assert others["logits"].shape == (2, 3)
    for name, found in layers.items():
        assert found.rows == calibration.layers[name].rows
        assert all(torch.equal(getattr(found, p), getattr(calibration.layers[name], p)) for p in statistics.PARTS)
    with pytest.raises(InputError, match="must be made from"):
        statistics.load(path, {"seed": 1})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_truncatable_factors_are_the_svd(shape, rank):
    matrix = torch.randn(SHAPES[shape], dtype=torch.float64)
    left, right = truncatable(matrix)
    torch.testing.assert_close(left[:, :rank] @ right[:rank], truncated(matrix, rank))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_asvd_truncates_the_weight_scaled_by_the_root_of_mean_magnitudes(shape, rank):
    weight, x, stats = layer(shape)
    scale = torch.diag(x.abs().mean(0) ** 0.5 + 1e-6)
    expected = truncated(weight @ scale, rank) @ torch.linalg.inv(scale)
    torch.testing.assert_close(product(asvd.factors(weight, stats), rank), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 5, 11])
def test_svd_llm_truncates_the_whitened_weight_and_loses_the_singular_values_it_cuts(shape, rank):
    weight, x, stats = layer(shape)
    root = torch.linalg.cholesky(x.mT @ x)
    found = product(svd_llm.factors(weight, stats), rank)
    torch.testing.assert_close(found, truncated(weight @ root, rank) @ torch.linalg.inv(root))
    cut = torch.linalg.svdvals(weight @ root)[rank:]
    torch.testing.assert_close((x @ (weight - found).mT).square().sum(), cut.square().sum())


def test_svd_llm_is_the_uncentred_activation_aware_projection_of_the_product():
    weight, _, stats = layer("wide")
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
    linear.weight.data = weight
    calibrated = LayerStats("input", stats.gram, stats.total, stats.rows)
    down, up, _ = factorise(linear, calibrated, centre=False).factors(5)
    torch.testing.assert_close(product(svd_llm.factors(weight, stats), 5), up @ down)


def test_svd_llm_lifts_a_gram_matrix_that_is_not_positive_definite():
    x = torch.randn(3, 8, dtype=torch.float64)
    gram = x.mT @ x - 0.1 * torch.eye(8)
    root = svd_llm.whitening(gram)
    lift = 1e-6 - torch.linalg.eigvalsh(gram)[0]
    torch.testing.assert_close(root @ root.mT, gram + lift * torch.eye(8))
    assert torch.equal(root, root.tril())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_corda_truncates_the_weight_times_the_damped_covariance(shape, rank):
    weight, x, stats = layer(shape)
    second = x.mT @ x / len(x)
    damped = second + 0.01 * second.diagonal().mean() * torch.eye(len(second))
    expected = truncated(weight @ damped, rank) @ torch.linalg.inv(damped)
    torch.testing.assert_close(product(corda.factors(weight, stats), rank), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_eva_projects_on_the_right_singular_vectors_of_the_activations(shape):
    weight, x, stats = layer(shape)
    right = torch.linalg.svd(x, full_matrices=False)[2][:5]
    down, up = eva.factors(weight, stats)
    torch.testing.assert_close(down[:5].mT @ down[:5], right.mT @ right, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(up[:, :5], weight @ down[:5].mT)


@pytest.mark.parametrize("keep", [0.4, 0.7])
def test_uniform_ranks_are_one_share_of_every_layer_and_use_up_the_budget(calibration, keep):
    model = small_model()
    dense = count_parameters(model)
    compressed = compress_uniform(model, asvd.prepare(model, calibration), keep)
    assert compressed.parameters == count_parameters(model) <= keep * dense
    assert compressed.parameters > (keep - 0.01) * dense
    sizes = {name: linear.weight.shape for name, linear in compressible_linears(small_model()).items()}
    shares = [rank * sum(sizes[name]) / sizes[name].numel() for name, rank in compressed.details["ranks"].items()]
    steps = [sum(size) / size.numel() for size in sizes.values()]
    assert max(shares) - min(shares) < max(steps)


def test_mixed_ranks_are_those_of_plain_svd(calibration):
    model = small_model()
    found = compress_mixed(model, asvd.prepare(model, calibration), 0.5).details["ranks"]
    plain = METHODS["plain SVD, mixed"]
    other = small_model()
    assert found == plain.compress(other, plain.prepare(other, calibration), 0.5).details["ranks"]


def alternating_thresholding(scaled: Tensor, rank: int, entries: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of OATS, with a whole SVD each time."""
    sparse = torch.zeros_like(scaled)
    for _ in range(iterations):
        low = truncated(scaled - sparse, rank)
        kept = (scaled - low).abs().topk(entries, dim=1).indices
        sparse = torch.zeros_like(scaled).scatter_(1, kept, (scaled - low).gather(1, kept))
    return sparse, low


@pytest.mark.parametrize("shape", [(48, 80), (80, 48)])
def test_oats_alternates_between_the_truncated_svd_and_the_largest_entries_of_each_row(shape):
    scaled = torch.randn(shape) * torch.logspace(-1, 1, shape[1])
    sparse, low = oats.alternate(scaled, 4, 10, 1)
    for found, expected in zip((sparse, low), alternating_thresholding(scaled, 4, 10, 1), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    sparse, low = oats.alternate(scaled, 4, 10, 30)
    assert int((sparse != 0).sum()) == 10 * shape[0]
    assert (sparse != 0).sum(1).unique().tolist() == [10]
    assert torch.linalg.matrix_rank(low.double(), rtol=1e-5) == 4
    error = (scaled - sparse - low).norm()
    exact = (scaled - sum(alternating_thresholding(scaled, 4, 10, 30))).norm()
    torch.testing.assert_close(error, exact, rtol=0.02, atol=0)


def test_oats_keeps_the_entries_of_channels_that_are_large_on_the_images():
    weight = torch.ones(4, 8)
    second = torch.ones(8)
    second[5] = 100.0
    compressed, found = oats.compress_layer(weight, second, 0.2, iterations=3)
    assert found == {"rank": 0, "nonzeros": 4, "index_bits": 32}
    assert compressed.nonzero()[:, 1].tolist() == [5] * 4
    assert compressed.sum() == 4


def test_oats_scales_by_the_root_of_second_moments_and_back():
    weight, second = torch.randn(24, 32), torch.rand(32) + 0.1
    compressed, found = oats.compress_layer(weight, second, 0.8, iterations=4)
    sparse, low = oats.alternate(weight * second.sqrt(), found["rank"], found["nonzeros"] // 24, 4)
    torch.testing.assert_close(compressed, (sparse + low) / second.sqrt())


def test_oats_counts_ranks_and_entries_of_ties_too():
    assert int((oats._largest(torch.ones(3, 6), 2) != 0).sum()) == 6


@pytest.mark.parametrize("keep", [0.4, 0.6])
def test_oats_stores_no_more_than_the_budget_and_goes_block_by_block(calibration, keep):
    model = small_model()
    dense = copy.deepcopy(model)
    found = oats.compress(model, calibration, keep, iterations=2)
    assert (keep - 0.02) * count_parameters(dense) < found.parameters <= keep * count_parameters(dense)
    assert found.details["parameters_with_indices"] > found.parameters
    # The last layer was compressed by the inputs that it has behind the compressed ones before it.
    before = copy.deepcopy(model)
    before.blocks[1] = copy.deepcopy(dense.blocks[1])
    second = observe(before, images())["blocks.1.mlp.fc2"].square().sum(0)
    share = layer_share(dense, keep)
    expected, _ = oats.compress_layer(dense.blocks[1].mlp.fc2.weight.detach(), second, share, iterations=2)
    torch.testing.assert_close(model.blocks[1].mlp.fc2.weight.detach(), expected, rtol=1e-3, atol=1e-4)


def test_the_sensitivity_of_asvd_is_the_divergence_with_one_layer_cut(calibration):
    model = small_model()
    factors = asvd.prepare(model, calibration)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    damage = asvd_search.sensitivity(model, factors, images())
    assert set(damage) == {(name, share) for name in factors for share in asvd_search.SHARES}
    assert model.state_dict().keys() == before.keys()
    cut = copy.deepcopy(model)
    linear = cut.blocks[1].attn.proj
    down, up, _ = factors["blocks.1.attn.proj"].factors(asvd_search.rank_of(linear, 0.3))
    linear.weight.data = up @ down
    with torch.inference_mode():
        x = torch.cat(images())
        expected = divergence(cut(x), model(x)).mean().item()
    assert damage["blocks.1.attn.proj", 0.3] == pytest.approx(expected, rel=1e-3)


def test_the_search_of_asvd_applies_what_harms_least_within_the_budget():
    model = small_model()
    names = list(compressible_linears(model))
    # The later the layer and the larger the share, the less harm.
    damage = {(name, share): -names.index(name) - share for name in names for share in asvd_search.SHARES}
    for keep in (0.5, 0.8):
        found = asvd_search.search(model, damage, keep)
        first = names[-len(found)]
        assert set(found) == set(names[names.index(first) :])
        assert all(found[name] == 0.1 for name in names[names.index(first) + 1 :])
        compressed = copy.deepcopy(model)
        factors = asvd.prepare(compressed, Calibration(images(), input_statistics(compressed, images())))
        done = asvd_search.compress(compressed, asvd_search.Searchable(factors, damage), keep)
        assert done.parameters <= keep * count_parameters(model)
        assert done.details["ranks"][names[0]] is None
    with pytest.raises(InputError, match="keep must be at least"):
        asvd_search.search(model, damage, 0.05)


@pytest.mark.parametrize("bottleneck", [False, True])
def test_torch_pruning_removes_whole_dimensions_within_the_budget(calibration, bottleneck):
    model = small_model()
    dense = count_parameters(model)
    found = structured.compress(model, calibration, 0.6, bottleneck=bottleneck)
    assert found.parameters == count_parameters(model) <= 0.6 * dense
    assert found.parameters > 0.5 * dense
    assert (model.embed_dim == model.blocks[0].attn.qkv.in_features) == bottleneck
    assert model.blocks[0].attn.num_heads == 3
    with torch.inference_mode():
        assert model(images()[0]).shape == (3, 7)


def test_a_budget_below_what_cannot_be_compressed_is_refused(calibration):
    with pytest.raises(InputError, match="keep must be above"):
        layer_share(small_model(), 0.01)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_keeps_the_budget_and_gives_finite_logits(name, calibration):
    dense, model = small_model(), small_model()
    method = METHODS[name]
    known = calibration if method.reads_inputs else Calibration(calibration.images, {})
    found = method.compress(model, method.prepare(dense, known), 0.6)
    assert found.parameters <= 0.6 * count_parameters(dense)
    with torch.inference_mode():
        assert model(images()[0]).isfinite().all()
    for left, right in zip(dense.parameters(), small_model().parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mixrank, defaults", {}),
        ("mixrank, low ranks", {"form": "pivoted"}),
        ("mixrank, tokens alike", {"form": "pivoted", "weighting": "none", "shrink": 0.3}),
        ("mixrank, sparse", {"form": "sparse"}),
    ],
)
def test_ours_is_what_compress_makes(name, options):
    batches = list(torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(3)).split(8))
    expected, found, method = small_model(), small_model(), METHODS[name]
    plan = compress(expected, batches, keep=0.5, **options).plan
    prepared = method.prepare(found, Calibration(batches, {}))
    assert method.compress(found, prepared, 0.5).parameters == plan.parameters_after
    assert all(torch.equal(tensor, found.state_dict()[key]) for key, tensor in expected.state_dict().items())
