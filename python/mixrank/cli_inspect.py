"""``mixrank inspect``: the header of a checkpoint, without its tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mixrank import checkpoint
from mixrank.cli_output import to_json_text


def run(file: Path, *, as_json: bool) -> None:
    """Print the header of ``file`` as text, or as JSON on standard output."""
    header = checkpoint.read_header(file)
    content: dict[str, Any] = {
        "architecture": header.architecture,
        "args": header.args,
        "preprocessing": header.preprocessing,
        "library_version": header.library_version,
        "file_bytes": file.stat().st_size,
        "plan": None if header.plan is None else header.plan.to_json(),
        "quantization": header.quantization,
        "metadata": header.metadata,
    }
    if as_json:
        print(to_json_text(content), end="")
        return

    from rich.console import Console

    console = Console()
    for label, value in (
        ("architecture", header.architecture),
        ("arguments", json.dumps(header.args)),
        ("preprocessing", json.dumps(header.preprocessing)),
        ("written by", f"mixrank {header.library_version}"),
        ("file", f"{content['file_bytes'] / 1e6:.2f} MB"),
        ("quantization", _quantization(header.quantization)),
        ("options", "-" if header.plan is None else json.dumps(header.plan.options)),
    ):
        console.print(f"{label:<14} {value}", markup=False, highlight=False, soft_wrap=True)
    if header.plan is not None:
        console.print(header.plan.describe(), markup=False, highlight=False, soft_wrap=True)


def _quantization(layers: dict[str, bool]) -> str:
    if not layers:
        return "none"
    return f"{len(layers)} layers of 8-bit weights, {sum(layers.values())} of them with 8-bit inputs"
