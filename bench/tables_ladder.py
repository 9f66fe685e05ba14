"""The tables of docs/kernels/: what each version of the kernels won."""

from __future__ import annotations

from mixrank_bench.environment import RESULTS, read
from mixrank_bench.markdown import conditions, table
from mixrank_bench.measures import newest_runs

LADDER = RESULTS / "ladder.jsonl"
NO_RUN = "No run has been recorded yet.\n"


def ladder(op: str) -> str:
    """The speed-up over torch eager on each case, one line for each dtype and version of the operator's kernel."""
    rows = [row for row in newest_runs(read(LADDER)) if row["op"] == op]
    if not rows:
        return NO_RUN
    names = list(dict.fromkeys(row["case"] for row in rows))
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        ratio = row["reference_milliseconds"] / row["milliseconds"]
        lines.setdefault((row["dtype"], row["step"], row["commit"]), {})[row["case"]] = f"{ratio:.2f}x"
    cells = [(*line, *(ratios.get(name, "-") for name in names)) for line, ratios in lines.items()]
    return table(("dtype", "what is new", "commit", *names), cells) + "\n" + conditions(rows[-1])


def lowrank() -> str:
    """The versions of lowrank_linear."""
    return ladder("lowrank_linear")


def gram() -> str:
    """The versions of gram_accumulate_."""
    return ladder("gram_accumulate_")
