"""The report: one HTML file with the numbers, the plots and the plans of a result, and nothing beside it."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mixrank.errors import InputError
from mixrank.files import write_text

SUMMARY_KEYS = ("top1", "parameters", "bytes", "macs", "images_per_second")
LAYER_KEYS = ("name", "in_features", "out_features", "rank", "parameters_before", "parameters_after")


def write_report(path: str | Path, data: dict[str, Any]) -> None:
    """Draw a result and write it as one self-contained HTML file.

    Args:
        path: the file to write; it is whole afterwards, or what it was before.
        data: what ``--json`` of ``mixrank compress``, ``compensate``, ``uvc``, ``evaluate`` or ``sweep`` wrote, or what
            ``mixrank demo`` did: a list ``results`` with one entry for each budget.

    Raises:
        InputError: ``data`` is not such a result, or the file cannot be written.

    Example:
        >>> write_report("report.html", json.loads(Path("result.json").read_text()))  # doctest: +SKIP
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mixrank", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "significant": "{:.3g}".format, "seconds": _seconds}
    foreign = (KeyError, TypeError, IndexError, ValueError, AttributeError, ZeroDivisionError, jinja2.UndefinedError)
    try:
        page = environment.get_template("report.html").render(_context(data))
    except foreign as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            "the data is not a result of mixrank compress, sweep, compensate, uvc, evaluate or demo: "
            f"{type(error).__name__}: {error}"
        ) from error
    write_text(Path(path), page)


def _context(data: dict[str, Any]) -> dict[str, Any]:
    """What the template shows, in order."""
    swept = [row | {"label": f"{row['strategy']}, keep {row['keep']:g}"} for row in data.get("rows", [])]
    entries = swept or data.get("results", [data])
    dense = {key: data["dense"][key] for key in SUMMARY_KEYS}
    results = [_result(entry, index, dense, brief=bool(swept)) for index, entry in enumerate(entries)]
    architecture = data["model"]["architecture"]
    context = {
        "architecture": architecture,
        "dense": dense,
        "results": results,
        "swept": len({row["strategy"] for row in swept}),
        "chosen": results[(len(results) - 1) // 2],
        "front": None,
        "compensation": _compensation(data.get("compensation")),
        "pruning": _pruning(data),
        "rows": _rows(dense, results),
        "speed": _speed_note(data),
        "command": _command_line(data),
        "facts": _facts(data),
        "skipped": _skipped(data.get("images", {})),
        "notes": [str(note) for note in data.get("notes") or []],
    }
    if swept:
        from mixrank import report_figures

        context["front"] = Markup(report_figures.sweep(dense, swept, "front"))
    elif len(results) > 1:
        from mixrank import report_figures

        variants = [{"label": "dense", **dense}] + [{"label": r["label"], **r["compressed"]} for r in results]
        context["front"] = Markup(report_figures.front(variants, "front"))
    return context


def _compensation(result: dict[str, Any] | None) -> dict[str, Any] | None:
    """A training: its figure and what it brought."""
    if result is None:
        return None
    from mixrank import report_figures

    return result | {"figure": Markup(report_figures.compensation(result, "compensation"))}


def _pruning(data: dict[str, Any]) -> dict[str, Any] | None:
    """What unified compression removed."""
    if data.get("command") != "uvc":
        return None
    from mixrank import report_uvc

    found = report_uvc.section(data["result"])
    return found | {"figure": found["figure"] and Markup(found["figure"])}


def _result(entry: dict[str, Any], index: int, dense: dict[str, Any], *, brief: bool) -> dict[str, Any]:
    """One budget: its summary, its layers, and its plots; ``brief``: of these only the ranks."""
    from mixrank import report_figures

    # A dense model of 8-bit weights has none, and a pruned one only with lower ranks.
    plan = (entry["result"].get("ranks") or {}).get("plan") if entry.get("command") == "uvc" else entry["plan"]
    plan = plan or {"layers": []}
    curves = {layer["name"]: layer for layer in entry.get("layers") or []}
    layers = [
        curves.get(layer["name"], {}) | {key: layer[key] for key in LAYER_KEYS} | {"entries": layer.get("entries", 0)}
        for layer in plan["layers"]
    ]
    compressed = {key: entry["compressed"][key] for key in SUMMARY_KEYS}
    kept = compressed["parameters"] / dense["parameters"]
    figures: dict[str, str | None] = dict.fromkeys(("energy", "depth", "parameters", "error"))
    if layers:
        figures["depth"] = report_figures.depth(layers, f"depth{index}")
        if not brief:
            figures["parameters"] = report_figures.parameters(plan, f"parameters{index}")
        if any(layer.get("relative_error") is not None for layer in layers):
            figures["error"] = report_figures.error(layers, f"error{index}")
        if any(layer.get("weight_energy_kept") or layer.get("output_energy_kept") for layer in layers):
            figures["energy"] = report_figures.energy(layers, f"energy{index}")
    return {
        "label": entry.get("label") or f"{100 * kept:.0f} % kept",
        "kept": kept,
        "compressed": compressed,
        "layers": layers,
        "fidelity": entry.get("fidelity"),
        "seconds": entry.get("compressing"),
        "tiles": _tiles(dense, compressed, entry.get("fidelity")),
        "figures": {name: svg and Markup(svg) for name, svg in figures.items()},
    }


def _tiles(dense: dict[str, Any], compressed: dict[str, Any], fidelity: dict[str, Any] | None) -> list[dict[str, str]]:
    """The headline numbers."""
    tiles = [
        {"value": f"{100 * (compressed[key] / dense[key] - 1):+.1f} %".replace("-", "−"), "label": label}
        for key, label in (("parameters", "parameters"), ("bytes", "bytes"), ("macs", "multiply-accumulates"))
    ]
    if dense["images_per_second"] and compressed["images_per_second"]:
        gain = compressed["images_per_second"] / dense["images_per_second"]
        tiles.append({"value": f"{gain:.2f}×", "label": "images per second"})
    if dense["top1"] is not None and compressed["top1"] is not None:
        change = compressed["top1"] - dense["top1"]
        tiles.append({"value": f"{change:+.2f} pt".replace("-", "−"), "label": "top-1"})
    if fidelity is not None:
        tiles.append({"value": f"{fidelity['agreement']:.1f} %", "label": "agreement with the dense model"})
    return tiles


def _rows(dense: dict[str, Any], results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The summary table: the dense model, then each budget."""

    def row(label: str, summary: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
        gain = None
        if dense["images_per_second"] and summary["images_per_second"]:
            gain = summary["images_per_second"] / dense["images_per_second"]
        more = {"fidelity": result.get("fidelity"), "seconds": result.get("seconds")}
        return {"label": label, "kept": summary["parameters"] / dense["parameters"], "gain": gain, **summary, **more}

    return [row("dense", dense, {})] + [row(result["label"], result["compressed"], result) for result in results]


def _speed_note(data: dict[str, Any]) -> str | None:
    """How the speed was measured, in a sentence."""
    speed = data.get("speed") or {}
    if "dense" not in speed:
        return None
    how = speed["dense"]
    threads = f"{how['threads']} thread{'' if how['threads'] == 1 else 's'}"
    spread = ", ".join(f"{name} {values['low']:.0f} to {values['high']:.0f}" for name, values in speed.items())
    return (
        f"Measured interleaved, {how['rounds']} rounds of batches of {how['batch']} on {threads}; "
        f"the median is shown, the range is {spread} images/s."
    )


def _command_line(data: dict[str, Any]) -> str | None:
    """The command that made the result, from its options."""
    options = data.get("options") or {}
    command = data.get("command")
    if command not in ("compress", "sweep", "compensate", "evaluate"):
        return None if command is None else f"mixrank {command}"
    words = ["mixrank", command] + ([str(options["file"])] if "file" in options else [])
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        if name == "file" or value is None or (value is False and name != "centre"):
            continue
        if isinstance(value, list):
            words += [word for item in value for word in (option, str(item))]
        elif isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
        else:
            words += [option, str(value)]
    return shlex.join(words)


def _facts(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Small tables at the end: what has to be known to repeat or to judge the numbers."""
    facts = {
        "Versions": data.get("versions") or {},
        "Options": data.get("options") or {},
        "Seconds": {name: _seconds(value) for name, value in (data.get("times") or {}).items()},
        "Images": {
            name.replace("_", " "): len(value) if isinstance(value, list) else value
            for name, value in (data.get("images") or {}).items()
        },
        "Model arguments": data["model"].get("args") or {},
        "Left as they are": {
            module["name"] or "the model itself": f"{module['parameters']:,} parameters: {module['reason']}"
            for module in data.get("left_alone") or []
        },
    }
    return {title: {name: _plain(value) for name, value in table.items()} for title, table in facts.items() if table}


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else "-" if value is None else json.dumps(value)


def _skipped(images: dict[str, Any]) -> list[str]:
    return [name for value in images.values() if isinstance(value, list) for name in value]


def _number(value: float | None, digits: int = 0, scale: float = 1.0) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value / scale:,.{digits}f}"


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"
