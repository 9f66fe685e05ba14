"""Exported models: loaded in a process without this library they give the same outputs, in every form of a layer."""

from __future__ import annotations

import copy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import timm
import torch

import mixrank
from mixrank import InputError
from mixrank.export import export_dense, export_onnx, export_torch
from mixrank.models import create_model
from mixrank.plain import merged, plain
from mixrank.uvc.shrink import KeptBlock, shrink_

ARGS = {"img_size": 32, "depth": 2, "embed_dim": 96, "num_heads": 3, "num_classes": 5}
WITHOUT = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("mixrank", "mixrank_kernels"):
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
import numpy, torch
"""


def dense():
    torch.manual_seed(0)
    return create_model("vit_tiny_patch16_224", args=ARGS)


def compressed(form: str = "pivoted", **options):
    model = dense()
    mixrank.compress(model, [torch.randn(6, 3, 32, 32)], keep=0.6, form=form, energy="weight", **options)
    return model


def sparse():
    """One layer of entries beside factors, one of entries alone."""
    model = dense()
    for block, rank in zip(model.blocks, (8, 0), strict=True):
        layer = block.mlp.fc1 = mixrank.SparseLinear(96, 384, 10_000, rank)
        torch.nn.init.normal_(layer.bias, std=0.1)
    return model


def quantised(model, dynamic: bool = True):
    mixrank.quantize_(model, dynamic=dynamic)
    return model


def pruned():
    model = dense()
    kept = [KeptBlock((tuple(range(32)), (), (0, 3)), tuple(range(0, 384, 2))), None]
    return shrink_(model, kept)


MODELS = {
    "dense": dense,
    "factors": lambda: compressed("factors"),
    "pivoted": compressed,
    "sparse": sparse,
    "split": lambda: compressed("factors", split_qkv=True),
    "int8 factors": lambda: quantised(compressed("factors")),
    "int8 pivoted": lambda: quantised(compressed()),
    "int8 sparse": lambda: quantised(sparse()),
    "int8 weights": lambda: quantised(compressed(), dynamic=False),
    "pruned": pruned,
}
WHOLE = ("split", "sparse", "int8 pivoted", "pruned")
"""Those that are exported here; the others are made of the same parts."""


def assert_no_folder_is_named(path: Path) -> None:
    """A file for others tells nothing of the machine that it was made on."""
    parts = [path.read_bytes()]
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            parts = [archive.read(name) for name in archive.namelist()]
    for library in (mixrank, timm, torch):
        assert not any(str(Path(library.__file__).parent).encode() in part for part in parts)


def run_without(code: str, *arguments) -> None:
    """In a process in which this library cannot be imported."""
    command = [sys.executable, "-c", WITHOUT + code, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def images():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", MODELS)
def test_a_plain_copy_is_the_same_function_of_nothing_but_pytorch(name, images):
    model = MODELS[name]().eval()
    with torch.no_grad():
        expected, found = model(images), plain(model)(images)
    assert (found - expected).abs().max() < (2e-2 if "int8" in name else 1e-4) * expected.abs().max()
    kinds = {type(module).__module__.partition(".")[0] for module in plain(model).modules()}
    own = {type(module).__name__ for module in plain(model).modules() if "mixrank" in type(module).__module__}
    assert kinds <= {"torch", "timm", "mixrank"}
    assert own <= {"_Pivoted", "_Int8", "_Sum", "SplitLinear", "PrunedAttention"}


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_a_torch_program_runs_without_the_library(name, images, tmp_path):
    model = MODELS[name]().eval()
    made = export_torch(model, tmp_path / "model.pt2")
    assert made.error < (2e-2 if "int8" in name else 1e-4) * made.scale
    with torch.no_grad():
        torch.save((images, model(images)), tmp_path / "expected.pt")
    code = (
        "images, expected = torch.load(sys.argv[2])\n"
        "found = torch.export.load(sys.argv[1]).module()(images)\n"
        "assert (found - expected).abs().max() <= float(sys.argv[3]) * expected.abs().max()\n"
    )
    run_without(code, tmp_path / "model.pt2", tmp_path / "expected.pt", 2e-2 if "int8" in name else 1e-4)
    assert made.bytes == (tmp_path / "model.pt2").stat().st_size
    assert_no_folder_is_named(tmp_path / "model.pt2")


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_an_onnx_file_runs_without_the_library(name, images, tmp_path):
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    model = MODELS[name]().eval()
    made = export_onnx(model, tmp_path / "model.onnx")
    assert made.error < (2e-2 if "int8" in name else 1e-4) * made.scale
    with torch.no_grad():
        torch.save((images, model(images)), tmp_path / "expected.pt")
    code = (
        "import onnx, onnxruntime\n"
        "images, expected = torch.load(sys.argv[2])\n"
        "domains = {one.domain for one in onnx.load(sys.argv[1]).graph.node}\n"
        "assert domains <= {'', 'ai.onnx'}, domains\n"
        "session = onnxruntime.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])\n"
        "found = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]\n"
        "assert numpy.abs(found - expected.numpy()).max() <= float(sys.argv[3]) * expected.abs().max()\n"
    )
    run_without(code, tmp_path / "model.onnx", tmp_path / "expected.pt", 2e-2 if "int8" in name else 1e-4)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".pt"] == ["model.onnx"]
    assert_no_folder_is_named(tmp_path / "model.onnx")


@pytest.mark.parametrize("name", [name for name in MODELS if name != "pruned"])
def test_the_dense_weights_are_those_of_timms_model(name, images, tmp_path):
    model = MODELS[name]().eval()
    made = export_dense(model, tmp_path / "model.safetensors")
    assert made.error < (5e-2 if "int8" in name else 1e-4) * made.scale
    found = timm.create_model("vit_tiny_patch16_224", checkpoint_path=str(tmp_path / "model.safetensors"), **ARGS)
    with torch.no_grad():
        assert torch.allclose(found.eval()(images), merged(model)(images), atol=1e-5)


@pytest.mark.slow
def test_kept_operators_and_a_fixed_batch(images, tmp_path):
    model = compressed().eval()
    export_torch(model, tmp_path / "model.pt2", batch=5, keep_operators=True)
    program = torch.export.load(tmp_path / "model.pt2")
    assert "mixrank_kernels.pivoted_linear" in str(program.graph)
    with torch.no_grad():
        assert torch.allclose(program.module()(images), model(images), atol=1e-5)
    with pytest.raises(Exception, match="5"):
        program.module()(images[:2])
    model = sparse().eval()
    made = export_torch(model, tmp_path / "sparse.pt2", keep_operators=True)
    assert str(torch.export.load(tmp_path / "sparse.pt2").graph).count("mixrank_kernels.sparse_linear") == 2
    assert made.error < 1e-4 * made.scale


def test_what_cannot_be_exported_is_a_sentence_and_no_file(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="the model was pruned: timm has no architecture of its shapes"):
        export_dense(pruned(), tmp_path / "model.safetensors")

    class Odd(torch.nn.Module):
        def forward(self, x):
            return torch.tensor(float(x.sum().item() > 0)) if x.sum() > 0 else x

    model = dense()
    model.blocks[0] = Odd()
    with pytest.raises(InputError, match=r"torch\.export cannot export the model"):
        export_torch(model, tmp_path / "model.pt2")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match="ONNX needs the package onnxscript: pip install onnx onnxscript"):
        export_onnx(dense(), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_gives_other_outputs_is_not_kept(tmp_path, monkeypatch):
    from mixrank import export

    def other(model):
        changed = copy.deepcopy(model)
        torch.nn.init.zeros_(changed.head.weight)
        return changed

    monkeypatch.setattr(export, "plain", other)
    with pytest.raises(InputError, match="the exported model gives other outputs: they differ by"):
        export_torch(dense(), tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []
