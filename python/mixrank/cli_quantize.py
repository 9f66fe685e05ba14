"""``mixrank quantize``: a checkpoint with weights of 8 bits from one without."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mixrank.cli_input import check_outputs
from mixrank.cli_output import change, megabytes, versions, write_json
from mixrank.errors import InputError
from mixrank.stopwatch import Stopwatch


@dataclasses.dataclass(frozen=True)
class QuantizeOptions:
    """The arguments of the command, under their own names."""

    file: Path
    out: Path
    weight_only: bool
    skip: tuple[str, ...]
    json: Path | None

    def check(self) -> None:
        """Everything that can be known before the checkpoint is read."""
        if not self.file.is_file():
            raise InputError(f"{self.file} does not exist or is not a file")
        check_outputs({"--out": self.out, "--json": self.json}, self.file)


def run(options: QuantizeOptions) -> None:
    """Quantise and write; nothing is written unless everything before it worked."""
    options.check()
    from rich.console import Console

    from mixrank import checkpoint
    from mixrank.quantize import quantize_

    watch = Stopwatch()
    with watch.stage("load"):
        header = checkpoint.read_header(options.file)
        model = checkpoint.load(options.file)
    with watch.stage("quantize"):
        result = quantize_(model, dynamic=not options.weight_only, skip=options.skip)
    with watch.stage("save"):
        sizes = {"bytes_before": result.bytes_before, "bytes_after": result.bytes_after}
        checkpoint.save(model, options.out, metadata=header.metadata | {"quantization": sizes})
    if options.json is not None:
        data = {
            "command": "quantize",
            "model": {"architecture": header.architecture, "args": header.args},
            **result.to_json(),
            "options": dataclasses.asdict(options),
            "times": watch.seconds,
            "versions": versions(),
        }
        write_json(options.json, data)

    console = Console()
    console.print(result.describe(), markup=False, highlight=False, soft_wrap=True)
    before, after = result.bytes_before, result.bytes_after
    lines = [
        ("MB", f"{megabytes(before)} -> {megabytes(after)} ({change(after, before)})"),
        ("checkpoint", options.out),
        ("JSON", options.json),
    ]
    for label, value in lines:
        if value is not None:
            console.print(f"{label:<11} {value}", markup=False, soft_wrap=True, highlight=False)
