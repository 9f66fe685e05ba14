"""Pictures to read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from mixrank.data import Batch

CONFIG = {
    "input_size": [3, 8, 8],
    "interpolation": "bicubic",
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "crop_pct": 0.9,
    "crop_mode": "center",
}
GREY = CONFIG | {"input_size": [1, 8, 8], "mean": [0.5], "std": [0.25]}


def picture(path: Path, level: int = 128, size: tuple[int, int] = (12, 10), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, level if mode in ("L", "P") else (level,) * len(mode)).save(path)
    return path


def noise(path: Path) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path.read_bytes()


def levels(batch: Batch) -> list[int]:
    """The grey levels that :func:`picture` was given."""
    return [round(float((image.mean() * 0.5 + 0.5) * 255)) for image in batch.images]
