"""Which form the layers of a compressed model are given, where that is measured: low ranks or sparse weights.

Of one model the one follows it more closely, of another the other, and nothing that is known before tells which
(docs/accuracy.md). So both are made of most of the images, and judged by the rest. The two are far apart where it
matters, so a trial is made in a shorter way than what is kept: without measured pulls and weights of layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from mixrank.automatic import classifies
from mixrank.calibrate import DEFAULT_HELD_OUT
from mixrank.data import as_batch
from mixrank.errors import InputError
from mixrank.fidelity import compare, logits_of
from mixrank.models import twin
from mixrank.processes import are_several
from mixrank.sample import Apart

TRIED = ("pivoted", "sparse")
TRIAL_IMAGES = 32
"""That the ranks of a trial are measured on."""


def unmeasurable(images: Iterable) -> str | None:
    """Why forms cannot be measured with these images; None where they can."""
    if isinstance(images, Iterator):
        return "the images go by once, as they were an iterator, and not a list or a loader"
    count, needed = 0, math.ceil(1 / DEFAULT_HELD_OUT)
    for item in images:
        count += len(as_batch(item, count).images)
        if count >= needed:
            return None
    return f"it takes {needed} images at least, but there were {count}"


def measure_forms(
    model: nn.Module,
    images: Iterable,
    make: Callable[[nn.Module, Iterable, str], object],
    *,
    dtype: torch.dtype | None = None,
) -> dict[str, float]:
    """How far the model of each form of :data:`TRIED` is from the dense one.

    Args:
        model: a classifier; it is not changed.
        images: batches of images without labels, a list or a loader that can be gone through several times.
        make: compresses a model in place, by images, to layers of a form.
        dtype: run the models under autocast in this dtype.

    Returns:
        By form the mean divergence on images held out, in nats.

    Raises:
        InputError: the images are an iterator, are too few to hold some out, or come to several processes; the model
            is no classifier; or from ``make``.
    """
    if (reason := unmeasurable(images)) is not None:
        raise InputError(f"form='auto' tries two forms, but {reason}")
    if are_several():
        raise InputError("form='auto' works in one process: choose a form where there are several")
    if not classifies(model, images)[0]:
        raise InputError(f"form='auto' needs logits of classes, but {type(model).__name__} returns none")
    fitted = Apart(images, DEFAULT_HELD_OUT)
    found: dict[str, float] = {}
    target: Tensor | None = None
    for form in TRIED:
        trial = twin(model)
        make(trial, fitted, form)
        judged = [batch.images for batch in fitted.kept]
        if target is None:
            target = logits_of(twin(model).eval(), judged, dtype)
        logits = logits_of(trial.eval(), judged, dtype)
        found[form] = compare(logits, target).divergence if logits.isfinite().all() else math.inf
    return found


def best_of(found: dict[str, float]) -> tuple[str, str]:
    """The form of least divergence, and a sentence that tells all of them."""
    best = min(found, key=lambda form: found[form] if math.isfinite(found[form]) else math.inf)
    told = ", ".join(f"{form} {divergence:.3g}" for form, divergence in found.items())
    return best, f"layers are {best}: divergence on images held out, in nats: {told}"
