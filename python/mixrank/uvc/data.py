"""Training data by epochs: the same images in the same order whenever an epoch is gone through, on every process."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mixrank.errors import InputError


class TrainingData(Protocol):
    """What a training goes through.

    Attributes:
        steps: batches in an epoch, the same for each.
    """

    steps: int

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images ``[B, C, H, W]`` ready for the model and labels ``[B]`` int64; a function of ``number`` alone."""
        ...


class TensorData:
    """Images that are in memory, in another order in each epoch.

    Args:
        images: ``[count, ...]`` of any dtype.
        labels: ``[count]`` class indices of any integer dtype.
        batch_size: images in a batch of one process; what is left over at the end of an epoch is passed over.
        prepare: images of a batch and a generator to what the model takes; None: fp32 as they are.
        seed: of the order, and of what ``prepare`` draws.
        rank: of this process, from 0 on.
        processes: how many share the images.

    Raises:
        InputError: numbers of images and labels differ, or there are fewer than one batch for each process.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        prepare: Callable[[Tensor, torch.Generator], Tensor] | None = None,
        *,
        seed: int = 0,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        if len(images) != len(labels):
            raise InputError(f"labels must be one for each of {len(images)} images, but there were {len(labels)}")
        if batch_size < 1 or len(images) < batch_size * processes:
            raise InputError(
                f"batch_size must be from 1 to {len(images) // processes} with {len(images)} images and {processes} "
                f"processes, but it was {batch_size}"
            )
        self.images, self.labels, self.batch_size, self.prepare = images, labels.long(), batch_size, prepare
        self.seed, self.rank, self.processes = seed, rank, processes
        self.steps = len(images) // (batch_size * processes)

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of this process; those of all processes together are a permutation of the images.

        Args:
            number: of the epoch, from 0 on; the order is a function of it and of the seed.
        """
        order = torch.randperm(len(self.images), generator=self._generator(number, 0))
        for step in range(self.steps):
            chosen = order[(step * self.processes + self.rank) * self.batch_size :][: self.batch_size]
            images = self.images[chosen]
            if self.prepare is not None:
                images = self.prepare(images, self._generator(number, 1 + step * self.processes + self.rank))
            yield images.float(), self.labels[chosen]

    def _generator(self, number: int, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed(hash((self.seed, number, stream)) % 2**63)


@contextlib.contextmanager
def seeded(seed: int, epoch: int) -> Iterator[None]:
    """Random numbers of torch, NumPy and Python as functions of seed and epoch; afterwards as they were."""
    # timm's mixup draws from NumPy's global numbers.
    state, old = random.getstate(), np.random.get_state()  # noqa: NPY002
    number = hash((seed, epoch)) % 2**32
    with torch.random.fork_rng():
        torch.manual_seed(number), np.random.seed(number), random.seed(number)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(state)
            np.random.set_state(old)  # noqa: NPY002
