"""From a decoded image to the tensor that a model wants, plainly or as a random view."""

from __future__ import annotations

import contextlib
import math
import random
import warnings
from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor

from mixrank.errors import InputError

_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
# Views of an image that is still easily recognised; colours stay, which the model's statistics depend on.
_MILD: dict[str, Any] = {"scale": (0.6, 1.0), "ratio": (0.9, 1 / 0.9), "hflip": 0.5, "color_jitter": None}


def check_preprocessing(preprocessing: dict) -> dict:
    """Return what :func:`mixrank.models.preprocessing` made, possibly long ago and in another place.

    Raises:
        InputError: a field is missing, unknown, or outside its range.
    """
    size, mean, std = (preprocessing.get(key) for key in ("input_size", "mean", "std"))
    valid = {
        "input_size": isinstance(size, list)
        and len(size) == 3
        and all(type(n) is int and 0 < n <= 16384 for n in size),
        "interpolation": preprocessing.get("interpolation") in _INTERPOLATIONS,
        "mean": _are_numbers(mean, size),
        "std": _are_numbers(std, size) and min(std) > 0,
        "crop_pct": _are_numbers([preprocessing.get("crop_pct")]) and 0.1 <= preprocessing["crop_pct"] <= 10,
        "crop_mode": preprocessing.get("crop_mode") in ("center", "squash", "border"),
    }
    wrong = [key for key, good in valid.items() if not good] + sorted(preprocessing.keys() - valid.keys())
    if wrong:
        raise InputError(f"the preprocessing's {wrong[0]} cannot be used: {preprocessing.get(wrong[0])!r}")
    return preprocessing


def _are_numbers(values: Any, like: Any = None) -> TypeGuard[list[float]]:
    same = isinstance(values, list) and (like is None or (isinstance(like, list) and len(values) == like[0]))
    return same and all(type(value) in (int, float) and math.isfinite(value) for value in values)


class Prepare:
    """From a PIL image, or an open file, to a tensor [C, H, W]; can be sent to a worker process.

    Attributes:
        views: how many views there are of an image: the plain one and ``augment`` random ones.
    """

    def __init__(self, preprocessing: dict, augment: int = 0, seed: int = 0) -> None:
        from timm.data import create_transform

        check_preprocessing(preprocessing)
        self.size = channels, height, width = preprocessing["input_size"]
        self.views, self.seed = augment + 1, seed
        self.transform = create_transform(**preprocessing, is_training=False)
        self.random = create_transform(**preprocessing, **_MILD, is_training=True) if augment else self.transform
        if channels not in (1, 3):
            raise InputError(f"images have 1 or 3 channels, but the model wants {channels}")
        self.mode = "L" if channels == 1 else "RGB"
        self.short_edge = math.floor(max(height, width) / preprocessing["crop_pct"])

    def __call__(self, image: Any, index: int = 0, view: int = 0) -> Tensor:
        """Prepare a view of an image: 0 is the plain one, another one is drawn by the image's index."""
        image = self._decoded(image)
        if view == 0:
            return self.transform(image)
        with _seeded(hash((self.seed, index, view)) % 2**63):
            return self.random(image)

    def _decoded(self, image: Any) -> Any:
        """The PIL image in the model's mode; what was opened is closed."""
        from PIL import Image

        with warnings.catch_warnings(), image:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if not isinstance(image, Image.Image):
                image = Image.open(image)
            width, height = image.size
            # The transform scales the short edge up: an image one pixel high would become gigabytes.
            if max(width, height) / min(width, height) * self.short_edge**2 > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise ValueError(f"{width} x {height} pixels is too narrow")
            return image.convert(self.mode)


class TrainingViews(Prepare):
    """From a PIL image, or an open file, to a random view of it by the global random numbers.

    Args:
        preprocessing: as for :class:`Prepare`.
        views: further arguments of ``timm.data.create_transform``, such as ``scale``, ``color_jitter``,
            ``auto_augment`` and ``re_prob``.

    Raises:
        InputError: timm refuses them.
    """

    def __init__(self, preprocessing: dict, views: dict[str, Any]) -> None:
        from timm.data import create_transform

        super().__init__(preprocessing)
        plain: dict[str, Any] = {key: preprocessing[key] for key in ("input_size", "interpolation", "mean", "std")}
        try:
            self.random = create_transform(**plain, is_training=True, **views)
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"timm has no training views with {views}: {error}") from error

    def __call__(self, image: Any, index: int = 0, view: int = 0) -> Tensor:
        """Draw a view."""
        return self.random(self._decoded(image))


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Both random streams that transforms draw from start at a seed, and go on after as if nothing had been drawn."""
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(state)
