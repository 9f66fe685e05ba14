"""Unified compression beside other ways to choose what goes: the tables of docs/uvc.md."""

from __future__ import annotations

from statistics import mean

from mixrank_bench import uvc, uvc_speed
from mixrank_bench.environment import read
from mixrank_bench.markdown import conditions, table

NO_RUN = "No run has been recorded yet.\n"
KINDS = ("blocks", "heads", "columns", "neurons", "ranks")


def runs() -> dict[tuple[str, float, str], dict[int, dict]]:
    """The newest row of every seed, by model, budget and method."""
    found: dict[tuple[str, float, str], dict[int, dict]] = {}
    for row in read(uvc.OUT):
        if row["kind"] == "method":
            found.setdefault((row["model"], row["budget"], row["method"]), {})[row["seed"]] = row
    return found


def top1(seeds: dict[int, dict]) -> float:
    """After the training, the mean of the seeds, in per cent."""
    return mean(row["result"]["after"] for row in seeds.values())


def dense() -> dict[str, float]:
    """Of each model the top-1 before anything is removed, in per cent."""
    found = {}
    for (model, _, method), seeds in runs().items():
        if method == uvc.OURS:
            found[model] = next(iter(seeds.values()))["result"]["before"]
    return found


def methods() -> str:
    """Every method at every budget, of each model, the most accurate first; its seeds side by side."""
    found = runs()
    if not found:
        return NO_RUN
    lines = []
    for (model, budget, method), seeds in sorted(found.items(), key=lambda one: (one[0][0], -one[0][1], -top1(one[1]))):
        share, parameters = (max(row[name] for row in seeds.values()) for name in ("share", "parameters"))
        landed, after = (
            ", ".join(f"{seeds[seed]['result'][name]:.2f}" for seed in sorted(seeds)) for name in ("landed", "after")
        )
        lines.append((model, budget, method, f"{share:.4f}", f"{parameters:,}", landed, after, f"{top1(seeds):.2f}"))
    told = "".join(f"Dense, {model}: {before:.2f} %. " for model, before in dense().items())
    header = ("model", "budget", "method", "MACs kept", "parameters", "removed, %", "after, %", "mean")
    return table(header, lines) + f"\n{told}{_newest()['epochs']:g} epochs each. {conditions(_newest())}"


def mechanisms() -> str:
    """What took the multiply-adds along, of ours alone and with lower ranks."""
    rows = [row for seeds in runs().values() for row in seeds.values() if "removed" in row["result"]]
    if not rows:
        return NO_RUN
    lines = []
    for row in sorted(rows, key=lambda row: (row["model"], -row["budget"], row["method"], row["seed"])):
        removed = row["result"]["removed"]
        total = sum(removed.values())
        shares = (f"{100 * removed.get(kind, 0) / total:.0f} %" for kind in KINDS)
        lines.append((row["model"], row["budget"], row["method"], row["seed"], *shares))
    return table(("model", "budget", "method", "seed", *KINDS), lines) + "\n" + conditions(_newest())


def split() -> str:
    """How far from the dense model each division of a budget leaves the compressed one, before any training."""
    rows = [row for seeds in runs().values() for row in seeds.values() if row["method"] == uvc.BOTH]
    if not rows:
        return NO_RUN
    powers = sorted({power for row in rows for power in row["result"]["tried"]}, key=float)
    lines = []
    for row in sorted(rows, key=lambda row: (row["model"], -row["budget"], row["seed"])):
        tried, taken = row["result"]["tried"], f"{row['result']['power']:g}"
        cells = (f"{tried[power]:.4f}" if power in tried else "not reached" for power in powers)
        marked = (f"**{cell}**" if power == taken else cell for power, cell in zip(powers, cells, strict=True))
        lines.append((row["model"], row["budget"], row["seed"], *marked))
    header = ("model", "budget b", "seed", *(f"parts to b^{power}" for power in powers))
    return table(header, lines) + "\n" + conditions(_newest())


def _newest() -> dict:
    """The row of a method that was measured last."""
    return [row for row in read(uvc.OUT) if row["kind"] == "method"][-1]


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
    """The newest rows by model, threads and budget, the most multiply-adds first."""
    latest = {(row["model"], row["threads"], row["budget"]): row for row in read(uvc_speed.OUT)}
    return dict(sorted(latest.items(), key=lambda one: (*one[0][:2], -one[1]["macs"])))
