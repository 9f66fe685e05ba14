"""What a compression chooses by itself depends on whether the model is a classifier: its first image tells."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor, nn

from mixrank.data import as_batch


def classifies(model: nn.Module, images: Iterable) -> tuple[bool, Iterable]:
    """Whether a model makes logits of at least two classes of the first image, and all images again.

    Args:
        model: in any mode; it is as it was afterwards. With an attribute ``num_classes`` of 0, as timm's backbones have
            it, it is no classifier.
        images: batches as for :func:`mixrank.calibrate.calibrate`; an iterator has to be replaced by what is returned.

    Returns:
        False without any image.
    """
    stream = iter(images)
    first = next(stream, None)
    if isinstance(images, Iterator):
        images = stream if first is None else chain([first], stream)
    if first is None or getattr(model, "num_classes", None) == 0:
        return False, images
    parameter = next(model.parameters())
    image = as_batch(first).images[:1].to(parameter.device, parameter.dtype)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            output = model(image.clone()) if len(image) else None
    finally:
        for module, mode in modes.items():
            module.training = mode
    return isinstance(output, Tensor) and output.dim() == 2 and output.shape[1] >= 2, images
