"""Images of a stream that are kept while the stream passes by: a random sample, or those that it shall not hold."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from operator import length_hint

import torch
from torch import Tensor

from mixrank.calibrate import DEFAULT_HELD_OUT, held_out_images
from mixrank.data import Batch, as_batch
from mixrank.errors import InputError


class Sample:
    """Batches passed on as they are, of which ``size`` images are kept (reservoir sampling, Vitter 1985, algorithm R).

    Which ones depends on the seed and on the order of the images, not on the batches they come in.

    Args:
        batches: as for :func:`mixrank.calibrate.calibrate`.
        size: how many images to keep, at least 1.
        seed: of the choice.
        held_out: the share of the images that calibration holds out (None: its own), to keep no others, but for the
            first images where there are too few to hold one out. 0: all alike. A calibration that goes through these
            batches must be told the same.
    """

    def __init__(self, batches: Iterable, size: int, seed: int, held_out: float | None) -> None:
        if size < 1:
            raise InputError(f"sensitivity_images must be at least 1, but it was {size}")
        self.batches, self.size, self.seed, self.held_out = batches, size, seed, held_out
        self.share = DEFAULT_HELD_OUT if held_out is None else held_out
        self.views = getattr(batches, "views", 1)
        self._kept: list[Tensor] = []

    def __iter__(self) -> Iterator:
        source, first, count = random.Random(self.seed), 0, 0
        self._kept = []
        chosen = not self.share  # whether what is kept is what is wanted, not the first images for want of better
        for item in self.batches:
            images = as_batch(item, first).images
            wanted = self._wanted(first, len(images))
            first += len(images)
            if not chosen and wanted.any():
                chosen, self._kept = True, []
            elif not chosen:
                self._kept += [_copy(image) for image in images[: self.size - len(self._kept)]]
            for image in images[wanted.to(images.device)]:
                place = count if count < self.size else source.randrange(count + 1)
                if place < self.size:
                    self._kept[place : place + 1] = [_copy(image)]
                count += 1
            yield item

    def _wanted(self, first: int, count: int) -> Tensor:
        """Which of the next images may be kept: of those held out the plain view, or without such images any."""
        if not self.share:
            return torch.ones(count, dtype=torch.bool)
        plain = torch.arange(first, first + count) % self.views == 0
        return held_out_images(first, count, self.share, self.views) & plain

    def __length_hint__(self) -> int:
        return length_hint(self.batches)

    @property
    def images(self) -> Tensor:
        """What was kept, ``[images, C, H, W]``.

        Raises:
            InputError: the images are of different sizes.
        """
        sizes = {tuple(image.shape) for image in self._kept}
        if len(sizes) > 1:
            raise InputError(f"sensitivity needs images of one size, but there were {sorted(sizes)}")
        return torch.stack(self._kept)


def _copy(image: Tensor) -> Tensor:
    return image.detach().cpu().clone()


class Apart:
    """Batches without a share of their images, spread evenly; those are kept, without labels.

    Args:
        batches: as for :func:`mixrank.calibrate.calibrate`, one view of each image.
        share: of the images, in (0, 1).
    """

    def __init__(self, batches: Iterable, share: float) -> None:
        if getattr(batches, "views", 1) != 1:
            raise InputError("images to hold out of must be one view each, but there were further ones")
        self.batches, self.share = batches, share
        self._kept: list[Batch] = []
        self._count = 0

    def __iter__(self) -> Iterator[Batch]:
        self._kept, self._count = [], 0
        for item in self.batches:
            batch = as_batch(item, self._count)
            apart = held_out_images(self._count, len(batch.images), self.share, 1)
            self._count += len(batch.images)
            for chosen in (apart, ~apart):
                if chosen.any():
                    names = [batch.names[index] for index in chosen.nonzero().flatten().tolist()]
                    part = Batch(batch.images[chosen.to(batch.images.device)], None, names)
                    if chosen is apart:
                        self._kept.append(part)
                    else:
                        yield part

    def __length_hint__(self) -> int:
        return length_hint(self.batches)

    @property
    def kept(self) -> list[Batch]:
        """The images held out.

        Raises:
            InputError: there is none.
        """
        if not self._kept:
            raise InputError(f"held_out={self.share} needs more images, but there were {self._count}")
        return self._kept
