"""The demo on its real model and images: what it prints is what it measured, and what it writes can be used."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from mixrank import checkpoint
from mixrank.cli import app
from mixrank.data import open_images
from mixrank.demo import ASSETS, IMAGES, PREPROCESSING, WEIGHTS
from mixrank.demo.exported import KEEP, command, export
from mixrank.demo.run import COLUMNS, KEEPS, batches, load_images, load_model
from mixrank.errors import InputError
from mixrank.evaluate import evaluate
from mixrank.models import preprocessing

LARGEST_ASSETS = 8_000_000
LARGEST_LOSS = {0.6: 1.0, 0.45: 1.0, 0.3: 2.0}  # points of top-1


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    """The folder, what was printed, and ``demo.json`` of one run of the command."""
    out = tmp_path_factory.mktemp("demo") / "made" / "here"
    result = CliRunner().invoke(app, ["demo", "--out", str(out), "--export-images", "--quiet"])
    assert result.exit_code == 0, result.output
    return out, result.stdout, json.loads((out / "demo.json").read_text())


def test_prints_one_table(demo: tuple[Path, str, dict[str, Any]]) -> None:
    out, printed, data = demo
    for column in COLUMNS:
        assert column in printed
    for label in ("dense", *(f"keep {keep:g}" for keep in KEEPS)):
        assert label in printed
    for summary in (data["dense"], *(entry["compressed"] for entry in data["results"])):
        assert f"{summary['parameters']:,}" in printed
        assert f"{summary['top1']:.2f} %" in printed
    assert all(len(line) <= 80 for line in printed.splitlines() if "│" in line)
    assert f"to compress the same by yourself:\n{command(out)}\n" in printed


def test_budgets_hold_and_everything_shrinks(demo: tuple[Path, str, dict[str, Any]]) -> None:
    _, _, data = demo
    assert [entry["keep"] for entry in data["results"]] == list(KEEPS)
    larger = data["dense"]
    for entry in data["results"]:
        summary = entry["compressed"]
        assert summary["parameters"] == entry["plan"]["parameters_after"]
        assert summary["parameters"] <= entry["keep"] * data["dense"]["parameters"]
        assert summary["parameters"] > (entry["keep"] - 0.01) * data["dense"]["parameters"]
        for key in ("parameters", "bytes", "macs"):
            assert summary[key] < larger[key]
        assert summary["images_per_second"] > 0
        larger = summary


def test_accuracy_is_kept(demo: tuple[Path, str, dict[str, Any]]) -> None:
    _, _, data = demo
    dense = data["dense"]["top1"]
    assert dense > 84
    lost = {entry["keep"]: dense - entry["compressed"]["top1"] for entry in data["results"]}
    for keep, points in LARGEST_LOSS.items():
        assert lost[keep] <= points, lost


def test_checkpoints_are_the_measured_models(demo: tuple[Path, str, dict[str, Any]]) -> None:
    out, _, data = demo
    for entry in data["results"]:
        model = checkpoint.load(out / entry["checkpoint"])
        assert sum(parameter.numel() for parameter in model.parameters()) == entry["compressed"]["parameters"]
        assert preprocessing(model) == PREPROCESSING


def test_writes_a_report_of_every_budget(demo: tuple[Path, str, dict[str, Any]]) -> None:
    out, _, _ = demo
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 1 + 4 * len(KEEPS)
    assert "Accuracy against size" in page


def test_exported_images_are_the_embedded_ones(demo: tuple[Path, str, dict[str, Any]]) -> None:
    """The files, read as the checkpoint says, become the demo's own tensors: one preprocessing for both ways."""
    out, _, data = demo
    images = load_images()
    own = batches(images["test_images"][:64], images["test_labels"][:64], size=64)[0]
    config = checkpoint.read_header(out / data["results"][0]["checkpoint"]).preprocessing
    source = open_images(out / "test", config, labels=out / "test_labels.csv")
    assert len(source) == len(images["test_images"])
    read = next(iter(source.batches(64, workers=0)))
    torch.testing.assert_close(read.images, own.images)
    assert torch.equal(read.labels, own.labels)
    assert len(list((out / "calibration").iterdir())) == len(images["calibration_images"])


def test_the_command_that_is_printed_compresses_what_was_exported(tmp_path: Path) -> None:
    images = {name: part[:100] for name, part in load_images().items()}
    dense = load_model()
    export(tmp_path, dense, images)
    words = shlex.split(command(tmp_path))
    result = CliRunner().invoke(app, [*words[1:], "--energy", "weight", "--json", str(tmp_path / "it.json"), "--quiet"])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "it.json").read_text())
    assert found["dense"]["top1"] == evaluate(dense, batches(images["test_images"], images["test_labels"])).top1
    assert found["compressed"]["parameters"] <= KEEP * found["dense"]["parameters"]
    assert checkpoint.read_header(tmp_path / "compressed.safetensors").preprocessing == PREPROCESSING


def test_assets_are_small_and_documented() -> None:
    files = list(ASSETS.iterdir())
    assert {path.name for path in files} >= {WEIGHTS, IMAGES, "LICENSE.fashion-mnist"}
    assert sum(path.stat().st_size for path in files) < LARGEST_ASSETS
    images = load_images()
    assert images["calibration_images"].shape == (1000, 28, 28)
    assert images["test_images"].shape == (2000, 28, 28)
    assert images["test_labels"].shape == (2000,)


def test_missing_assets_say_what_makes_them(tmp_path: Path) -> None:
    for load in (load_model, load_images):
        with pytest.raises(InputError, match=r"missing.*python -m mixrank\.demo\.train"):
            load(tmp_path)
    (tmp_path / IMAGES).write_bytes(b"no archive")
    with pytest.raises(InputError, match="damaged"):
        load_images(tmp_path)


def test_out_must_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "file" / "below")])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: --out")
