"""``mixrank compress``: fidelity with and without labels, and training in the same command."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from mixrank import checkpoint
from mixrank.views import Views


def ran(world, *arguments: str) -> str:
    result = world.invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_images_without_labels_give_fidelity_and_no_accuracy(world, tmp_path: Path) -> None:
    results = tmp_path / "m.json"
    more = ["--eval-images", str(world.flat), "--json", str(results)]
    text = ran(world, *world.compress(tmp_path / "m.safetensors", *more))
    data = json.loads(results.read_text())
    assert data["dense"]["top1"] is None
    assert data["fidelity"].keys() == {"divergence", "agreement", "images"}
    assert data["fidelity"]["images"] == data["images"]["evaluation"] == 12
    assert data["fidelity"]["divergence"] > 0
    assert "top-1 needs labels" in text
    assert f"{data['fidelity']['divergence']:.3g}" in text
    assert checkpoint.read_header(tmp_path / "m.safetensors").metadata["fidelity"] == data["fidelity"]


def test_labels_add_accuracy_to_fidelity(world, tmp_path: Path) -> None:
    results = tmp_path / "m.json"
    more = ["--eval-images", str(world.flat), "--labels", str(world.labels), "--json", str(results)]
    text = ran(world, *world.compress(tmp_path / "m.safetensors", *more, keep="1"))
    data = json.loads(results.read_text())
    assert data["compressed"]["top1"] == data["dense"]["top1"]
    assert data["fidelity"] == {"divergence": 0.0, "agreement": 100.0, "images": 12}
    assert "needs labels" not in text


def test_sensitivity_decides_the_ranks(world, tmp_path: Path) -> None:
    results = tmp_path / "m.json"
    more = ["--energy", "sensitivity", "--sensitivity-images", "5", "--json", str(results)]
    ran(world, *world.compress(tmp_path / "m.safetensors", *more))
    data = json.loads(results.read_text())
    assert "sensitivity" in data["times"]
    assert data["plan"]["options"]["energy"] == "sensitivity"
    assert data["compressed"]["parameters"] <= 0.5 * data["dense"]["parameters"]


def trained(world, out: Path, *more: str, images: Path | None = None) -> list[str]:
    return world.compress(out, "--steps", "8", "--learning-rate", "1e-3", *more, images=images)


@pytest.fixture(scope="module")
def twice(world) -> Path:
    """Every image twice: of one held-out image alone, packed and unpacked weights need not give the same bits."""
    folder = world.root / "twice"
    folder.mkdir()
    for path in world.flat.iterdir():
        for number in range(2):
            (folder / f"{number}{path.name}").symlink_to(path)
    return folder


def test_training_follows_in_the_same_command(world, tmp_path: Path) -> None:
    out, results, page = tmp_path / "m.safetensors", tmp_path / "m.json", tmp_path / "m.html"
    text = ran(world, *trained(world, out, "--json", str(results), "--report", str(page)))
    data = json.loads(results.read_text())
    assert 0 < data["compensation"]["steps"] <= 8
    assert data["compensation"]["after"]["divergence"] <= data["compensation"]["before"]["divergence"]
    assert data["compensation"]["options"]["learning_rate"] == 1e-3
    assert len(data["layers"]) == 8
    assert data["times"].keys() >= {"calibrate", "compensate"}
    header = checkpoint.read_header(out)
    assert header.metadata["compensation"]["best_step"] == data["compensation"]["best_step"]
    assert header.plan == checkpoint.read_header(world.checkpoint).plan
    assert "training" in text
    assert {path.name for path in tmp_path.iterdir()} == {"m.safetensors", "m.json", "m.html"}


def test_training_in_one_command_and_in_two_writes_the_same_weights(world, tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    ran(world, *trained(world, one))
    second = ["compensate", str(world.checkpoint), "--weights", str(world.weights), "--images", str(world.flat)]
    ran(world, *second, "--out", str(two), "--steps", "8", "--learning-rate", "1e-3", "--quiet")
    first, other = (checkpoint.load(path).state_dict() for path in (one, two))
    assert all(torch.equal(first[name], other[name]) for name in first)


def test_an_interrupted_training_goes_on_with_resume(world, twice: Path, tmp_path: Path, monkeypatch) -> None:
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    ran(world, *trained(world, whole, images=twice))
    batch, calls = Views.batch, []

    def interrupted(self, step: int) -> torch.Tensor:
        calls.append(step)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return batch(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Views, "batch", interrupted)
        assert world.invoke(*trained(world, broken, images=twice)).exit_code == 130
    kept = tmp_path / "broken.safetensors.compressed"
    assert not broken.exists()
    assert checkpoint.load(kept).mixrank_plan.layers
    assert "go on with --resume, or delete it" in world.refused(*trained(world, broken, images=twice))
    assert "another --images" in world.refused(*trained(world, broken, "--resume", images=world.tree))
    results = tmp_path / "m.json"
    # Calibrating again would fail: what was compressed is read, not made once more.
    monkeypatch.setattr(importlib.import_module("mixrank.compress"), "calibrate", None)
    ran(world, *trained(world, broken, "--resume", "--json", str(results), images=twice))
    assert broken.read_bytes() == whole.read_bytes()
    assert "calibrate" in json.loads(results.read_text())["times"]
    assert {path.name for path in tmp_path.iterdir()} == {"whole.safetensors", "broken.safetensors", "m.json"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", "1", "--minutes", "1"], "at most one of --steps and --minutes"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--minutes", "0"], "--minutes must be above 0"),
        (["--steps", "1", "--learning-rate", "0"], "learning_rate must be above 0"),
        (["--resume"], "--resume belongs to --steps or --minutes"),
        (["--steps", "1", "--limit", "1"], "need at least 2 images"),
        (["--sensitivity-images", "0"], "--sensitivity-images must be at least 1"),
    ],
)
def test_bad_arguments_are_refused_in_one_sentence(world, tmp_path: Path, more: list[str], message: str) -> None:
    assert message in world.refused(*world.compress(tmp_path / "m.safetensors", *more))
    assert not list(tmp_path.iterdir())
