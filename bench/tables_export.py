"""The table of docs/benchmarks.md: exported models in other runtimes."""

from __future__ import annotations

from mixrank_bench import export
from mixrank_bench.environment import read
from mixrank_bench.markdown import conditions, table

NO_RUN = "No run has been recorded yet.\n"


def runtimes() -> str:
    """Images per second of each runtime, and how many times those of the dense model there."""
    rows = read(export.OUT)
    if not rows:
        return NO_RUN
    latest = {(row["batch"], row["runtime"], row["model"]): row for row in rows}
    lines = []
    for (batch, runtime, model), row in sorted(latest.items(), key=lambda item: item[0][0]):
        if model == "dense":
            continue
        dense, rate = latest[batch, runtime, "dense"]["images_per_second"], row["images_per_second"]
        ours = latest[batch, export.OURS, model]["images_per_second"]
        lines.append(
            (batch, model, runtime, f"{rate:.2f}", f"{dense:.2f}", f"{rate / dense:.2f}x", f"{rate / ours:.2f}x")
        )
    header = ("batch", "model", "runtime", "images/s", "dense there, images/s", "speed-up there", "times mixrank")
    return table(header, lines) + "\n" + conditions(rows[-1])
