"""Unified compression beside other ways to choose what goes: the tables of docs/uvc.md."""

from __future__ import annotations

from mixrank_bench import uvc, uvc_speed
from mixrank_bench.environment import read
from mixrank_bench.markdown import conditions, table

NO_RUN = "No run has been recorded yet.\n"
KINDS = ("blocks", "heads", "columns", "neurons", "ranks")


def methods() -> str:
    """Every method at every budget, of each model and seed, the most accurate first."""
    rows = [row for row in read(uvc.OUT) if row["kind"] == "method"]
    if not rows:
        return NO_RUN
    latest = {(row["model"], row["budget"], row["seed"], row["method"]): row for row in rows}
    order = sorted(
        latest.values(), key=lambda row: (row["model"], -row["budget"], row["seed"], -row["result"]["after"])
    )
    header = (
        "model",
        "budget",
        "seed",
        "method",
        "MACs kept",
        "parameters",
        "removed, %",
        "after, %",
    )
    lines = []
    for row in order:
        found = row["result"]
        scores = (f"{found[name]:.2f}" for name in ("landed", "after"))
        named = (row["model"], row["budget"], row["seed"], row["method"])
        lines.append((*named, f"{row['share']:.4f}", f"{row['parameters']:,}", *scores))
    last = rows[-1]
    dense = {row["model"]: row["result"]["before"] for row in order if row["method"] == uvc.OURS}
    told = "".join(f"Dense, {model}: {top1:.2f} %. " for model, top1 in dense.items())
    return table(header, lines) + f"\n{told}{last['epochs']:g} epochs each. {conditions(last)}"


def mechanisms() -> str:
    """What took the multiply-adds along, of ours alone and with lower ranks."""
    rows = [row for row in read(uvc.OUT) if row["kind"] == "method" and "removed" in row["result"]]
    if not rows:
        return NO_RUN
    latest = {(row["model"], -row["budget"], row["method"], row["seed"]): row for row in rows}
    lines = []
    for (model, budget, method, seed), row in sorted(latest.items()):
        removed = row["result"]["removed"]
        total = sum(removed.values())
        shares = (f"{100 * removed.get(kind, 0) / total:.0f} %" for kind in KINDS)
        lines.append((model, -budget, method, seed, *shares))
    return table(("model", "budget", "method", "seed", *KINDS), lines) + "\n" + conditions(rows[-1])


def speed() -> str:
    """Images per second beside what the multiply-adds promise."""
    latest = _speeds()
    if not latest:
        return NO_RUN
    lines = []
    for (model, threads, budget), row in latest.items():
        dense = latest[model, threads, "dense"]
        ratio = row["images_per_second"] / dense["images_per_second"]
        promise = dense["macs"] / row["macs"]
        rate = f"{row['images_per_second']:.1f}"
        lines.append((model, threads, budget, rate, f"{ratio:.2f}x", f"{promise:.2f}x", f"{ratio / promise:.2f}"))
    header = ("model", "threads", "budget", "images/s, median", "speed-up", "by multiply-adds", "of what these promise")
    last = list(latest.values())[-1]
    return table(header, lines) + f"\nBatch {last['batch']}. {conditions(last)}"


def times() -> str:
    """What a batch takes, by kind of operation."""
    latest = _speeds()
    if not latest:
        return NO_RUN
    kinds = (*uvc_speed.KINDS, uvc_speed.ELSE)
    lines = [
        (*named, *(f"{row['milliseconds'][kind]:.2f}" for kind in kinds), f"{sum(row['milliseconds'].values()):.1f}")
        for named, row in latest.items()
    ]
    last = list(latest.values())[-1]
    return table(("model", "threads", "budget", *kinds, "all"), lines) + f"\nMilliseconds. {conditions(last)}"


def _speeds() -> dict[tuple[str, int, str], dict]:
    return {(row["model"], row["threads"], row["budget"]): row for row in read(uvc_speed.OUT)}
