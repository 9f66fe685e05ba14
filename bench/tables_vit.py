"""What compression does to a real ViT-B/16: the tables of docs/accuracy.md and README.md."""

from __future__ import annotations

from mixrank.compress import FORM
from mixrank_bench import vit_b16, vit_b16_compensation, vit_b16_oats_speed, vit_b16_peers
from mixrank_bench.environment import read
from mixrank_bench.markdown import conditions, table

FIDELITY = (("top1", 1), ("agreement", 1), ("kl", 3))  # fields and decimals
AIMS = {0.6: (2.0, 0.5), 0.5: (5.0, 1.5), 0.4: (12.0, 3.0)}
"""Points of top-1 that may be lost at each budget, without training and after at most so many minutes of two cores:"""
AIM_MINUTES = 60.0


def front() -> str:
    """What sparse weights, the defaults of this model, and low ranks make at each budget, beside the dense model."""
    rows, peers = read(vit_b16.OUT), read(vit_b16_peers.OUT)
    speeds = {row["model"]: row for row in read(vit_b16_oats_speed.OUT)}
    dense = next(row for row in rows if row["kind"] == "dense")
    lines = [_model("dense", dense, speeds.get("dense"), speeds.get("dense"))]
    sparse = {row["keep"]: row for row in peers if (row["method"], row["seed"]) == ("mixrank, sparse", 0)}
    low = {vit_b16.Strategy(**row["strategy"]): row for row in rows if row["kind"] == "strategy"}
    trained, last = read(vit_b16_compensation.OUT), dense
    for label, form, found, name in (
        ("sparse weights", "sparse", sparse, vit_b16_oats_speed.sparse_name),
        ("low ranks", FORM, {keep: low.get(vit_b16.low_ranks(keep)) for keep in vit_b16.KEEPS}, vit_b16.speed_name),
    ):
        for keep in vit_b16.KEEPS:
            if (row := found.get(keep)) is not None:
                speed = (speeds.get(name(keep)), speeds.get("dense"))
                lines.append(_model(f"{label}, keep {keep}", row, *speed))
                after = _longest(trained, keep, form)
                if after is not None and after["before"]["top1"] == row["top1"]:  # of this very model
                    row = row | {"top1": after["after"]["top1"]}
                    lines.append(
                        _model(f"{label}, keep {keep}, trained {_core_minutes(after):.0f} core-minutes", row, *speed)
                    )
                last = found[keep] if form == "sparse" else last
    header = ("", "parameters", "MB", "GMACs", "top-1, %", f"images/s, batch {vit_b16.SPEED_BATCH}", "speed-up")
    threads = f" Speed on {speeds['dense']['threads']} threads.\n" if speeds else "\n"
    return table(header, lines) + "\n" + conditions(last).rstrip() + threads


def _speeds(rows: list[dict]) -> list[dict]:
    """The rows of speed of the last run: only what took turns can be compared."""
    names = {"dense", *(f"keep {keep}" for keep in vit_b16.KEEPS), *map(vit_b16.speed_name, vit_b16.KEEPS)}
    found = (row for row in rows if row["kind"] == "speed" and row["model"] in names)
    latest = {(row["batch"], row["model"]): row for row in found}
    return sorted(latest.values(), key=lambda row: row["batch"])


def _model(label: str, row: dict, speed: dict | None, dense_speed: dict | None) -> tuple:
    known = speed is not None and dense_speed is not None
    rate, ratio = _speed(speed, dense_speed) if known else ("not measured", "not measured")
    return (
        label,
        f"{row['parameters']:,}",
        f"{row['bytes'] / 1e6:.0f}" if "bytes" in row else "not measured",
        f"{row['macs'] / 1e9:.1f}" if "macs" in row else "not measured",
        f"{row['top1']:.1f}",
        rate,
        ratio,
    )


def _speed(speed: dict, dense: dict) -> tuple[str, str]:
    rate = speed["images_per_second"]
    return f"{rate:.1f}", f"{rate / dense['images_per_second']:.2f}x"


def _strategy(row: dict) -> str:
    s = row["strategy"]
    by = (
        f"measured sensitivity ({s['sensitivity_images']} images)"
        if s["energy"] == "sensitivity"
        else f"{s['energy']} energy"
    )
    ranks = "uniform ranks" if s["ranks"] == "uniform" else f"mixed ranks by {by}"
    factors = {"aware": "activation-aware", "fisher": "two-sided (Fisher)", "svd": "plain SVD"}[s["factors"]]
    shrink = f", shrink {s['shrink']}" if s.get("shrink") else ""
    tokens = f", tokens by {s['weighting']}" if s.get("weighting", "none") != "none" else ""
    tokens += " and alike" if s.get("level") else ""
    details = f"{tokens}{', centred' if s['centre'] else ''}{', q k v split' if s['split_qkv'] else ''}{shrink}"
    return f"{factors}, {ranks}{details}{', pivoted' if s.get('form') == 'pivoted' else ''}"


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
    rows = _speeds(read(vit_b16.OUT))
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


def compensation() -> str:
    """Each budget before and after the training."""
    rows = read(vit_b16_compensation.OUT)
    if not rows:
        return "No run has been recorded yet.\n"
    latest = {(row["keep"], row.get("form", FORM), row["minutes"], row["seed"]): row for row in rows}
    lines = []
    for (keep, form, _, seed), row in sorted(latest.items(), reverse=True):
        before, after, training = row["before"], row["after"], row["training"]
        cells = (f"{before[name]:.{digits}f} → {after[name]:.{digits}f}" for name, digits in FIDELITY)
        spent = f"{training['seconds'] / 60:.0f} x {row['environment']['threads']}"
        options = training["options"]
        chosen = (f"{options['learning_rate']:g}", f"{100 * options.get('mix', 0):.0f} %")
        lines.append((keep, form, *cells, spent, *chosen, training["steps"], training["best_step"], seed))
    header = (
        "keep",
        "layers",
        "top-1, %",
        "agreement, %",
        "KL, nats",
        "minutes x threads",
        "rate",
        "mixed",
        "steps",
        "best",
        "seed",
    )
    return table(header, lines) + "\n" + conditions(rows[-1])


def aims() -> str:
    """Points that are lost beside those that may be, without training and after the longest one within the limit."""
    rows, trained = read(vit_b16.OUT), read(vit_b16_compensation.OUT)
    beside = {(row["method"], row["keep"]): row["top1"] for row in read(vit_b16_peers.OUT) if row["seed"] == 0}
    dense = next(row["top1"] for row in rows if row["kind"] == "dense")
    low = {vit_b16.Strategy(**row["strategy"]): row["top1"] for row in rows if row["kind"] == "strategy"}
    lines = []
    for keep, (aim, trained_aim) in AIMS.items():
        found = {FORM: low.get(vit_b16.low_ranks(keep)), "sparse": beside.get(("mixrank, sparse", keep))}
        for form, top1 in found.items():
            longest = _longest(trained, keep, form)
            after = None if longest is None else longest["after"]["top1"]
            minutes = "" if longest is None else f"{_core_minutes(longest):.0f}"
            lines.append((keep, form, *_against(dense, top1, aim), *_against(dense, after, trained_aim), minutes))
    header = ("keep", "layers", "lost, points", "aim", "trained: lost", "aim", "core-minutes")
    return table(header, lines)


def _longest(trained: list[dict], keep: float, form: str) -> dict | None:
    """The longest training of a budget within the limit."""
    found = [row for row in trained if (row["keep"], row.get("form", FORM)) == (keep, form)]
    return max((row for row in found if _core_minutes(row) <= 2 * AIM_MINUTES + 1), key=_core_minutes, default=None)


def _core_minutes(row: dict) -> float:
    return row["training"]["seconds"] / 60 * row["environment"]["threads"]


def _against(dense: float, top1: float | None, aim: float) -> tuple[str, str]:
    if top1 is None:
        return "not measured", f"{aim:g}"
    lost = dense - top1
    return f"{lost:.1f}", f"{aim:g}, {'met' if lost <= aim + 1e-9 else 'not met'}"
