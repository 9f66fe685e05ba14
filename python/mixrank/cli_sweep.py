"""``mixrank sweep``: strategies at several budgets, from one calibration."""

from __future__ import annotations

import dataclasses
import hashlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixrank.cli_help import (
    DTYPE_HELP,
    EVAL_HELP,
    IMAGES_HELP,
    LABELS_HELP,
    LIMIT_HELP,
    MODEL_ARGS_HELP,
    MODEL_HELP,
    QUIET_HELP,
    ROOT_HELP,
    STRICT_HELP,
    WEIGHTS_HELP,
)
from mixrank.cli_input import check_budgets, check_outputs, check_positive, chosen_dtype, model_arguments
from mixrank.errors import InputError
from mixrank.precision import Precision

if TYPE_CHECKING:
    from torch import nn

    from mixrank.sweep import SweepResult, SweepRow

EPILOG = (
    "Example: mixrank sweep --model deit_small_patch16_224 --images photos/ --keep 0.6 --keep 0.5 --keep 0.4 "
    "--json sweep.json --report sweep.html"
)
# What may differ between a sweep that was interrupted and the one that goes on with it.
FREE = ("keep", "strategy", "json", "report", "batch_size", "resume", "quiet")


def sweep(
    model: Annotated[str, typer.Option(help=MODEL_HELP)],
    images: Annotated[str, typer.Option(help="Images without labels. " + IMAGES_HELP)],
    keep: Annotated[list[float], typer.Option(help="A share of all parameters that remains, in (0, 1] (repeatable).")],
    json: Annotated[Path, typer.Option(help="The result, written anew after each row.")],
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            help="A strategy (repeatable): pivoted, sparse, svd, svd-uniform, aware, aware-uniform, aware-pivoted, "
            "output, shrunk, fisher, sensitivity, sensitivity-pivoted.",
            show_default="pivoted, sparse, svd, svd-uniform, aware, aware-pivoted, sensitivity",
        ),
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Also write an HTML report.")] = None,
    weights: Annotated[Path | None, typer.Option(help=WEIGHTS_HELP)] = None,
    model_args: Annotated[str | None, typer.Option(help=MODEL_ARGS_HELP)] = None,
    eval_images: Annotated[
        str | None, typer.Option(help=EVAL_HELP + " Without them a part of --images is held out for that.")
    ] = None,
    labels: Annotated[Path | None, typer.Option(help=LABELS_HELP + " For --eval-images.")] = None,
    held_out: Annotated[
        float | None,
        typer.Option(
            help="The share of --images that models are only compared on, where there are no --eval-images.",
            show_default="0.2",
        ),
    ] = None,
    sensitivity_images: Annotated[int, typer.Option(help="How many images sensitivity is measured on.")] = 128,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the sweep in --json: only rows that it lacks are made.")
    ] = False,
    data_root: Annotated[Path | None, typer.Option(help=ROOT_HELP)] = None,
    split: Annotated[str, typer.Option(help="The part of a named data set to calibrate on.")] = "train",
    eval_split: Annotated[str, typer.Option(help="The part of a named data set to compare on.")] = "validation",
    limit: Annotated[int | None, typer.Option(help=LIMIT_HELP)] = None,
    batch_size: Annotated[int, typer.Option(help="Images in one batch.")] = 32,
    dtype: Annotated[Precision, typer.Option(help=DTYPE_HELP)] = Precision.float32,
    strict: Annotated[bool, typer.Option("--strict", help=STRICT_HELP)] = False,
    seed: Annotated[int, typer.Option(help="Seed of all that is random.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help=QUIET_HELP)] = False,
) -> None:
    """Compare strategies and budgets: size, work, and how closely each follows the dense model.

    One calibration serves all. No model is written: compress with the options of the one you choose.
    """
    options = dict(locals())
    _run(_Options(**options))


@dataclasses.dataclass(frozen=True)
class _Options:
    """The arguments of the command, under their own names."""

    model: str
    images: str
    keep: list[float]
    json: Path
    strategy: list[str] | None
    report: Path | None
    weights: Path | None
    model_args: str | None
    eval_images: str | None
    labels: Path | None
    held_out: float | None
    sensitivity_images: int
    resume: bool
    data_root: Path | None
    split: str
    eval_split: str
    limit: int | None
    batch_size: int
    dtype: Precision
    strict: bool
    seed: int
    quiet: bool

    def check(self) -> None:
        """Everything that can be known before a model is built."""
        check_budgets("--keep", *self.keep)
        for name in ("limit", "batch_size", "sensitivity_images"):
            check_positive(name, getattr(self, name))
        if self.weights is not None and not self.weights.is_file():
            raise InputError(f"--weights {self.weights} does not exist or is not a file")
        if self.labels is not None and self.eval_images is None:
            raise InputError("--labels belongs to --eval-images, which is missing (calibration needs no labels)")
        if self.held_out is not None and self.eval_images is not None:
            raise InputError("--held-out belongs to a sweep without --eval-images, but both were given")
        check_outputs({"--json": self.json, "--report": self.report}, self.weights, self.labels)
        if self.json.exists() and not self.resume:
            raise InputError(f"--json {self.json} exists already: go on with its sweep by --resume, or delete it")

    def deciding(self) -> dict[str, Any]:
        """The options that decide what a row holds, in terms of JSON."""
        from mixrank.cli_output import plain

        return plain({name: value for name, value in dataclasses.asdict(self).items() if name not in FREE})


def _run(options: _Options) -> None:
    options.check()
    args = model_arguments(options.model_args)

    from mixrank.cli_output import versions, write_json
    from mixrank.data import open_images
    from mixrank.models import create_model, preprocessing
    from mixrank.stopwatch import Stopwatch
    from mixrank.strategies import DEFAULT_STRATEGIES
    from mixrank.sweep import sweep

    watch = Stopwatch()
    with watch.stage("load"):
        model = create_model(options.model, pretrained=options.weights is None, weights=options.weights, args=args)
        identity = {"digest": _digest(model), "deciding": options.deciding()}
        done = _earlier(options, identity)
        opened = partial(open_images, preprocessing=preprocessing(model), strict=options.strict, root=options.data_root)
        calibration = opened(options.images, split=options.split, limit=options.limit, seed=options.seed)
        evaluation = None
        if options.eval_images is not None:
            evaluation = opened(options.eval_images, labels=options.labels, split=options.eval_split)

    data: dict[str, Any] = {}

    def keep_rows(result: SweepResult) -> None:
        results = result.to_json()
        results["images"] |= {
            "calibration_skipped": list(calibration.skipped),
            "evaluation_skipped": [] if evaluation is None else list(evaluation.skipped),
        }
        data.update(
            {
                "command": "sweep",
                "model": {"architecture": options.model, "args": args, "weights": options.weights or "pretrained"},
                **results,
                "options": dataclasses.asdict(options),
                "identity": identity,
                "times": watch.seconds,
                "versions": versions(),
            }
        )
        write_json(options.json, data)

    with watch.stage("sweep"):
        result = sweep(
            model,
            calibration.batches(options.batch_size),
            options.keep,
            options.strategy or DEFAULT_STRATEGIES,
            evaluation=None if evaluation is None else evaluation.batches(options.batch_size),
            held_out=0.2 if options.held_out is None else options.held_out,
            sensitivity_images=options.sensitivity_images,
            seed=options.seed,
            dtype=chosen_dtype(options.dtype, next(model.parameters()).device),
            done=done,
            on_row=keep_rows,
            progress=not options.quiet,
        )
    keep_rows(result)
    _show(options, data)


def _digest(model: nn.Module) -> str:
    """What tells weights from others of the same architecture."""
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _earlier(options: _Options, identity: dict[str, Any]) -> list[SweepRow]:
    """The rows of the sweep to go on with."""
    from mixrank.cli_output import read_result
    from mixrank.strategies import STRATEGIES
    from mixrank.sweep import SweepRow

    if not (options.resume and options.json.exists()):
        return []
    data = read_result(options.json)
    earlier = data.get("identity")
    if data.get("command") != "sweep" or not isinstance(earlier, dict):
        raise InputError(f"--json {options.json} does not hold a sweep to go on with")
    known = earlier.get("deciding") or {}
    other = [name for name, value in identity["deciding"].items() if known.get(name) != value]
    if other:
        raise InputError(
            f"--json {options.json} is a sweep with another --{other[0].replace('_', '-')}: give the same, or delete it"
        )
    if earlier.get("digest") != identity["digest"]:
        raise InputError(f"--json {options.json} is a sweep of other weights: give the same, or delete it")
    rows = [SweepRow.from_json(row) for row in data["rows"]]
    # A preset that has changed since is another strategy under the same name.
    return [row for row in rows if STRATEGIES.get(row.strategy) == row.options]


def _show(options: _Options, data: dict[str, Any]) -> None:
    from rich.console import Console

    from mixrank.cli_output import plain, sweep_table

    if options.report is not None:
        from mixrank.report import write_report

        write_report(options.report, plain(data))
    console = Console()
    console.print(sweep_table(data))
    images = data["images"]
    console.print(f"compared with the dense model on {images['evaluation']} images", highlight=False)
    skipped = images["calibration_skipped"] + images["evaluation_skipped"]
    if skipped:
        console.print(f"{len(skipped)} images were skipped, the first: {skipped[0]}", markup=False)
    for label, path in (("report", options.report), ("JSON", options.json)):
        if path is not None:
            console.print(f"{label:<11} {path}", markup=False, soft_wrap=True, highlight=False)
