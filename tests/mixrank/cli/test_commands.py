"""What the commands write."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest

import mixrank
from mixrank import checkpoint, cli_compress, compress
from mixrank.apply import restructure_
from mixrank.counting import count_parameters
from mixrank.nn_sparse import mask_places
from mixrank.plan import LayerPlan
from mixrank.run_compress import STRATEGY

ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "num_heads": 2, "depth": 2, "num_classes": 2}
SUMMARY = {"top1", "parameters", "bytes", "macs", "images_per_second"}
IMAGES_PER_CLASS = 6


@pytest.mark.parametrize("name", [*STRATEGY, "shrink"])
def test_the_command_has_the_defaults_of_the_function(name: str) -> None:
    command, function = (inspect.signature(each).parameters[name].default for each in (cli_compress.compress, compress))
    assert str(command) == str(function)


def test_compress_writes_checkpoint_json_and_report(world, tmp_path: Path) -> None:
    out, result_file, page = tmp_path / "m.safetensors", tmp_path / "m.json", tmp_path / "m.html"
    more = ["--eval-images", str(world.flat), "--labels", str(world.labels), "--json", str(result_file)]
    result = world.invoke(*world.compress(out, *more, "--report", str(page)))
    assert result.exit_code == 0, result.output
    for word in ("dense", "compressed", "parameters", "MB", "GMACs", "top-1", "images/s"):
        assert word in result.stdout

    data = json.loads(result_file.read_text())
    assert data["dense"].keys() >= SUMMARY
    assert data["compressed"].keys() >= SUMMARY
    assert {"plan", "layers", "options", "versions", "times", "images"} <= data.keys()
    assert {"mixrank", "torch", "timm", "triton", "python", "cpu", "threads"} <= data["versions"].keys()
    assert {"load", "calibrate", "decompose", "allocate", "apply", "speed", "save"} <= data["times"].keys()
    assert data["compressed"]["parameters"] == data["plan"]["parameters_after"]
    assert data["compressed"]["parameters"] <= 0.5 * data["dense"]["parameters"]
    assert data["compressed"]["bytes"] < data["dense"]["bytes"]
    assert data["compressed"]["macs"] < data["dense"]["macs"]
    assert data["images"]["calibration"] == data["images"]["evaluation"] == 2 * IMAGES_PER_CLASS
    assert data["images"]["calibration_skipped"] == []
    assert 0 <= data["compressed"]["top1"] <= 100
    assert len(data["layers"]) == len(data["plan"]["layers"]) == 8
    assert "<svg" in page.read_text()

    model = checkpoint.load(out)
    assert sum(parameter.numel() for parameter in model.parameters()) == data["compressed"]["parameters"]
    assert {path.name for path in tmp_path.iterdir()} == {"m.safetensors", "m.json", "m.html"}


def test_equal_runs_write_equal_checkpoints(world, tmp_path: Path) -> None:
    out = tmp_path / "again.safetensors"
    assert world.invoke(*world.compress(out)).exit_code == 0
    assert out.read_bytes() == world.checkpoint.read_bytes()


@pytest.mark.parametrize(
    "more",
    [
        ["--factors", "svd", "--ranks", "uniform"],
        ["--energy", "output", "--no-centre", "--split-qkv", "--dtype", "bfloat16"],
        ["--limit", "5", "--seed", "3", "--batch-size", "2", "--step", "4", "--shrink", "0.3"],
        ["--weighting", "clip", "--weighting-level", "0.9", "--shrink", "auto", "--energy", "mixed", "--augment", "2"],
        ["--factors", "fisher", "--weighting", "gradient", "--draws", "2", "--held-out", "0.4", "--min-rank", "0.1"],
        ["--sequential", "--ridge", "0.5", "--shrink", "oas", "--max-rank", "30"],
        ["--form", "auto", "--gradient-power", "0.5"],
    ],
    ids=["svd-uniform", "output-split", "limit", "auto-augment", "fisher", "sequential", "auto-form"],
)
def test_compress_takes_every_strategy(world, tmp_path: Path, more: list[str]) -> None:
    out, result_file = tmp_path / "m.safetensors", tmp_path / "m.json"
    result = world.invoke(*world.compress(out, *more, "--json", str(result_file)))
    assert result.exit_code == 0, result.output
    data = json.loads(result_file.read_text())
    assert data["compressed"]["parameters"] <= 0.5 * data["dense"]["parameters"]
    assert data["images"]["calibration"] == (5 if "--limit" in more else 2 * IMAGES_PER_CLASS)
    assert data["dense"]["top1"] is None
    assert all(f"note: {note}" in result.stdout for note in data["notes"])


@pytest.mark.parametrize(("form", "figures"), [("pivoted", 4), ("sparse", 3)])  # energy by rank is of low ranks alone
def test_a_form_goes_through_every_command(world, tmp_path: Path, form: str, figures: int) -> None:
    out, results, page = (tmp_path / name for name in ("m.safetensors", "m.json", "m.html"))
    result = world.invoke(*world.compress(out, "--form", form, "--json", str(results), "--report", str(page)))
    assert result.exit_code == 0, result.output
    data = json.loads(results.read_text())
    assert data["compressed"]["parameters"] <= 0.5 * data["dense"]["parameters"]
    assert data["options"]["form"] == form
    assert page.read_text().count("<svg") == figures
    inspected = world.invoke("inspect", str(out))
    assert f" {form} " in inspected.stdout, inspected.output
    arguments = ["--images", str(world.flat), "--limit", "4", "--json", str(results), "--quiet"]
    result = world.invoke("evaluate", str(out), *arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(results.read_text())["compressed"]["bytes"] == data["compressed"]["bytes"]


def test_sparse_layers_go_through_the_commands_that_read_a_checkpoint(world, tmp_path: Path) -> None:
    model = mixrank.create_model(ARCHITECTURE, weights=world.weights, args=MODEL_ARGS)
    k, n, total = 64, 256, count_parameters(model)
    after = 4000 + mask_places(k, n) + n
    layer = LayerPlan("blocks.0.mlp.fc1", k, n, 0, True, k * n + n, after, "sparse", 4000)
    plan = mixrank.Plan((layer,), total, total - (layer.parameters_before - layer.parameters_after))
    file, results = tmp_path / "m.safetensors", tmp_path / "m.json"
    mixrank.save(restructure_(model, plan), file)
    inspected = world.invoke("inspect", str(file))
    assert "    0      4000   sparse " in inspected.stdout, inspected.output
    arguments = ["--images", str(world.flat), "--limit", "4", "--json", str(results), "--quiet"]
    result = world.invoke("evaluate", str(file), *arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(results.read_text())["compressed"]["parameters"] == plan.parameters_after
    quantised = tmp_path / "q.safetensors"
    result = world.invoke("quantize", str(file), "--out", str(quantised))
    assert result.exit_code == 0, result.output
    assert re.search(r"^blocks\.0\.mlp\.fc1 +as is ", result.stdout, re.MULTILINE), "its input stays as it is"
    result = world.invoke("evaluate", str(quantised), *arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(results.read_text())["compressed"]["parameters"] == plan.parameters_after
    for path in (file, quantised):
        dense = tmp_path / f"dense_{path.name}"
        result = world.invoke("export", str(path), "--format", "safetensors-dense", "--out", str(dense))
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize(("option", "key"), [("--max-bytes", "bytes"), ("--max-macs", "macs")])
def test_other_budgets_hold(world, tmp_path: Path, option: str, key: str) -> None:
    limit = int(0.6 * json.loads((world.root / "half.json").read_text())["dense"][key])
    result_file = tmp_path / "m.json"
    arguments = world.compress(tmp_path / "m.safetensors", option, str(limit), "--json", str(result_file), keep=None)
    result = world.invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert json.loads(result_file.read_text())["compressed"][key] <= limit


def test_evaluate_measures_a_checkpoint(world, tmp_path: Path) -> None:
    result_file = tmp_path / "e.json"
    result = world.invoke(
        "evaluate", str(world.checkpoint), "--images", str(world.tree), "--json", str(result_file), "--quiet"
    )
    assert result.exit_code == 0, result.output
    assert "top-1" in result.stdout
    data = json.loads(result_file.read_text())
    before = json.loads((world.root / "half.json").read_text())
    for key in ("parameters", "bytes", "macs"):
        assert data["dense"][key] == before["dense"][key]
        assert data["compressed"][key] == before["compressed"][key]
    assert data["dense"]["top1"] is None
    assert data["dense"]["images_per_second"] > 0
    assert 0 <= data["compressed"]["top1"] <= 100
    assert data["plan"] == before["plan"]


def test_evaluate_without_labels_measures_speed_only(world, tmp_path: Path) -> None:
    result_file = tmp_path / "e.json"
    arguments = ["--images", str(world.flat), "--limit", "4", "--json", str(result_file), "--quiet"]
    result = world.invoke("evaluate", str(world.checkpoint), *arguments)
    assert result.exit_code == 0, result.output
    assert "top-1 needs labels" in result.stdout
    data = json.loads(result_file.read_text())
    assert data["compressed"]["top1"] is None
    assert data["images"]["evaluation"] == 4


def test_inspect_shows_the_plan(world) -> None:
    result = world.invoke("inspect", str(world.checkpoint))
    assert result.exit_code == 0, result.output
    assert ARCHITECTURE in result.stdout
    assert "blocks.1.mlp.fc2" in result.stdout
    header = json.loads(world.invoke("inspect", str(world.checkpoint), "--json").stdout)
    assert header["architecture"] == ARCHITECTURE
    assert header["args"] == MODEL_ARGS
    assert header["plan"] == json.loads((world.root / "half.json").read_text())["plan"]
    assert header["file_bytes"] == world.checkpoint.stat().st_size


def test_report_is_drawn_from_the_json(world, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = world.invoke("report", str(world.root / "half.json"), "--out", str(page))
    assert result.exit_code == 0, result.output
    assert page.read_text().count("<svg") == 4
