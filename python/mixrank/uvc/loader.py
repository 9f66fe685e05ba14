"""Training data from folders, archives and named data sets, by timm's data sets and transforms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from mixrank.data import Decoded, ImageSource, collate
from mixrank.errors import InputError
from mixrank.prepare import TrainingViews


class LoaderData:
    """Random views of labelled images, decoded as they are needed; what is drawn depends on seed and epoch alone.

    Args:
        source: from :func:`mixrank.data.open_images`.
        preprocessing: from :func:`mixrank.models.preprocessing`.
        batch_size: images in a batch of one process; what is left over at the end of an epoch is passed over.
        views: further arguments of ``timm.data.create_transform``, see :class:`mixrank.prepare.TrainingViews`.
        workers: processes that decode; 0: this one.
        seed: of order and views.
        rank: of this process, from 0 on.
        processes: how many share the images.
        strict: an image that does not decode is an InputError, not one fewer in its batch.

    Attributes:
        steps: batches in an epoch.
        skipped: name and reason of each image that did not decode, filled while loading.

    Raises:
        InputError: the images are a stream or have no labels, there are fewer than one batch for each process, or an
            argument is outside its range; while iterating: of a whole batch no image decodes.
    """

    def __init__(
        self,
        source: ImageSource,
        preprocessing: dict,
        batch_size: int,
        *,
        views: dict[str, Any] | None = None,
        workers: int = 0,
        seed: int = 0,
        rank: int = 0,
        processes: int = 1,
        strict: bool = False,
    ) -> None:
        if source.samples is None:
            raise InputError(f"{source.source} is a stream, but training needs images that can be drawn by number")
        if not source.labelled:
            raise InputError(f"{source.source} has no labels: training needs one folder for each class, or a csv file")
        count = len(source.samples)
        if batch_size < 1 or count < batch_size * processes:
            raise InputError(
                f"batch_size must be from 1 to {count // processes} with {count} images and {processes} processes, "
                f"but it was {batch_size}"
            )
        if workers < 0:
            raise InputError(f"workers must be at least 0, but it was {workers}")
        self._images = source.samples.prepared_by(TrainingViews(preprocessing, views or {}))
        # Whole batches only, so that each process has as many as the others.
        self._sampler: DistributedSampler[Decoded] = DistributedSampler(
            self._images, processes, rank, seed=seed, drop_last=True
        )
        self._source, self._batch_size, self._workers = source.source, batch_size, workers
        self._seed, self._rank, self._strict = seed, rank, strict
        self._skipped: dict[str, str] = {}
        self.steps = len(self._sampler) // batch_size

    @property
    def skipped(self) -> list[str]:
        return [f"{name}: {reason}" for name, reason in self._skipped.items()]

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of this process in an epoch."""
        self._sampler.set_epoch(number)
        # Workers take their seeds from it; without workers views are drawn from the random numbers of this process.
        generator = torch.Generator().manual_seed(hash((self._seed, number, self._rank)) % 2**63)
        loader = DataLoader(
            self._images,
            self._batch_size,
            sampler=self._sampler,
            drop_last=True,
            collate_fn=collate,
            num_workers=self._workers,
            generator=generator,
        )
        for batch, bad in loader:
            if bad and self._strict:
                raise InputError(f"{self._source}: {bad[0][0]} does not decode: {bad[0][1]}")
            self._skipped |= dict(bad)
            if batch is None:
                raise InputError(f"{self._source}: none of {len(bad)} images decodes, the first: {bad[0][0]}")
            if batch.labels is None:
                raise InputError(f"{self._source}: an image has no label, one of {', '.join(batch.names[:3])}")
            yield batch.images, batch.labels
