"""Families of timm, from a model to a compiled checkpoint: what is compressed, and that the rest is told by name."""

from __future__ import annotations

import copy

import pytest
import torch

import mixrank
from mixrank.counting import count_macs, count_parameters
from mixrank.coverage import left_alone
from mixrank.models import compressible_linears, create_model, preprocessing
from mixrank_bench.architectures import FAMILIES

CLASSES = {"num_classes": 7}
MANY_LAYERS = ("MaxViT", "MLP-Mixer")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_compressed_saved_loaded_and_compiled(name, tmp_path):
    torch.manual_seed(0)
    family = FAMILIES[name]
    dense = create_model(family.architecture, args={**family.args, **family.small, **CLASSES})
    channels, height, width = preprocessing(dense)["input_size"]
    images = torch.randn(8, channels, min(height, 96), min(width, 96))
    model = copy.deepcopy(dense)
    options = {"energy": "weight"} if name in MANY_LAYERS else {"sensitivity_images": 2}
    result = mixrank.compress(model, [images], keep=0.7 if family.whole_graph else 0.85, **options)
    factored = [layer for layer in result.layers if layer.rank is not None]
    assert factored
    assert count_parameters(model) < count_parameters(dense)
    assert count_macs(model) < count_macs(dense)
    told = {layer.name for layer in result.layers} | {module.name for module in result.left_alone}
    owners = {
        module
        for module, layer in dense.named_modules()
        if any(weight.squeeze().dim() > 1 for weight in layer.parameters(recurse=False))
    }
    assert owners <= told
    mixrank.save(model, tmp_path / "model.safetensors")
    loaded = mixrank.load(tmp_path / "model.safetensors")
    with torch.no_grad():
        expected = model(images)
        assert torch.equal(loaded(images), expected)
        compiled = torch.compile(loaded, backend="aot_eager", fullgraph=family.whole_graph)
        assert torch.allclose(compiled(images), expected, atol=1e-4)
    torch._dynamo.reset()


def test_what_stays_is_told_by_name_and_reason():
    model = create_model("convnext_atto", args={"depths": [1, 1, 1, 1], "conv_mlp": False, "num_classes": 7})
    found = {module.name: module for module in left_alone(model)}
    assert found["stem.0"].reason == "it is a Conv2d"
    assert found["stem.0"].parameters == model.stem[0].weight.numel()
    assert found["head.fc"].reason == "it is the classifier"
    assert not found.keys() & compressible_linears(model).keys()
    result = mixrank.compress(model, [torch.randn(6, 3, 64, 64)], keep=0.9, energy="weight")
    assert result.left_alone == list(found.values())
    assert any("% of the parameters stay as they are" in note and "it is a Conv2d" in note for note in result.notes)
    vit = create_model("vit_tiny_patch16_224", args={"img_size": 32, "depth": 2, "num_classes": 7})
    assert [module.name for module in left_alone(vit)] == ["", "patch_embed.proj", "head"]
    result = mixrank.compress(vit, [torch.randn(6, 3, 32, 32)], keep=0.9, energy="weight")
    assert not any("stay as they are" in note for note in result.notes)  # a few percent need no note
