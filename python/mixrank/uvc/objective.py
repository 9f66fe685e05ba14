"""What unified compression minimises: the error of the labels, and the distance from the model before compression."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mixrank.errors import InputError


def objective(
    logits: Tensor, target: Tensor, teacher: Tensor | None, *, share: float, temperature: float, smoothing: float
) -> Tensor:
    """``(1 - share) cross-entropy + share T^2 KL(teacher || model)`` (Hinton, Vinyals, Dean 2015), in fp32.

    Args:
        logits: ``[B, classes]``.
        target: ``[B]`` int64 class indices, or ``[B, classes]`` probabilities (of mixed images).
        teacher: ``[B, classes]`` logits of the model before compression; None: cross-entropy alone.
        share: of the distillation, in [0, 1].
        temperature: T, above 0.
        smoothing: of the labels, in [0, 1), where these are class indices.
    """
    logits = logits.float()
    smooth = smoothing if target.dim() == 1 else 0.0
    labels = F.cross_entropy(logits, target, label_smoothing=smooth)
    if teacher is None:
        return labels
    student, wanted = ((each.float() / temperature).log_softmax(-1) for each in (logits, teacher))
    distance = F.kl_div(student, wanted, log_target=True, reduction="batchmean")
    return (1 - share) * labels + share * temperature**2 * distance


def check_labels(labels: Tensor, classes: int, place: str) -> None:
    """Raise InputError unless ``labels`` are int64 class indices below ``classes``; ``place`` says where they came."""
    if labels.dim() != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise InputError(f"labels must be class indices [B], but {place} had {labels.dtype} of {list(labels.shape)}")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        wrong = int(labels.min()) if labels.min() < 0 else int(labels.max())
        raise InputError(f"labels must lie in 0 to {classes - 1}, as the model has classes, but {place} had {wrong}")
