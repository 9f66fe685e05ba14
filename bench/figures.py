"""The figures of the documents: the roofline, the speed-ups over each peer, and accuracy against size.

A figure carries in its metadata what it was drawn from; it is out of date when the results are not that any more.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mixrank_bench import figures_uvc, tables_ops, tables_peers
from mixrank_bench.ceilings import Ceilings
from mixrank_bench.drawing import OTHERS, OURS_COLOUR, STYLE, Drawing, fingerprint, panels
from mixrank_bench.measures import Measure, geometric_mean, measures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOLDER = Path("docs") / "images"
DTYPE_COLOURS = {"float32": "#0072B2", "bfloat16": "#D55E00"}
GROUP_COLOURS = {"factors": "#0072B2", "add": "#E69F00", "dense": "#009E73", "gram": "#CC79A7"}
MARKERS = {
    "lowrank_linear": "o",
    "lowrank_residual_linear": "s",
    "gram_accumulate_": "^",
    "cross_gram_accumulate_": "D",
}


def links(*names: str) -> str:
    """Some figures as images in markdown."""
    if any(FIGURES[name].source() is None for name in names):
        return tables_ops.NO_RUN
    return "\n\n".join(f"![{FIGURES[name].text}](images/{name}.svg)" for name in names) + "\n"


def write(root: Path) -> None:
    """Draw every figure that is out of date under ``root``."""
    for name, drawing in _outdated(root):
        import matplotlib

        (root / FOLDER).mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(STYLE):
            metadata = {"Date": None, "Creator": None, "Description": drawing.source()}
            drawing.draw().savefig(_file(root, name), format="svg", metadata=metadata, bbox_inches="tight")


def stale(root: Path) -> list[str]:
    """The figures under ``root`` that are missing, or were not drawn from the results as they are."""
    return [str(_file(root, name).relative_to(root)) for name, _ in _outdated(root)]


def _outdated(root: Path) -> list[tuple[str, Drawing]]:
    found = []
    for name, drawing in FIGURES.items():
        source, file = drawing.source(), _file(root, name)
        if source is not None and not (file.is_file() and source in file.read_text()):
            found.append((name, drawing))
    return found


def _file(root: Path, name: str) -> Path:
    return root / FOLDER / f"{name}.svg"


def _newest_run() -> str | None:
    rows = tables_ops.rows()
    return rows[0]["run"] if any(not one.red for one in measures(rows)) else None


def _of_operators(draw: Callable[[list[Measure]], Figure]) -> Figure:
    return draw([one for one in measures(tables_ops.rows()) if not one.red])


def _front_source() -> str | None:
    return fingerprint(tables_peers.front())


def front() -> Figure:
    """Top-1 against the parameters that remain: every method a line, ours the thick one."""
    figure, (axis,) = panels(1, 1, (6.4, 3.8))
    points = tables_peers.front()
    dense = points["dense"][0][1]
    axis.axhline(dense, color="#222222", lw=1, ls=":")
    axis.annotate("dense", (1, dense), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="#222222")
    for number, (method, found) in enumerate((m, f) for m, f in points.items() if m != "dense"):
        ours = method in tables_peers.OURS
        colour = OURS_COLOUR if ours else OTHERS[number % len(OTHERS)]
        style = {"lw": 1.2, "ls": ("-", "--")[number // len(OTHERS) % 2]}
        if ours:
            style = {"lw": 2.6, "zorder": 3, "ls": ("-", "-.", "--", ":")[tables_peers.OURS.index(method)]}
        axis.plot([x / 1e6 for x, _ in found], [y for _, y in found], color=colour, marker="o", label=method, **style)
    axis.set(xlabel="parameters that remain, millions", ylabel="top-1, %", ylim=(0, 100))
    figure.legend(loc="outside right center", frameon=False)
    return figure


def roofline(found: list[Measure]) -> Figure:
    """Operations per second against operations per byte, one panel for each number of threads."""
    found_limits = {one.row["threads"]: one.ceilings for one in found}
    figure, axes = panels(1, len(found_limits), (5.2, 4.0))
    for axis, (threads, limits) in zip(axes, sorted(found_limits.items()), strict=True):
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
    figure, axes = panels(len(gathered), len(dtypes), (6.0, 0.5), heights=bars)
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


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


FIGURES: dict[str, Drawing] = {
    "roofline": Drawing(
        "Operations per second of every case beside the measured ceilings",
        _newest_run,
        partial(_of_operators, roofline),
    ),
    "speedups": Drawing(
        "Speed-up over each peer: geometric mean, line from the worst to the best case",
        _newest_run,
        partial(_of_operators, speed_ups),
    ),
    "front": Drawing(
        "Top-1 of a ViT-B/16 against the parameters that remain, by method, without training", _front_source, front
    ),
} | figures_uvc.FIGURES
