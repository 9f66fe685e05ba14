"""What ``mixrank uvc`` does: every check first, then the long work, then the files."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from mixrank.cli_input import (
    check_budgets,
    check_device,
    check_outputs,
    check_positive,
    chosen_device,
    chosen_dtype,
    first_images,
    model_arguments,
)
from mixrank.cli_output import comparison_table, versions, write_json
from mixrank.errors import InputError
from mixrank.precision import Precision
from mixrank.processes import is_first, joined, place
from mixrank.uvc.combine import CombinedResult, compress_combined_, states_of
from mixrank.uvc.loader import LoaderData
from mixrank.uvc.recipe import Recipe, read_recipe
from mixrank.uvc.run import compress_uvc_
from mixrank.uvc.scalars import writer

if TYPE_CHECKING:
    from torch import nn

    from mixrank.data import ImageSource
    from mixrank.uvc.options import UVCOptions, UVCResult

CALIBRATION_IMAGES = 1000
_BATCH = 32
_GIVEN = ("budget", "epochs", "batch_size", "learning_rate", "distillation", "seed")


@dataclasses.dataclass(frozen=True)
class CommandOptions:
    """The arguments of the command, under their own names."""

    model: str
    images: str
    out: Path
    weights: Path | None
    model_args: str | None
    budget: float | None
    then_mixed_rank: bool
    recipe: str | None
    epochs: float | None
    batch_size: int | None
    learning_rate: float | None
    distillation: float | None
    labels: Path | None
    data_root: Path | None
    split: str
    limit: int | None
    workers: int
    device: str
    dtype: Precision
    resume: bool
    eval_images: str | None
    eval_labels: Path | None
    eval_split: str
    json: Path | None
    tensorboard: Path | None
    strict: bool
    seed: int | None
    quiet: bool

    @property
    def state(self) -> Path:
        """Where the run is kept while it lasts."""
        return self.out.with_name(f"{self.out.name}.state")

    def check(self) -> Recipe:
        """Everything that can be known before a model is built; returns what the run goes by."""
        if self.budget is not None:
            check_budgets("--budget", self.budget)
        for name in ("batch_size", "limit"):
            check_positive(name, getattr(self, name))
        for path in (self.weights, self.labels, self.eval_labels):
            if path is not None and not path.is_file():
                raise InputError(f"{path} does not exist or is not a file")
        if self.eval_labels is not None and self.eval_images is None:
            raise InputError("--eval-labels belongs to --eval-images, which is missing")
        check_device(self.device)
        check_outputs({"--out": self.out, "--json": self.json}, self.weights, self.labels, self.eval_labels)
        for path in states_of(self.state):
            if path.exists() and not self.resume:
                raise InputError(f"{path} is an interrupted run: go on with --resume, or delete it")
        return read_recipe(self.recipe, {name: getattr(self, name) for name in _GIVEN})


def run(options: CommandOptions) -> None:
    """Compress and write; ``out`` is not written unless everything before it worked."""
    recipe = options.check()
    with joined(chosen_device(options.device)) as device:
        _run(options, recipe, device)


class _Running(TypedDict):
    """What both ways to compress are run with."""

    options: UVCOptions
    validation: Iterable | None
    dtype: torch.dtype | None
    state: Path
    log: Callable[[dict[str, Any]], None] | None
    progress: bool


def _run(options: CommandOptions, recipe: Recipe, device: torch.device) -> None:
    from mixrank import checkpoint
    from mixrank.identity import compressed_from
    from mixrank.models import create_model, preprocessing

    args = model_arguments(options.model_args)
    dense = create_model(options.model, pretrained=options.weights is None, weights=options.weights, args=args)
    images = _open(options, preprocessing(dense), options.images, options.labels, options.split, options.limit)
    validation = None
    if options.eval_images is not None:
        wanted = options.eval_images, options.eval_labels, options.eval_split
        validation = _open(options, preprocessing(dense), *wanted)
    for source in (images, validation):
        _check_classes(source, dense)
    rank, processes = place()
    data = LoaderData(
        images,
        preprocessing(dense),
        recipe.batch_size,
        views=dict(recipe.views),
        workers=options.workers,
        seed=recipe.options.seed,
        rank=rank,
        processes=processes,
        strict=options.strict,
    )
    log = writer(options.tensorboard) if options.tensorboard is not None and is_first() else None
    running: _Running = {
        "options": recipe.options,
        "validation": None if validation is None else validation.batches(_BATCH),
        "dtype": chosen_dtype(options.dtype, device),
        "state": options.state,
        "log": log,
        "progress": not options.quiet and is_first(),
    }
    model = copy.deepcopy(dense).to(device)
    if options.then_mixed_rank:
        wanted = options.images, options.labels, options.split
        calibration = _open(options, preprocessing(dense), *wanted, CALIBRATION_IMAGES)
        batches = calibration.batches(_BATCH)
        result: UVCResult | CombinedResult = compress_combined_(
            model, data, batches, combined=recipe.combined, **running
        )
    else:
        result = compress_uvc_(model, data, **running)
    if is_first():
        model = model.cpu()
        checkpoint.save(model, options.out, metadata={"uvc": _noted(result)} | compressed_from(dense))
        _report(options, recipe, result, dense, model, first_images(validation or images, 8), data.skipped)
        for path in states_of(options.state):
            path.unlink(missing_ok=True)


def _open(
    options: CommandOptions, data_config: dict, images: str, labels: Path | None, split: str, limit: int | None = None
) -> ImageSource:
    from mixrank.data import open_images

    return open_images(
        images,
        data_config,
        labels=labels,
        limit=limit,
        seed=options.seed or 0,
        strict=options.strict,
        root=options.data_root,
        split=split,
    )


def _check_classes(source: ImageSource | None, model: nn.Module) -> None:
    from mixrank.attributes import class_count
    from mixrank.evaluate import check_folders

    if source is None:
        return
    if not source.labelled:
        raise InputError(f"{source.source} has no labels: give one folder for each class, or a csv file")
    check_folders(source.classes, class_count(model))


def _noted(result: UVCResult | CombinedResult) -> dict[str, Any]:
    """What a checkpoint says of its origin: no times, so that a run that was interrupted writes the same bytes."""
    return _without(result.to_json(), ("seconds", "history"))


def _without(value: Any, names: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        return {name: _without(part, names) for name, part in value.items() if name not in names}
    return [_without(part, names) for part in value] if isinstance(value, list) else value


def _report(
    options: CommandOptions,
    recipe: Recipe,
    result: UVCResult | CombinedResult,
    dense: nn.Module,
    model: nn.Module,
    sample: torch.Tensor,
    skipped: list[str],
) -> None:
    from rich.console import Console

    from mixrank.evaluate import compare_speed, summarise

    first, last = (result.pruned, result.trained) if isinstance(result, CombinedResult) else (result, result)
    speed = compare_speed({"dense": dense, "compressed": model}, sample)
    sizes = {
        "dense": summarise(dense, None, speed["dense"]).to_json() | {"top1": first.before},
        "compressed": summarise(model, None, speed["compressed"]).to_json() | {"top1": last.after},
    }
    data = {
        "command": "uvc",
        "model": {"architecture": options.model, "args": model_arguments(options.model_args)},
        **sizes,
        "result": result.to_json(),
        "recipe": dataclasses.asdict(recipe),
        "options": dataclasses.asdict(options),
        "skipped": skipped,
        "versions": versions(),
    }
    if options.json is not None:
        write_json(options.json, data)
    console = Console()
    console.print(comparison_table(sizes["dense"], sizes["compressed"], options.model))
    console.print(shares(result), highlight=False)
    if isinstance(result, CombinedResult) and result.tried:
        console.print(division(result), highlight=False)
    if skipped:
        console.print(f"{len(skipped)} images were skipped, the first: {skipped[0]}", markup=False)
    for label, path in (("checkpoint", options.out), ("JSON", options.json)):
        if path is not None:
            console.print(f"{label:<11} {path}", markup=False, soft_wrap=True, highlight=False)


def shares(result: UVCResult | CombinedResult) -> str:
    """By what the multiply-adds went, in a sentence."""
    removed = result.to_json()["removed"]
    total = sum(removed.values())
    parts = ", ".join(f"{name} {100 * macs / total:.0f} %" for name, macs in removed.items())
    kept = 100 * result.macs_after / result.macs_before
    return f"{kept:.2f} % of the multiply-adds remain; of those that went: {parts}"


def division(result: CombinedResult) -> str:
    """How the budget was divided, in a sentence."""
    tried = ", ".join(f"{power:g}: {divergence:.4f}" for power, divergence in result.tried.items())
    return (
        f"parts were removed down to the budget's power {result.power:g}, ranks lowered for the rest "
        f"(nats from the dense model without training, by power: {tried})"
    )
