"""How close a compressed classifier stays to the dense one: accuracy, agreement, divergence, which images are right.

Top-1 alone needs thousands of images to tell two methods apart. Agreement with the dense model's predictions and the
Kullback-Leibler divergence of the softmax need no label, and which images each model gets right lets two models be
compared on the same images (McNemar's test).
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mixrank import fidelity
from mixrank.data import Batch
from mixrank.errors import InputError


@dataclass(frozen=True)
class Reference:
    """The dense model on the images of a comparison.

    Attributes:
        images: the batches, each ``[B, C, H, W]``.
        labels: ``[images]`` int64, the class index of each image.
        logits: ``[images, classes]`` float32.
    """

    images: list[Tensor]
    labels: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Fidelity:
    """One model against the dense one on the same images.

    Attributes:
        images: how many there were.
        top1: percent of images whose label has the largest logit.
        agreement: percent of images on which both models predict the same class.
        kl: mean over the images of KL(dense || model) of the softmax, in nats.
        correct: one character an image, in their order: ``1`` where the model is right, else ``0``.
        seconds: time in the model.
    """

    images: int
    top1: float
    agreement: float
    kl: float
    correct: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the comparison in terms of JSON."""
        return asdict(self)


def reference(
    dense: nn.Module, batches: Iterable[Batch], *, dtype: torch.dtype | None = None, logits: Tensor | None = None
) -> Reference:
    """Keep the images and the dense model's logits for any number of comparisons.

    Args:
        dense: images ``[B, C, H, W]`` to logits ``[B, classes]``.
        batches: labelled images.
        dtype: run the model under autocast in this dtype. None: the model's own dtype.
        logits: ``[images, classes]``, what the model returned for these images before; it is not run again.

    Raises:
        InputError: there is no image, one without a label, or logits of another number of images.
    """
    batches = list(batches)
    if not batches:
        raise InputError("batches must hold at least one image, but there was none")
    if any(batch.labels is None for batch in batches):
        raise InputError("batches must have a label for every image, but some had none")
    images = [batch.images for batch in batches]
    labels = torch.cat([batch.labels for batch in batches])
    if logits is not None and len(logits) != len(labels):
        raise InputError(f"logits must be of the {len(labels)} images, but there were {len(logits)}")
    return Reference(images, labels, logits_of(dense, images, dtype=dtype) if logits is None else logits)


def logits_of(model: nn.Module, images: Iterable[Tensor], *, dtype: torch.dtype | None = None) -> Tensor:
    """Return the logits ``[images, classes]`` of a model in evaluation mode, in float32 on the CPU."""
    training = model.training
    model.eval()
    try:
        return fidelity.logits_of(model, list(images), dtype)
    finally:
        model.train(training)


def compare(model: nn.Module, dense: Reference, *, dtype: torch.dtype | None = None) -> Fidelity:
    """Run a model on the images of ``dense`` and compare it with the labels and with the dense model.

    Args:
        model: images ``[B, C, H, W]`` to logits ``[B, classes]``.
        dense: what :func:`reference` returned.
        dtype: run the model under autocast in this dtype. None: the model's own dtype.

    Raises:
        InputError: an output is not finite or has another shape than the dense model's.
    """
    started = time.perf_counter()
    logits = logits_of(model, dense.images, dtype=dtype)
    return compare_logits(logits, dense, seconds=time.perf_counter() - started)


def compare_logits(logits: Tensor, dense: Reference, *, seconds: float = 0.0) -> Fidelity:
    """Compare logits ``[images, classes]`` with the labels and with the dense model's.

    Raises:
        InputError: as :func:`compare`.
    """
    if logits.shape != dense.logits.shape:
        raise InputError(
            f"the model must return logits {list(dense.logits.shape)} as the dense model, but returned "
            f"{list(logits.shape)}"
        )
    close = fidelity.compare(logits, dense.logits)
    right = logits.argmax(-1) == dense.labels
    return Fidelity(
        images=len(logits),
        top1=100 * right.double().mean().item(),
        agreement=close.agreement,
        kl=close.divergence,
        correct="".join("1" if one else "0" for one in right.tolist()),
        seconds=seconds,
    )
