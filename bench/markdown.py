"""Tables in markdown, and what is said of every table of measurements."""

from __future__ import annotations

from collections.abc import Iterable


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table in markdown."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def conditions(row: dict) -> str:
    """Where and when a result was measured."""
    e = row["environment"]
    isa = f" ({e['isa']})" if e.get("isa") else ""  # rows of earlier commits do not name it
    threads = f"{e['threads']} thread{'' if e['threads'] == 1 else 's'}"
    versions = f"torch {e['torch']}, timm {e['timm']}, commit {e['commit']}"
    return f"Measured on {e['cpu']}{isa}, {threads}, {versions}, {e['date']}.\n"
