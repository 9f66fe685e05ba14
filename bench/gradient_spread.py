"""From how many images the squared gradients at each block of the real ViT-B/16 really are.

    MIXRANK_DATA=FOLDER python -m mixrank_bench.gradient_spread

FOLDER is that of :mod:`mixrank_bench.vit_b16`. Of E, an image's sum of squared gradients at a layer, the effective
number of images is ``(sum E)^2 / sum E^2``: n where n images have all of it alike. It is told too for the powers of E
that :func:`mixrank.gradients.tempered` makes. One JSON line for each layer goes to
``bench/results/gradient_spread.jsonl``; ``python -m mixrank_bench.report`` makes a table of docs/accuracy.md from it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from mixrank.accumulate import hooked
from mixrank.gradients import POWER, backward
from mixrank.models import compressible_linears
from mixrank.precision import fast_dtype
from mixrank_bench.environment import RESULTS, append, read
from mixrank_bench.markdown import conditions, table
from mixrank_bench.vit_b16 import Data

OUT = RESULTS / "gradient_spread.jsonl"
IMAGES = 192
BATCH = 8
POWERS = (1.0, 0.5, POWER)


def energies(model: nn.Module, images: Tensor, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Of each compressible layer the squared gradients with respect to its outputs, summed for each image: ``[B]``.

    Args:
        model: a classifier in evaluation mode.
        images: ``[B, C, H, W]``.
        dtype: run the model under autocast in this dtype.
    """
    found: dict[str, list[Tensor]] = {}

    def listener(name: str):
        def listen(_module: nn.Module, _arguments: object, output: Tensor) -> None:
            def receive(gradient: Tensor) -> None:
                found.setdefault(name, []).append(gradient.double().flatten(1).square().sum(1))

            output.register_hook(receive)

        return listen

    handles = (layer.register_forward_hook(listener(name)) for name, layer in compressible_linears(model).items())
    with hooked(handles), torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        for first in range(0, len(images), BATCH):
            part = images[first : first + BATCH]
            numbers = list(range(first, first + len(part)))
            backward(model, part, numbers, [str(number) for number in numbers], draws=1, seed=0)
    return {name: torch.cat(parts) for name, parts in found.items()}


def effective(values: Tensor) -> float:
    """How many of some values that are not negative make up their sum: ``(sum)^2 / sum of squares``."""
    return (values.sum().square() / values.square().sum()).item()


def spread() -> str:
    """The table: by block the layer of the fewest images, at each power."""
    rows = read(OUT)
    if not rows:
        return "No run has been recorded yet.\n"
    blocks: dict[int, list[dict]] = {}
    for row in {row["layer"]: row for row in rows}.values():
        blocks.setdefault(int(row["layer"].split(".")[1]), []).append(row)
    lines = []
    for block, members in sorted(blocks.items()):
        least = (min(member["effective"][f"{power:g}"] for member in members) for power in POWERS)
        lines.append((block + 1, *(f"{value:.0f}" for value in least)))
    header = ("block", *(f"of {rows[-1]['images']} images, power {power:g}" for power in POWERS))
    return table(header, lines) + "\n" + conditions(rows[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="the file of results, added to")
    parser.add_argument("--threads", type=int, default=1, help="threads of one operation")
    args = parser.parse_args()
    if "MIXRANK_DATA" not in os.environ:
        parser.error("set MIXRANK_DATA to the folder with the model and the images")
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        data = Data(Path(os.environ["MIXRANK_DATA"]), Path(scratch))
        data.dequantize()
        model = data.model().eval()
        images = torch.cat([batch.images for batch in data.calibration(model, IMAGES)])
        for name, energy in energies(model, images, dtype=fast_dtype()).items():
            counts = {f"{power:g}": effective(energy**power) for power in POWERS}
            append(args.out, {"layer": name, "images": len(images), "effective": counts})


if __name__ == "__main__":
    main()
