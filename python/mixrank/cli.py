"""The command line: ``mixrank compress | sweep | compensate | uvc | quantize | evaluate | inspect | report | ...``.

Only arguments are declared here. What a command does lives in its own module and is imported when the command
runs, so that ``mixrank --help`` does not wait for timm and matplotlib.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mixrank import cli_bench, cli_compensate, cli_compress, cli_export, cli_sweep, cli_uvc
from mixrank.cli_help import IMAGES_HELP, JSON_HELP, LABELS_HELP, LIMIT_HELP, QUIET_HELP, ROOT_HELP, STRICT_HELP
from mixrank.errors import InputError, is_out_of_memory
from mixrank.launch import started_processes

OUT_OF_MEMORY = 1
BAD_INPUT = 2
INTERRUPTED = 130
SHARED = ("compress", "uvc")
"""The commands whose work several processes share."""


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
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            print("error: out of memory: give a smaller --batch-size, or a larger machine", file=sys.stderr)
            raise typer.Exit(OUT_OF_MEMORY) from None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        found = super().resolve_command(ctx, args)
        if started_processes() > 1 and found[0] not in SHARED:
            raise InputError(f"mixrank {found[0]} works in one process: torchrun is for {' and '.join(SHARED)}")
        return found


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


app.command(epilog=cli_compress.EPILOG)(cli_compress.compress)


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

    Linear layers are quantised, factored, sparse or dense, the classifier among them. Of sparse ones the places of the
    entries and the speed stay as they are. No images are needed.
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
    result: Annotated[
        Path, typer.Argument(help="What --json of compress, sweep, compensate, uvc or demo wrote.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")],
) -> None:
    """Draw the report of a result: one HTML file that needs nothing beside it."""
    from mixrank.cli_input import check_outputs
    from mixrank.cli_output import read_result
    from mixrank.report import write_report

    check_outputs({"--out": out}, result)
    write_report(out, read_result(result))
    print(f"report      {out}")


app.command(epilog=cli_sweep.EPILOG)(cli_sweep.sweep)
app.command(epilog=cli_compensate.EPILOG)(cli_compensate.compensate)
app.command(epilog=cli_uvc.EPILOG)(cli_uvc.uvc)
app.command(epilog=cli_export.EPILOG)(cli_export.export)
app.command(epilog=cli_bench.EPILOG)(cli_bench.bench)


@app.command(epilog="Example: mixrank demo --out demo-output")
def demo(
    out: Annotated[Path, typer.Option(help="The folder for checkpoint, report and JSON.")] = Path("demo-output"),
    export_images: Annotated[
        bool,
        typer.Option("--export-images", help="Also write images, labels and weights, and print how to compress these."),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help=QUIET_HELP)] = False,
) -> None:
    """Compress the embedded vision transformer to three budgets and measure it on real images."""
    from mixrank.demo.run import run

    run(out, export_images=export_images, progress=not quiet)


def main() -> None:
    """The console script."""
    app(prog_name="mixrank")
