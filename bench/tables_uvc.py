"""Unified compression beside other ways to choose what goes: the tables of docs/uvc.md."""

from __future__ import annotations

from mixrank_bench import uvc, uvc_speed
from mixrank_bench.environment import read
from mixrank_bench.markdown import conditions, table

NO_RUN = "No run has been recorded yet.\n"
KINDS = ("blocks", "heads", "columns", "neurons", "ranks")


def methods() -> str:
    """Every method at every budget, of each model, the most accurate first; its seeds side by side."""
    rows = [row for row in read(uvc.OUT) if row["kind"] == "method"]
    if not rows:
        return NO_RUN
    runs = [{row["seed"]: row for row in runs} for runs in _by(rows, "model", "budget", "method")]
    order = sorted(runs, key=lambda seeds: (_any(seeds)["model"], -_any(seeds)["budget"], -_mean(seeds)))
    lines = []
    for seeds in order:
        one = _any(seeds)
        shares, parameters = ({row[name] for row in seeds.values()} for name in ("share", "parameters"))
        scores = (
            ", ".join(f"{seeds[seed]['result'][name]:.2f}" for seed in sorted(seeds)) for name in ("landed", "after")
        )
        sizes = (f"{max(shares):.4f}", f"{max(parameters):,}")
        lines.append((one["model"], one["budget"], one["method"], *sizes, *scores, f"{_mean(seeds):.2f}"))
    last = rows[-1]
    dense = {row["model"]: row["result"]["before"] for row in rows if row["method"] == uvc.OURS}
    told = "".join(f"Dense, {model}: {top1:.2f} %. " for model, top1 in dense.items())
    header = ("model", "budget", "method", "MACs kept", "parameters", "removed, %", "after, %", "mean")
    return table(header, lines) + f"\n{told}{last['epochs']:g} epochs each. {conditions(last)}"


def _by(rows: list[dict], *names: str) -> list[list[dict]]:
    """Rows that agree in all of these, together."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return list(found.values())


def _any(seeds: dict[int, dict]) -> dict:
    return seeds[min(seeds)]


def _mean(seeds: dict[int, dict]) -> float:
    return sum(row["result"]["after"] for row in seeds.values()) / len(seeds)


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
