"""``mixrank quantize``: what it writes, what reads it, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mixrank import checkpoint
from mixrank.models import create_model
from mixrank.quantize import quantize_, quantized_layers


@pytest.mark.parametrize("more", [[], ["--weight-only"], ["--skip", "head", "--skip", "*.attn.*"]], ids=" ".join)
def test_quantize_writes_a_checkpoint_that_the_other_commands_read(world, tmp_path: Path, more: list[str]) -> None:
    out, result_file = tmp_path / "q.safetensors", tmp_path / "q.json"
    result = world.invoke("quantize", str(world.checkpoint), "--out", str(out), "--json", str(result_file), *more)
    assert result.exit_code == 0, result.output
    assert "blocks.0.mlp.fc1" in result.stdout
    data = json.loads(result_file.read_text())
    assert {"layers", "skipped", "bytes_before", "bytes_after", "options", "times", "versions"} <= data.keys()
    kinds = quantized_layers(checkpoint.load(out))
    assert kinds == {layer["name"]: layer["dynamic"] for layer in data["layers"]}
    assert set(kinds.values()) == {"--weight-only" not in more}
    assert ("head" in kinds) is ("--skip" not in more)
    assert data["bytes_after"] < data["bytes_before"]
    assert checkpoint.read_header(out).metadata["quantization"]["bytes_after"] == data["bytes_after"]

    shown = world.invoke("inspect", str(out))
    assert f"{len(kinds)} layers of 8-bit weights" in shown.stdout
    assert json.loads(world.invoke("inspect", str(out), "--json").stdout)["quantization"] == kinds

    evaluated = tmp_path / "e.json"
    result = world.invoke("evaluate", str(out), "--images", str(world.tree), "--json", str(evaluated), "--quiet")
    assert result.exit_code == 0, result.output
    compressed = json.loads(evaluated.read_text())["compressed"]
    assert compressed["bytes"] == data["bytes_after"]
    assert compressed["parameters"] == json.loads((world.root / "half.json").read_text())["compressed"]["parameters"]


def test_equal_runs_write_equal_checkpoints(world, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert world.invoke("quantize", str(world.checkpoint), "--out", str(tmp_path / name)).exit_code == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_bad_input_is_refused_and_nothing_is_written(world, tmp_path: Path) -> None:
    out = str(tmp_path / "q.safetensors")
    assert "does not exist" in world.refused("quantize", str(tmp_path / "absent"), "--out", out)
    assert "was not written by mixrank" in world.refused("quantize", str(world.weights), "--out", out)
    assert "overwrite an input" in world.refused("quantize", str(world.checkpoint), "--out", str(world.checkpoint))
    message = world.refused("quantize", str(world.checkpoint), "--out", out, "--skip", "blocks.9.*")
    assert "skip names 'blocks.9.*'" in message
    same = world.refused("quantize", str(world.checkpoint), "--out", out, "--json", out)
    assert "name the same file" in same
    assert not list(tmp_path.iterdir())


def test_a_quantised_checkpoint_is_not_quantised_again(world, tmp_path: Path) -> None:
    first = tmp_path / "q.safetensors"
    assert world.invoke("quantize", str(world.checkpoint), "--out", str(first)).exit_code == 0
    message = world.refused("quantize", str(first), "--out", str(tmp_path / "again.safetensors"))
    assert "there is no layer to quantise" in message


def test_a_dense_model_of_8_bit_weights_is_measured_and_drawn(world, tmp_path: Path) -> None:
    header = checkpoint.read_header(world.checkpoint)
    model = create_model(header.architecture, weights=world.weights, args=header.args)
    quantize_(model)
    checkpoint.save(model, tmp_path / "dense8.safetensors")
    result, page = tmp_path / "dense8.json", tmp_path / "dense8.html"
    measured = ["evaluate", str(tmp_path / "dense8.safetensors"), "--images", str(world.flat), "--json", str(result)]
    assert world.invoke(*measured, "--quiet").exit_code == 0
    assert world.invoke("report", str(result), "--out", str(page)).exit_code == 0
    assert "100 % kept" in page.read_text()
