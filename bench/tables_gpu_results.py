"""The GPU section of docs/benchmarks.md: the newest run of :mod:`mixrank_bench.gpu` on each card."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from mixrank_bench import gpu_bars
from mixrank_bench.ceilings import Ceilings
from mixrank_bench.environment import RESULTS, read
from mixrank_bench.markdown import table
from mixrank_bench.measures import SERVED, geometric_mean, newest_runs

OUT = RESULTS / "gpu.jsonl"
NO_RUN = "Not measured yet.\n"
GROUPS = {
    "factors": "same factors",
    "add": "linear + add",
    "dense": "dense",
    "gram": "Gram",
    "rounded": "Gram, rounded: no equal",
}
Row = dict[str, Any]


def rows() -> list[Row]:
    """The rows of the newest run of each card."""
    return newest_runs(read(OUT), lambda row: row["environment"].get("gpu"))


def gpu() -> str:
    """Everything that was measured, card by card."""
    found = rows()
    if not found:
        return NO_RUN
    cards = dict.fromkeys(row["environment"]["gpu"] for row in found)
    return "\n".join(_card([row for row in found if row["environment"]["gpu"] == card]) for card in cards)


def _card(found: list[Row]) -> str:
    parts: dict[str, Callable[[list[Row]], str]] = {
        "Ceilings, measured in the same run": ceilings,
        "What it has to show": bars,
        "Against each peer, cold cache: geometric mean and worst case": summary,
        "Cases in which a peer is faster than what is served, and cases without a number": losing,
        "One row of tokens: calls from Python beside captured ones, µs": launches,
        "Whole model": models,
    }
    tables = ((title, make(found)) for title, make in parts.items())
    return _origin(found) + "".join(f"\n{title}:\n\n{text}" for title, text in tables if text)


def _origin(found: list[Row]) -> str:
    e, cases = found[0]["environment"], {(r["op"], r["dtype"], r["case"]) for r in found if r["kind"] == "op"}
    settings = next((row for row in found if row["kind"] == "settings"), {})
    clocks = settings.get("clocks.sm") or e.get("clocks.sm") or "unknown"
    return (
        f"{e['gpu']}: run {found[0]['run']}, {len(cases)} cases, driver {e.get('driver_version', 'unknown')}, CUDA "
        f"{e['cuda']}, torch {e['torch']}, Triton {e['triton']}, clock {clocks} at the end, power limit "
        f"{e.get('power.limit', 'unknown')}; {e['date']}.\n"
    )


def ceilings(found: list[Row]) -> str:
    """Matrix products, copies and calls."""
    lines = []
    for row in (row for row in found if row["kind"] == "ceiling"):
        limits = Ceilings.from_json(row)
        lines += [
            (f"{dtype} product of {row['side']}²", f"{rate / 1e12:.0f} TFLOP/s") for dtype, rate in limits.flops.items()
        ]
        lines += [
            (f"copy of {size / 2**20:g} MiB", f"{rate / 1e9:.0f} GB/s") for size, rate in limits.bandwidth.items()
        ]
        lines += [("captured call for one number", f"{1e6 * limits.call:.1f} µs")]
        lines += [("call from Python for one number", f"{1e6 * row['eager_call']:.1f} µs")]
    return table(("ceiling", "measured"), lines) if lines else ""


def bars(found: list[Row]) -> str:
    """Every bar for each of our implementations."""
    lines = [
        (
            line.bar.text,
            line.implementation,
            f"{line.bar.wanted:g}x",
            NO_RUN.rstrip(".\n").lower() if line.measured is None else f"{line.measured:.2f}x",
            "yes" if line.met else "**no**",
        )
        for line in gpu_bars.judge(found)
    ]
    return table(("bar", "ours", "wanted", "measured", "met"), lines)


def summary(found: list[Row]) -> str:
    """How many times as fast as each peer each of ours is."""
    gathered: dict[tuple[str, str, str, str, str], list[float]] = {}
    for row in _cold(found):
        for group in GROUPS:
            for peer, timing in row["milliseconds"].get(group, {}).items():
                for name, ours in row["milliseconds"]["ours"].items():
                    key = (row["op"], row["dtype"], name, GROUPS[group], peer)
                    gathered.setdefault(key, []).append(timing["median"] / ours["median"])
    lines = [(*key, f"{geometric_mean(v):.2f}x", f"{min(v):.2f}x", len(v)) for key, v in gathered.items()]
    return table(("operator", "dtype", "ours", "group", "against", "mean", "worst", "cases"), sorted(lines))


def losing(found: list[Row]) -> str:
    """What an honest table does not leave out."""
    lines = []
    for row in (row for row in found if row["kind"] == "op" and row["timed"] == "cold"):
        cells = (row["op"], row["case"], row["dtype"])
        lines += [(*cells, name, "failed", "", reason) for name, reason in row["refused"].get("ours", {}).items()]
        if row["gate"]:
            lines.append((*cells, SERVED, "no number", "", row["gate"]))
            continue
        ours = row["milliseconds"]["ours"][SERVED]["median"]
        for group in ("factors", "add", "dense", "gram"):
            peers = {name: timing["median"] for name, timing in row["milliseconds"].get(group, {}).items()}
            if peers and min(peers.values()) < ours:
                best = min(peers, key=peers.get)
                lines.append((*cells, SERVED, f"{1e3 * ours:.1f}", f"{peers[best] / ours:.2f}x", best))
    return table(("operator", "case", "dtype", "ours", "µs", "ratio", "faster peer, or why"), lines) if lines else ""


def launches(found: list[Row]) -> str:
    """What a call costs beyond the work."""
    by_case: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in (row for row in found if row["kind"] == "op" and not row["gate"]):
        by_case.setdefault((row["op"], row["dtype"], row["case"]), {})[row["timed"]] = row["milliseconds"]
    lines = [
        (*key, name, f"{1e3 * timing['median']:.1f}", f"{1e3 * ways['warm'][group][name]['median']:.1f}")
        for key, ways in by_case.items()
        if "eager" in ways and "warm" in ways
        for group in ("ours", "factors")
        for name, timing in ways["eager"].get(group, {}).items()
        if name in ways["warm"].get(group, {})
    ]
    return table(("operator", "dtype", "case", "who", "from Python", "captured"), lines) if lines else ""


def models(found: list[Row]) -> str:
    """Images per second, dense and compressed."""
    lines = []
    for row in (row for row in found if row["kind"] == "model"):
        what = (row["case"], f"{row['keep']:g}", row["batch"], row["dtype"], row["timed"])
        if row["gate"]:
            lines.append((*what, SERVED, "no number", row["gate"]))
            continue
        dense = row["milliseconds"]["dense"]["dense"]["median"]
        named = {"dense": dense} | {name: timing["median"] for name, timing in row["milliseconds"]["ours"].items()}
        lines += [(*what, n, f"{1e3 * row['batch'] / ms:.0f}", f"{dense / ms:.2f}x") for n, ms in named.items()]
    header = ("model", "keep", "batch", "dtype", "captured as", "served by", "images/s", "against dense")
    return table(header, lines) if lines else ""


def _cold(found: Iterable[Row]) -> list[Row]:
    return [row for row in found if row["kind"] == "op" and row["timed"] == "cold" and not row["gate"]]
