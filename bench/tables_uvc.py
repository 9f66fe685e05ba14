"""Unified compression beside other ways to choose what goes: the tables of docs/uvc.md."""

from __future__ import annotations

from mixrank_bench import uvc
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
    rows = [row for row in read(uvc.OUT) if row["kind"] == "speed"]
    if not rows:
        return NO_RUN
    latest = {(row["model"], row["batch"], row["budget"]): row for row in rows}
    lines = []
    for (model, batch, budget), row in latest.items():
        dense = latest[model, batch, "dense"]
        ratio = row["images_per_second"] / dense["images_per_second"]
        promise = dense["macs"] / row["macs"]
        rate = f"{row['images_per_second']:.1f}"
        lines.append((model, batch, budget, rate, f"{ratio:.2f}x", f"{promise:.2f}x", f"{ratio / promise:.2f}"))
    header = ("model", "batch", "budget", "images/s, median", "speed-up", "by multiply-adds", "of what these promise")
    return table(header, lines) + "\n" + conditions(rows[-1])
