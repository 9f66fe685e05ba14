"""The command line: ``mixrank compress | compensate | quantize | evaluate | inspect | report | bench | demo``.

Only arguments are declared here. What a command does lives in its own module and is imported when the command
runs, so that ``mixrank --help`` does not wait for timm and matplotlib.
"""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mixrank import cli_bench, cli_compensate
from mixrank.errors import InputError

BAD_INPUT = 2
INTERRUPTED = 130


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


class Precision(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class Commands(TyperGroup):
    """Turns what a user can mend into one sentence and a status, wherever the command was started from."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            raise typer.Exit(BAD_INPUT) from None
        except KeyboardInterrupt:
            print("interrupted: files that were not complete have been left unwritten", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=Commands,
    name="mixrank",
    help="Compress vision transformers by mixed-rank factorisation and serve them by fused kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

IMAGES_HELP = "A folder of images, an ImageFolder tree, or a timm.data dataset name such as hfds/... or torch/cifar10."
LABELS_HELP = "A csv with the columns file,label; without it the class folders of an ImageFolder tree are the labels."
JSON_HELP = "Also write the result to this file, as JSON."
ROOT_HELP = "The folder in which a named data set lies or is downloaded to."
LIMIT_HELP = "Use a random subset of this many images."
STRICT_HELP = "Fail on an image that does not decode instead of skipping and counting it."
QUIET_HELP = "No progress bars."


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"mixrank {version('mixrank-kernels')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(
    epilog="Example: mixrank compress --model deit_small_patch16_224 --images calibration/ --keep 0.5 "
    "--out deit_small_50.safetensors --eval-images val/ --labels val.csv --report deit_small_50.html"
)
def compress(
    model: Annotated[str, typer.Option(help="A timm architecture.", rich_help_panel="Model")],
    images: Annotated[str, typer.Option(help="Images without labels. " + IMAGES_HELP, rich_help_panel="Calibration")],
    out: Annotated[Path, typer.Option(help="The checkpoint to write (safetensors).", rich_help_panel="Output")],
    weights: Annotated[
        Path | None,
        typer.Option(
            help="A state dict (safetensors, pth); without it timm's pretrained weights.", rich_help_panel="Model"
        ),
    ] = None,
    model_args: Annotated[
        str | None,
        typer.Option(help="""Arguments of timm.create_model: '{"img_size": 384}'.""", rich_help_panel="Model"),
    ] = None,
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
        Factors,
        typer.Option(
            help="aware: best factors for the calibration images; svd: for the weight alone; fisher: aware in the "
            "metric of the loss.",
            rich_help_panel="Strategy",
        ),
    ] = Factors.aware,
    ranks: Annotated[
        Ranks, typer.Option(help="mixed: a rank for each layer; uniform: one share.", rich_help_panel="Strategy")
    ] = Ranks.mixed,
    energy: Annotated[
        Energy,
        typer.Option(
            help="The energy that decides the mixed ranks: of the weight, of the outputs on the calibration images or "
            "on images held out, or mixed: the geometric mean of weight and held_out.",
            rich_help_panel="Strategy",
        ),
    ] = Energy.weight,
    centre: Annotated[
        bool | None,
        typer.Option(
            "--centre/--no-centre",
            help="Move the mean activation into the bias; by default as the factors need it.",
            rich_help_panel="Strategy",
        ),
    ] = None,
    shrink: Annotated[
        str,
        typer.Option(
            help="Pull of the factors towards svd, against few images: a number of at least 0; auto: by layer, from "
            "images held out; oas: from the number of images.",
            rich_help_panel="Strategy",
        ),
    ] = "0",
    fisher_shrink: Annotated[
        float, typer.Option(help="Pull of the metric of fisher towards the plain one.", rich_help_panel="Strategy")
    ] = 1.0,
    weighting: Annotated[
        WeightingKind,
        typer.Option(
            help="How much each calibration token counts: none: alike; image, token: errors relative to the image's or "
            "the token's output; clip: long outputs less; class: the class token more; gradient: by its effect on "
            "the model's answer.",
            rich_help_panel="Calibration",
        ),
    ] = WeightingKind.none,
    weighting_level: Annotated[
        float | None,
        typer.Option(
            help="clip: a multiple of the median length, or below 1 a quantile; class: the class token's weight "
            "relative to all patches.",
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
    draws: Annotated[
        int,
        typer.Option(help="Labels drawn for each image where gradients are needed.", rich_help_panel="Calibration"),
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
        Form,
        typer.Option(
            help="How layers of low rank are held; pivoted: fewer numbers for each rank.", rich_help_panel="Strategy"
        ),
    ] = Form.factors,
    eval_images: Annotated[
        str | None, typer.Option(help="Labelled images to measure top-1 on.", rich_help_panel="Evaluation")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help=LABELS_HELP + " For --eval-images.", rich_help_panel="Evaluation")
    ] = None,
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
    dtype: Annotated[
        Precision, typer.Option(help="Precision of the model; the sums are float64.", rich_help_panel="Calibration")
    ] = Precision.float32,
    strict: Annotated[bool, typer.Option("--strict", help=STRICT_HELP)] = False,
    seed: Annotated[int, typer.Option(help="Seed of all that is random.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help=QUIET_HELP)] = False,
) -> None:
    """Make a timm model smaller, with a few hundred unlabelled images and no training."""
    options = dict(locals())
    from mixrank.cli_compress import CompressOptions, run

    run(CompressOptions(**options))


@app.command(epilog="Example: mixrank quantize deit_small_50.safetensors --out deit_small_50_int8.safetensors")
def quantize(
    file: Annotated[Path, typer.Argument(help="A checkpoint written by mixrank.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The checkpoint to write (safetensors).")],
    weight_only: Annotated[
        bool, typer.Option("--weight-only", help="Leave the inputs of the layers as they are: smaller, but not faster.")
    ] = False,
    skip: Annotated[
        list[str] | None, typer.Option(help="A layer that stays as it is (repeatable); * stands for anything.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help=JSON_HELP)] = None,
) -> None:
    """Give a checkpoint weights of 8 bits: a quarter of the bytes, and faster on processors that multiply integers.

    Linear layers are quantised, factored or dense, the classifier among them. No images are needed.
    """
    options = dict(locals()) | {"skip": tuple(skip or ())}
    from mixrank.cli_quantize import QuantizeOptions, run

    run(QuantizeOptions(**options))


@app.command(epilog="Example: mixrank evaluate deit_small_50.safetensors --images val/ --labels val.csv")
def evaluate(
    file: Annotated[Path, typer.Argument(help="A checkpoint written by mixrank.", show_default=False)],
    images: Annotated[str, typer.Option(help=IMAGES_HELP)],
    labels: Annotated[Path | None, typer.Option(help=LABELS_HELP)] = None,
    data_root: Annotated[Path | None, typer.Option(help=ROOT_HELP)] = None,
    split: Annotated[str, typer.Option(help="The part of a named data set.")] = "validation",
    json: Annotated[Path | None, typer.Option(help=JSON_HELP)] = None,
    limit: Annotated[int | None, typer.Option(help=LIMIT_HELP)] = None,
    batch_size: Annotated[int, typer.Option(help="Images in one batch.")] = 32,
    strict: Annotated[bool, typer.Option("--strict", help=STRICT_HELP)] = False,
    seed: Annotated[int, typer.Option(help="Seed of the random subset.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help=QUIET_HELP)] = False,
) -> None:
    """Measure a compressed model: top-1 and speed.

    A checkpoint does not hold the dense weights. The dense column therefore shows the size of the architecture
    and the speed of the compressed model with its factors multiplied out; its top-1 is empty.
    """
    options = dict(locals())
    from mixrank.cli_evaluate import EvaluateOptions, run

    run(EvaluateOptions(**options))


@app.command(epilog="Example: mixrank inspect deit_small_50.safetensors")
def inspect(
    file: Annotated[Path, typer.Argument(help="A checkpoint written by mixrank.", show_default=False)],
    json: Annotated[bool, typer.Option("--json", help="Print the header as JSON instead.")] = False,
) -> None:
    """Show what a checkpoint holds: architecture, preprocessing, and the rank of each layer."""
    from mixrank.cli_inspect import run

    run(file, as_json=json)


@app.command(epilog="Example: mixrank report deit_small_50.json --out deit_small_50.html")
def report(
    result: Annotated[Path, typer.Argument(help="What --json of compress or demo wrote.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")],
) -> None:
    """Draw the report of a result: one HTML file that needs nothing beside it."""
    from mixrank.cli_input import check_outputs
    from mixrank.cli_output import read_result
    from mixrank.report import write_report

    check_outputs({"--out": out}, result)
    write_report(out, read_result(result))
    print(f"report      {out}")


app.command(epilog=cli_compensate.EPILOG)(cli_compensate.compensate)
app.command(epilog=cli_bench.EPILOG)(cli_bench.bench)


@app.command(epilog="Example: mixrank demo --out demo-output")
def demo(
    out: Annotated[Path, typer.Option(help="The folder for checkpoint, report and JSON.")] = Path("demo-output"),
    export_images: Annotated[
        bool, typer.Option("--export-images", help="Also write the demo's images and labels, to try compress on.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help=QUIET_HELP)] = False,
) -> None:
    """Compress the embedded vision transformer to three budgets and measure it on real images."""
    from mixrank.demo.run import run

    run(out, export_images=export_images, progress=not quiet)


def main() -> None:
    """The console script."""
    app(prog_name="mixrank")
