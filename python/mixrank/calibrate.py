"""Calibration: second-moment statistics of every compressible layer over a few hundred unlabelled images."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from mixrank.accumulate import Frames, Measure, Part, groups_of
from mixrank.data import Batch, as_batch
from mixrank.errors import InputError
from mixrank.gradients import backward, held_bytes
from mixrank.memory import trim
from mixrank.models import compressible_linears
from mixrank.processes import are_several, gathered, is_first
from mixrank.progress import track
from mixrank.stats import CalibrationStats
from mixrank.weighting import AUTOMATIC, Weighting

CHUNK = 8  # most images that pass at once where gradients have to flow
HELD = 3 * 2**28  # most bytes that such a pass may hold for the way back, but for one of a single image
DEFAULT_HELD_OUT = 0.2


def held_out_before(images: Tensor, share: float) -> Tensor:
    """How many of the first images are held out, for each of some counts: they are evenly spread."""
    return (images * share + 1e-9).floor()


def held_out_images(numbers: Sequence[int], share: float, views: int) -> Tensor:
    """Which of the views with these numbers are of images that are held out; all views of an image stay together."""
    image = torch.tensor(numbers, dtype=torch.float64).div(views, rounding_mode="floor")
    return held_out_before(image + 1, share) > held_out_before(image, share)


def numbers_of(batch: Batch, first: int) -> Sequence[int]:
    """The places of a batch's images in their source; ``first`` counts the images that came before.

    Raises:
        InputError: several processes share the images, and the batch does not tell.
    """
    if batch.numbers is not None:
        return batch.numbers
    if are_several():
        raise InputError(
            "batches of several processes must tell the numbers of their images, as those of open_images do"
        )
    return range(first, first + len(batch.images))


def check_calibration(
    model: nn.Module,
    *,
    held_out: float | None,
    weighting: str | Weighting,
    draws: int,
    gradients: bool,
    gradient_power: float = 1.0,
    inputs: bool = False,
) -> Measure:
    """Return what :func:`calibrate` shall measure; raise InputError where its arguments are outside their ranges."""
    if held_out is not None and not 0 <= held_out < 1:
        raise InputError(f"held_out must be at least 0 and below 1, but it was {held_out}")
    if draws < 1:
        raise InputError(f"draws must be at least 1, but it was {draws}")
    if not 0 < gradient_power <= 1:
        raise InputError(f"gradient_power must be above 0 and at most 1, but it was {gradient_power}")
    prefix = getattr(model, "num_prefix_tokens", 0) or 0
    measure = Measure(Weighting.of(weighting), prefix, gradients, inputs, gradient_power)
    if measure.weighting.kind == "class" and not measure.prefix_tokens:
        raise InputError(f"weighting 'class' needs a model with a class token, but {type(model).__name__} has none")
    return measure


def calibrate(
    model: nn.Module,
    batches: Iterable,
    *,
    held_out: float | None = 0.0,
    weighting: str | Weighting = "none",
    gradients: bool = False,
    gradient_power: float = 1.0,
    inputs: bool = False,
    draws: int = 1,
    seed: int = 0,
    progress: bool = False,
    dtype: torch.dtype | None = None,
) -> CalibrationStats:
    """Run the model over images and accumulate the statistics of every compressible layer.

    The model runs in evaluation mode, and comes back in the mode that it was in. The first image of
    each size passes through it once more, alone and before the others, to find the layers that share an input. Which
    layers do must not depend on anything but the size of the images. Where gradients have to flow, eight images at
    a time pass through the model and back, or fewer of a model that would hold much of them meanwhile.

    Args:
        model: a model whose linear layers :func:`mixrank.models.compressible_linears` finds.
        batches: :class:`mixrank.data.Batch` objects, image tensors ``[B, C, H, W]``, or tuples and lists that begin
            with one. Labels are not used. An attribute ``views`` says how many views of each image follow each other,
            one ``held_out`` which share was expected to be held out. Where several processes share the images
            (:mod:`mixrank.processes`), those of this one; all of them return the sums over all.
        held_out: share of the images, in [0, 1), whose statistics are kept apart, to tell errors on images that the
            factors were not made from. They are spread evenly, and the same ones whatever the batches are. None: a
            fifth, or none of fewer than five images.
        weighting: how much each token counts, see :mod:`mixrank.weighting`.
        gradients: also sum the outer products of the gradients of the loss with respect to each layer's outputs, for
            ``factors="fisher"``.
        gradient_power: of each image's sum of squared gradients at a layer, in (0, 1]: 1 takes gradients as they are,
            less keeps few images from having most of the sum, see :mod:`mixrank.gradients`.
        inputs: sum over the inputs of every layer, ``[K, K]``, also where its outputs are fewer, and of the gradients
            only the squares, ``[N]``: what sparse weights are fitted by (:mod:`mixrank.sparse`).
        draws: random probes of each image's answer, for gradients, see :mod:`mixrank.gradients`.
        seed: of these draws.
        progress: show a progress bar with the time left.
        dtype: run the model under autocast in this dtype (bfloat16 is about twice as fast on recent CPUs);
            the sums stay in float64. None: the model's own dtype.

    Returns:
        Statistics by layer name. A layer that was never called has none and is named in ``idle``.

    Raises:
        InputError: no images, or too few to hold any out; no layer to compress, or none was called; a layer sees NaN
            or infinite values (named with the image); gradients of a model that is no classifier; an argument
            outside its range, or ``held_out`` other than the batches were told.

    Example:
        >>> import timm, torch
        >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
        >>> calibrate(model, [torch.randn(2, 3, 32, 32)])["blocks.0.attn.proj"].gram.shape
        torch.Size([192, 192])
    """
    measure = check_calibration(
        model, held_out=held_out, weighting=weighting, draws=draws, gradients=gradients,
        gradient_power=gradient_power, inputs=inputs,
    )  # fmt: skip
    return _summed(model, batches, measure, held_out, draws, seed, progress, dtype).finish()


def calibrate_both(
    model: nn.Module,
    batches: Iterable,
    *,
    held_out: float | None = 0.0,
    gradient_power: float = 1.0,
    draws: int = 1,
    seed: int = 0,
    progress: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[CalibrationStats, CalibrationStats]:
    """Statistics of tokens by :data:`mixrank.weighting.AUTOMATIC` and of tokens alike, from one pass, with gradients.

    The arguments and errors are those of :func:`calibrate`.
    """
    measure = check_calibration(
        model, held_out=held_out, weighting=AUTOMATIC, draws=draws, gradients=True, gradient_power=gradient_power
    )
    sums = _summed(model, batches, measure, held_out, draws, seed, progress, dtype)
    alike = sums.finish(alike=True)
    return sums.finish(), alike


@dataclass(frozen=True)
class _Sums:
    """What passed through the layers of a model: of the images that are used, and of those held out."""

    linears: dict[str, nn.Linear]
    parts: list[Part]
    views: int
    seconds: float

    def finish(self, *, alike: bool = False) -> CalibrationStats:
        """The statistics; those of tokens alike have to come first."""
        layers, *others = (part.finish(self.views, alike=alike) for part in self.parts)
        reached = {name for name in layers if all(name in other for other in others)}
        idle = tuple(name for name in self.linears if name not in reached)
        if not reached:
            raise InputError(f"layer {idle[0]} ({len(idle)} in all) was never called, so there are no statistics")
        counts = (-(-part.images // self.views) for part in self.parts)
        results = [
            CalibrationStats({name: found[name] for name in found if name in reached}, images, self.seconds, idle=idle)
            for found, images in zip((layers, *others), counts, strict=True)
        ]
        results[0].held_out = results[1] if others else None
        trim()  # of all that passed through the model nothing is needed any more
        return results[0]


def _summed(
    model: nn.Module,
    batches: Iterable,
    measure: Measure,
    held_out: float | None,
    draws: int,
    seed: int,
    progress: bool,
    dtype: torch.dtype | None,
) -> _Sums:
    linears = compressible_linears(model)
    if not linears:
        raise InputError(f"the model ({type(model).__name__}) has no linear layer that can be compressed")
    told = getattr(batches, "held_out", held_out)
    if told != held_out:  # a sample of the images held out would be of others
        raise InputError(f"held_out must be {told}, as the batches were told, but it was {held_out}")
    share = DEFAULT_HELD_OUT if held_out is None else held_out
    views = getattr(batches, "views", 1)
    parameter = next(model.parameters())
    training, started = model.training, time.perf_counter()
    frames = Frames()
    parts = [Part(linears, measure, frames) for _ in range(2 if share else 1)]
    sizes: set[torch.Size] = set()
    chunk = CHUNK
    try:
        model.eval()
        autocast = torch.autocast(parameter.device.type, dtype, enabled=dtype is not None)
        # What is made in inference mode cannot take part in a backward pass.
        with torch.inference_mode(not measure.backward), torch.no_grad(), autocast:
            for item in track(batches, "calibrating", enabled=progress and is_first()):
                first = sum(part.images for part in parts)
                batch = as_batch(item, first)
                inputs = batch.images.to(parameter.device, parameter.dtype)
                if inputs.shape[1:] not in sizes:
                    groups = groups_of(linears, partial(_once, model, inputs[:1]))
                    for part in parts:
                        part.arrange(groups)
                    sizes.add(inputs.shape[1:])
                    if measure.backward:
                        chunk = max(1, min(chunk, HELD // max(1, held_bytes(model, inputs[:1]))))
                places = numbers_of(batch, first)
                apart = held_out_images(places, share, views)
                for part, chosen in zip(parts, (~apart, apart), strict=False):
                    for index in chosen.nonzero().flatten().split(chunk if measure.backward else max(1, len(inputs))):
                        if len(index):
                            images = inputs if len(index) == len(inputs) else inputs[index.to(inputs.device)]
                            names = [batch.names[i] for i in index.tolist()]
                            forward = partial(model, images)
                            if measure.backward:
                                numbers = [places[i] for i in index.tolist()]
                                forward = partial(backward, model, images, numbers, names, draws, seed)
                            part.run(forward, names)
    finally:
        model.train(training)
    _over_processes(parts)
    seconds = time.perf_counter() - started
    total = sum(part.images for part in parts)
    if total == 0:
        raise InputError("calibration needs at least one image, but there was none")
    if held_out and any(part.images == 0 for part in parts):
        raise InputError(f"held_out={held_out} needs more images, but there were {-(-total // views)}")
    return _Sums(linears, [part for part in parts if part.images], views, seconds)


def _over_processes(parts: list[Part]) -> None:
    """Sums over the images of all processes, where several share them; each of them has seen some."""
    if not are_several():
        return
    known = gathered([[list(each.layers) for each in part.accumulators] for part in parts])
    if not all(any(part) for part in known):
        raise InputError(f"{len(known)} processes need at least as many batches of images: take smaller ones")
    if any(other != known[0] for other in known):
        raise InputError("processes must see images of the same sizes, but layers shared inputs in some of them only")
    for part in parts:
        part.add_up()


def _once(model: nn.Module, image: Tensor) -> object:
    return model(image.clone())
