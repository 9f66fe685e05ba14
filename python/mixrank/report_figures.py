"""The plots of the report, drawn by matplotlib as SVG that takes its colours from the page's style sheet.

Every colour is drawn as a stand-in and replaced by a CSS variable afterwards, so that one drawing serves light and
dark pages. Layer names come from a file: nothing here reads them as markup or mathematics.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

INK, MUTED, GRID, PAPER, REMOVED = "#010203", "#010204", "#010205", "#010206", "#010207"
SERIES = [f"#0201{index:02x}" for index in range(6)]
RAMP = [f"#0301{index:02x}" for index in range(8)]
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper", REMOVED: "removed"}
VARIABLES |= {colour: f"series-{index}" for index, colour in enumerate(SERIES)}
VARIABLES |= {colour: f"ramp-{index}" for index, colour in enumerate(RAMP)}
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", ":")
OTHER = "other"

STYLE: dict[RcKeyType, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mixrank",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "lines.linewidth": 1.5,
}


def kinds_of(names: Sequence[str]) -> list[str]:
    """The kind of each layer (``qkv``, ``proj``, ``fc1``...): the last word of its name, rare kinds as one."""
    words = [_kind(name) for name in names]
    common = sorted(dict.fromkeys(words), key=lambda word: -words.count(word))
    if len(common) > len(SERIES):
        shown = set(common[: len(SERIES) - 1])
        words = [word if word in shown else OTHER for word in words]
    return words


def _kind(name: str) -> str:
    part = re.fullmatch(r".*?([^.]+)\.parts\.(\d+)", name, flags=re.DOTALL)
    if part and part[1] == "qkv" and part[2] in "012":
        return "qkv"[int(part[2])]
    words = [word for word in name.split(".") if not word.isdigit()]
    return (words or [name])[-1]


def _grouped(layers: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for layer, kind in zip(layers, kinds_of([layer["name"] for layer in layers]), strict=True):
        groups.setdefault(kind, []).append(layer)
    return groups


def new_figure(width: float, height: float, **grid: Any) -> tuple[Figure, Any]:
    """A figure of some inches with its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(**grid)


def _legend(figure: Figure, axis: Axes) -> None:
    """A legend below the figure, in rows of one length as far as that goes, to be read along them."""
    entries = list(zip(*axis.get_legend_handles_labels(), strict=True))
    rows = -(-len(entries) // 6)
    columns = -(-len(entries) // rows)
    # Matplotlib fills its columns one after another.
    ordered = [entry for column in range(columns) for entry in entries[column::columns]]
    figure.legend(*zip(*ordered, strict=True), loc="outside lower center", ncols=columns)


def _svg(figure: Figure, prefix: str, description: str) -> str:
    """The figure as an element of an HTML page: no prolog, no metadata, no fixed size, ids of its own."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    opening = svg[: svg.index(">") + 1]
    start = opening.index('viewBox="')
    box = opening[start : opening.index('"', start + len('viewBox="')) + 1]
    width = float(box.split('"')[1].split()[2])
    label = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    svg = f'<svg {box} role="img" aria-label="{label}" style="max-width: {width:.0f}pt">' + svg[len(opening) :]
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = svg.replace('href="#', f'href="#{prefix}-').replace("url(#", f"url(#{prefix}-")
    svg = svg.replace("'DejaVu Sans'", "var(--font)")
    for colour, name in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def draw(figure: Any, data: Any, prefix: str, description: str) -> str:
    """What ``figure`` makes of ``data`` as SVG; ``prefix`` is that of its ids, ``description`` what it shows."""
    with matplotlib.rc_context(STYLE):
        return _svg(figure(data), prefix, description)


def front(variants: Sequence[dict[str, Any]], prefix: str) -> str:
    """Accuracy against size, and speed, of the dense model and of each budget."""
    return draw(_front, variants, prefix, "Top-1 accuracy against parameters, and images per second, for each budget")


def _front(variants: Sequence[dict[str, Any]]) -> Figure:
    figure, (accuracy, speed) = new_figure(10.5, 3.4, ncols=2)
    colours = [MUTED] + [SERIES[0]] * (len(variants) - 1)
    sizes = [variant["parameters"] / 1e6 for variant in variants]
    accuracy.set_title("Accuracy against size")
    accuracy.set_xlabel("parameters (millions)")
    accuracy.set_ylabel("top-1 (%)")
    points = zip(sizes, [variant["top1"] for variant in variants], [v["label"] for v in variants], colours, strict=True)
    scored = [point for point in points if point[1] is not None]
    if scored:
        ordered = sorted(scored)
        accuracy.plot([x for x, *_ in ordered], [y for _, y, *_ in ordered], color=SERIES[0], alpha=0.5, zorder=1)
        for index, (x, y, label, colour) in enumerate(ordered):
            accuracy.scatter([x], [y], color=colour, s=42, zorder=2)
            # Above and below in turn: budgets lie so close that labels on one side would run into each other.
            place = {"xytext": (0, 7), "va": "bottom"} if index % 2 else {"xytext": (0, -7), "va": "top"}
            accuracy.annotate(label, (x, y), textcoords="offset points", ha="center", **place)
        low, high = min(y for _, y, *_ in scored), max(y for _, y, *_ in scored)
        margin = max(1.0, 0.35 * (high - low))
        accuracy.set_ylim(low - margin, min(100.0, high + margin))
        accuracy.set_xlim(0, 1.12 * max(sizes))

    speed.set_title("Speed")
    speed.set_ylabel("images per second")
    speed.grid(axis="x", visible=False)
    rates = [variant["images_per_second"] or 0 for variant in variants]
    speed.bar([variant["label"] for variant in variants], rates, color=colours, width=0.6)
    for index, value in enumerate(rates):
        gain = f" ({value / rates[0]:.2f}x)" if index and rates[0] else ""
        speed.annotate(f"{value:.0f}{gain}", (index, value), (0, 3), textcoords="offset points", ha="center")
    speed.margins(y=0.15)
    return figure


def sweep(dense: dict[str, Any], rows: Sequence[dict[str, Any]], prefix: str) -> str:
    """Accuracy (where it was measured), agreement and divergence against size: one curve for each strategy."""
    description = "Accuracy, agreement with the dense model and divergence from it against parameters, by strategy"
    return draw(sweep_figure, (dense, rows), prefix, description)


def sweep_figure(data: tuple[dict[str, Any], Sequence[dict[str, Any]]]) -> Figure:
    """The figure of :func:`sweep`."""
    dense, rows = data
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["compressed"]["parameters"]):
        groups.setdefault(row["strategy"], []).append(row)
    panels = [
        ("agreement with the dense model (%)", "fidelity", "agreement"),
        ("divergence from the dense model (nats)", "fidelity", "divergence"),
    ]
    if dense["top1"] is not None:
        panels.insert(0, ("top-1 (%)", "compressed", "top1"))
    figure, axes = new_figure(10.5, 3.9, ncols=len(panels), squeeze=False)
    for axis, (label, part, key) in zip(axes[0], panels, strict=True):
        for index, name in enumerate(dict.fromkeys(row["strategy"] for row in rows)):
            points = [(row["compressed"]["parameters"] / 1e6, row[part][key]) for row in groups[name]]
            place = index % len(SERIES)
            style = {"color": SERIES[place], "marker": MARKERS[place], "linestyle": DASHES[index // len(SERIES) % 3]}
            axis.plot(*zip(*points, strict=True), markersize=5, label=name, **style)
        axis.set_xlabel("parameters (millions)")
        axis.set_ylabel(label)
    if dense["top1"] is not None:
        axes[0][0].axhline(dense["top1"], color=MUTED, linestyle=":", label="dense")
    if all(row["fidelity"]["divergence"] > 0 for row in rows):
        _logarithmic(axes[0][-1])
    _legend(figure, axes[0][0])
    return figure


def _logarithmic(axis: Axes) -> None:
    """A logarithmic scale upwards, with plain numbers: matplotlib's own labels are mathematics, which is off."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(lambda value, _place: f"{value:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def compensation(result: dict[str, Any], prefix: str) -> str:
    """Divergence and agreement on the held-out images along a training; the step that was kept is ringed."""
    return draw(compensation_figure, result, prefix, "Divergence and agreement on held-out images along the training")


def compensation_figure(result: dict[str, Any]) -> Figure:
    """The figure of :func:`compensation`."""
    looks = [{"step": 0, **result["before"]}, *result["history"]]
    figure, axes = new_figure(10.5, 3.2, ncols=2)
    labels = {"divergence": "divergence from the dense model (nats)", "agreement": "agreement with the dense model (%)"}
    for axis, (key, label) in zip(axes, labels.items(), strict=True):
        axis.plot([look["step"] for look in looks], [look[key] for look in looks], color=SERIES[0], marker="o")
        best = next(look for look in looks if look["step"] == result["best_step"])
        ring = {"markersize": 11, "markerfacecolor": "none", "markeredgecolor": INK, "linestyle": ""}
        axis.plot([best["step"]], [best[key]], "o", **ring)
        axis.set_xlabel("step")
        axis.set_ylabel(label)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_title("Held-out error along the training")
    axes[0].set_ylim(bottom=0)
    return figure


def energy(layers: Sequence[dict[str, Any]], prefix: str) -> str:
    """Energy kept against rank: one column for each kind of layer, one line for each layer."""
    return draw(
        _energy, layers, prefix, "Share of output energy and of weight energy kept, against rank, by layer kind"
    )


def _energy(layers: Sequence[dict[str, Any]]) -> Figure:
    groups = _grouped(layers)
    rows = [("output_energy_kept", "output energy kept (%)"), ("weight_energy_kept", "weight energy kept (%)")]
    rows = [row for row in rows if any(layer.get(row[0]) for layer in layers)]
    figure, axes = new_figure(
        10.5, 2.5 * len(rows) + 0.3, nrows=len(rows), ncols=len(groups), squeeze=False, sharey=True
    )
    figure.suptitle("Energy kept against rank", x=0.005, ha="left", fontsize=11, fontweight="bold")
    for line, (key, label) in zip(axes, rows, strict=True):
        line[0].set_ylabel(label)
        for axis, (kind, members) in zip(line, groups.items(), strict=True):
            _energy_curves(axis, members, key)
            if axis in axes[0]:
                axis.set_title(kind)
            if axis in axes[-1]:
                axis.set_xlabel("rank")
    return figure


def _energy_curves(axis: Axes, members: Sequence[dict[str, Any]], key: str) -> None:
    import numpy

    for depth, layer in enumerate(members):
        if not layer.get(key):
            continue
        colour = RAMP[round(depth * (len(RAMP) - 1) / max(1, len(members) - 1))]
        ranks, kept = layer["energy_ranks"], [100 * share for share in layer[key]]
        axis.plot(ranks, kept, color=colour, linewidth=1.2)
        if layer["rank"] is not None:
            height = float(numpy.interp(layer["rank"], ranks, kept))
            axis.plot([layer["rank"]], [height], "o", color=colour, markersize=5, markeredgecolor=PAPER)
    axis.set_ylim(0, 103)
    axis.set_xlim(left=0)


def depth(layers: Sequence[dict[str, Any]], prefix: str) -> str:
    """The rank of each layer and the share of its parameters that remains, along the depth of the model."""
    return draw(_depth, layers, prefix, "Rank and share of parameters kept for each layer along the depth")


def _depth(layers: Sequence[dict[str, Any]]) -> Figure:
    figure, (rank, share) = new_figure(10.5, 3.4, ncols=2)
    for (kind, members), colour, marker in zip(_grouped(layers).items(), SERIES, MARKERS, strict=False):
        places = list(range(len(members)))
        full = [min(layer["in_features"], layer["out_features"]) for layer in members]
        ranks = [size if layer["rank"] is None else layer["rank"] for layer, size in zip(members, full, strict=True)]
        kept = [100 * layer["parameters_after"] / layer["parameters_before"] for layer in members]
        dense = [layer["rank"] is None for layer in members]
        for axis, values in ((rank, ranks), (share, kept)):
            axis.plot(places, values, color=colour, marker=marker, markersize=5, label=kind)
            hollow = [(x, y) for x, y, whole in zip(places, values, dense, strict=True) if whole]
            if hollow:
                style = {"markersize": 5, "markerfacecolor": PAPER, "linestyle": ""}
                axis.plot(*zip(*hollow, strict=True), color=colour, marker=marker, **style)
    rank.set_title("Rank along the depth (hollow: the layer stays dense)")
    rank.set_ylabel("rank")
    share.set_title("Parameters kept along the depth")
    share.set_ylabel("parameters kept (%)")
    for axis in (rank, share):
        axis.set_xlabel("layer of this kind, from the input")
        axis.set_ylim(bottom=0)
        axis.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, rank)
    return figure


def parameters(plan: dict[str, Any], prefix: str) -> str:
    """Parameters of each layer before and after, as one bar each."""
    return draw(_parameters, plan, prefix, "Parameters kept and removed, for each layer and for the rest of the model")


def _parameters(plan: dict[str, Any]) -> Figure:
    layers = plan["layers"]
    kinds = kinds_of([layer["name"] for layer in layers])
    colours = dict(zip(dict.fromkeys(kinds), SERIES, strict=False))
    figure, axis = new_figure(10.5, 3.8)
    after = [layer["parameters_after"] / 1e3 for layer in layers]
    removed = [max(0, layer["parameters_before"] - layer["parameters_after"]) / 1e3 for layer in layers]
    rest = (plan["parameters_before"] - sum(layer["parameters_before"] for layer in layers)) / 1e3
    places = list(range(len(layers)))
    axis.bar(places, after, color=[colours[kind] for kind in kinds], width=0.8)
    axis.bar(places, removed, bottom=after, color=REMOVED, width=0.8, label="removed")
    axis.bar([len(layers)], [rest], color=MUTED, width=0.8, label="all else (kept)")
    for kind, colour in colours.items():
        axis.bar([0], [0], color=colour, label=f"{kind}, kept")
    names = [layer["name"].removeprefix("blocks.") for layer in layers] + ["all else"]
    every = -(-len(names) // 60)
    axis.set_xticks([*places, len(layers)][::every], names[::every], rotation=90, fontsize=7)
    axis.set_xlim(-0.6, len(layers) + 0.6)
    axis.grid(axis="x", visible=False)
    axis.set_title("Parameters of each layer, before and after")
    axis.set_xlabel("layer")
    axis.set_ylabel("parameters (thousands)")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper right", ncols=8)
    return figure


def error(layers: Sequence[dict[str, Any]], prefix: str) -> str:
    """The relative output error of each layer on the calibration images and, dashed, on images held out."""
    return draw(error_figure, layers, prefix, "Relative output error of each layer along the depth")


def error_figure(layers: Sequence[dict[str, Any]]) -> Figure:
    """The figure of :func:`error`."""
    figure, axis = new_figure(10.5, 3.2)
    for (kind, members), colour, marker in zip(_grouped(layers).items(), SERIES, MARKERS, strict=False):
        for key, style, label in (("relative_error", "-", kind), ("held_out_error", "--", f"{kind}, held out")):
            errors = [layer.get(key) for layer in members]
            known = [(place, 100 * value) for place, value in enumerate(errors) if value is not None]
            if known:
                line = {"color": colour, "linestyle": style, "marker": marker, "markersize": 5, "label": label}
                axis.plot(*zip(*known, strict=True), **line)
    axis.set_title("Relative output error along the depth")
    axis.set_xlabel("layer of this kind, from the input")
    axis.set_ylabel("relative output error (%)")
    axis.set_ylim(bottom=0)
    axis.xaxis.get_major_locator().set_params(integer=True)
    # A column for each kind, with what was held out below it.
    kinds = len({line.get_color() for line in axis.lines})
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=kinds)
    return figure
