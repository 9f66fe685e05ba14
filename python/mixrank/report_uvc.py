"""The part of the report that tells of unified compression: what went by which mechanism, and how the search ran."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mixrank.report_figures import INK, SERIES, draw, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = ("heads", "columns", "neurons")


def section(result: dict[str, Any]) -> dict[str, Any]:
    """What the template shows of the ``result`` that ``mixrank uvc --json`` writes."""
    pruned, trained = result.get("pruned", result), result.get("trained", result)
    total = sum(result["removed"].values())
    entries = [entry for entry in pruned["history"] if "target" in entry]
    return {
        "remaining": 100 * result["macs_after"] / result["macs_before"],
        "removed": {name: 100 * macs / total for name, macs in result["removed"].items()},
        "top1": [pruned["before"], pruned["landed"], trained["after"]],
        "blocks": [
            {
                "index": int(b["index"]),
                "heads": len(b["columns"]),
                "columns": sum(b["columns"]),
                "neurons": b["neurons"],
            }
            for b in pruned["blocks"]
        ],
        "figure": search(entries, "search") if entries else None,
    }


def search(entries: Sequence[dict[str, Any]], prefix: str) -> str:
    """What remains, the multipliers and the gates over the updates of a search."""
    return draw(_search, entries, prefix, "What remains, multipliers and gates over the steps of the search")


def _search(entries: Sequence[dict[str, Any]]) -> Figure:
    figure, axes = new_figure(10.5, 3.2, ncols=3)
    draw_search(axes, entries, SERIES[0], SERIES[1:], INK)
    return figure


def draw_search(
    axes: Sequence[Axes], entries: Sequence[dict[str, Any]], ours: str, others: Sequence[str], ink: str
) -> None:
    """Draw the updates of a search (:class:`mixrank.uvc.options.FinetuneResult`) on three axes in the given colours."""
    steps = [entry["step"] for entry in entries]
    left, middle, right = axes
    left.plot(steps, [entry["target"] for entry in entries], color=ink, ls=":", label="target")
    left.plot(steps, [entry["remaining"] for entry in entries], color=ours, label="R")
    left.set(xlabel="step", title="Share of the multiply-adds", ylim=(0, 1.05))
    left.legend(frameon=False)
    middle.plot(steps, [entry["pressure"] for entry in entries], color=ours, label="budget (z)")
    for kind, colour in zip(KINDS, others, strict=False):
        means = [sum(entry["multipliers"][kind]) / len(entry["multipliers"][kind]) for entry in entries]
        middle.plot(steps, means, color=colour, label=kind)
    middle.set(xlabel="step", title="Multipliers, mean over the blocks")
    middle.legend(frameon=False)
    blocks = len(entries[0]["keep"])
    for block in range(blocks):
        shade = 0.25 + 0.75 * block / max(1, blocks - 1)
        right.plot(steps, [entry["keep"][block] for entry in entries], color=ours, alpha=shade, label=f"{block}")
    right.set(xlabel="step", title="Probability that a block is kept", ylim=(0, 1.05))
    right.legend(frameon=False, title="block", fontsize=7.5, ncols=3, columnspacing=1, handlelength=1.5)
