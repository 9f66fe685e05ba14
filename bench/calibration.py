"""The Gram matrices of a calibration run beside its forward pass: ``python -m mixrank_bench.calibration``.

A ViT-B/16 of timm with random weights over random images, in fp32 and under autocast in bf16. The plain forward pass,
calibration with ``gram_accumulate_`` and calibration with PyTorch's ``addmm_`` in fp32, which others use, take turns on
the same images. ``seconds_gram`` is what passed inside the calls that accumulate; ``seconds_calibrate`` less
``seconds_forward`` is another way to the same figure, which counts the hooks and the noise of two long runs too.
``--save`` adds rows to a file; ``python -m mixrank_bench.report`` makes a table of ``bench/results/calibration.jsonl``.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import mixrank
from mixrank.models import preprocessing
from mixrank_bench.environment import RESULTS, append_all, busy, environment
from mixrank_kernels import ops, reference, testing
from mixrank_kernels.ops import gram_accumulate_

OUT = RESULTS / "calibration.jsonl"
MODEL = "vit_base_patch16_224"
DTYPES: dict[str, torch.dtype | None] = {"bfloat16": torch.bfloat16, "float32": None}
BATCH, TURN_IMAGES = 32, 64
Accumulate = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], None]


@dataclass
class Timed:
    """An ``accumulate`` that takes the place of ``ops.gram_accumulate_`` and adds up the seconds spent in it."""

    accumulate: Accumulate
    seconds: float = 0.0

    def __call__(
        self, gram: Tensor, x: Tensor, row_weight: Tensor | None = None, column_sum: Tensor | None = None
    ) -> None:
        started = time.perf_counter()
        self.accumulate(gram, x, row_weight, column_sum)
        self.seconds += time.perf_counter() - started


class Addmm:
    """The Gram matrices as others take them: ``addmm_`` in fp32 on the whole of each, narrower activations cast."""

    def __init__(self) -> None:
        self.grams: dict[int, Tensor] = {}

    def __call__(self, gram: Tensor, x: Tensor, row_weight: Tensor | None, column_sum: Tensor | None) -> None:
        assert row_weight is None, "calibration weighs no rows"
        rows = x.float().flatten(0, -2)
        total = self.grams.setdefault(gram.data_ptr(), torch.zeros(gram.shape))
        total.addmm_(rows.mT, rows)
        column_sum += rows.sum(0)


METHODS: dict[str, Callable[[], Accumulate]] = {"addmm": Addmm, "ours": lambda: gram_accumulate_}


def gated(gram: Tensor, x: Tensor, row_weight: Tensor | None, column_sum: Tensor | None) -> None:
    """Accumulate, and raise AssertionError unless that was within the error budget on these very activations."""
    arguments = {"gram": gram, "x": x, "row_weight": row_weight, "column_sum": column_sum}
    exact = list(testing.run(reference.gram_accumulate_, testing.exact(arguments)))
    yardstick = list(testing.run(testing.plain_gram_accumulate_, arguments))
    gram_accumulate_(**arguments)
    for ours, true, plain in zip((gram, column_sum), exact, yardstick, strict=True):
        testing.assert_within_budget(ours, true, plain, x.dtype)


@contextlib.contextmanager
def accumulating(accumulate: Accumulate) -> Iterator[None]:
    """Let :func:`mixrank.calibrate` use ``accumulate`` in place of ``ops.gram_accumulate_``."""
    with mock.patch.object(ops, "gram_accumulate_", accumulate):
        yield


def measure(model: nn.Module, images: Tensor, dtype: torch.dtype | None) -> list[dict[str, Any]]:
    """Pass all images [B, C, H, W] through the model once plainly and once with each method, in turns of 64 images.

    Returns:
        The measured part of the row of each method.
    """
    names = ("forward", *METHODS)
    total, gram = dict.fromkeys(names, 0.0), dict.fromkeys(METHODS, 0.0)
    with accumulating(gated):
        mixrank.calibrate(model, [images[:1]], dtype=dtype)
    _forward(model, [images[:1]], dtype)
    for turn, part in enumerate(images.split(TURN_IMAGES)):
        batches = part.split(BATCH)
        for name in names[:: 1 if turn % 2 == 0 else -1]:
            started = time.perf_counter()
            if name == "forward":
                _forward(model, batches, dtype)
            else:
                timed = Timed(METHODS[name]())
                with accumulating(timed):
                    mixrank.calibrate(model, batches, dtype=dtype)
                gram[name] += timed.seconds
            total[name] += time.perf_counter() - started
    return [
        {
            "method": name,
            "seconds_forward": total["forward"],
            "seconds_gram": gram[name],
            "seconds_calibrate": total[name],
            "share": gram[name] / total["forward"],
        }
        for name in METHODS
    ]


def _forward(model: nn.Module, batches: Iterable[Tensor], dtype: torch.dtype | None) -> None:
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype is not None):
        for batch in batches:
            model(batch)


def rows(name: str, images: int, *, arguments: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """Measure one model of timm in both dtypes.

    Args:
        name: what timm calls it.
        images: how many random images pass through it.
        arguments: further arguments of ``timm.create_model``.
    """
    torch.manual_seed(0)
    model = mixrank.create_model(name, args=arguments)
    inputs = torch.randn(images, *preprocessing(model)["input_size"])
    for dtype_name, dtype in DTYPES.items():
        for measured in measure(model, inputs, dtype):
            yield {
                "kind": "calibration",
                "model": name,
                "images": images,
                "threads": torch.get_num_threads(),
                "dtype": dtype_name,
            } | measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256, help="random images that pass through the model")
    parser.add_argument("--threads", type=int, default=1, help="threads of one operation")
    parser.add_argument("--save", type=Path, nargs="?", const=OUT, help=f"add the rows to a file ({OUT.name})")
    parser.add_argument("--busy", action="store_true", help="measure although the machine is busy")
    args = parser.parse_args()
    for option in ("images", "threads"):
        if getattr(args, option) < 1:
            parser.error(f"--{option} must be at least 1, but it was {getattr(args, option)}")
    reason = None if args.busy else busy()
    if reason:
        parser.error(f"{reason}: timings would mean nothing; wait, or pass --busy to have them all the same")
    torch.set_num_threads(args.threads)

    header = environment()
    run = f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%SZ}-{header['commit']}"
    console = Console()
    console.print(header, highlight=False)
    table = Table(
        "dtype", "method", "forward, s", "Gram matrices, s", "calibrate less forward, s", "share of the forward"
    )
    for row in rows(MODEL, args.images):
        if args.save:
            append_all(args.save, [{"run": run} | row], header)
        seconds = (row["seconds_forward"], row["seconds_gram"], row["seconds_calibrate"] - row["seconds_forward"])
        table.add_row(row["dtype"], row["method"], *(f"{value:.2f}" for value in seconds), f"{row['share']:.1%}")
    console.print(table)


if __name__ == "__main__":
    main()
