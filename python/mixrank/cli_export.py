"""``mixrank export``: a checkpoint for other runtimes."""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixrank.cli_help import JSON_HELP
from mixrank.cli_input import check_outputs, check_positive
from mixrank.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from mixrank.export import Exported

EPILOG = "Example: mixrank export deit_small_50.safetensors --format onnx --out deit_small_50.onnx"


class Format(StrEnum):
    torch_export = "torch-export"
    onnx = "onnx"
    safetensors_dense = "safetensors-dense"


def export(
    file: Annotated[Path, typer.Argument(help="A checkpoint written by mixrank.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    format: Annotated[
        Format,
        typer.Option(
            help="torch-export: a program that torch.export.load reads (.pt2); onnx: standard operators; "
            "safetensors-dense: the weights of timm's own model, factors multiplied out."
        ),
    ],
    batch: Annotated[int | None, typer.Option(help="Images of every call; by default any number.")] = None,
    keep_operators: Annotated[
        bool,
        typer.Option(
            "--keep-operators",
            help="torch-export: keep the fused operators; faster, and whoever loads it imports mixrank_kernels.",
        ),
    ] = False,
    json: Annotated[Path | None, typer.Option(help=JSON_HELP)] = None,
) -> None:
    """Write a compressed model for where mixrank is not installed; it is loaded again and compared first."""
    _run(_Options(**locals()))


@dataclasses.dataclass(frozen=True)
class _Options:
    """The arguments of the command, under their own names."""

    file: Path
    out: Path
    format: str
    batch: int | None
    keep_operators: bool
    json: Path | None

    def check(self) -> None:
        """Everything that can be known before the checkpoint is read."""
        if not self.file.is_file():
            raise InputError(f"{self.file} does not exist or is not a file")
        check_positive("batch", self.batch)
        if self.keep_operators and self.format != Format.torch_export:
            raise InputError(f"--keep-operators belongs to --format torch-export, got {self.format}")
        if self.batch is not None and self.format == Format.safetensors_dense:
            raise InputError("--batch belongs to --format torch-export or onnx: weights serve any number of images")
        check_outputs({"--out": self.out, "--json": self.json}, self.file)


def _run(options: _Options) -> None:
    options.check()
    from rich.console import Console

    from mixrank import checkpoint
    from mixrank.cli_output import megabytes, versions, write_json

    made = _exported(checkpoint.load(options.file), options)
    if options.json is not None:
        told = {"command": "export", "options": dataclasses.asdict(options), "versions": versions()}
        write_json(options.json, told | {"result": dataclasses.asdict(made)})
    console = Console()
    if made.error is None:
        console.print("not run here: ONNX Runtime is not installed", highlight=False)
    else:
        console.print(f"logits differ by {made.error:.2g} at most, the largest is {made.scale:.3g}", highlight=False)
    console.print(f"MB          {megabytes(made.bytes)}", highlight=False)
    for path in made.files:
        console.print(f"file        {path}", markup=False, soft_wrap=True, highlight=False)


def _exported(model: nn.Module, options: _Options) -> Exported:
    from mixrank.export import export_dense, export_onnx, export_torch

    if options.format == Format.onnx:
        return export_onnx(model, options.out, batch=options.batch)
    if options.format == Format.safetensors_dense:
        return export_dense(model, options.out)
    return export_torch(model, options.out, batch=options.batch, keep_operators=options.keep_operators)
