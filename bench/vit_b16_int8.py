"""What 8-bit weights change of a real ViT-B/16, dense and compressed: agreement, divergence, top-1, bytes.

    MIXRANK_DATA=FOLDER python -m mixrank_bench.vit_b16_int8

The folder is that of ``mixrank_bench.vit_b16``. Every quantised model is compared with the same model in fp32. One JSON
line for each goes to ``bench/results/vit_b16_int8.jsonl``; ``python -m mixrank_bench.report`` makes a table of
docs/kernels/int8.md.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mixrank
from mixrank.data import as_batch, open_images
from mixrank.models import count_bytes, preprocessing
from mixrank.quantize import quantize_
from mixrank_bench.environment import RESULTS, append
from mixrank_bench.vit_b16 import Data

OUT = RESULTS / "vit_b16_int8.jsonl"
KEEP = 0.4
CALIBRATION_IMAGES = 64
BATCH = 25


def compressed(data: Data, dense: nn.Module) -> nn.Module:
    """The model with 40 % of its parameters, from a few calibration images."""
    model = copy.deepcopy(dense)
    mixrank.compress(model, data.calibration(model, CALIBRATION_IMAGES), keep=KEEP, shrink=0.3)
    return model


def logits(model: nn.Module, batches: list[Any]) -> Tensor:
    """Of all images: ``[images, classes]`` in fp64."""
    with torch.inference_mode():
        return torch.cat([model(batch.images) for batch in batches]).double()


def compare(found: Tensor, expected: Tensor, labels: Tensor) -> dict[str, float]:
    """How far logits are from those of the model in fp32, and how often each is right, in percent."""
    log, log_expected = found.log_softmax(1), expected.log_softmax(1)
    divergence = (log_expected.exp() * (log_expected - log)).sum(1)
    return {
        "agreement": 100 * (found.argmax(1) == expected.argmax(1)).double().mean().item(),
        "divergence": divergence.mean().item(),
        "largest_divergence": divergence.max().item(),
        "top1": 100 * (found.argmax(1) == labels).double().mean().item(),
        "images": len(labels),
    }


def measure(data: Data, out: Path, images: int | None) -> None:
    """Both models, each in fp32, with weights of 8 bits, and with weights and activations of 8 bits."""
    dense = data.model()
    source = open_images(data.folder / "test", preprocessing(dense), labels=data.folder / "test.csv", limit=images)
    batches = [as_batch(batch, 0) for batch in source.batches(BATCH)]
    labels = torch.cat([batch.labels for batch in batches])
    for name, make in (("dense", lambda: dense), (f"keep {KEEP}", lambda: compressed(data, dense))):
        model = make()
        expected = logits(model, batches)
        rows = {"fp32": (model, expected)}
        for kind, dynamic in (("weights", False), ("weights and activations", True)):
            quantised = copy.deepcopy(model)
            quantize_(quantised, dynamic=dynamic)
            rows[kind] = quantised, logits(quantised, batches)
        for kind, (quantised, found) in rows.items():
            row = {"kind": "int8", "model": name, "in_8_bits": kind, "bytes": count_bytes(quantised)}
            append(out, row | compare(found, expected, labels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="the file of results, added to")
    parser.add_argument("--images", type=int, help="only so many of the test images")
    args = parser.parse_args()
    if "MIXRANK_DATA" not in os.environ:
        parser.error("set MIXRANK_DATA to the folder with the model and the images")
    with tempfile.TemporaryDirectory() as scratch:
        data = Data(Path(os.environ["MIXRANK_DATA"]), Path(scratch))
        data.dequantize()
        measure(data, args.out, args.images)


if __name__ == "__main__":
    main()
