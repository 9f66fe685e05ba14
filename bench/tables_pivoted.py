"""The table of docs/kernels/pivoted.md: the pivoted form beside the factors of the same weight, and the dense layer."""

from __future__ import annotations

from mixrank_bench.environment import RESULTS, read
from mixrank_bench.markdown import conditions, table
from mixrank_bench.measures import geometric_mean, measures, newest_runs

OUT = RESULTS / "pivoted.jsonl"
NO_RUN = "No run has been recorded yet.\n"
OWN = "lowrank_linear"
HEADER = ("case", "dtype", "ms", "% of the roof", OWN, "best other, factors", "best other, dense weight")


def speed() -> str:
    """Each case of the newest run: milliseconds, percent of the roof, and how many times as long others take."""
    rows = newest_runs(read(OUT))
    found = [one for one in measures(rows) if not one.red]
    if not found:
        return NO_RUN
    columns: list[list[float]] = []
    lines = []
    for one in found:
        others = {name: time for name, time in one.peers("factors").items() if name != OWN}
        times = (one.peers("factors")[OWN], min(others.values()), one.best("dense")[1])
        ratios = [time / one.milliseconds for time in times]
        columns.append(ratios)
        cells = (f"{ratio:.2f}x" for ratio in ratios)
        roof = f"{one.roof[0]:.0f} ({one.roof[1]})" if one.roof else "-"
        lines.append((one.row["case"], one.row["dtype"], f"{one.milliseconds:.3f}", roof, *cells))
    means = (f"{geometric_mean(column):.2f}x" for column in zip(*columns, strict=True))
    lines.append(("geometric mean", "", "", "", *means))
    return table(HEADER, lines) + "\n" + conditions(rows[-1])
