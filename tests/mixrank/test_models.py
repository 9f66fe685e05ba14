from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from mixrank import models
from mixrank.errors import InputError
from mixrank.models import ModelSpec, twin
from mixrank.nn import MixedRankLinear, SplitLinear

SMALL = {"img_size": 32, "depth": 2, "num_classes": 7}
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", SMALL, ["head"]),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", SMALL, ["head", "head_dist"]),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 56, "depths": [1, 1], "num_heads": [3, 6], "num_classes": 7},
        ["head.fc"],
    ),
    "cait": ("cait_xxs24_224", {"img_size": 32, "depth": 1, "num_classes": 7}, ["head"]),
    "beit": ("beit_base_patch16_224", {"img_size": 32, "depth": 1, "num_classes": 7}, ["head"]),
    "eva": ("eva02_tiny_patch14_224", {"img_size": 28, "depth": 1, "num_classes": 7}, ["head"]),
    "clip": ("vit_base_patch16_clip_224", {"img_size": 32, "depth": 1, "num_classes": 7}, ["head"]),
    "no_head": ("vit_tiny_patch16_224", SMALL | {"num_classes": 0}, []),
}
every_family = pytest.mark.parametrize(("architecture", "args", "heads"), FAMILIES.values(), ids=FAMILIES)


def image(model: nn.Module) -> torch.Tensor:
    return torch.randn(2, *models.preprocessing(model)["input_size"])


def test_create_model_is_timms_in_eval_mode_and_knows_how_to_build_it_again():
    model = models.create_model("vit_tiny_patch16_224", args=SMALL | {"mlp_ratio": 2.0})
    assert not model.training
    assert model.num_classes == 7
    assert models.model_spec(model) == ModelSpec("vit_tiny_patch16_224", SMALL | {"mlp_ratio": 2.0})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"architecture": "vit_tny_patch16_224"}, "did you mean vit_tiny_patch16_224"),
        ({"architecture": "hf-hub:someone/model"}, "is not an architecture of timm"),
        ({"architecture": "qqqqqqqq"}, r"timm.list_models\(\) names those"),
        ({"architecture": "vit_tiny_patch16_224.nonsense"}, r"Invalid pretrained tag \(nonsense\)"),
        ({"args": {"colour": "red"}}, "unexpected keyword argument 'colour'"),
        ({"args": {"depth": "two"}}, r'cannot build vit_tiny_patch16_224 with the arguments {"depth": "two"}'),
        ({"args": {"checkpoint_path": "x.pth"}}, "'checkpoint_path' cannot be among the arguments"),
        ({"args": {"norm_layer": nn.LayerNorm}}, "must be in terms of JSON"),
        ({"args": {"drop_rate": float("nan")}}, "must be in terms of JSON"),
        ({"args": [1]}, r"must be a JSON object, but were \[1\]"),
        ({"pretrained": True, "weights": "w.safetensors"}, "from one place only"),
    ],
)
def test_create_model_refuses(call, message):
    with pytest.raises(InputError, match=message):
        models.create_model(**{"architecture": "vit_tiny_patch16_224"} | call)


def test_a_failed_download_asks_for_a_file(monkeypatch):
    build = timm.create_model

    def no_network(name, pretrained=False, **args):
        if pretrained:
            raise OSError("no route to host\nand a long trace")
        return build(name, **args)

    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(InputError, match=r"cannot be had \(no route to host\); give a file with weights \(--weights"):
        models.create_model("vit_tiny_patch16_224", pretrained=True, args=SMALL)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s}])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_from_a_file(tmp_path, suffix, wrap):
    state = timm.create_model("vit_tiny_patch16_224", **SMALL).state_dict()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(wrap(state), path)
    model = models.create_model("vit_tiny_patch16_224", weights=path, args=SMALL)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


class Stranger:
    """Unpickling this would run code."""


def _spoil(state: dict, how: str) -> dict:
    if how == "missing":
        del state["norm.weight"], state["head.bias"]
    elif how == "unexpected":
        state["extra"] = torch.zeros(2)
    elif how == "shape":
        state["head.weight"] = torch.zeros(3, 192)
    elif how == "codes":
        state["head.weight"] = torch.zeros(7, 192, dtype=torch.int8)
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"weights.safetensors does not fit vit_tiny_patch16_224: of 32 tensors, 2 missing \(first: norm.w"),
        ("unexpected", r"1 unexpected \(first: extra\)"),
        ("shape", r"1 of another shape \(first: head.weight, \[3, 192\] instead of \[7, 192\]\)"),
        ("codes", r"holds head.weight as torch.int8, not torch.float32"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, how, message):
    path = tmp_path / "weights.safetensors"
    save_file(_spoil(timm.create_model("vit_tiny_patch16_224", **SMALL).state_dict(), how), path)
    with pytest.raises(InputError, match=message):
        models.create_model("vit_tiny_patch16_224", weights=path, args=SMALL)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("absent.pth", lambda path: None, "does not exist: name a file"),
        ("folder.pth", lambda path: path.mkdir(), "is a folder: name a file"),
        ("weights.npz", lambda path: path.write_bytes(b"x"), "must end in .safetensors, .pth, .pt or .bin"),
        ("weights.safetensors", lambda path: path.write_bytes(b"not tensors"), "cannot be read as safetensors"),
        ("weights.pth", lambda path: path.write_bytes(b"not tensors"), "cannot be read as a torch file"),
        ("weights.bin", lambda path: torch.save(Stranger(), path), "a torch file that holds only tensors"),
        ("weights.pt", lambda path: torch.save({"epoch": 3}, path), "does not hold a state dict"),
        (
            "weights.safetensors",
            lambda path: save_file({"a": torch.zeros(1)}, path, metadata={"mixrank": "{}"}),
            "is a mixrank checkpoint: open it with mixrank.load",
        ),
    ],
)
def test_weights_that_cannot_be_read(tmp_path, name, write, message):
    write(tmp_path / name)
    with pytest.raises(InputError, match=message):
        models.create_model("vit_tiny_patch16_224", weights=tmp_path / name, args=SMALL)


@every_family
def test_the_spec_of_a_timm_model_builds_it_again(architecture, args, heads):
    model = timm.create_model(architecture, **args)
    spec = models.model_spec(model)
    assert json.loads(json.dumps(spec.args)) == spec.args
    again = models.create_model(spec.architecture, args=spec.args)
    again.load_state_dict(model.state_dict())
    x = image(model)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), again(x))
    assert models.preprocessing(again) == models.preprocessing(model)


def test_the_spec_is_read_off_the_model_where_timm_noted_nothing():
    args = {"img_size": 32, "num_classes": 7, "in_chans": 1}
    model = timm.create_model("vit_tiny_patch16_224", **args)
    del model._model_args
    assert models.model_spec(model).args == args


def test_the_spec_sees_through_factored_and_split_layers():
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    models.split_qkv_(model)
    model.blocks[0].attn.qkv.parts[1] = MixedRankLinear(192, 192, 8)
    model.blocks[1].mlp.fc1 = MixedRankLinear(192, 768, 8)
    assert models.model_spec(model).args == SMALL


def test_the_spec_notices_a_new_classifier():
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    model.reset_classifier(3)
    assert models.model_spec(model).args == SMALL | {"num_classes": 3}


def test_the_spec_of_a_changed_model_is_refused():
    model = timm.create_model("vit_tiny_patch16_224", **SMALL)
    model.blocks[1].mlp.fc1 = nn.Linear(192, 100)
    with pytest.raises(InputError, match=r"does not build this model again .*blocks.1.mlp.fc1.weight.*create it with"):
        models.model_spec(model)


def test_the_spec_of_a_stranger_is_refused():
    with pytest.raises(InputError, match="Sequential does not say which timm architecture it is"):
        models.model_spec(nn.Sequential(nn.Linear(2, 2)))


@every_family
def test_all_linears_but_the_heads_can_be_replaced_and_are_called(architecture, args, heads):
    model = timm.create_model(architecture, **args).eval()
    models.expose_qkv_(model)
    found = models.compressible_linears(model)
    plain = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    assert list(found) == [name for name in plain if name not in heads]
    assert models.skipped_linears(model) == dict.fromkeys(heads, "it is the classifier")
    called = set()
    for name, linear in found.items():
        linear.register_forward_hook(lambda *_, name=name: called.add(name))
    with torch.no_grad():
        model(image(model))
    assert called == set(found)


@pytest.mark.parametrize("family", ["beit", "eva"])
def test_qkv_whose_weight_is_read_directly_is_left_out_until_exposed(family):
    architecture, args, _ = FAMILIES[family]
    model = timm.create_model(architecture, **args).eval()
    nn.init.normal_(model.blocks[0].attn.q_bias)
    nn.init.normal_(model.blocks[0].attn.v_bias)
    x, names = image(model), list(model.state_dict())
    assert "reads the weight directly" in models.skipped_linears(model)["blocks.0.attn.qkv"]
    assert "blocks.0.attn.qkv" not in models.compressible_linears(model)
    assert models.split_qkv_(model) == ()
    with torch.no_grad():
        before = model(x)
        assert models.expose_qkv_(model) == ("blocks.0.attn.qkv",)
        assert models.expose_qkv_(model) == ()
        torch.testing.assert_close(model(x), before)
        assert models.split_qkv_(model) == ("blocks.0.attn.qkv",)
        torch.testing.assert_close(model(x), before)
    assert list(model.state_dict()) != names


def test_linears_that_are_more_than_a_linear_map_are_left_out():
    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)
            self.first, self.tied, self.free = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.tied.weight = self.first.weight

    reasons = models.skipped_linears(Tower())
    assert list(models.compressible_linears(Tower())) == ["free"]
    assert reasons["attention.out_proj"].startswith("it is a NonDynamicallyQuantizableLinear")
    assert reasons["first"] == reasons["tied"] == "it shares its weight with another layer"


def test_split_qkv_changes_nothing_but_the_structure():
    model = timm.create_model("vit_tiny_patch16_224", **SMALL).eval()
    x = image(model)
    with torch.no_grad():
        before = model(x)
        assert models.split_qkv_(model) == ("blocks.0.attn.qkv", "blocks.1.attn.qkv")
        torch.testing.assert_close(model(x), before)
    assert isinstance(model.blocks[1].attn.qkv, SplitLinear)
    assert [name for name in models.compressible_linears(model) if "qkv" in name][:3] == [
        f"blocks.0.attn.qkv.parts.{part}" for part in range(3)
    ]


def test_a_twin_has_modules_of_its_own_and_the_same_tensors():
    model = timm.create_model("vit_tiny_patch16_224", **SMALL).eval()
    made = twin(model)
    assert all(ours is theirs for ours, theirs in zip(made.parameters(), model.parameters(), strict=True))
    linear = model.blocks[0].mlp.fc1
    made.blocks[0].mlp.fc1 = nn.Identity()
    assert model.blocks[0].mlp.fc1 is linear
    made.train(True)
    assert not model.training


def test_preprocessing_is_that_of_the_model_as_built():
    config = models.preprocessing(timm.create_model("vit_tiny_patch16_224", **SMALL))
    assert config == {
        "input_size": [3, 32, 32],
        "interpolation": "bicubic",
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "crop_pct": 0.9,
        "crop_mode": "center",
    }
    grey = models.preprocessing(timm.create_model("deit_tiny_patch16_224", in_chans=1, depth=1))
    assert grey["input_size"] == [1, 224, 224]
    assert grey["mean"] == [pytest.approx((0.485 + 0.456 + 0.406) / 3)]
    with pytest.raises(InputError, match="Linear does not say how its images are prepared"):
        models.preprocessing(nn.Linear(2, 2))
