"""Random views of a fixed set of images, a function of seed and step alone: a run that goes on sees the same ones."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from mixrank.data import as_batch
from mixrank.errors import InputError

_SIDES = (3 / 4, 4 / 3)  # width by height of a crop, as in timm's training transform


def gather(batches: Iterable, *, least: int) -> Tensor:
    """All images of the batches ``[B, C, H, W]``, in fp16 (whose steps are finer than those of 8-bit images).

    Raises:
        InputError: fewer than ``least`` images, images of different sizes, or one that is not finite in fp16.
    """
    images: list[Tensor] = []
    count = 0
    for item in batches:
        batch = as_batch(item, count)
        count += len(batch.images)
        half = batch.images.half()
        finite = half.isfinite().flatten(1).all(1)
        if not finite.all():
            raise InputError(f"image {batch.names[int(finite.int().argmin())]} has NaN, infinite or huge values")
        if images and half.shape[1:] != images[0].shape[1:]:
            raise InputError(
                f"images must have one size, but {batch.names[0]} has {list(half.shape[1:])} and the first "
                f"{list(images[0].shape[1:])}"
            )
        images.append(half.cpu())
    if count < least:
        raise InputError(f"at least {least} images are needed, but there were {count}")
    return torch.cat(images)


class Views:
    """Batches of random views of images.

    Args:
        images: ``[B, C, H, W]``, any floating dtype, on the CPU.
        batch_size: images in a batch, at least 1; at most B are taken.
        seed: equal seeds give equal views.
        min_scale: smallest share of an image's area in a view, in (0, 1]; 1 takes images as they are, without flips.
        mix: share of the views that are mixed with the next one of the batch, in any proportion (mixup of Zhang et al.
            2018, with the uniform proportions that suit distillation, Beyer et al. 2022).
    """

    def __init__(self, images: Tensor, batch_size: int, *, seed: int, min_scale: float, mix: float = 0.0) -> None:
        self.images, self.seed, self.min_scale, self.mix = images, seed, min_scale, mix
        self.batch_size = min(batch_size, len(images))

    def batch(self, step: int) -> Tensor:
        """The views ``[batch_size, C, H, W]`` fp32 of one step: each pass over the images is a new permutation."""
        steps = len(self.images) // self.batch_size
        epoch, place = divmod(step, steps)
        order = torch.randperm(len(self.images), generator=self._generator(2 * epoch))
        chosen = order[place * self.batch_size :][: self.batch_size]
        images = self.images[chosen].float()
        generator = self._generator(2 * step + 1)
        if self.min_scale < 1:
            images = torch.stack([self._view(image, generator) for image in images])
        if self.mix:
            which, share = torch.rand(2, len(images), 1, 1, 1, generator=generator)
            share = torch.where(which < self.mix, share, 1.0)
            images = share * images + (1 - share) * images.roll(-1, 0)
        return images

    def _generator(self, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + stream) % 2**63)

    def _view(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """A random crop, resized to the image's own size, flipped half of the time."""
        height, width = image.shape[-2:]
        scale, side, top, left, flip = torch.rand(5, generator=generator).tolist()
        area = (self.min_scale + (1 - self.min_scale) * scale) * height * width
        ratio = math.exp(math.log(_SIDES[0]) + side * (math.log(_SIDES[1]) - math.log(_SIDES[0])))
        h = min(height, max(1, round(math.sqrt(area / ratio))))
        w = min(width, max(1, round(math.sqrt(area * ratio))))
        top, left = int(top * (height - h + 1)), int(left * (width - w + 1))
        crop = image[None, :, top : top + h, left : left + w]
        view = F.interpolate(crop, size=(height, width), mode="bicubic", align_corners=False, antialias=True)[0]
        view = view.clamp(image.amin(), image.amax())
        return view.flip(-1) if flip < 0.5 else view
