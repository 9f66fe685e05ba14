"""``mixrank_kernels/choices.json`` from a run of :mod:`mixrank_bench.gpu`: what is fastest with a cold cache."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from mixrank.errors import InputError
from mixrank_bench import gpu_cases
from mixrank_bench.measures import SERVED, geometric_mean, newest_runs
from mixrank_kernels import choice

Row = dict[str, Any]
PATH = Path(str(resources.files("mixrank_kernels").joinpath(choice.TABLE)))
LIBRARIES = "composite"
_CLASSES = {"float64": "fp64", "float32": "fp32"}


def decided(text: str, rows: Iterable[Row]) -> tuple[str, list[str]]:
    """Give every line of the table that was measured the implementation that was fastest, and say where.

    Args:
        text: the table; ranges of sizes stay as they are, and so do lines of operands that the suite does not have.
        rows: a file of results, whose newest run counts.

    Returns:
        The new text, and what was decided, in words.

    Raises:
        InputError: the run is not of a commit, or has no number for a case that a line rests on.
    """
    rows = newest_runs(
        row for row in rows if row["kind"] == "op" and row["device"] == "cuda" and row["timed"] == "cold"
    )
    _refuse(rows)
    environment = rows[0]["environment"]
    measured = f"{environment['gpu']}, run {rows[0]['run']}"
    lines, told = json.loads(text), []
    for line in lines:
        ratios = _ratios([row for row in rows if _is_in(row, line)])
        if not ratios:
            continue
        best = max(ratios, key=ratios.get)
        line |= {"implementation": best, "measured": measured}
        said = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in ratios.items())
        told.append(f"{line['op']} {line['operands']} {line['low']} to {line['high']}: {best} ({said})")
    return "[\n" + ",\n".join(f"  {json.dumps(line)}" for line in lines) + "\n]\n", told


def _refuse(rows: list[Row]) -> None:
    if not rows:
        raise InputError("the results must have rows of operators on cuda with a cold cache, but there are none")
    commit = rows[0]["environment"]["commit"]
    if commit == "unknown" or commit.endswith("+"):
        raise InputError(f"the results must be of a commit without changes, but they are of {commit!r}")
    numbers = {(row["op"], row["dtype"], row["case"]) for row in rows if not row["gate"]}
    needed = [*gpu_cases.bar_cases(), *gpu_cases.choice_cases()]
    missing = [case for case in needed if (case.op, case.dtype_name, case.name) not in numbers]
    if missing:
        first = f"{missing[0].op} {missing[0].dtype_name} {missing[0].name}"
        wanted = f"the results must have a number for each of {len(needed)} cases"
        raise InputError(f"{wanted}, but {len(missing)} have none: {first}, ...")


def _is_in(row: Row, line: dict[str, Any]) -> bool:
    """Whether a line of the table decides about calls like that of a row."""
    is_gram = "gram" in row["op"]
    if row["residual"].startswith("blocks") or (row["dtype"] == "float16" and not is_gram) or row["gate"]:
        return False  # decided before the table is asked
    size = max(row["k"], row["n"]) if is_gram else row["m"]
    of_line = (row["op"], _CLASSES.get(row["dtype"], "half")) == (line["op"], line["operands"])
    return of_line and line["low"] <= size and (line["high"] is None or size <= line["high"])


def _ratios(rows: list[Row]) -> dict[str, float]:
    """How many times as fast as the libraries each implementation is that has a number in all of the rows."""
    times = [{name: t["median"] for name, t in row["milliseconds"]["ours"].items() if name != SERVED} for row in rows]
    times = [one for one in times if LIBRARIES in one]
    if not times:
        return {}
    names = dict.fromkeys((LIBRARIES, *itertools.chain(*times)))
    complete = [name for name in names if all(name in one for one in times)]
    return {name: geometric_mean(one[LIBRARIES] / one[name] for one in times) for name in complete}
