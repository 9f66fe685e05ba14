"""Images of a stream that are kept while the stream passes by: a random sample, or those that it shall not hold."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from operator import length_hint

import torch
from torch import Tensor

from mixrank.calibrate import DEFAULT_HELD_OUT, held_out_before, held_out_images, numbers_of
from mixrank.data import Batch, as_batch
from mixrank.errors import InputError
from mixrank.processes import gathered

PART = 24
"""Images that go through the model together where a sample is measured on."""


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
        source, first, drawn = random.Random(self.seed), 0, 0
        kept: dict[int, tuple[int, Tensor]] = {}  # by place: which of the wanted images it is, and the image
        spare: dict[int, Tensor] = {}  # by number: the first images, for want of better
        for item in self.batches:
            batch = as_batch(item, first)
            numbers = numbers_of(batch, first)
            first += len(batch.images)
            for image, number, order in zip(batch.images, numbers, self._orders(numbers), strict=True):
                if order is None:
                    if not kept and len(spare) < self.size:
                        spare[number] = _copy(image)
                    continue
                place = self.size
                while drawn <= order:  # what other processes see is drawn for here too
                    place = drawn if drawn < self.size else source.randrange(drawn + 1)
                    drawn += 1
                if place < self.size:
                    kept[place] = order, _copy(image)
            yield item
        self._kept = _merged(gathered(kept)) or _merged(gathered({n: (n, image) for n, image in spare.items()}))
        del self._kept[self.size :]
        random.Random(self.seed).shuffle(self._kept)  # any part of them is a sample too

    def _orders(self, numbers: Sequence[int]) -> list[int | None]:
        """Which of those that may be kept each is: of images held out the plain view, or without such images any."""
        if not self.share:
            return list(numbers)
        wanted = held_out_images(numbers, self.share, self.views).tolist()
        images = torch.tensor(numbers, dtype=torch.float64).div(self.views, rounding_mode="floor")
        before = held_out_before(images, self.share).int().tolist()
        return [
            order if held and number % self.views == 0 else None
            for order, held, number in zip(before, wanted, numbers, strict=True)
        ]

    def __length_hint__(self) -> int:
        return length_hint(self.batches)

    @property
    def images(self) -> Tensor:
        """What was kept, in random order, ``[images, C, H, W]``.

        Raises:
            InputError: the images are of different sizes.
        """
        sizes = {tuple(image.shape) for image in self._kept}
        if len(sizes) > 1:
            raise InputError(f"sensitivity needs images of one size, but there were {sorted(sizes)}")
        return torch.stack(self._kept)

    @property
    def parts(self) -> Sequence[Tensor]:
        """The same in batches of at most :data:`PART`."""
        return self.images.split(PART)


def _merged(parts: list[dict[int, tuple[int, Tensor]]]) -> list[Tensor]:
    """Of each place the last image that any process put there."""
    last: dict[int, tuple[int, Tensor]] = {}
    for part in parts:
        for place, (order, image) in part.items():
            if place not in last or order > last[place][0]:
                last[place] = order, image
    return [last[place][1] for place in sorted(last)]


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
            apart = held_out_images(range(self._count, self._count + len(batch.images)), self.share, 1)
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
