from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from mixrank.counting import count_bytes, count_macs, count_parameters, tokens_per_layer
from mixrank.errors import InputError
from mixrank.nn import MixedRankLinear
from mixrank.nn_sparse import SparseLinear
from mixrank.quantize import quantize_

SMALL = {"img_size": 32, "depth": 2, "num_classes": 7}


def test_counts_take_shared_tensors_once_and_buffers_only_where_they_are_saved():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].weight = model[0].weight
    model.register_buffer("scratch", torch.zeros(100), persistent=False)
    assert count_parameters(model) == 16 + 4 + 4 + 8
    assert count_bytes(model) == 4 * (16 + 4 + 4 + 8 + 8) + 8


def vit_macs(width: int, depth: int, tokens: int, patch: int, classes: int) -> int:
    embedding = (tokens - 1) * 3 * patch**2 * width
    block = tokens * width * 12 * width + 2 * tokens**2 * width
    return embedding + depth * block + width * classes


def test_macs_are_those_of_the_formula():
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    assert count_macs(model) == vit_macs(768, 12, 197, 16, 1000) == 17_563_828_224


def test_macs_of_a_factored_layer():
    model = timm.create_model("vit_tiny_patch16_224", **SMALL).half()
    dense = vit_macs(192, 2, 5, 16, 7)
    assert count_macs(model) == dense
    model.blocks[0].mlp.fc1 = MixedRankLinear(192, 768, 24, dtype=torch.float16)
    model.blocks[0].mlp.train()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert count_macs(model) == dense - 5 * 192 * 768 + 5 * 24 * (192 + 768)
    assert model.blocks[0].mlp.training
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_places_of_sparse_layers_are_counted_once():
    layer = SparseLinear(20, 9, 50, 2)  # its mask: 27 bytes, 7 numbers of 32 bits
    own = 50 + 2 * (20 + 9) + 9
    model = nn.Sequential(layer, nn.Linear(9, 20), layer)
    assert count_parameters(model) == own + 7 + 9 * 20 + 20
    assert count_bytes(model) == 4 * (own + 9 * 20 + 20) + 27
    other = SparseLinear(20, 9, 50)
    other.mask = layer.mask
    assert count_parameters(nn.Sequential(layer, other)) == own + 50 + 9 + 7
    assert count_parameters(nn.Sequential(layer.half())) == own + 7
    quantised = nn.Sequential(SparseLinear(20, 9, 50, 2))
    quantize_(quantised)
    assert count_parameters(quantised) == own + 7
    assert count_bytes(quantised) == 50 + 27 + 2 * (20 + 9) + 4 * (9 + 9 + 2 + 9)


@pytest.mark.parametrize("rank", [0, 24])
def test_macs_of_a_sparse_layer(rank):
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    model.blocks[0].mlp.fc1 = SparseLinear(192, 768, 1234, rank)
    assert count_macs(model) == vit_macs(192, 2, 5, 16, 7) - 5 * 192 * 768 + 5 * (1234 + rank * (192 + 768))


def test_macs_of_a_model_that_cannot_run_are_refused():
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    model.blocks[0].mlp.fc1 = nn.Linear(100, 768)
    with pytest.raises(InputError, match="the operations of VisionTransformer cannot be counted"):
        count_macs(model)


def test_tokens_per_layer_counts_one_image():
    tokens = tokens_per_layer(timm.create_model("vit_tiny_patch16_224", **SMALL))
    assert tokens["blocks.0.attn.qkv"] == 5
    assert tokens["head"] == 1
