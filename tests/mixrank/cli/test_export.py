"""``mixrank export``: what it writes and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch

from mixrank import load


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [("torch-export", "model.pt2"), ("onnx", "model.onnx")])
def test_it_writes_a_model_that_was_compared(world, tmp_path: Path, kind: str, name: str) -> None:
    out, told = tmp_path / name, tmp_path / "result.json"
    result = world.invoke("export", str(world.checkpoint), "--format", kind, "--out", str(out), "--json", str(told))
    assert result.exit_code == 0, result.output
    assert "logits differ by" in result.stdout
    found = json.loads(told.read_text())["result"]
    assert found["bytes"] == out.stat().st_size
    assert found["error"] < 1e-4 * found["scale"]
    assert {path.name for path in tmp_path.iterdir()} == {name, "result.json"}


def test_the_dense_weights_load_into_timm(world, tmp_path: Path) -> None:
    out = tmp_path / "dense.safetensors"
    result = world.invoke("export", str(world.checkpoint), "--format", "safetensors-dense", "--out", str(out))
    assert result.exit_code == 0, result.output
    model = load(world.checkpoint)
    plain = timm.create_model(model.mixrank_spec.architecture, checkpoint_path=str(out), **model.mixrank_spec.args)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(plain.eval()(x), model(x), atol=1e-4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--format", "onnx", "--keep-operators"], "--keep-operators belongs to --format torch-export, got onnx"),
        (["--format", "safetensors-dense", "--batch", "2"], "--batch belongs to --format torch-export or onnx"),
        (["--format", "onnx", "--batch", "0"], "--batch must be at least 1, got 0"),
    ],
)
def test_bad_input_is_one_sentence_and_no_file(world, tmp_path: Path, more: list[str], message: str) -> None:
    assert message in world.refused("export", str(world.checkpoint), "--out", str(tmp_path / "out"), *more)
    assert list(tmp_path.iterdir()) == []
