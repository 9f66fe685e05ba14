"""Make the tables of the documents from the committed results: ``python -m mixrank_bench.report``.

A table stands between ``<!-- generated: ... -->`` and ``<!-- end -->``; ``--check`` fails where a document is not what
the results say.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from mixrank_bench import run, vit_b16
from mixrank_bench.environment import ROOT, read

BLOCK = re.compile(r"(<!-- generated: python -m mixrank_bench\.report(?: (\S+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table in markdown."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def conditions(row: dict) -> str:
    """Where and when a result was measured."""
    e = row["environment"]
    return (
        f"Measured on {e['cpu']}, {e['threads']} threads, torch {e['torch']}, timm {e['timm']}, commit {e['commit']}, "
        f"{e['date']}.\n"
    )


def front() -> str:
    """The best strategy at each budget beside the dense model."""
    rows = read(vit_b16.OUT)
    dense = next(row for row in rows if row["kind"] == "dense")
    speeds = {row["model"]: row for row in rows if row["kind"] == "speed" and row["batch"] == vit_b16.SPEED_BATCH}
    lines = [_model("dense", dense, speeds["dense"], speeds["dense"])]
    for keep in vit_b16.KEEPS:
        found = [row for row in rows if row["kind"] == "strategy" and row["strategy"]["keep"] == keep]
        best = max(found, key=lambda row: row["top1"])
        lines.append(_model(f"keep {keep}: {_strategy(best)}", best, speeds[f"keep {keep}"], speeds["dense"]))
    header = ("", "parameters", "MB", "GMACs", "top-1, %", f"images/s, batch {vit_b16.SPEED_BATCH}", "speed-up")
    return table(header, lines) + "\n" + conditions(dense)


def _model(label: str, row: dict, speed: dict, dense_speed: dict) -> tuple:
    return (
        label,
        f"{row['parameters']:,}",
        f"{row['bytes'] / 1e6:.0f}",
        f"{row['macs'] / 1e9:.1f}",
        f"{row['top1']:.1f}",
        f"{speed['images_per_second']:.1f}",
        f"{speed['images_per_second'] / dense_speed['images_per_second']:.2f}x",
    )


def _strategy(row: dict) -> str:
    s = row["strategy"]
    ranks = "uniform ranks" if s["ranks"] == "uniform" else f"mixed ranks by {s['energy']} energy"
    factors = "activation-aware" if s["factors"] == "aware" else "plain SVD"
    shrink = f", shrink {s['shrink']}" if s.get("shrink") else ""
    return f"{factors}, {ranks}{', centred' if s['centre'] else ''}{', q k v split' if s['split_qkv'] else ''}{shrink}"


def strategies() -> str:
    """Every strategy at every budget."""
    rows = [row for row in read(vit_b16.OUT) if row["kind"] == "strategy"]
    by_strategy: dict[str, dict[float, dict]] = {}
    for row in rows:
        by_strategy.setdefault(_strategy(row), {})[row["strategy"]["keep"]] = row
    keeps = vit_b16.KEEPS
    lines = []
    for name, found in by_strategy.items():
        scores = [f"{found[keep]['top1']:.1f}" if keep in found else "not measured" for keep in keeps]
        errors = [f"{found[keep]['mean_relative_error']:.4f}" if keep in found else "not measured" for keep in keeps]
        lines.append((name, *scores, *errors))
    lines.sort(key=lambda line: _sort_key(line[2]), reverse=True)
    header = ("strategy", *(f"top-1 at {k}" for k in keeps), *(f"error at {k}" for k in keeps))
    return table(header, lines) + "\n" + conditions(rows[-1])


def _sort_key(cell: str) -> float:
    return -1.0 if cell == "not measured" else float(cell)


def costs() -> str:
    """Time and peak memory of each step."""
    rows = [row for row in read(vit_b16.OUT) if row["kind"] == "cost"]
    lines = [(r["step"], r["images"] or "-", f"{r['seconds']:.1f}", f"{r['peak_megabytes']:.0f}") for r in rows]
    return table(("step", "images", "seconds", "peak memory, MB"), lines) + "\n" + conditions(rows[-1])


def speeds() -> str:
    """Dense against compressed at each batch size."""
    rows = [row for row in read(vit_b16.OUT) if row["kind"] == "speed"]
    dense = {row["batch"]: row["images_per_second"] for row in rows if row["model"] == "dense"}
    lines = [
        (
            r["batch"],
            r["model"],
            f"{r['images_per_second']:.2f}",
            f"{r['low']:.2f} - {r['high']:.2f}",
            f"{r['images_per_second'] / dense[r['batch']]:.2f}x",
        )
        for r in rows
    ]
    return table(("batch", "model", "images/s, median", "range", "speed-up"), lines) + "\n" + conditions(rows[-1])


def operators() -> str:
    """Every operator on every shape against its peers, and the geometric means; losing rows included."""
    rows = [row for row in read(run.OUT) if row["kind"] == "op"]
    ratios: dict[tuple, list[float]] = {}
    lines = []
    for row in rows:
        times = {name: timing["median"] for name, timing in row["milliseconds"].items()}
        ours = times.pop("ours")
        rate = f"{row['flops'] / ours / 1e6:.0f}"
        for peer, time in times.items():
            ratios.setdefault((row["op"], row["dtype"], peer), []).append(time / ours)
        peers = "; ".join(f"{peer} {time / ours:.2f}x" for peer, time in times.items())
        lines.append((row["op"], row["case"], row["dtype"], row["threads"], f"{ours:.3f}", rate, peers))
    means = [
        (*key, f"{math.exp(sum(map(math.log, values)) / len(values)):.2f}x", f"{min(values):.2f}x", len(values))
        for key, values in ratios.items()
    ]
    return (
        table(("operator", "dtype", "peer", "geometric mean", "worst", "cases"), means)
        + "\n"
        + table(("operator", "case", "dtype", "threads", "ms", "GF/s", "speed-up over"), lines)
        + "\n"
        + conditions(rows[-1])
    )


DOCUMENTS = {
    "README.md": {None: front},
    "docs/accuracy.md": {"front": front, "strategies": strategies, "costs": costs, "speeds": speeds},
    "docs/benchmarks.md": {None: operators},
}


def render(path: Path, blocks: dict) -> str:
    """The document with each of its generated blocks made anew."""
    return BLOCK.sub(lambda match: match[1] + "\n" + blocks[match[2]]() + "\n" + match[3], path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a document is out of date")
    args = parser.parse_args()
    stale = []
    for name, blocks in DOCUMENTS.items():
        path = ROOT / name
        text = render(path, blocks)
        if text != path.read_text():
            stale.append(name)
            if not args.check:
                path.write_text(text)
    if args.check and stale:
        sys.exit(f"out of date, run python -m mixrank_bench.report: {', '.join(stale)}")


if __name__ == "__main__":
    main()
