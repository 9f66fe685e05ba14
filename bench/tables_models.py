"""The tables of whole models and of calibration runs in docs/benchmarks.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixrank_bench.environment import RESULTS, read
from mixrank_bench.markdown import conditions, table

CALIBRATION = RESULTS / "calibration.jsonl"
MODELS = RESULTS / "models.jsonl"
NONE = "Nothing has been recorded yet.\n"


def calibration_rows() -> list[dict[str, Any]]:
    """The newest row of the kind ``calibration`` for each model, method, dtype and number of threads."""
    return _newest(CALIBRATION, "calibration", "model", "method", "dtype", "threads")


def _newest(path: Path, kind: str, *keys: str) -> list[dict[str, Any]]:
    """The rows of a kind without those that were measured again later, in the order of the first measurement."""
    found: dict[tuple, dict[str, Any]] = {}
    for row in read(path):
        if row["kind"] == kind:
            found[tuple(row[key] for key in keys)] = row
    return list(found.values())


def calibration() -> str:
    """How long the Gram matrices of a calibration run take beside the forward pass."""
    rows = calibration_rows()
    if not rows:
        return NONE
    lines = [
        (
            row["model"],
            row["method"],
            row["dtype"],
            row["threads"],
            row["images"],
            f"{row['seconds_forward']:.1f}",
            f"{row['seconds_gram']:.1f}",
            f"{100 * row['seconds_gram'] / row['seconds_forward']:.0f} %",
        )
        for row in rows
    ]
    header = ("model", "method", "dtype", "threads", "images", "forward pass, s", "Gram matrices, s", "share")
    return table(header, lines) + "\n" + conditions(rows[-1])


def models() -> str:
    """Dense against compressed models, the ratio taken against the fastest mode of the dense model."""
    rows = _newest(MODELS, "model", "model", "keep", "mode", "dtype", "threads", "batch")
    if not rows:
        return NONE
    dense: dict[tuple, list[float]] = {}
    for row in rows:
        if row["keep"] is None:
            dense.setdefault(_setting(row), []).append(row["images_per_second"])
    lines = []
    for row in rows:
        best = max(dense.get(_setting(row), []), default=None)
        lines.append(
            (
                row["model"],
                "dense" if row["keep"] is None else f"keep {row['keep']:g}",
                row["mode"],
                row["dtype"],
                row["threads"],
                row["batch"],
                f"{row['parameters']:,}",
                f"{row['peak_megabytes']:.0f}" if row["peak_megabytes"] is not None else "-",
                f"{row['images_per_second']:.2f}",
                f"{row['low']:.2f} - {row['high']:.2f}",
                f"{row['images_per_second'] / best:.2f}x" if best else "-",
            )
        )
    header = (
        "model",
        "",
        "mode",
        "dtype",
        "threads",
        "batch",
        "parameters",
        "peak memory, MB",
        "images/s, median",
        "range",
        "against the best dense",
    )
    return table(header, lines) + "\n" + conditions(rows[-1])


def _setting(row: dict[str, Any]) -> tuple:
    return row["model"], row["dtype"], row["threads"], row["batch"]
