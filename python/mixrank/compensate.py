"""Error compensation: the factors of a compressed model are trained to follow the dense one on unlabelled images.

After truncation every layer still sees inputs that the layers before it have changed, and its error was the least
for the layer and not for the model. Gradients mend both (Azizi, Nazemi, Pedram 2024, layer-wise error compensation,
widened here from a layer's outputs to a block's and to the model's):

``layer``
    every factored layer imitates the dense model's outputs of the same layer, from the inputs that the compressed
    layers before it give; the gradient stays within the layer (the paper's).
``block``
    the same for whole blocks.
``model``
    the gradient passes through the whole model, whose block outputs imitate the dense model's and whose logits are
    distilled (KL).

In all three the error of a tap (a layer or block) is the mean over tokens of ``|s - t|^2 / |t - mean(t)|^2``: relative
for each token, so that the few tokens of enormous norm do not drown the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from mixrank.errors import InputError
from mixrank.nn_pivoted import put_back_, unpivot_
from mixrank.training import CompensationOptions, CompensationResult, Training, modes
from mixrank.views import Views, gather

__all__ = ["CompensationOptions", "CompensationResult", "compensate_"]


def compensate_(
    model: nn.Module,
    dense: nn.Module,
    images: Iterable,
    *,
    steps: int | None = None,
    minutes: float | None = None,
    options: CompensationOptions | None = None,
    dtype: torch.dtype | None = None,
    state: Path | str | None = None,
    progress: bool = False,
) -> CompensationResult:
    """Train a compressed model in place to follow the dense one on unlabelled images.

    The model is left at the step that followed the dense model best on the held-out images, which may be none: it is
    never left worse than it came. Both models run in evaluation mode (no dropout). Layers in the pivoted form are
    trained as factors and brought back into their form, the same up to rounding.

    Args:
        model: with factored layers; on any device, in fp32.
        dense: the model before compression, on the same device.
        images: batches as for :func:`mixrank.calibrate`; all are kept in memory, in fp16. Labels are not used.
        steps: how many steps to train; or
        minutes: how long to take, evaluation included; the number of steps follows from the speed of the first ones.
        options: see :class:`CompensationOptions`.
        dtype: train under autocast in this dtype (bfloat16 is faster on recent CPUs and GPUs); parameters and the
            optimizer stay in fp32.
        state: a file in which the run is kept from time to time; where it exists already the run goes on from it and
            ends with the same bits, on the same machine and number of threads.
        progress: show a progress bar with the time left.

    Returns:
        Fidelity before and after, the held-out errors along the way, and why the training ended.

    Raises:
        InputError: an option outside its range, not exactly one of ``steps`` and ``minutes``, no factored layer, too
            few images, parameters that are not fp32, a state of another run, a loss that is not finite. The model is
            then as it was.

    Example:
        >>> import timm, copy, torch
        >>> from mixrank import compress
        >>> dense = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
        >>> model, images = copy.deepcopy(dense), [torch.randn(8, 3, 32, 32)]
        >>> _ = compress(model, images, keep=0.5)
        >>> result = compensate_(model, dense, images, steps=2, options=CompensationOptions(batch_size=4))
        >>> result.after.divergence <= result.before.divergence
        True
    """
    options = options or CompensationOptions()
    options.check()
    _check_budget(steps, minutes)
    images = gather(images, least=2)
    apart = max(1, round(options.held_out * len(images)))
    if apart >= len(images):
        raise InputError(f"held_out={options.held_out} leaves none of the {len(images)} images to train on")
    # Evenly spread, as images of one class often lie together.
    index = torch.arange(len(images))
    held = ((index + 1) * apart // len(images)) > (index * apart // len(images))
    views = Views(images[~held], options.batch_size, seed=options.seed, min_scale=options.min_scale, mix=options.mix)
    pivoted = unpivot_(model)
    try:
        training = Training(model, dense, options, dtype, views, images[held])
        original = {name: parameter.detach().clone() for name, parameter in training.parameters.items()}
        try:
            with modes(model, dense, training.parameters):
                result = training.run(steps, minutes, None if state is None else Path(state), progress)
        except BaseException:
            training.set(original)
            raise
    except BaseException:
        put_back_(model, pivoted)
        raise
    put_back_(model, pivoted, trained=result.best_step > 0)
    return result


def _check_budget(steps: int | None, minutes: float | None) -> None:
    if (steps is None) == (minutes is None):
        raise InputError("exactly one of steps and minutes must be given")
    if steps is not None and steps < 1:
        raise InputError(f"steps must be at least 1, but it was {steps}")
    if minutes is not None and not 0 < minutes < math.inf:
        raise InputError(f"minutes must be above 0, but it was {minutes}")
