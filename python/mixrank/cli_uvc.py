"""``mixrank uvc``: its arguments; what it does is in :mod:`mixrank.run_uvc`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mixrank.cli_help import (
    DEVICE_HELP,
    DTYPE_HELP,
    JSON_HELP,
    LABELS_HELP,
    LIMIT_HELP,
    MODEL_ARGS_HELP,
    MODEL_HELP,
    QUIET_HELP,
    ROOT_HELP,
    STRICT_HELP,
    WEIGHTS_HELP,
)
from mixrank.precision import Precision

EPILOG = (
    "Example: mixrank uvc --model deit_small_patch16_224 --images train/ --budget 0.5 --epochs 30 "
    "--out deit_small_uvc.safetensors --eval-images val/"
)
_IMAGES = "Training images, one folder for each class; or a timm.data dataset name."


def uvc(
    model: Annotated[str, typer.Option(help=MODEL_HELP, rich_help_panel="Model")],
    images: Annotated[str, typer.Option(help=_IMAGES, rich_help_panel="Training")],
    out: Annotated[Path, typer.Option(help="The checkpoint to write (safetensors).", rich_help_panel="Output")],
    weights: Annotated[Path | None, typer.Option(help=WEIGHTS_HELP, rich_help_panel="Model")] = None,
    model_args: Annotated[str | None, typer.Option(help=MODEL_ARGS_HELP, rich_help_panel="Model")] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="The share of the multiply-adds that remains; by default 0.5.", rich_help_panel="Budget"),
    ] = None,
    then_mixed_rank: Annotated[
        bool,
        typer.Option(
            "--then-mixed-rank",
            help="Remove less, and lower the ranks of what stays for the rest of the budget.",
            rich_help_panel="Budget",
        ),
    ] = False,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="A TOML file with all options of the run, or the name of one that ships with the package; the options "
            "here go before it.",
            rich_help_panel="Training",
        ),
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Times through the images in all; by default 10.", rich_help_panel="Training")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images in a step of one process; by default 128.", rich_help_panel="Training")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="The highest one, of AdamW; by default 3e-4.", rich_help_panel="Training")
    ] = None,
    distillation: Annotated[
        float | None,
        typer.Option(
            help="Share of the distance from the dense model in the loss; by default 0.5.", rich_help_panel="Training"
        ),
    ] = None,
    labels: Annotated[Path | None, typer.Option(help=LABELS_HELP, rich_help_panel="Training")] = None,
    data_root: Annotated[Path | None, typer.Option(help=ROOT_HELP, rich_help_panel="Training")] = None,
    split: Annotated[
        str, typer.Option(help="The part of a named data set to train on.", rich_help_panel="Training")
    ] = "train",
    limit: Annotated[int | None, typer.Option(help=LIMIT_HELP, rich_help_panel="Training")] = None,
    workers: Annotated[
        int, typer.Option(help="Processes that decode training images.", rich_help_panel="Training")
    ] = 2,
    device: Annotated[str, typer.Option(help=DEVICE_HELP, rich_help_panel="Training")] = "auto",
    dtype: Annotated[Precision, typer.Option(help=DTYPE_HELP, rich_help_panel="Training")] = Precision.float32,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the run that was interrupted; on a CPU it ends with the same bytes.",
            rich_help_panel="Training",
        ),
    ] = False,
    eval_images: Annotated[
        str | None,
        typer.Option(
            help="Other images with labels, to tell top-1; they decide nothing.", rich_help_panel="Evaluation"
        ),
    ] = None,
    eval_labels: Annotated[
        Path | None, typer.Option(help=LABELS_HELP + " For --eval-images.", rich_help_panel="Evaluation")
    ] = None,
    eval_split: Annotated[
        str, typer.Option(help="The part of a named data set to evaluate on.", rich_help_panel="Evaluation")
    ] = "validation",
    json: Annotated[Path | None, typer.Option(help=JSON_HELP, rich_help_panel="Output")] = None,
    tensorboard: Annotated[
        Path | None,
        typer.Option(
            help="A folder for TensorBoard: loss, share that remains, multipliers, gates, counts, top-1.",
            rich_help_panel="Output",
        ),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help=STRICT_HELP)] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of all that is random; by default 0.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help=QUIET_HELP)] = False,
) -> None:
    """Make a timm vision transformer smaller by training: heads, columns, neurons and blocks go under one budget.

    Unlike compress it needs labelled training images. Under torchrun (torchrun --nproc-per-node 2 -m mixrank uvc ...)
    processes share each step. While the run lasts its state is kept beside --out, so that --resume can go on with it.
    """
    options = dict(locals())
    from mixrank.run_uvc import CommandOptions, run

    run(CommandOptions(**options))
