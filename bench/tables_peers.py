"""Published training-free compression beside ours on a real ViT-B/16: a table of docs/accuracy.md."""

from __future__ import annotations

import math

from mixrank_bench import vit_b16_oats_speed, vit_b16_peers
from mixrank_bench.accuracy_peers.methods import METHODS
from mixrank_bench.environment import read
from mixrank_bench.markdown import conditions, table

OURS = ("mixrank, sparse", "mixrank, defaults", "mixrank, low ranks", "mixrank, tokens alike")
"""The first of these that was measured at a budget is what the others there are compared with."""
MOVED = "lost / won"
PAIRED = "right: only ours / only this"
HEADER = ("method", "ranks", "parameters", "top-1, %", "agreement, %", "KL, nats", MOVED, PAIRED, "p", "source")
NO_RUN = "Not measured yet.\n"


def peers() -> str:
    """Every method at every budget, the most accurate first; of a measurement made twice, the later one."""
    latest = _latest()
    if not latest:
        return NO_RUN
    dense = next(row for row in latest.values() if row["method"] == "dense")
    parts = [_dense(dense)]
    for keep in sorted({keep for method, keep in latest if method != "dense"}, reverse=True):
        found = [row for (method, at), row in latest.items() if at == keep and method != "dense"]
        found.sort(key=lambda row: (-row["top1"], row["kl"]))
        by_method = {row["method"]: row for row in found}
        ours = next((by_method[name] for name in OURS if name in by_method), None)
        parts.append(f"### keep {keep}\n\n" + table(HEADER, [_line(row, dense, ours) for row in found]))
    absent = [name for name in METHODS if not any(method == name for method, _ in latest)]
    if absent:
        parts.append(f"Not measured yet: {'; '.join(absent)}.\n")
    last = list(latest.values())[-1]
    images = f"{last['calibration_images']} calibration images (seed {last['seed']}), {last['images']} test images"
    parts.append(f"{images}, evaluated in {last['evaluation_dtype']}. {conditions(last)}")
    return "\n".join(parts)


def _latest(seed: int = 0) -> dict[tuple[str, float], dict]:
    return {(row["method"], row["keep"]): row for row in read(vit_b16_peers.OUT) if row["seed"] == seed}


def subsets() -> str:
    """What another random subset of the calibration images changes, for each method that was measured with more."""
    seeds = sorted({row["seed"] for row in read(vit_b16_peers.OUT)})
    by_seed = {seed: _latest(seed) for seed in seeds}
    repeated = {key for seed in seeds[1:] for key in by_seed[seed] if key[0] != "dense"}
    lines = []
    for method, keep in sorted(repeated, key=lambda key: (-key[1], key[0])):
        for seed in seeds:
            row = by_seed[seed].get((method, keep))
            if row is not None:
                numbers = (f"{row['top1']:.1f}", f"{row['agreement']:.1f}", f"{row['kl']:.3f}")
                lines.append((keep, method, seed, *numbers))
    return table(("keep", "method", "seed", *HEADER[3:6]), lines) if lines else NO_RUN


def sparse_speed() -> str:
    """The speed of OATS' form of the layers beside the dense model and ours, of the last run."""
    latest = {row["model"]: row for row in read(vit_b16_oats_speed.OUT)}
    if not latest:
        return NO_RUN
    dense = latest["dense"]["images_per_second"]
    lines = []
    for name, row in latest.items():
        rate, spread = row["images_per_second"], f"{row['low']:.2f} - {row['high']:.2f}"
        lines.append((name, f"{rate:.2f}", spread, f"{rate / dense:.2f}x"))
    header = ("model", f"images/s, batch {latest['dense']['batch']}", "range", "against dense")
    return table(header, lines) + "\n" + conditions(latest["dense"])


def front() -> dict[str, list[tuple[int, float]]]:
    """For each method, and for ``dense``, the parameters that remain and the top-1 in percent, the smallest first."""
    found: dict[str, list[tuple[int, float]]] = {}
    for (method, _), row in _latest().items():
        found.setdefault(method, []).append((row["parameters"], row["top1"]))
    return {method: sorted(points) for method, points in found.items()} if "dense" in found else {}


def _dense(row: dict) -> str:
    return f"Dense: {row['parameters']:,} parameters, top-1 {row['top1']:.1f} %.\n"


def _line(row: dict, dense: dict, ours: dict | None) -> tuple:
    parameters = f"{row['parameters']:,}"
    if "parameters_with_indices" in row:
        parameters += f" ({row['parameters_with_indices']:,} with the places of the nonzeros)"
    numbers = (f"{row['top1']:.1f}", f"{row['agreement']:.1f}", f"{row['kl']:.3f}")
    lost, won = discordant(dense["correct"], row["correct"])
    paired = ("", "")
    if ours is not None and row is not ours:
        counts = discordant(ours["correct"], row["correct"])
        paired = (f"{counts[0]} / {counts[1]}", f"{mcnemar(*counts):.2g}")
    return (row["method"], row["how"], parameters, *numbers, f"{lost} / {won}", *paired, row["source"])


def discordant(first: str, second: str) -> tuple[int, int]:
    """How many images only the first of two models has right, and how many only the second, from ``0`` and ``1``."""
    pairs = list(zip(first, second, strict=True))
    return pairs.count(("1", "0")), pairs.count(("0", "1"))


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided p-value of the exact test that each is as often right where the other is wrong (McNemar 1947)."""
    count, less = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(math.comb(count, k) for k in range(less + 1)) / 2**count)
