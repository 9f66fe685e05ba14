"""How closely a classifier follows another one, without labels: divergence of the logits and agreement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixrank.errors import InputError


@dataclass(frozen=True)
class Fidelity:
    """How closely a model follows the dense one.

    Attributes:
        divergence: mean over the images of the Kullback-Leibler divergence of the softmax of the dense model from
            the model's, in nats; 0 where they are the same.
        agreement: percent of images for which both put the same class first.
        images: how many there were.
    """

    divergence: float
    agreement: float
    images: int


def divergence(logits: Tensor, dense: Tensor) -> Tensor:
    """KL(dense || model) of each image, in nats: logits ``[B, classes]`` of both in any floating dtype; ``[B]`` fp32.

    Differentiable in ``logits``.
    """
    log_model, log_dense = F.log_softmax(logits.float(), -1), F.log_softmax(dense.float(), -1)
    return F.kl_div(log_model, log_dense, log_target=True, reduction="none").sum(-1)


def compare(logits: Tensor, dense: Tensor) -> Fidelity:
    """The fidelity behind logits ``[B, classes]`` of a model and of the dense one.

    Raises:
        InputError: the logits are not of one shape ``[B, classes]`` with at least one image and two classes, or not
            finite.
    """
    if logits.shape != dense.shape or logits.dim() != 2 or len(logits) == 0 or logits.shape[1] < 2:
        raise InputError(
            f"both models must return logits [images, classes] of at least two classes, but they returned "
            f"{list(logits.shape)} and {list(dense.shape)}"
        )
    if not logits.isfinite().all() or not dense.isfinite().all():
        raise InputError("the logits of a model are not finite")
    same = (logits.argmax(1) == dense.argmax(1)).float().mean().item()
    mean = max(0.0, divergence(logits, dense).mean().item())  # of nearly equal logits it is below zero by rounding
    return Fidelity(mean, 100 * same, len(logits))


def logits_of(model: nn.Module, batches: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """Logits ``[images, classes]`` in fp32 on the CPU, of a model in evaluation mode, under autocast in ``dtype``."""
    parameter = next(model.parameters())
    with torch.inference_mode(), torch.autocast(parameter.device.type, dtype, enabled=dtype is not None):
        outputs = [model(batch.to(parameter.device, parameter.dtype)).float().cpu() for batch in batches]
    return torch.cat(outputs)
