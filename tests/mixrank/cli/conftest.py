"""What the commands read, and how they are run."""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from mixrank.cli import app
from mixrank.models import create_model

ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "num_heads": 2, "depth": 2, "num_classes": 2}
IMAGES_PER_CLASS = 6


@dataclasses.dataclass(frozen=True)
class World:
    """Everything the commands read: weights, images without and with classes, labels, a checkpoint."""

    root: Path
    weights: Path
    flat: Path
    tree: Path
    labels: Path
    checkpoint: Path

    def compress(self, out: Path, *more: str, images: Path | None = None, keep: str | None = "0.5") -> list[str]:
        arguments = ["compress", "--model", ARCHITECTURE, "--weights", str(self.weights), "--quiet"]
        arguments += ["--model-args", json.dumps(MODEL_ARGS), "--images", str(images or self.flat), "--out", str(out)]
        return [*arguments, *([] if keep is None else ["--keep", keep]), *more]

    def invoke(self, *arguments: str):
        """Run a command in this process."""
        return CliRunner().invoke(app, list(arguments))

    def refused(self, *arguments: str) -> str:
        """Run a command that refuses its input, and return its one sentence."""
        result = self.invoke(*arguments)
        assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
        assert "Traceback" not in result.stderr
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        return result.stderr

    def run_process(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command in a process of its own."""
        command = [sys.executable, "-m", "mixrank", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> World:
    root = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    model = create_model(ARCHITECTURE, args=MODEL_ARGS)
    save_file(model.state_dict(), root / "weights.safetensors")
    generator = np.random.default_rng(0)
    rows = []
    for label, name in enumerate(("cat", "dog")):
        (root / "tree" / name).mkdir(parents=True)
        (root / "flat").mkdir(exist_ok=True)
        for index in range(IMAGES_PER_CLASS):
            image = Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8))
            image.save(root / "tree" / name / f"{index}.png")
            image.save(root / "flat" / f"{name}{index}.png")
            rows.append((f"{name}{index}.png", label))
    with (root / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "label"), *rows])
    made = World(
        root,
        root / "weights.safetensors",
        root / "flat",
        root / "tree",
        root / "labels.csv",
        root / "half.safetensors",
    )
    result = CliRunner().invoke(app, made.compress(made.checkpoint, "--json", str(root / "half.json")))
    assert result.exit_code == 0, result.output
    return made


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The model is too small for more, and on a busy machine a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
