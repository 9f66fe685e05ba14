"""Calibration: second-moment statistics of every compressible layer over a few hundred unlabelled images."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mixrank.accumulate import Part, groups_of
from mixrank.data import as_batch
from mixrank.errors import InputError
from mixrank.models import compressible_linears
from mixrank.progress import track
from mixrank.stats import CalibrationStats


def _held_out(first: int, count: int, share: float) -> Tensor:
    """Which of ``count`` images from number ``first`` on are held out: evenly spread, whatever the batches are."""
    index = torch.arange(first, first + count + 1, dtype=torch.float64)
    return ((index * share + 1e-9).floor().diff() > 0).cpu()


def calibrate(
    model: nn.Module,
    batches: Iterable,
    *,
    held_out: float = 0.0,
    progress: bool = False,
    dtype: torch.dtype | None = None,
) -> CalibrationStats:
    """Run the model over images and accumulate the statistics of every compressible layer.

    The model runs in evaluation mode without gradients, and comes back in the mode that it was in. The first image of
    each size passes through it once more, alone and before the others, to find the layers that share an input. Which
    layers do must not depend on anything but the size of the images.

    Args:
        model: a model whose linear layers :func:`mixrank.models.compressible_linears` finds.
        batches: :class:`mixrank.data.Batch` objects, image tensors ``[B, C, H, W]``, or tuples and lists that begin
            with one. Labels are not used.
        held_out: share of the images, in [0, 1), whose statistics are kept apart, to tell errors on images that the
            factors were not made from. They are spread evenly, and the same ones whatever the batches are.
        progress: show a progress bar with the time left.
        dtype: run the model under autocast in this dtype (bfloat16 is about twice as fast on recent CPUs);
            the sums stay in float64. None: the model's own dtype.

    Returns:
        Statistics by layer name.

    Raises:
        InputError: no images, or too few to hold any out; no layer to compress; a layer sees NaN or infinite values
            (named with the image).

    Example:
        >>> import timm, torch
        >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
        >>> calibrate(model, [torch.randn(2, 3, 32, 32)])["blocks.0.attn.proj"].gram.shape
        torch.Size([192, 192])
    """
    if not 0 <= held_out < 1:
        raise InputError(f"held_out must be at least 0 and below 1, but it was {held_out}")
    linears = compressible_linears(model)
    if not linears:
        raise InputError(f"the model ({type(model).__name__}) has no linear layer that can be compressed")
    parameter = next(model.parameters())
    training, started = model.training, time.perf_counter()
    parts = [Part(), Part()] if held_out else [Part()]
    sizes: set[torch.Size] = set()
    try:
        model.eval()
        with torch.inference_mode(), torch.autocast(parameter.device.type, dtype, enabled=dtype is not None):
            for item in track(batches, "calibrating", enabled=progress):
                first = sum(part.images for part in parts)
                batch = as_batch(item, first)
                inputs = batch.images.to(parameter.device, parameter.dtype)
                if inputs.shape[1:] not in sizes:
                    groups = groups_of(model, linears, inputs[:1])
                    for part in parts:
                        part.arrange(linears, groups)
                    sizes.add(inputs.shape[1:])
                apart = _held_out(first, len(inputs), held_out)
                for part, chosen in zip(parts, (~apart, apart), strict=False):
                    if chosen.any():
                        index = chosen.nonzero().flatten()
                        images = inputs if chosen.all() else inputs[index.to(inputs.device)]
                        part.run(model, images, [batch.names[i] for i in index.tolist()])
    finally:
        model.train(training)
    seconds = time.perf_counter() - started
    images = sum(part.images for part in parts)
    if images == 0:
        raise InputError("calibration needs at least one image, but there was none")
    if any(part.images == 0 for part in parts):
        raise InputError(f"held_out={held_out} needs more images, but there were {images}")
    layers, *others = (part.finish(linears) for part in parts)
    apart = CalibrationStats(others[0], parts[1].images, seconds) if others else None
    return CalibrationStats(layers, parts[0].images, seconds, apart)
