"""Published training-free compression beside ours on a real ViT-B/16: a table of docs/accuracy.md."""

from __future__ import annotations

from mixrank_bench import vit_b16_peers
from mixrank_bench.accuracy_peers.methods import METHODS
from mixrank_bench.environment import read
from mixrank_bench.markdown import conditions, table

HEADER = ("method", "ranks", "parameters", "top-1, %", "agreement, %", "KL, nats", "source")
NO_RUN = "Not measured yet.\n"


def peers() -> str:
    """Every method at every budget, the most accurate first; of a measurement made twice, the later one."""
    rows = read(vit_b16_peers.OUT)
    if not rows:
        return NO_RUN
    latest = {(row["method"], row["keep"]): row for row in rows}
    parts = [_dense(row) for row in latest.values() if row["method"] == "dense"]
    for keep in sorted({keep for method, keep in latest if method != "dense"}, reverse=True):
        found = [row for (method, at), row in latest.items() if at == keep and method != "dense"]
        found.sort(key=lambda row: (-row["top1"], row["kl"]))
        parts.append(f"### keep {keep}\n\n" + table(HEADER, map(_line, found)))
    absent = [name for name in METHODS if not any(method == name for method, _ in latest)]
    if absent:
        parts.append(f"Not measured yet: {'; '.join(absent)}.\n")
    last = rows[-1]
    images = f"{last['calibration_images']} calibration images (seed {last['seed']}), {last['images']} test images"
    parts.append(f"{images}, evaluated in {last['evaluation_dtype']}. {conditions(last)}")
    return "\n".join(parts)


def _dense(row: dict) -> str:
    return f"Dense: {row['parameters']:,} parameters, top-1 {row['top1']:.1f} %.\n"


def _line(row: dict) -> tuple:
    parameters = f"{row['parameters']:,}"
    if "parameters_with_indices" in row:
        parameters += f" ({row['parameters_with_indices']:,} with the places of the nonzeros)"
    numbers = (f"{row['top1']:.1f}", f"{row['agreement']:.1f}", f"{row['kl']:.3f}")
    return (row["method"], row["how"], parameters, *numbers, row["source"])
