"""``mixrank uvc``: what it writes, what it refuses, that an interrupted run goes on, and that torchrun shares it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mixrank import checkpoint, load
from mixrank.counting import count_macs
from mixrank.models import create_model
from mixrank.uvc.loader import LoaderData

ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "num_heads": 4, "depth": 3, "num_classes": 2}


@pytest.fixture(scope="module")
def weights(world):
    """Of a model that is large enough to be divided."""
    torch.manual_seed(0)
    model = create_model(ARCHITECTURE, args=MODEL_ARGS)
    save_file(model.state_dict(), world.root / "larger.safetensors")
    return world.root / "larger.safetensors"


def arguments(world, weights: Path, out: Path, *more: str) -> list[str]:
    fixed = ["uvc", "--model", ARCHITECTURE, "--model-args", json.dumps(MODEL_ARGS), "--weights", str(weights)]
    fixed += ["--images", str(world.tree), "--out", str(out), "--quiet", "--workers", "0", "--batch-size", "4"]
    return [*fixed, "--epochs", "4", *more]


def test_it_writes_a_model_within_the_budget_and_says_what_went(world, weights, tmp_path: Path) -> None:
    out, data_file, events = tmp_path / "small.safetensors", tmp_path / "result.json", tmp_path / "events"
    more = ["--eval-images", str(world.flat), "--eval-labels", str(world.labels), "--json", str(data_file)]
    result = world.invoke(*arguments(world, weights, out, *more, "--tensorboard", str(events), "--budget", "0.6"))
    assert result.exit_code == 0, result.output
    assert "of the multiply-adds remain; of those that went: blocks" in result.stdout
    data = json.loads(data_file.read_text())
    found = data["result"]
    assert 0.98 * 0.6 <= found["macs_after"] / found["macs_before"] <= 0.6
    assert data["compressed"]["macs"] == found["macs_after"] == count_macs(load(out))
    assert data["compressed"]["top1"] == found["after"] is not None
    noted = checkpoint.read_header(out).metadata["uvc"]
    assert noted["macs_after"] == found["macs_after"]
    assert not {"seconds", "history"} & noted.keys()
    assert {path.name for path in tmp_path.iterdir()} == {"small.safetensors", "result.json", "events"}

    page = tmp_path / "page.html"
    assert world.invoke("report", str(data_file), "--out", str(page)).exit_code == 0
    text = page.read_text()
    assert text.count("<svg") == 1
    assert f"All {len(found['blocks'])} blocks that remain" in text

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told = EventAccumulator(str(events))
    told.Reload()
    tags = set(told.Tags()["scalars"])
    assert {"loss", "remaining", "pressure", "top1", "keep/block_2", "shares/neurons/block_0"} <= tags
    assert [event.value for event in told.Scalars("top1")] == pytest.approx(
        [entry["top1"] for entry in found["history"] if "top1" in entry]
    )


def test_then_mixed_rank_keeps_the_budget_and_tells_what_the_ranks_took(world, weights, tmp_path: Path) -> None:
    out, data_file = tmp_path / "small.safetensors", tmp_path / "result.json"
    more = ["--then-mixed-rank", "--budget", "0.5", "--json", str(data_file)]
    result = world.invoke(*arguments(world, weights, out, *more))
    assert result.exit_code == 0, result.output
    found = json.loads(data_file.read_text())["result"]
    assert found["macs_by_ranks"] == found["removed"]["ranks"] > 0
    assert found["tried"][f"{found['power']:g}"] == min(found["tried"].values())
    assert f"down to the budget's power {found['power']:g}, ranks lowered for the rest" in " ".join(
        result.output.split()
    )
    assert 0.9 * 0.5 <= found["macs_after"] / found["macs_before"] <= 0.5
    assert count_macs(load(out)) == found["macs_after"]
    page = tmp_path / "page.html"
    assert world.invoke("report", str(data_file), "--out", str(page)).exit_code == 0
    assert page.read_text().count("<svg") == 3  # the search, the ranks, the parameters


def test_an_interrupted_run_goes_on_with_resume_and_writes_the_same_bytes(world, weights, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    assert world.invoke(*arguments(world, weights, whole)).exit_code == 0
    epoch = LoaderData.epoch

    def interrupted(self, number: int):
        if number == 3:
            raise KeyboardInterrupt
        return epoch(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(LoaderData, "epoch", interrupted)
        assert world.invoke(*arguments(world, weights, broken)).exit_code == 130
    assert not broken.exists()
    state = tmp_path / "broken.safetensors.state"
    assert state.exists()
    assert "--resume" in world.refused(*arguments(world, weights, broken))
    assert "another run" in world.refused(*arguments(world, weights, broken, "--budget", "0.6", "--resume"))
    assert world.invoke(*arguments(world, weights, broken, "--resume")).exit_code == 0
    assert broken.read_bytes() == whole.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {whole.name, broken.name}


def test_a_recipe_says_what_the_options_do_not(world, weights, tmp_path: Path) -> None:
    recipe, out, data_file = tmp_path / "my.toml", tmp_path / "small.safetensors", tmp_path / "result.json"
    recipe.write_text("budget = 0.7\nlearning_rate = 1e-3\nmixup = 0.2\n[views]\nscale = [0.8, 1.0]\n")
    more = ["--recipe", str(recipe), "--budget", "0.6", "--json", str(data_file)]
    assert world.invoke(*arguments(world, weights, out, *more)).exit_code == 0
    told = json.loads(data_file.read_text())["recipe"]
    assert (told["options"]["budget"], told["options"]["mixup"], told["batch_size"]) == (0.6, 0.2, 4)
    assert told["views"] == {"scale": [0.8, 1.0]}


@pytest.mark.slow
def test_torchrun_shares_the_steps(world, weights, tmp_path: Path) -> None:
    out, data_file = tmp_path / "small.safetensors", tmp_path / "result.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mixrank"]
    command += arguments(world, weights, out, "--json", str(data_file), "--device", "cpu")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("of the multiply-adds remain") == 1
    # 12 images in batches of 4 for each of two processes: one step in each epoch.
    assert json.loads(data_file.read_text())["result"]["steps"] == 4
    assert {path.name for path in tmp_path.iterdir()} == {out.name, data_file.name}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--budget", "1.5"], "--budget must be above 0 and at most 1, got 1.5"),
        (["--budget", "0.001"], "budget must be above 0."),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--batch-size", "13"], "batch_size must be from 1 to 12 with 12 images and 1 processes, but it was 13"),
        (["--epochs", "0"], "epochs must be above 0, but it was 0.0"),
        (["--device", "gpu"], "--device must be auto, cpu or cuda, got gpu"),
        (["--recipe", "nothing"], "there is no recipe nothing: give a file, or one of deit_small_imagenet"),
        (["--labels", "nothing.csv"], "nothing.csv does not exist or is not a file"),
        (["--eval-labels", __file__], "--eval-labels belongs to --eval-images, which is missing"),
        (["--workers", "-1"], "workers must be at least 0, but it was -1"),
    ],
)
def test_bad_input_is_one_sentence_and_no_file(world, weights, tmp_path: Path, more: list[str], message: str) -> None:
    assert message in world.refused(*arguments(world, weights, tmp_path / "out.safetensors", *more))
    assert list(tmp_path.iterdir()) == []


def test_images_without_labels_and_folders_of_other_classes_are_refused(world, weights, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    assert "has no labels: give one folder for each class" in world.refused(
        *arguments(world, weights, out, "--images", str(world.flat))
    )
    third = tmp_path / "tree"
    shutil.copytree(world.tree, third)
    shutil.copytree(world.tree / "cat", third / "bird")
    assert "the images lie in 3 class folders, but the model has 2 classes" in world.refused(
        *arguments(world, weights, out, "--images", str(third))
    )
