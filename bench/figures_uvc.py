"""The figures of docs/uvc.md: a run over its steps, and accuracy against size of both systems."""

from __future__ import annotations

from statistics import mean
from typing import TYPE_CHECKING, Any

from mixrank.report_uvc import draw_search
from mixrank_bench import tables_uvc, uvc
from mixrank_bench.drawing import OTHERS, OURS_COLOUR, Drawing, fingerprint, panels
from mixrank_bench.environment import read

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRAWN = 0.5
"""The budget of the run that is drawn."""
LINES = {uvc.BOTH: "-", uvc.LOW_RANK: "--", uvc.OURS: ":"}
"""How what this library does is drawn."""


def _run() -> list[dict[str, Any]]:
    """The updates of the newest run of ours at that budget."""
    rows = [row for row in read(uvc.OUT) if row["kind"] == "method"]
    ours = [row for row in rows if (row["method"], row["budget"]) == (uvc.OURS, DRAWN)]
    return [entry for entry in ours[-1]["result"]["history"] if "target" in entry] if ours else []


def run() -> Figure:
    """What remains and its target, the multipliers, and the gates of the blocks, over the steps of a search."""
    figure, axes = panels(1, 3, (3.6, 2.9))
    draw_search(axes, _run(), OURS_COLOUR, OTHERS, "#222222")
    return figure


def fronts() -> dict[str, dict[str, list[tuple[int, float]]]]:
    """By model and method, by the size: parameters and top-1 of each budget, means of the seeds."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for (model, _, method), seeds in tables_uvc.runs().items():
        parameters = round(mean(row["parameters"] for row in seeds.values()))
        found.setdefault(model, {}).setdefault(method, []).append((parameters, tables_uvc.top1(seeds)))
    return {model: {name: sorted(points) for name, points in methods.items()} for model, methods in found.items()}


def front() -> Figure:
    """Top-1 against the parameters that remain, by method, after equal trainings."""
    found, dense = fronts(), tables_uvc.dense()
    figure, axes = panels(1, len(found), (5.6, 3.6))
    for axis, (model, methods) in zip(axes, found.items(), strict=True):
        others = [name for name in methods if name not in LINES]
        for name, points in methods.items():
            if name in LINES:
                colour, style = OURS_COLOUR, {"lw": 2.4, "zorder": 3, "ls": LINES[name]}
            else:
                colour, style = OTHERS[others.index(name) % len(OTHERS)], {"lw": 1.2}
            axis.plot([x / 1e6 for x, _ in points], [y for _, y in points], "o", color=colour, label=name, **style)
        if model in dense:
            axis.axhline(dense[model], color="#222222", ls=":", lw=1, label="dense")
        axis.set(xlabel="parameters that remain, millions", ylabel="top-1, %", title=model)
        axis.legend(frameon=False, fontsize=7)
    return figure


FIGURES: dict[str, Drawing] = {
    "uvc_run": Drawing(
        "A search at budget 0.5 over its steps: what remains, multipliers, gates", lambda: fingerprint(_run()), run
    ),
    "uvc_front": Drawing(
        "Top-1 against the parameters that remain, by method, after equal trainings",
        lambda: fingerprint([fronts(), tables_uvc.dense()] if fronts() else {}),
        front,
    ),
}
