"""The figures of docs/benchmarks.md: the roofline, and the speed-ups over each peer.

A figure carries the run that it was drawn from in its metadata; it is out of date when that is not the newest run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mixrank_bench import tables_ops
from mixrank_bench.ceilings import Ceilings
from mixrank_bench.measures import Measure, geometric_mean, measures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOLDER = Path("docs") / "images"
# The palette of Okabe and Ito, which the colour-blind can tell apart.
DTYPE_COLOURS = {"float32": "#0072B2", "bfloat16": "#D55E00"}
GROUP_COLOURS = {"factors": "#0072B2", "add": "#E69F00", "dense": "#009E73", "gram": "#CC79A7"}
MARKERS = {
    "lowrank_linear": "o",
    "lowrank_residual_linear": "s",
    "gram_accumulate_": "^",
    "cross_gram_accumulate_": "D",
}
STYLE = {
    "svg.hashsalt": "mixrank",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def links() -> str:
    """The figures as images in markdown."""
    if not tables_ops.rows():
        return tables_ops.NO_RUN
    return "\n\n".join(f"![{text}](images/{name}.svg)" for name, (text, _) in FIGURES.items()) + "\n"


def write(root: Path) -> None:
    """Draw every figure of the newest run under ``root``."""
    rows = tables_ops.rows()
    found = [one for one in measures(rows) if not one.red]
    if not found:
        return
    import matplotlib

    (root / FOLDER).mkdir(parents=True, exist_ok=True)
    for name, (_, draw) in FIGURES.items():
        with matplotlib.rc_context(STYLE):
            figure = draw(found)
            metadata = {"Date": None, "Creator": None, "Description": rows[0]["run"]}
            figure.savefig(root / FOLDER / f"{name}.svg", format="svg", metadata=metadata, bbox_inches="tight")


def stale(root: Path) -> list[str]:
    """The figures under ``root`` that are missing, or were not drawn from the newest run."""
    rows = tables_ops.rows()
    if not rows:
        return []
    files = [root / FOLDER / f"{name}.svg" for name in FIGURES]
    run = rows[0]["run"]
    return [str(file.relative_to(root)) for file in files if not file.is_file() or run not in file.read_text()]


def roofline(found: list[Measure]) -> Figure:
    """Operations per second against operations per byte, one panel for each number of threads."""
    panels = {one.row["threads"]: one.ceilings for one in found}
    figure, axes = _panels(1, len(panels), (5.2, 4.0))
    for axis, (threads, limits) in zip(axes, sorted(panels.items()), strict=True):
        chosen = [one for one in found if one.row["threads"] == threads]
        for one in chosen:
            row = one.row
            axis.scatter(
                row["flops"] / row["bytes"],
                one.rate() / 1e9,
                s=14,
                marker=MARKERS[row["op"]],
                color=DTYPE_COLOURS[row["dtype"]],
                alpha=0.6,
                linewidths=0,
            )
        _roofs(axis, limits, [one.row["flops"] / one.row["bytes"] for one in chosen])
        axis.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="GF/s", title=_threads(threads))
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, marker="o", ls="", label=name) for name, colour in DTYPE_COLOURS.items()]
    handles += [Line2D([], [], color="#555555", marker=mark, ls="", label=op) for op, mark in MARKERS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _roofs(axis: Axes, limits: Ceilings, intensities: list[float]) -> None:
    """The measured ceilings: arithmetic level, memory by the size of the working set."""
    low, high = min(intensities) / 1.5, max(intensities) * 1.5
    top = max(limits.flops.values(), default=float("inf"))
    for dtype, flops in limits.flops.items():
        start = max(low, flops / max(limits.bandwidth.values()))
        axis.plot([start, high], [flops / 1e9] * 2, color=DTYPE_COLOURS[dtype], lw=1.2)
        axis.annotate(f"{dtype} peak", (high, flops / 1e9), ha="right", va="bottom", color=DTYPE_COLOURS[dtype])
    sizes = (max(limits.bandwidth, key=limits.bandwidth.__getitem__), max(limits.bandwidth))
    for size, style in zip(sizes, ("--", ":"), strict=True):
        rate = limits.bandwidth[size]
        end = min(high, top / rate)
        axis.plot([low, end], [rate * low / 1e9, rate * end / 1e9], color="#555555", ls=style, lw=1.0)
        axis.annotate(f"  {size / 2**20:g} MiB", (low, rate * low / 1e9), va="top", color="#555555")


def speed_ups(found: list[Measure]) -> Figure:
    """Geometric mean of the ratio to each peer, and a line from the worst to the best case: operators by dtypes."""
    gathered: dict[str, dict[str, dict[tuple[str, str], list[float]]]] = {}
    for one in found:
        for group, peer, ratio in tables_ops.ratios(one):
            if group != "ours" and peer != tables_ops.BEST:
                by_dtype = gathered.setdefault(one.row["op"], {})
                by_dtype.setdefault(one.row["dtype"], {}).setdefault((group, peer), []).append(ratio)
    dtypes = [dtype for dtype in DTYPE_COLOURS if any(dtype in by_dtype for by_dtype in gathered.values())]
    bars = [max(map(len, by_dtype.values())) for by_dtype in gathered.values()]
    figure, axes = _panels(len(gathered), len(dtypes), (6.0, 0.5), heights=bars)
    for index, (op, by_dtype) in enumerate(gathered.items()):
        for column, dtype in enumerate(dtypes):
            _ratios(axes[index * len(dtypes) + column], by_dtype.get(dtype, {}), f"{op}, {dtype}")
    return figure


def _ratios(axis: Axes, peers: dict[tuple[str, str], list[float]], title: str) -> None:
    groups = list(tables_ops.GROUPS)
    ordered = sorted(peers.items(), key=lambda item: groups.index(item[0][0]))
    for index, ((group, _), values) in enumerate(ordered):
        mean = geometric_mean(values)
        axis.barh(index, mean - 1, left=1, color=GROUP_COLOURS[group], height=0.7)
        axis.plot([min(values), max(values)], [index, index], color="#222222", lw=1)
        axis.annotate(f" {mean:.2f}x", (max(*values, mean, 1), index), va="center", fontsize=8)
    axis.axvline(1, color="#222222", lw=1)
    axis.set_yticks(range(len(ordered)), [f"{tables_ops.GROUPS[group]}: {peer}" for (group, peer), _ in ordered])
    axis.invert_yaxis()
    axis.set(xscale="log", title=title)
    low, high = axis.get_xlim()
    axis.set_xticks([2.0**power for power in range(-6, 9) if low <= 2.0**power <= high], minor=False)
    axis.set_xticks([], minor=True)
    axis.xaxis.set_major_formatter("{x:g}x")
    axis.set_xlim(low, high * (high / low) ** 0.1)


def _panels(
    rows: int, columns: int, size: tuple[float, float], heights: list[int] | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure with panels in rows: ``size`` is that of a panel, or of one unit of the row's height."""
    from matplotlib.figure import Figure

    units = [height + 1 for height in heights] if heights else [1] * rows
    figure = Figure(figsize=(size[0] * columns, size[1] * sum(units) / (2 if heights else 1)), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, height_ratios=units).flat)


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


FIGURES: dict[str, tuple[str, Callable[[list[Measure]], Figure]]] = {
    "roofline": ("Operations per second of every case beside the measured ceilings", roofline),
    "speedups": ("Speed-up over each peer: geometric mean, line from the worst to the best case", speed_ups),
}
