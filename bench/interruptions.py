"""Commands killed without a word, again and again: ``--resume`` ends with the bytes of a run that was left alone.

    python -m mixrank_bench.interruptions --runs 51

Each run starts a command on a small model, kills it (``SIGKILL``) after a random part of the time that it takes, goes
on with ``--resume``, up to some kills, and compares what is written. One JSON line for each command goes to
``bench/results/interruptions.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from mixrank.models import create_model
from mixrank_bench.environment import RESULTS, append

OUT = RESULTS / "interruptions.jsonl"
COMMANDS = ("compress", "compensate", "uvc")
ARCHITECTURE = "vit_tiny_patch16_224"
ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "num_heads": 4, "depth": 3, "num_classes": 2}
IMAGES = 24
MOST_KILLS = 3
TIMEOUT = 300


@dataclass(frozen=True)
class World:
    """What the commands read: weights, images in class folders, a checkpoint to train."""

    folder: Path

    @property
    def weights(self) -> Path:
        return self.folder / "weights.safetensors"

    @property
    def images(self) -> Path:
        return self.folder / "images"

    @property
    def checkpoint(self) -> Path:
        return self.folder / "compressed.safetensors"

    def make(self) -> None:
        """Write all of it."""
        torch.manual_seed(0)
        save_file(create_model(ARCHITECTURE, args=ARGS).state_dict(), self.weights)
        source = np.random.default_rng(0)
        for number in range(IMAGES):
            path = self.images / ("cat", "dog")[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(source.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
        finish([*self.command("compress", self.checkpoint)[:-2]])

    def command(self, name: str, out: Path) -> list[str]:
        """The arguments of a command whose last two make it long enough to be interrupted."""
        model = ["--model", ARCHITECTURE, "--model-args", json.dumps(ARGS), "--weights", str(self.weights)]
        common = ["--images", str(self.images), "--out", str(out), "--quiet"]
        if name == "compress":
            return ["compress", *model, *common, "--keep", "0.6", "--device", "cpu", "--steps", "40"]
        if name == "compensate":
            weights = ["--weights", str(self.weights), "--batch-size", "4"]
            return ["compensate", str(self.checkpoint), *weights, *common, "--steps", "60"]
        fixed = ["--batch-size", "4", "--workers", "0", "--device", "cpu"]
        return ["uvc", *model, *common, *fixed, "--epochs", "16"]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """A command in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mixrank", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(arguments: list[str]) -> float:
    """Run a command to its end; returns its seconds."""
    started = time.monotonic()
    process = start(arguments)
    _, told = process.communicate(timeout=TIMEOUT)
    if process.returncode:
        raise RuntimeError(f"{arguments[0]} ended with {process.returncode}: {told.strip()}")
    return time.monotonic() - started


def interrupted(arguments: list[str], out: Path, seconds: float, source: random.Random) -> int:
    """Run a command that is killed a few times, until it ends by itself; returns how often it was killed."""
    kills = 0
    while True:
        # What a run leaves behind is known by its name; without that there is nothing to resume.
        left = [path for path in out.parent.iterdir() if path.name.startswith(f"{out.name}.")]
        process = start([*arguments, "--resume"] if left or arguments[0] != "compress" else arguments)
        wait = source.uniform(0.2, 1.0) * seconds if kills < MOST_KILLS else TIMEOUT
        try:
            _, told = process.communicate(timeout=wait)
            if process.returncode:
                raise RuntimeError(f"{arguments[0]} ended with {process.returncode}: {told.strip()}")
            return kills
        except subprocess.TimeoutExpired:
            if kills == MOST_KILLS:
                raise
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1


def run(name: str, runs: int, seed: int) -> dict:
    """Interrupt a command in many runs."""
    source, kills, different, failures = random.Random(hash((seed, runs))), 0, 0, []
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        world.make()
        (Path(folder) / "whole").mkdir()
        whole = Path(folder) / "whole" / "out.safetensors"
        seconds = finish(world.command(name, whole))
        expected = whole.read_bytes()
        for number in range(runs):
            place = Path(folder) / str(number)
            place.mkdir()
            out = place / "out.safetensors"
            try:
                kills += interrupted(world.command(name, out), out, seconds, source)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                failures.append(f"run {number}: {error}"[:500])
                continue
            different += out.read_bytes() != expected
            named = [path.name for path in place.iterdir() if not path.name.startswith(".")]
            if named != [out.name]:
                failures.append(f"run {number} left {sorted(named)}")
    row = {"kind": "interruptions", "command": name, "runs": runs, "seed": seed, "kills": kills}
    return row | {"different": different, "failures": failures, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--command", choices=COMMANDS, action="append", help="only this one (repeatable)")
    parser.add_argument("--runs", type=int, default=51, help="of all commands together")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=OUT, help="the file of results, added to")
    args = parser.parse_args()
    names = args.command or COMMANDS
    failed = False
    for name in names:
        row = run(name, -(-args.runs // len(names)), args.seed)
        append(args.out, row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        failed = failed or row["different"] or row["failures"]
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
