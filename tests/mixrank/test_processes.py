"""Processes that share a compression: the plan of one process to the bit, its factors to rounding, and what is refused.

Every process is started by torchrun, as users start them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mixrank import checkpoint
from mixrank.data import open_images
from mixrank.errors import InputError
from mixrank.models import create_model
from mixrank.processes import divided
from mixrank.sample import Sample

ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "num_heads": 2, "depth": 3, "num_classes": 5}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty images, one of which does not decode, and the weights of a small model."""
    root, source = tmp_path_factory.mktemp("shared"), np.random.default_rng(0)
    (root / "images").mkdir()
    for number in range(40):
        Image.fromarray(source.integers(0, 256, (36, 32, 3), dtype=np.uint8)).save(root / "images" / f"{number}.png")
    (root / "images" / "17.png").write_bytes(b"nonsense")
    torch.manual_seed(0)
    model = create_model(ARCHITECTURE, args=MODEL_ARGS)
    for block in model.blocks:  # spectra that fall, as those of trained models do
        for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            layer.weight.data *= torch.logspace(0, -2, layer.in_features)
    save_file(model.state_dict(), root / "weights.safetensors")
    return root


def command(folder: Path, out: Path, *more: str) -> list[str]:
    fixed = ["compress", "--model", ARCHITECTURE, "--model-args", json.dumps(MODEL_ARGS), "--device", "cpu"]
    fixed += ["--weights", str(folder / "weights.safetensors"), "--images", str(folder / "images"), "--keep", "0.6"]
    fixed += ["--eval-images", str(folder / "images")]
    return [*fixed, "--out", str(out), "--batch-size", "4", "--quiet", *more]


def start(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    started = [*TORCHRUN, str(processes), "-m", "mixrank"] if processes > 1 else [sys.executable, "-m", "mixrank"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*started, *arguments], capture_output=True, text=True, timeout=240, check=False, env=environment
    )


@pytest.mark.slow
@pytest.mark.parametrize("form", ["pivoted", "sparse"])
def test_processes_make_the_plan_of_one_and_its_factors(folder, form):
    alone = folder / f"{form}_alone.safetensors"
    result = start(1, *command(folder, alone, "--form", form, "--json", str(folder / "alone.json")))
    assert result.returncode == 0, result.stderr
    out, told = folder / f"{form}_shared.safetensors", folder / "shared.json"
    result = start(2, *command(folder, out, "--form", form, "--json", str(told)))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("checkpoint") == 1
    assert checkpoint.read_header(out).plan == checkpoint.read_header(alone).plan
    first, second = load_file(alone), load_file(out)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.allclose(value.double(), second[name].double(), rtol=1e-4, atol=1e-5), name
    expected, found = (json.loads(path.read_text()) for path in (folder / "alone.json", told))
    assert found["images"] == expected["images"]
    assert found["images"]["calibration"] == 39
    assert len(found["images"]["calibration_skipped"]) == 1
    assert found["plan"] == expected["plan"]
    assert found["fidelity"] == pytest.approx(expected["fidelity"], rel=1e-3)


@pytest.mark.slow
def test_too_few_batches_and_what_one_process_does_are_refused(folder, tmp_path):
    for more, message in (
        (["--batch-size", "40"], "batch_size=40 makes fewer batches of 40 images than the 2 processes that share them"),
        (["--sequential", "--factors", "aware"], "sequential=True works in one process"),
    ):
        result = start(2, *command(folder, tmp_path / "out.safetensors", *more))
        assert result.returncode != 0
        assert message in result.stderr
        told = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert all(message in line or "another process ended before its time" in line for line in told)
        assert "mixrank/cli.py" not in result.stderr  # the only traceback is torchrun's own
    assert list(tmp_path.iterdir()) == []


def test_other_commands_do_not_work_in_several_processes(folder, monkeypatch):
    from typer.testing import CliRunner

    from mixrank.cli import app

    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(app, ["inspect", "file.safetensors"])
    assert result.exit_code == 2
    assert "mixrank inspect works in one process: torchrun is for compress and uvc" in result.stderr
    result = CliRunner().invoke(app, command(folder, folder / "out.safetensors", "--steps", "3"))
    assert result.exit_code == 2
    assert "--steps and --minutes train in one process" in result.stderr


def test_the_parts_of_the_processes_are_all_images_once(folder):
    config = {
        "input_size": [3, 32, 32],
        "interpolation": "bicubic",
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    source = open_images(folder / "images", config, augment=1)
    whole = [number for batch in source.batches(6) for number in batch.numbers]
    parts = [[number for batch in source.batches(6, part=(i, 3)) for number in batch.numbers] for i in range(3)]
    assert sorted(number for part in parts for number in part) == whole
    assert whole == [number for number in range(80) if number // 2 != source.names.index("17.png")]
    assert sum(len(source.batches(6, part=(i, 3))) for i in range(3)) == len(source.batches(6))
    with pytest.raises(InputError, match=r"part must be \(i, n\) with 0 <= i < n, but it was \(3, 3\)"):
        source.batches(6, part=(3, 3))


@pytest.mark.parametrize("held_out", [0.0, 0.25])
def test_a_sample_goes_by_the_numbers_of_the_images_not_by_who_saw_them(held_out):
    from mixrank.data import Batch

    def batch(numbers: list[int]) -> Batch:
        return Batch(
            torch.tensor(numbers, dtype=torch.float32)[:, None, None, None], None, [""] * len(numbers), numbers
        )

    whole = Sample([batch(list(range(start, start + 5))) for start in range(0, 100, 5)], 8, 3, held_out)
    list(whole)
    again = Sample([batch(list(range(start, min(start + 7, 100)))) for start in range(0, 100, 7)], 8, 3, held_out)
    list(again)
    assert torch.equal(whole.images, again.images)
    seen = whole.images.flatten().tolist()
    assert len(set(seen)) == 8
    assert max(seen) > 50
    if held_out:
        assert all(int(number) % 4 == 3 for number in seen)


def test_work_is_divided_and_comes_back_in_order():
    done = divided({"a": 1, "b": 5, "c": 2}, lambda names: {name: name.upper() for name in names})
    assert list(done.items()) == [("a", "A"), ("b", "B"), ("c", "C")]


@pytest.mark.slow
def test_a_process_that_dies_ends_the_job(folder, tmp_path):
    """Killed while the others wait for its sums, as by the kernel when memory runs out."""
    dying = (
        "import importlib, os, signal\n"
        "from mixrank import cli, processes\n"
        "calibrate = importlib.import_module('mixrank.calibrate')\n"
        "finish = calibrate._over_processes\n"
        "def die(parts):\n"
        "    if processes.place()[0] == 1:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    finish(parts)\n"
        "calibrate._over_processes = die\n"
        "cli.main()\n"
    )
    (tmp_path / "dying.py").write_text(dying)
    out = tmp_path / "out.safetensors"
    arguments = [*TORCHRUN, "2", str(tmp_path / "dying.py"), *command(folder, out)]
    started = time.monotonic()
    result = subprocess.run(
        arguments, capture_output=True, text=True, timeout=120, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert result.returncode != 0
    assert time.monotonic() - started < 100
    assert "SIGKILL" in result.stderr or "Signal 9" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dying.py"]
