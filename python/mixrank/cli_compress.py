"""``mixrank compress``: its arguments; what it does is in :mod:`mixrank.run_compress`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mixrank.cli_help import (
    DEVICE_HELP,
    DTYPE_HELP,
    EVAL_HELP,
    IMAGES_HELP,
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
    "Example: mixrank compress --model deit_small_patch16_224 --images calibration/ --keep 0.5 "
    "--out deit_small_50.safetensors --eval-images val/ --labels val.csv --report deit_small_50.html"
)


class Factors(StrEnum):
    aware = "aware"
    svd = "svd"
    fisher = "fisher"


class Ranks(StrEnum):
    mixed = "mixed"
    uniform = "uniform"


class Energy(StrEnum):
    weight = "weight"
    output = "output"
    held_out = "held_out"
    mixed = "mixed"
    sensitivity = "sensitivity"


class WeightingKind(StrEnum):
    none = "none"
    image = "image"
    token = "token"
    clip = "clip"
    class_ = "class"
    gradient = "gradient"


class Form(StrEnum):
    factors = "factors"
    pivoted = "pivoted"
    sparse = "sparse"
    auto = "auto"


def compress(
    model: Annotated[str, typer.Option(help=MODEL_HELP, rich_help_panel="Model")],
    images: Annotated[str, typer.Option(help="Images without labels. " + IMAGES_HELP, rich_help_panel="Calibration")],
    out: Annotated[Path, typer.Option(help="The checkpoint to write (safetensors).", rich_help_panel="Output")],
    weights: Annotated[Path | None, typer.Option(help=WEIGHTS_HELP, rich_help_panel="Model")] = None,
    model_args: Annotated[str | None, typer.Option(help=MODEL_ARGS_HELP, rich_help_panel="Model")] = None,
    keep: Annotated[
        float | None,
        typer.Option(help="The share of all parameters that remains, in (0, 1].", rich_help_panel="Budget"),
    ] = None,
    max_bytes: Annotated[
        int | None, typer.Option(help="The largest size of the model in bytes.", rich_help_panel="Budget")
    ] = None,
    max_macs: Annotated[
        int | None, typer.Option(help="The most multiply-accumulates for one image.", rich_help_panel="Budget")
    ] = None,
    factors: Annotated[
        Factors | None,
        typer.Option(
            help="aware: best factors for the calibration images; svd: for the weight alone; fisher: aware in the "
            "metric of the loss; by default fisher, of what is no classifier aware.",
            rich_help_panel="Strategy",
        ),
    ] = None,
    ranks: Annotated[
        Ranks, typer.Option(help="mixed: a rank for each layer; uniform: one share.", rich_help_panel="Strategy")
    ] = Ranks.mixed,
    energy: Annotated[
        Energy | None,
        typer.Option(
            help="The energy that decides the mixed ranks: of the weight, of the outputs on the calibration images or "
            "on images held out; mixed: the geometric mean of weight and held_out; sensitivity: how far the logits "
            "move, measured layer by layer; by default sensitivity, of what is no classifier weight.",
            rich_help_panel="Strategy",
        ),
    ] = None,
    sensitivity_images: Annotated[
        int,
        typer.Option(
            help="How many images held out --energy sensitivity is measured on, a quarter of them for a first plan.",
            rich_help_panel="Calibration",
        ),
    ] = 128,
    centre: Annotated[
        bool | None,
        typer.Option(
            "--centre/--no-centre",
            help="Move the mean activation into the bias; by default as the factors need it.",
            rich_help_panel="Strategy",
        ),
    ] = None,
    shrink: Annotated[
        str | None,
        typer.Option(
            help="Pull of the factors towards svd, against few images: a number of at least 0; auto: by layer, from "
            "images held out; oas: from the number of images; measured: one for all, by what the model makes "
            "of images held out.",
            show_default="measured for fisher, else 0.3",
            rich_help_panel="Strategy",
        ),
    ] = None,
    fisher_shrink: Annotated[
        float, typer.Option(help="Pull of the metric of fisher towards the plain one.", rich_help_panel="Strategy")
    ] = 2.0,
    weighting: Annotated[
        WeightingKind | None,
        typer.Option(
            help="How much each calibration token counts: none: alike; image, token: errors relative to the image's or "
            "the token's output; clip: long outputs less; class: the class token more; gradient: by its effect on "
            "the model's answer.",
            show_default="gradient with level 1 for fisher, else none",
            rich_help_panel="Calibration",
        ),
    ] = None,
    weighting_level: Annotated[
        float | None,
        typer.Option(
            help="clip: a multiple of the median length, or below 1 a quantile; class: the class token's weight "
            "relative to all patches; gradient: how much of the mean weight is added to each.",
            rich_help_panel="Calibration",
        ),
    ] = None,
    held_out: Annotated[
        float | None,
        typer.Option(
            help="The share of the images on which factors made without them are judged; by default a fifth.",
            rich_help_panel="Calibration",
        ),
    ] = None,
    gradient_power: Annotated[
        float | None,
        typer.Option(
            help="Of each image's sum of squared gradients at a layer: 1 takes them as they are, less keeps few images "
            "from having most of the sum.",
            show_default="0.25 for sparse, else 1",
            rich_help_panel="Calibration",
        ),
    ] = None,
    draws: Annotated[
        int,
        typer.Option(
            help="Random probes of each image's answer where gradients are needed.", rich_help_panel="Calibration"
        ),
    ] = 1,
    augment: Annotated[
        int,
        typer.Option(help="Further random views (crops, flips) of each image.", rich_help_panel="Calibration"),
    ] = 0,
    sequential: Annotated[
        bool,
        typer.Option("--sequential", help="Fit layers to the compressed prefix.", rich_help_panel="Strategy"),
    ] = False,
    ridge: Annotated[
        float, typer.Option(help="Pull of --sequential towards the original weights.", rich_help_panel="Strategy")
    ] = 0.1,
    split_qkv: Annotated[
        bool,
        typer.Option("--split-qkv/--no-split-qkv", help="Factor q, k and v apart.", rich_help_panel="Strategy"),
    ] = False,
    step: Annotated[int, typer.Option(help="Ranks are multiples of this.", rich_help_panel="Strategy")] = 8,
    min_rank: Annotated[
        float | None,
        typer.Option(help="The lowest rank, or below 1 a share of the full rank.", rich_help_panel="Strategy"),
    ] = None,
    max_rank: Annotated[
        float | None,
        typer.Option(help="The highest rank, or below 1 a share of the full rank.", rich_help_panel="Strategy"),
    ] = None,
    form: Annotated[
        Form | None,
        typer.Option(
            help="How layers are held; factors: two of low rank; pivoted: the same in fewer numbers; sparse: single "
            "entries beside factors; auto: pivoted or sparse, by what the model makes of images held out.",
            show_default="auto for a classifier on a CPU, pivoted on a GPU and with options of low ranks",
            rich_help_panel="Strategy",
        ),
    ] = None,
    eval_images: Annotated[str | None, typer.Option(help=EVAL_HELP, rich_help_panel="Evaluation")] = None,
    labels: Annotated[
        Path | None, typer.Option(help=LABELS_HELP + " For --eval-images.", rich_help_panel="Evaluation")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Then train the factors for this many steps on the calibration images, as mixrank compensate does.",
            rich_help_panel="Compensation",
        ),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="The same for about this long.", rich_help_panel="Compensation")
    ] = None,
    learning_rate: Annotated[
        float, typer.Option(help="The highest one of the training.", rich_help_panel="Compensation")
    ] = 2e-5,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with a training that was interrupted; what was compressed is not compressed again.",
            rich_help_panel="Compensation",
        ),
    ] = False,
    data_root: Annotated[Path | None, typer.Option(help=ROOT_HELP, rich_help_panel="Calibration")] = None,
    split: Annotated[
        str, typer.Option(help="The part of a named data set to calibrate on.", rich_help_panel="Calibration")
    ] = "train",
    eval_split: Annotated[
        str, typer.Option(help="The part of a named data set to evaluate on.", rich_help_panel="Evaluation")
    ] = "validation",
    json: Annotated[Path | None, typer.Option(help=JSON_HELP, rich_help_panel="Output")] = None,
    report: Annotated[Path | None, typer.Option(help="Also write an HTML report.", rich_help_panel="Output")] = None,
    limit: Annotated[int | None, typer.Option(help=LIMIT_HELP, rich_help_panel="Calibration")] = None,
    batch_size: Annotated[int, typer.Option(help="Images in one batch.")] = 32,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    dtype: Annotated[Precision, typer.Option(help=DTYPE_HELP, rich_help_panel="Calibration")] = Precision.float32,
    strict: Annotated[bool, typer.Option("--strict", help=STRICT_HELP)] = False,
    seed: Annotated[int, typer.Option(help="Seed of all that is random.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help=QUIET_HELP)] = False,
) -> None:
    """Make a timm model smaller, with a few hundred unlabelled images, and train it afterwards only if asked to.

    With --steps or --minutes the compressed model is kept as OUT.compressed (a checkpoint) and the training as
    OUT.state until --out is written, so that --resume can go on with the training. Under torchrun (torchrun
    --nproc-per-node 2 -m mixrank compress ...) processes share the images and the layers, and one writes.
    """
    options = dict(locals())
    from mixrank.run_compress import CompressOptions, run

    run(CompressOptions(**options))
