"""What all figures of the documents have in common: palette, style, panels, and when one is out of date."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The palette of Okabe and Ito, which the colour-blind can tell apart.
OURS_COLOUR = "#D55E00"
OTHERS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
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


@dataclass(frozen=True)
class Drawing:
    """A figure.

    Attributes:
        text: what it shows.
        source: what it is drawn from, in a word; None where there are no results yet.
        draw: makes it.
    """

    text: str
    source: Callable[[], str | None]
    draw: Callable[[], Figure]


def panels(
    rows: int, columns: int, size: tuple[float, float], heights: list[int] | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure with panels in rows: ``size`` is that of a panel, or of one unit of the row's height."""
    from matplotlib.figure import Figure

    units = [height + 1 for height in heights] if heights else [1] * rows
    figure = Figure(figsize=(size[0] * columns, size[1] * sum(units) / (2 if heights else 1)), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, height_ratios=units).flat)


def fingerprint(points: Any) -> str | None:
    """Of what a figure is drawn from, in terms of JSON; None where there is nothing."""
    return hashlib.sha256(json.dumps(points).encode()).hexdigest() if points else None
