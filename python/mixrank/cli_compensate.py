"""``mixrank compensate``: trains the factors of a checkpoint to follow the dense model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixrank.cli_help import DTYPE_HELP
from mixrank.cli_input import check_outputs, check_positive, chosen_dtype
from mixrank.errors import InputError
from mixrank.precision import Precision

if TYPE_CHECKING:
    from torch import nn

    from mixrank.compensate import CompensationOptions, CompensationResult

EPILOG = "Example: mixrank compensate deit_s_40.safetensors --images photos/ --minutes 60 --out deit_s_40b.safetensors"


class Scope(StrEnum):
    layer = "layer"
    block = "block"
    model = "model"


class Trained(StrEnum):
    factors = "factors"
    residual = "residual"
    all = "all"


def compensate(
    file: Annotated[Path, typer.Argument(help="A checkpoint written by mixrank.", show_default=False)],
    images: Annotated[str, typer.Option(help="Images without labels: a folder, or a timm.data dataset name.")],
    out: Annotated[Path, typer.Option(help="The checkpoint to write (safetensors).")],
    weights: Annotated[
        Path | None, typer.Option(help="The dense model's state dict; without it timm's pretrained weights.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="How many steps to train; or --minutes.")] = None,
    minutes: Annotated[float | None, typer.Option(help="How long to take, about.")] = None,
    scope: Annotated[
        Scope, typer.Option(help="How far gradients reach: within each layer, each block, or the whole model.")
    ] = Scope.model,
    trained: Annotated[
        Trained, typer.Option(help="Train the factored layers, a residual of theirs, or all.")
    ] = Trained.factors,
    learning_rate: Annotated[float, typer.Option(help="The highest one, of Adam.")] = 2e-5,
    batch_size: Annotated[int, typer.Option(help="Images in a step.")] = 16,
    min_scale: Annotated[float, typer.Option(help="The least share of an image in a random view; 1: no views.")] = 0.5,
    mix: Annotated[float, typer.Option(help="The share of the views that are mixed with another one.")] = 0.0,
    held_out: Annotated[float, typer.Option(help="The share of the images that only choose the best step.")] = 0.1,
    dtype: Annotated[Precision, typer.Option(help=DTYPE_HELP)] = Precision.float32,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run that was interrupted; it ends with the same bytes.")
    ] = False,
    data_root: Annotated[Path | None, typer.Option(help="The folder of a named data set.")] = None,
    split: Annotated[str, typer.Option(help="The part of a named data set.")] = "train",
    limit: Annotated[int | None, typer.Option(help="Use a random subset of this many images.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the result to this file, as JSON.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail on an image that does not decode.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the views and of the random subset.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Win back accuracy: train the factors to follow the dense model on unlabelled images.

    The best of what was seen on held-out images is written, never anything worse than the checkpoint was. While the run
    lasts its state is kept beside --out, so that --resume can go on with it.
    """
    _run(_Options(**locals()))


@dataclasses.dataclass(frozen=True)
class _Options:
    """The arguments of the command, under their own names."""

    file: Path
    images: str
    out: Path
    weights: Path | None
    steps: int | None
    minutes: float | None
    scope: str
    trained: str
    learning_rate: float
    batch_size: int
    min_scale: float
    mix: float
    held_out: float
    dtype: Precision
    resume: bool
    data_root: Path | None
    split: str
    limit: int | None
    json: Path | None
    strict: bool
    seed: int
    quiet: bool

    @property
    def state(self) -> Path:
        """Where the run is kept while it lasts."""
        return self.out.with_name(f"{self.out.name}.state")

    def check(self) -> None:
        """Everything that can be known before the checkpoint is read."""
        for path in (self.file, self.weights):
            if path is not None and not path.is_file():
                raise InputError(f"{path} does not exist or is not a file")
        if (self.steps is None) == (self.minutes is None):
            raise InputError("exactly one of --steps and --minutes must be given")
        check_positive("limit", self.limit)
        check_outputs({"--out": self.out, "--json": self.json}, self.file, self.weights)
        if self.state.exists() and not self.resume:
            raise InputError(f"{self.state} is an interrupted run: go on with --resume, or delete it")

    def training(self) -> CompensationOptions:
        from mixrank.compensate import CompensationOptions

        names = [field.name for field in dataclasses.fields(CompensationOptions)]
        given = {name: getattr(self, name) for name in names if hasattr(self, name)}
        options = CompensationOptions(**{name: _plain(value) for name, value in given.items()})
        options.check()
        return options


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, StrEnum) else value


def _run(options: _Options) -> None:
    """Train, then write; nothing is written unless everything before it worked."""
    options.check()
    training = options.training()

    from mixrank import checkpoint
    from mixrank.data import open_images
    from mixrank.evaluate import summarise
    from mixrank.identity import check_origin
    from mixrank.models import create_model, preprocessing

    header = checkpoint.read_header(options.file)
    model = checkpoint.load(options.file)
    pretrained = options.weights is None
    dense = create_model(header.architecture, pretrained=pretrained, weights=options.weights, args=header.args)
    check_origin(header.metadata, dense, options.file, options.weights)
    source = open_images(
        options.images,
        preprocessing(model),
        limit=options.limit,
        seed=options.seed,
        strict=options.strict,
        root=options.data_root,
        split=options.split,
    )
    before = summarise(dense).to_json()
    result = train(model, dense, source.batches(32), options, training)
    checkpoint.save(model, options.out, metadata=header.metadata | {"compensation": noted(result)})
    options.state.unlink(missing_ok=True)
    assert header.plan is not None  # what has no factored layer is not trained
    sizes = {"dense": before, "compressed": summarise(model).to_json(), "plan": header.plan.to_json()}
    _report(options, result, {"architecture": header.architecture, "args": header.args}, sizes)


def train(
    model: nn.Module,
    dense: nn.Module,
    batches: Iterable,
    options: Any,
    training: CompensationOptions,
) -> CompensationResult:
    """Train what a checkpoint was loaded to; ``dense`` is brought into its form.

    ``options`` of the command say ``steps``, ``minutes``, ``dtype``, ``state`` and ``quiet``.
    """
    from mixrank.compensate import compensate_

    _match(dense, model)
    return compensate_(
        model,
        dense,
        batches,
        steps=options.steps,
        minutes=options.minutes,
        options=training,
        dtype=chosen_dtype(options.dtype, next(model.parameters()).device),
        state=options.state,
        progress=not options.quiet,
    )


def noted(result: CompensationResult) -> dict[str, Any]:
    """What a checkpoint says of its training: no times, so that a run that was interrupted writes the same bytes."""
    return {key: value for key, value in result.to_json().items() if key != "seconds"}


def _match(dense: nn.Module, model: nn.Module) -> None:
    """Bring the dense model into the form that the checkpoint's model has.

    Layers of the checkpoint's model that were split need no counterpart: only outputs of factored layers and blocks
    are compared.
    """
    from mixrank.models import expose_qkv_, split_qkv_
    from mixrank.nn import SplitLinear

    if any(getattr(module, "qkv_bias_separate", False) for module in model.modules()):
        expose_qkv_(dense)
    if any(isinstance(module, SplitLinear) for module in model.modules()):
        split_qkv_(dense)


def summary(result: CompensationResult) -> str:
    """What became of the training, in a sentence."""
    if result.best_step == 0:
        return f"training brought nothing in {result.steps} steps ({result.stopped}): the model is as it was"
    return (
        f"best after {result.best_step} of {result.steps} steps ({result.stopped}), "
        f"on {result.before.images} held-out images"
    )


def _report(
    options: _Options, result: CompensationResult, model: dict[str, Any], sizes: dict[str, dict[str, Any]]
) -> None:
    from rich.console import Console
    from rich.table import Table

    from mixrank.cli_output import nats, percent, versions, write_json

    if options.json is not None:
        data = {
            "command": "compensate",
            "model": model,
            **sizes,
            "compensation": result.to_json(),
            "options": {name: _plain(value) for name, value in dataclasses.asdict(options).items()},
            "versions": versions(),
        }
        write_json(options.json, data)
    table = Table("", "before", "after", title=f"{options.out.name}", title_justify="left", title_style="bold")
    before, after = result.before, result.after
    table.add_row("divergence, nats", nats(before.divergence), nats(after.divergence))
    table.add_row("agreement with the dense model", percent(before.agreement), percent(after.agreement))
    console = Console()
    console.print(table)
    console.print(summary(result), highlight=False)
    console.print(f"checkpoint  {options.out}", markup=False, soft_wrap=True, highlight=False)
    if options.json is not None:
        console.print(f"JSON        {options.json}", markup=False, soft_wrap=True, highlight=False)
