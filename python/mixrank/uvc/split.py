"""How one budget is best divided between removing parts and lowering ranks: measured, without training."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from mixrank.compress import compress
from mixrank.counting import count_macs
from mixrank.errors import InputError
from mixrank.fidelity import compare, logits_of
from mixrank.sample import Apart
from mixrank.uvc.data import TrainingData
from mixrank.uvc.importance import observe
from mixrank.uvc.once import prune_once_
from mixrank.uvc.options import UVCOptions

POWERS = (0.1, 0.25, 0.5, 0.75)
"""Of the budget, that are tried."""
HELD_OUT = 0.2
"""Share of the images without labels that each attempt is judged on; its ranks are lowered by the others."""


def measure_split(
    model: nn.Module,
    data: TrainingData,
    images: Iterable,
    options: UVCOptions,
    *,
    powers: Sequence[float] = POWERS,
    dtype: torch.dtype | None = None,
) -> dict[float, float]:
    """How far the compressed model is from the dense one where ``budget ** power`` of the multiply-adds stay of parts.

    Parts go at once by their importance, and the ranks of what stays are lowered by the defaults of
    :func:`mixrank.compress`; nothing is trained.

    Args:
        model: a classifier, as for :func:`mixrank.uvc.run.compress_uvc_`; it is not changed.
        data: images by which importance is told; labels are drawn from the model itself.
        images: batches of images without labels, a list or a loader that can be gone through several times.
        options: of which the budget, the number of images observed, the multiple and the seed count.
        powers: each above 0 and below 1.
        dtype: run the models under autocast in this dtype.

    Returns:
        By power the mean divergence on images held out, in nats; without those that cannot reach the budget.

    Raises:
        InputError: none of them can (it says why), or the images are too few to hold some out.
    """
    seen = observe(model, data, options.observed or UVCOptions.observed, seed=options.seed, dtype=dtype)
    fitted, before = Apart(images, HELD_OUT), count_macs(model)
    found: dict[float, float] = {}
    dense: Tensor | None = None
    refused: InputError | None = None
    for power in powers:
        trial = copy.deepcopy(model).eval()
        try:
            prune_once_(trial, seen, options.budget**power, options.multiple)
            compress(trial, fitted, max_macs=int(options.budget * before), seed=options.seed, dtype=dtype)
        except InputError as error:
            refused = error
            continue
        judged = [batch.images for batch in fitted.kept]
        if dense is None:
            dense = logits_of(copy.deepcopy(model).eval(), judged, dtype)
        found[power] = compare(logits_of(trial, judged, dtype), dense).divergence
    if not found:
        assert refused is not None  # there is at least one power
        raise refused
    return found
