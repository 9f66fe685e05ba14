"""What every command of the CLI prints and writes: tables, JSON, times, and the versions behind the numbers."""

from __future__ import annotations

import json
import math
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixrank.errors import InputError
from mixrank.files import write_text

if TYPE_CHECKING:
    from rich.table import Table

UNKNOWN = "-"


def versions() -> dict[str, Any]:
    """Libraries, interpreter and processor: what has to be known to compare two results."""
    import torch

    from mixrank_kernels import backend

    found: dict[str, Any] = {"mixrank": _version("mixrank-kernels")}
    found |= {name: _version(name) for name in ("torch", "timm", "triton")}
    return (
        found
        | {"python": platform.python_version(), "cpu": cpu_name()}
        | {
            "isa": next(iter(backend.isas()), None),
            "threads": torch.get_num_threads(),
        }
    )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's own name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def to_json_text(data: Any) -> str:
    """Strict JSON, for other readers than Python's."""
    return json.dumps(plain(data), indent=1, allow_nan=False) + "\n"


def plain(value: Any) -> Any:
    """``value`` in terms of JSON alone: paths as text, NaN and infinities (which JSON does not have) as None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write the result of a command, whole or not at all."""
    write_text(path, to_json_text(data))


def read_result(path: Path) -> dict[str, Any]:
    """Read back what ``--json`` wrote."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not a readable JSON file: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path} holds a JSON {type(data).__name__}, but a result of mixrank is an object")
    return data


def megabytes(count: float | None) -> str:
    return UNKNOWN if count is None else f"{count / 1e6:.2f}"


def gigamacs(count: float | None) -> str:
    return UNKNOWN if count is None else f"{count / 1e9:.3f}"


def percent(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.2f} %"


def rate(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def nats(value: float) -> str:
    """A divergence, whose size can be anything."""
    return f"{value:.3g}"


def ratio(new: float | None, old: float | None) -> str:
    """How many times ``old`` fits into ``new``, as ``1.53x``."""
    return UNKNOWN if not new or not old else f"{new / old:.2f}x"


def change(new: float | None, old: float | None) -> str:
    """Relative change in percent with its sign."""
    return UNKNOWN if new is None or not old else f"{100 * (new / old - 1):+.1f} %"


def points(new: float | None, old: float | None) -> str:
    """Difference of two percentages, in points."""
    return UNKNOWN if new is None or old is None else f"{new - old:+.2f} pt"


def comparison_table(
    dense: dict[str, Any], compressed: dict[str, Any], title: str, fidelity: dict[str, Any] | None = None
) -> Table:
    """Dense against compressed, one row per quantity; ``fidelity``: of the compressed model to the dense one."""
    from rich.table import Table

    table = Table("", title=title, title_justify="left", title_style="bold")
    for heading in ("dense", "compressed", "change"):
        table.add_column(heading, justify="right")

    def row(label: str, key: str, text: Any, difference: Any) -> None:
        old, new = dense.get(key), compressed.get(key)
        table.add_row(label, text(old), text(new), difference(new, old))

    row("parameters", "parameters", lambda count: f"{count:,}", change)
    row("MB", "bytes", megabytes, change)
    row("GMACs", "macs", gigamacs, change)
    row("top-1", "top1", percent, points)
    if fidelity is not None:
        table.add_row("agreement", UNKNOWN, percent(fidelity["agreement"]), UNKNOWN)
        table.add_row("divergence, nats", UNKNOWN, nats(fidelity["divergence"]), UNKNOWN)
    row("images/s", "images_per_second", rate, ratio)
    return table


def sweep_table(data: dict[str, Any]) -> Table:
    """The rows of a sweep beside the dense model, narrow enough for 80 columns."""
    from rich.table import Table

    dense = data["dense"]
    scored = dense["top1"] is not None
    table = Table(title=data["model"]["architecture"], title_justify="left", title_style="bold", box=None)
    table.padding, table.pad_edge = (0, 1, 0, 0), False
    table.add_column("strategy", no_wrap=True)
    for heading in ("keep", "Mparam.", "MB", "GMACs", *(["top-1 %"] if scored else []), "agree %", "KL nats", "s"):
        table.add_column(heading, justify="right", no_wrap=True)

    def row(label: str, keep: str, summary: dict[str, Any], *more: str) -> None:
        sizes = (megabytes(summary["parameters"]), megabytes(summary["bytes"]), gigamacs(summary["macs"]))
        table.add_row(label, keep, *sizes, *([f"{summary['top1']:.2f}"] if scored else []), *more)

    row("dense", "", dense, *[UNKNOWN] * 3)
    for each in data["rows"]:
        fidelity = each["fidelity"]
        shown = (f"{fidelity['agreement']:.2f}", nats(fidelity["divergence"]), f"{each['compressing']:.0f}")
        row(each["strategy"], f"{each['keep']:g}", each["compressed"], *shown)
    return table
