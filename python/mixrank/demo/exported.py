"""The demo's model and images as files of the usual kinds, and the command that compresses these."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from torch import Tensor, nn

from mixrank.demo import ARCHITECTURE, MODEL_ARGS, PREPROCESSING, WEIGHTS
from mixrank.files import write_tensors, write_text

KEEP = 0.3


def export(out: Path, dense: nn.Module, images: dict[str, Tensor]) -> None:
    """Write ``calibration/`` and ``test/`` as PNG files, ``test_labels.csv``, and the weights of the dense model.

    Args:
        out: the folder to write to.
        dense: the model.
        images: ``calibration_images`` and ``test_images`` ``[B, H, W]`` uint8, ``test_labels`` ``[B]``.
    """
    from PIL import Image

    for part in ("calibration", "test"):
        folder = out / part
        folder.mkdir(exist_ok=True)
        for index, image in enumerate(images[f"{part}_images"].numpy()):
            Image.fromarray(image).save(folder / f"{index:04d}.png")
    lines = [f"{index:04d}.png,{label}" for index, label in enumerate(images["test_labels"].tolist())]
    write_text(out / "test_labels.csv", "\n".join(["file,label", *lines, ""]))
    write_tensors(out / WEIGHTS, {name: tensor.cpu() for name, tensor in dense.state_dict().items()}, {})


def command(out: Path) -> str:
    """The command for a shell that compresses what :func:`export` wrote to ``out``."""
    seen = {name: PREPROCESSING[name] for name in ("input_size", "mean", "std", "crop_pct")}
    words = ["mixrank", "compress", "--model", ARCHITECTURE]
    words += ["--model-args", json.dumps(MODEL_ARGS | {"pretrained_cfg_overlay": seen})]
    words += ["--weights", str(out / WEIGHTS), "--images", str(out / "calibration"), "--keep", f"{KEEP:g}"]
    words += ["--eval-images", str(out / "test"), "--labels", str(out / "test_labels.csv")]
    return shlex.join([*words, "--out", str(out / "compressed.safetensors")])
