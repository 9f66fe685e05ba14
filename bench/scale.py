"""Compression by several processes: what it costs by the shapes of a model, and whether a small run costs that.

    python -m mixrank_bench.scale

A model with random weights is compressed from random images by one process and by two, one thread each. Before, the
processes measure their own rates: of a pass through the model and back, of Gram matrices, of eigenvectors, of sums
over processes. One JSON line for each number of processes goes to ``bench/results/scale.jsonl``, with what these rates
and :class:`Work` predict. ``python -m mixrank_bench.report`` makes the tables of docs/scale.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

import mixrank
from mixrank.counting import count_macs
from mixrank.data import Batch
from mixrank.gradients import backward
from mixrank.models import ModelSpec, compressible_linears, create_model, meta_model
from mixrank.processes import add_up_, are_several, gathered, is_first, joined, place
from mixrank_bench.environment import RESULTS, append, read
from mixrank_kernels import ops

OUT = RESULTS / "scale.jsonl"
MODEL = "vit_small_patch16_224"
IMAGES = 64
BATCH = 8
PROCESSES = (1, 2)
EIGENVECTORS = 25
"""Operations of all eigenvectors of a symmetric matrix of size S, in S^3: tridiagonal form, solution, and back."""
DECOMPOSITIONS = 6
"""Of each layer: weight, held out and all images, each with its metric, roughly."""


@dataclass(frozen=True)
class Work:
    """What compressing a model costs, whoever does it.

    Attributes:
        passes: operations of an image forward and back; activations alone have gradients.
        grams: operations of the Gram matrices of an image: a triangle each of what a layer writes (or reads), and of
            its gradient.
        sums: bytes of all sums, of the images held out and of the others.
        eigenvectors: operations of all decompositions.
    """

    passes: int
    grams: int
    sums: int
    eigenvectors: int

    @classmethod
    def of(cls, model: nn.Module, tokens: int) -> Work:
        """The work of a vision transformer whose layers see so many tokens of an image."""
        sizes = [min(layer.weight.shape) for layer in compressible_linears(model).values()]
        return cls(
            passes=4 * count_macs(model),
            grams=sum(2 * tokens * size * (size + 1) for size in sizes),
            sums=sum(2 * 8 * (2 * size * size + size) for size in sizes),
            eigenvectors=sum(DECOMPOSITIONS * EIGENVECTORS * size**3 for size in sizes),
        )


@dataclass(frozen=True)
class Rates:
    """Operations per second of one process; bytes per second of sums over processes."""

    passes: float
    grams: float
    eigenvectors: float
    network: float

    def predict(self, work: Work, images: int, processes: int) -> dict[str, float]:
        """Seconds of the steps that processes share."""
        each = images / processes
        moved = 2 * (processes - 1) / processes * work.sums  # a ring sends and receives nearly all of it twice
        return {
            "calibrate": each * (work.passes / self.passes + work.grams / self.grams) + moved / self.network,
            "decompose": work.eigenvectors / self.eigenvectors / processes,
        }


def tokens_of(model: nn.Module) -> int:
    """Tokens of an image, of a timm vision transformer."""
    return model.patch_embed.num_patches + model.num_prefix_tokens


def rates(model: nn.Module, images: torch.Tensor) -> Rates:
    """Measured in this process, alongside whatever the others do."""
    work, count = Work.of(model, tokens_of(model)), len(images)
    names, numbers = [""] * count, list(range(count))
    size = model.embed_dim
    rows = torch.randn(count * tokens_of(model), size)
    gram, total = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    one_gram = len(rows) * size * (size + 1)
    square = torch.randn(size, size, dtype=torch.float64)
    moved = torch.zeros(2**23, dtype=torch.float64)
    share = 2 * (place()[1] - 1) / place()[1] if are_several() else 1.0
    return Rates(
        passes=count * work.passes / _seconds(lambda: backward(model, images, numbers, names, 1, 0)),
        grams=one_gram / _seconds(lambda: ops.gram_accumulate_(gram, rows, None, total)),
        eigenvectors=EIGENVECTORS * size**3 / _seconds(lambda: torch.linalg.eigh(square + square.mT)),
        network=share * 8 * len(moved) / _seconds(lambda: add_up_([moved])) if are_several() else float("inf"),
    )


def _seconds(do: Callable[[], object], rounds: int = 3) -> float:
    do()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        do()
        times.append(time.perf_counter() - started)
    return sorted(times)[rounds // 2]


def measure(out: Path) -> None:
    """One process of a run; the first one writes the row."""
    torch.set_num_threads(1)
    with joined(torch.device("cpu")):
        torch.manual_seed(0)
        model = create_model(MODEL)
        source = torch.Generator().manual_seed(1)
        images = torch.randn(IMAGES, 3, 224, 224, generator=source)
        number, count = place()
        found = gathered(rates(model, images[:BATCH]))
        starts = range(number * BATCH, IMAGES, count * BATCH)
        batches = [Batch(images[i : i + BATCH], None, [""] * BATCH, list(range(i, i + BATCH))) for i in starts]
        work = Work.of(model, tokens_of(model))
        started = time.perf_counter()
        result = mixrank.compress(model, batches, keep=0.5, form="pivoted")
        seconds = time.perf_counter() - started
        slowest = {step: max(part[step] for part in gathered(result.seconds)) for step in result.seconds}
        least = Rates(*(min(asdict(one)[field] for one in found) for field in asdict(found[0])))
        if is_first():
            named = {"model": MODEL, "images": IMAGES, "processes": count, "seconds": seconds, "steps": slowest}
            told = {name: rate for name, rate in asdict(least).items() if rate != float("inf")}
            append(out, named | {"rates": told, "predicted": least.predict(work, IMAGES, count)})


def hollow(name: str) -> nn.Module:
    """A model without memory for its weights, to count its work."""
    return meta_model(ModelSpec(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="the file of results, added to")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        measure(args.out)
        return
    for count in PROCESSES:
        start = [sys.executable]
        if count > 1:
            start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        command = [*start, "-m", "mixrank_bench.scale", "--child", "--out", str(args.out.resolve())]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        print(json.dumps(read(args.out)[-1]["steps"]), file=sys.stderr)


if __name__ == "__main__":
    main()
