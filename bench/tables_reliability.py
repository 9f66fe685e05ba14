"""The tables of docs/reliability.md: commands that were killed, and input that was meant to break them."""

from __future__ import annotations

from mixrank_bench import hostile as hostile_run
from mixrank_bench import interruptions as interruptions_run
from mixrank_bench.environment import read
from mixrank_bench.hostile_targets import TARGETS
from mixrank_bench.markdown import conditions, table

NO_RUN = "No run has been recorded yet.\n"
NOT_MEASURED = "not measured"


def interruptions() -> str:
    """Each command: how often it was killed, and what came out in the end."""
    rows = {row["command"]: row for row in read(interruptions_run.OUT)}
    if not rows:
        return NO_RUN
    lines = []
    for command in interruptions_run.COMMANDS:
        if (row := rows.get(command)) is None:
            cells: tuple = (NOT_MEASURED, "", "", "", "")
        else:
            failed = len(row["failures"])
            cells = (row["runs"], row["kills"], row["runs"] - row["different"] - failed, row["different"], failed)
        lines.append((f"`mixrank {command}`", *cells))
    header = ("command", "runs", "killed", "same bytes", "other bytes", "failures")
    return table(header, lines) + "\n" + conditions(list(rows.values())[-1])


def hostile() -> str:
    """Each target: cases, those refused with the promised error, and what was not promised."""
    rows = {row["target"]: row for row in read(hostile_run.OUT)}
    if not rows:
        return NO_RUN
    lines = []
    for target in TARGETS:
        if (row := rows.get(target)) is None:
            cells: tuple = (NOT_MEASURED, "", "", "", "")
        else:
            counts = (f"{row['cases']:,}", f"{row['refused']:,}", len(row["failures"]))
            cells = (*counts, f"{row['slowest_seconds']:.2f}", f"{row['memory'] / 2**20:.0f}")
        lines.append((target, *cells))
    header = ("input", "cases", "refused", "failures", "slowest, seconds", "memory at most, MiB more")
    cases = sum(row["cases"] for row in rows.values())
    return table(header, lines) + f"\n{cases:,} cases in all. " + conditions(list(rows.values())[-1])
