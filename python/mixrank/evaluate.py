"""Accuracy, speed and size of a model."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mixrank.counting import count_bytes, count_macs, count_parameters
from mixrank.data import as_batch
from mixrank.errors import InputError
from mixrank.progress import track


@dataclass(frozen=True)
class Evaluation:
    """What a model did on a set of images.

    Attributes:
        images: how many went through the model.
        top1: percent of images whose label has the largest logit; None without labels.
        top5: percent of images whose label is among the five largest; None without labels or with 5 classes or fewer.
        seconds: time in the model, without decoding.
        images_per_second: images by seconds; of a set this size, not a benchmark: see :func:`compare_speed`.
        skipped: images that did not decode.
        logits: ``[images, classes]`` fp32 on the CPU, for :func:`mixrank.fidelity.compare`.
    """

    images: int
    top1: float | None
    top5: float | None
    seconds: float
    images_per_second: float
    skipped: int
    logits: Tensor = field(repr=False, compare=False)


@dataclass(frozen=True)
class SpeedResult:
    """Speed of one model beside others.

    Attributes:
        images_per_second: median over the rounds.
        low: slowest round.
        high: fastest round.
        rounds: how often the model had its turn.
        batch: images in one call.
        threads: threads that PyTorch used for one operation on the CPU.
    """

    images_per_second: float
    low: float
    high: float
    rounds: int
    batch: int
    threads: int


@dataclass(frozen=True)
class ModelSummary:
    """What is compared before and after: accuracy in percent, size, work for one image, speed; None if not measured."""

    top1: float | None
    top5: float | None
    parameters: int
    bytes: int
    macs: int
    images_per_second: float | None

    def to_json(self) -> dict:
        """Return the summary in terms of JSON."""
        return asdict(self)


def evaluate(model: nn.Module, batches: Iterable[Any], *, progress: bool = False) -> Evaluation:
    """Run a classifier on images and count how often it is right.

    Args:
        model: images [B, C, H, W] to logits [B, classes]; it runs in eval mode and keeps the mode it had.
        batches: whatever :func:`mixrank.data.as_batch` reads, such as ``source.batches(32)``; images are moved to the
            model's device and floating dtype.
        progress: show a progress bar on standard error.

    Returns:
        Top-1 and top-5 where there are labels, the time it took, and the logits.

    Raises:
        InputError: there is no image; a label is outside the classes; the labels count subfolders, and there are not
            as many as classes; some images have labels and some none; an output is not finite or not [B, classes].

    Example:
        >>> import mixrank
        >>> model = mixrank.create_model("vit_tiny_patch16_224", args={"img_size": 32, "depth": 1, "num_classes": 3})
        >>> evaluate(model, [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]))]).images
        4
    """
    images, right1, right5, labelled, classes, seconds = 0, 0, 0, 0, 0, 0.0
    outputs: list[Tensor] = []
    device, dtype = _placement(model)
    with _eval_mode(model), torch.inference_mode():
        for item in track(batches, "evaluate", enabled=progress):
            batch = as_batch(item, images)
            x = batch.images.to(device, dtype)
            start = _now(device)
            logits = model(x)
            seconds += _now(device) - start
            classes = _check_logits(logits, batch.names)
            outputs.append(logits.float().cpu())
            if batch.labels is not None:
                _check_labels(batch.labels, batch.names, classes, getattr(batches, "classes", None))
                order = logits.float().topk(min(5, classes)).indices.cpu()
                hits = order == batch.labels.cpu()[:, None]
                right1 += int(hits[:, 0].sum())
                right5 += int(hits.sum())
                labelled += len(x)
            images += len(x)
    if images == 0:
        raise InputError("there is no image to evaluate the model on")
    if labelled not in (0, images):
        raise InputError(f"only {labelled} of {images} images have a label: give labels for all or for none")
    return Evaluation(
        images=images,
        top1=100 * right1 / images if labelled else None,
        top5=100 * right5 / images if labelled and classes > 5 else None,
        seconds=seconds,
        images_per_second=images / seconds,
        skipped=len(getattr(batches, "skipped", ())),
        logits=torch.cat(outputs),
    )


def _check_logits(logits: Any, names: list[str]) -> int:
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(names) or logits.shape[1] == 0:
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"the model must return logits [{len(names)}, classes], but it returned {found}")
    finite = logits.isfinite().all(dim=1)
    if not finite.all():
        raise InputError(f"the model's output for {names[int(finite.int().argmin())]} is not finite")
    return logits.shape[1]


def _check_labels(labels: Tensor, names: list[str], classes: int, folders: list[str] | None) -> None:
    outside = ((labels < 0) | (labels >= classes)).nonzero()
    if len(outside):
        first = int(outside[0])
        raise InputError(f"{names[first]} has the label {int(labels[first])}, but the model has {classes} classes")
    check_folders(folders, classes)


def check_folders(folders: list[str] | None, classes: int) -> None:
    """Raise InputError where folders give the labels, but not one for each class of the model."""
    # Counting the folders of a few classes from 0 would give a wrong accuracy that looks like a right one.
    if folders is not None and len(folders) != classes:
        raise InputError(
            f"the images lie in {len(folders)} class folders, but the model has {classes} classes: "
            "give the class indices in a CSV file of labels"
        )


def compare_speed(
    models: dict[str, nn.Module], images: Tensor, *, rounds: int = 5, warm_up: int = 1, min_seconds: float = 0.2
) -> dict[str, SpeedResult]:
    """Time models in turns (A B, B A, A B ...), so that whatever else the machine does meets each of them.

    Args:
        models: by the name under which the result is returned.
        images: [B, C, H, W], the same for all; moved to each model's device and floating dtype beforehand.
        rounds: turns of each model.
        warm_up: calls of each model that are not timed.
        min_seconds: a turn repeats the call until this much time has passed.

    Raises:
        InputError: there is no image, an argument is outside its range, or an output is not a finite tensor.
    """
    if images.dim() != 4 or len(images) == 0:
        raise InputError(f"images must be [B, C, H, W] with at least one image, but were {list(images.shape)}")
    for name, value, least in (("rounds", rounds, 1), ("warm_up", warm_up, 0), ("min_seconds", min_seconds, 0)):
        if not value >= least:
            raise InputError(f"{name} must be at least {least}, but it was {value}")
    rates: dict[str, list[float]] = {name: [] for name in models}
    with contextlib.ExitStack() as modes, torch.inference_mode():
        inputs = {}
        for name, model in models.items():
            modes.enter_context(_eval_mode(model))
            inputs[name] = images.to(*_placement(model))
            # Once more than asked for, since a model that computes nonsense has no speed worth telling.
            for _ in range(max(1, warm_up)):
                output = model(inputs[name])
            if not isinstance(output, Tensor) or not output.isfinite().all():
                raise InputError(f"the output of model {name!r} is not a finite tensor")
        for turn in range(rounds):
            for name in sorted(models, key=list(models).index, reverse=turn % 2 == 1):
                rates[name].append(_images_per_second(models[name], inputs[name], min_seconds))
    return {
        name: SpeedResult(
            statistics.median(values), min(values), max(values), rounds, len(images), torch.get_num_threads()
        )
        for name, values in rates.items()
    }


def _images_per_second(model: nn.Module, images: Tensor, min_seconds: float) -> float:
    calls, start = 0, _now(images.device)
    while True:
        model(images)
        calls += 1
        seconds = _now(images.device) - start
        if seconds >= min_seconds and seconds > 0:
            return calls * len(images) / seconds


def summarise(model: nn.Module, evaluation: Evaluation | None = None, speed: SpeedResult | None = None) -> ModelSummary:
    """Put the size of a model together with what was measured of it.

    Raises:
        InputError: the model's operations cannot be counted, see :func:`mixrank.counting.count_macs`.
    """
    return ModelSummary(
        top1=None if evaluation is None else evaluation.top1,
        top5=None if evaluation is None else evaluation.top5,
        parameters=count_parameters(model),
        bytes=count_bytes(model),
        macs=count_macs(model),
        images_per_second=None if speed is None else speed.images_per_second,
    )


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.float32


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
