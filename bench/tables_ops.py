"""The tables of docs/benchmarks.md and docs/benchmarks_all.md: the newest runs of the operators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mixrank_bench import bars, tables_models
from mixrank_bench.ceilings import Ceilings
from mixrank_bench.environment import RESULTS, read
from mixrank_bench.markdown import table
from mixrank_bench.measures import SERVED, UNPACKED, Measure, geometric_mean, measures, newest_runs
from mixrank_bench.ops import TOKENS

OUT = RESULTS / "ops.jsonl"
BEST = "best of these"
NO_RUN = "No run has been recorded yet.\n"
GROUPS = {
    "ours": "ours",
    "factors": "same factors",
    "add": "linear + add",
    "dense": "dense",
    "gram": "Gram",
}


def rows() -> list[dict[str, Any]]:
    """The rows of the newest run for each number of threads."""
    return newest_runs(read(OUT))


def machine() -> str:
    """Where, when and how the runs were measured, and their ceilings."""
    found = rows()
    if not found:
        return NO_RUN
    text = "".join(_origin(run, found) for run in dict.fromkeys(row["run"] for row in found))
    ceilings = [Ceilings.from_json(row) for row in found if row["kind"] == "ceiling"]
    sizes = list(ceilings[0].bandwidth)
    header = [
        "threads",
        "float32, GF/s",
        "bfloat16, GF/s",
        *(f"{size / 2**20:g} MiB, GB/s" for size in sizes),
        "call, µs",
    ]
    lines = [
        (
            c.threads,
            *(f"{c.flops[dtype] / 1e9:.0f}" if dtype in c.flops else "-" for dtype in ("float32", "bfloat16")),
            *(f"{c.bandwidth[size] / 1e9:.0f}" for size in sizes),
            f"{1e6 * c.call:.1f}",
        )
        for c in ceilings
    ]
    return text + table(header, lines)


def _origin(run: str, found: list[dict[str, Any]]) -> str:
    """One run in a sentence, with the threads that it is the newest of."""
    of_run = [row for row in found if row["run"] == run]
    e = of_run[0]["environment"]
    threads = " and ".join(str(count) for count in sorted({row["threads"] for row in of_run}))
    cases = sum(row["kind"] == "op" for row in of_run)
    peers = ", ".join(f"{name} {version}" for name, version in e["peers"].items())
    core = f", OpenBLAS kernels {e['openblas']}" if e["openblas"] else ""
    return (
        f"{'Full' if of_run[0]['full'] else 'Quick'} run {run}, threads {threads}, {cases} cases, {e['cpu']}, Python "
        f"{e['python']}, torch {e['torch']}, {peers}{core}; load {e['load']} at the start; {e['date']}.\n\n"
    )


def steadiness() -> str:
    """How much longer than its fastest round each variant took, ours and the others: what the machine did meanwhile."""
    gathered: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for one in measures(rows()):
        for group, named in one.row["milliseconds"].items():
            who = "ours" if group == "ours" else "others"
            shares = [(t["median"] / t["low"], t["high"] / t["low"]) for t in named.values()]
            gathered.setdefault((one.row["threads"], who), []).extend(shares)
    if not gathered:
        return NO_RUN
    lines = []
    for (threads, who), found in sorted(gathered.items()):
        medians, slowest = zip(*found, strict=True)
        percents = (f"{100 * sum(share > 1.5 for share in shares) / len(found):.0f} %" for shares in (medians, slowest))
        lines.append((threads, who, len(found), *percents))
    header = ("threads", "variants", "timed", "median over 1.5 times the fastest round", "slowest round over 1.5 times")
    return table(header, lines)


def ratios(one: Measure) -> Iterator[tuple[str, str, float]]:
    """Group, peer and ratio of every peer of a case, and of the best of each group of several."""
    for group in GROUPS:
        if group == "ours":
            if one.unpacked_milliseconds:
                yield group, UNPACKED, one.unpacked_milliseconds / one.milliseconds
            continue
        peers = one.peers(group)
        if len(peers) > 1:
            yield group, BEST, min(peers.values()) / one.milliseconds
        for name, milliseconds in peers.items():
            yield group, name, milliseconds / one.milliseconds


def summary() -> str:
    """Geometric mean and worst ratio to each peer, for each operator and dtype."""
    found = [one for one in measures(rows()) if not one.red]
    if not found:
        return NO_RUN
    threads = sorted({one.row["threads"] for one in found})
    gathered: dict[tuple[str, str, str, str], dict[int, list[float]]] = {}
    for one in found:
        for group, peer, ratio in ratios(one):
            key = (one.row["op"], one.row["dtype"], group, peer)
            gathered.setdefault(key, {}).setdefault(one.row["threads"], []).append(ratio)
    lines = []
    ops, groups = list(dict.fromkeys(key[0] for key in gathered)), list(GROUPS)
    for key in sorted(gathered, key=lambda key: (ops.index(key[0]), key[1], groups.index(key[2]))):
        op, dtype, group, peer = key
        by_threads = gathered[key]
        cells = []
        for count in threads:
            values = by_threads.get(count)
            cells += [f"{geometric_mean(values):.2f}x", f"{min(values):.2f}x", len(values)] if values else ["-"] * 3
        lines.append((op, dtype, GROUPS[group], peer, *cells))
    header = ["operator", "dtype", "group", "against"]
    for count in threads:
        header += [f"mean, {count}T", f"worst, {count}T", f"cases, {count}T"]
    return table(header, lines)


def ceiling() -> str:
    """How close each operator comes to the roofline, by the number of rows."""
    found = [one for one in measures(rows()) if not one.red]
    if not found:
        return NO_RUN
    threads = sorted({one.row["threads"] for one in found})
    gathered: dict[tuple[str, str, int], dict[int, list[tuple[float, str]]]] = {}
    for one in found:
        if one.roof:
            key = (one.row["op"], one.row["dtype"], one.row["m"])
            gathered.setdefault(key, {}).setdefault(one.row["threads"], []).append(one.roof)
    lines = []
    for key in sorted(gathered):
        cells = []
        for count in threads:
            roofs = gathered[key].get(count, [])
            shares = [share for share, _ in roofs]
            sides = sorted({side for _, side in roofs})
            cells += (
                [f"{geometric_mean(shares):.0f} %", f"{min(shares):.0f} %", ", ".join(sides)] if roofs else ["-"] * 3
            )
        lines.append((*key, *cells))
    header = ["operator", "dtype", "M"]
    for count in threads:
        header += [f"mean, {count}T", f"worst, {count}T", f"bound by, {count}T"]
    return table(header, lines)


def by_rank() -> str:
    """Percent of the arithmetic ceiling of lowrank_linear and of its fastest peer, for many rows, by the rank."""
    ranges = ((1, 64), (65, 128), (129, 256), (257, 1 << 30))
    gathered: dict[tuple[str, int, int], list[tuple[float, float]]] = {}
    for one in measures(rows()):
        best = None if one.red else one.best("factors")
        if one.row["op"] != "lowrank_linear" or one.row["m"] < TOKENS or not best or not one.percent:
            continue
        index = next(i for i, (low, high) in enumerate(ranges) if low <= one.row["rank"] <= high)
        pair = (one.percent, one.percent * one.milliseconds / best[1])
        gathered.setdefault((one.row["dtype"], one.row["threads"], index), []).append(pair)
    if not gathered:
        return NO_RUN
    lines = []
    for (dtype, threads, index), pairs in sorted(gathered.items()):
        low, high = ranges[index]
        name = f"{low} to {high}" if index + 1 < len(ranges) else f"{low} and more"
        shares = (f"{geometric_mean(values):.0f} %" for values in zip(*pairs, strict=True))
        lines.append((dtype, threads, name, len(pairs), *shares, f"{min(pairs)[0]:.0f} %"))
    return table(("dtype", "threads", "rank", "cases", "ours, mean", "fastest peer, mean", "ours, worst"), lines)


def by_width() -> str:
    """Percent of the arithmetic ceiling of Gram matrices of one input, and what binds them."""
    found = [one for one in measures(rows()) if one.row["op"] == "gram_accumulate_" and not one.red and one.percent]
    if not found:
        return NO_RUN
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for one in found:
        by_threads = cells.setdefault((one.row["case"], one.row["dtype"]), {})
        by_threads[one.row["threads"]] = f"{one.percent:.0f} %"
    threads = sorted({one.row["threads"] for one in found})
    lines = [(*key, *(by_threads.get(count, "-") for count in threads)) for key, by_threads in cells.items()]
    return table(("case", "dtype", *(f"{count}T" for count in threads)), lines)


def bar_lines() -> str:
    """Every bar, what was measured, and whether that is enough."""
    found = measures(rows())
    if not found:
        return NO_RUN
    lines = [
        (
            line.text,
            line.dtype,
            line.threads,
            line.wanted,
            "no number" if line.measured is None else f"{line.measured:.2f}{line.unit}",
            "yes" if line.met else "**no**",
            line.note,
        )
        for line in bars.judge(found, tables_models.calibration_rows())
    ]
    return table(("bar", "dtype", "threads", "wanted", "measured", "met", "why not"), lines)


def losing() -> str:
    """Every case in which the best peer of a group is faster, and every case without a number."""
    found = measures(rows())
    if not found:
        return NO_RUN
    lines = []
    for one in found:
        cells = (one.row["op"], one.row["case"], one.row["dtype"], one.row["threads"])
        if one.red:
            lines.append((*cells, "no number", "", one.red, ""))
            continue
        for group in ("factors", "add", "dense", "gram"):
            best = one.best(group)
            if best and best[1] < one.milliseconds:
                ratio = f"{best[1] / one.milliseconds:.2f}x"
                lines.append((*cells, f"{one.milliseconds:.3f}", GROUPS[group], best[0], ratio))
    if not lines:
        return "None.\n"
    return table(("operator", "case", "dtype", "threads", "ours, ms", "group", "faster peer", "ratio"), lines)


def complete() -> str:
    """Every case with every peer."""
    found = measures(rows())
    if not found:
        return NO_RUN
    lines = []
    for one in found:
        row = one.row
        cells = (row["op"], row["case"], row["dtype"], row["threads"])
        if one.red:
            lines.append((*cells, "-", "-", "-", "-", "-", f"no number: {one.red}"))
            continue
        timing = row["milliseconds"]["ours"][SERVED]
        roof = f"{one.roof[0]:.0f} ({one.roof[1]})" if one.roof else "-"
        full = f"{one.rate('equivalent_flops') / 1e9:.0f}" if row["equivalent_flops"] != row["flops"] else "-"
        peers = "; ".join(f"{GROUPS[group]}: {cell}" for group, cell in _by_group(one))
        lines.append(
            (
                *cells,
                f"{one.milliseconds:.3f}",
                f"{timing['low']:.3f} - {timing['high']:.3f}",
                f"{one.rate() / 1e9:.0f}",
                full,
                roof,
                peers,
            )
        )
    header = ["operator", "case", "dtype", "threads", "ms", "range", "GF/s", "as full product, GF/s", "% of roof"]
    return table([*header, "speed-up over (fastest first)"], lines)


def _by_group(one: Measure) -> Iterator[tuple[str, str]]:
    """Group and the ratios to its peers in words, the fastest peer first."""
    if one.unpacked_milliseconds:
        yield "ours", f"{UNPACKED} {one.unpacked_milliseconds / one.milliseconds:.2f}x"
    for group in GROUPS:
        peers = sorted(one.peers(group).items(), key=lambda peer: peer[1])
        if peers and group != "ours":
            yield group, ", ".join(f"{name} {time / one.milliseconds:.2f}x" for name, time in peers)


def absent() -> str:
    """Which peers are missing, on how many cases, and why."""
    counts: dict[tuple[str, str, str], int] = {}
    for one in measures(rows()):
        for named in one.row["absent"].values():
            for name, reason in named.items():
                key = (name, one.row["dtype"], reason)
                counts[key] = counts.get(key, 0) + 1
    if not counts:
        return NO_RUN if not rows() else "None.\n"
    return table(("peer", "dtype", "reason", "times"), [(*key, count) for key, count in sorted(counts.items())])
