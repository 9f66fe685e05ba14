"""The tables of docs/scale.md: a small run beside its prediction, and the work of a large one."""

from __future__ import annotations

from mixrank_bench import large as large_run
from mixrank_bench import scale
from mixrank_bench.environment import read
from mixrank_bench.markdown import conditions, table
from mixrank_bench.scale import Rates, Work

NO_RUN = "No run has been recorded yet.\n"
LARGE = "vit_gigantic_patch14_224"
LARGE_IMAGES = 10_000_000
GPUS = (1, 8, 64)
# What one GPU of 2023 is assumed to do, not measured here: well below its peak of 989e12 in bf16; eigenvectors in
# float64 on 16 cores of its host; 50 GB/s between neighbours.
ASSUMED = Rates(passes=3e14, grams=1e14, eigenvectors=2e11, network=5e10)


def measured() -> str:
    """Each number of processes: seconds of the steps, measured and predicted."""
    rows = {row["processes"]: row for row in read(scale.OUT)}
    if not rows:
        return NO_RUN
    first = rows[min(rows)]
    lines = []
    for count, row in sorted(rows.items()):
        for step, seconds in row["steps"].items():
            predicted = row["predicted"].get(step)
            lines.append(
                (
                    count,
                    step,
                    f"{seconds:.1f}",
                    "-" if predicted is None else f"{predicted:.1f}",
                    f"{first['steps'][step] / seconds:.2f}x",
                )
            )
        lines.append((count, "all", f"{row['seconds']:.1f}", "-", f"{first['seconds'] / row['seconds']:.2f}x"))
    header = ("processes", "step", "seconds", "predicted", "times as fast as one")
    last = rows[max(rows)]
    return table(header, lines) + f"\n{last['model']}, {last['images']} images. " + conditions(last)


def memory() -> str:
    """Minutes and resident memory of large models in one process."""
    rows = {(row["model"], row["dtype"]): row for row in read(large_run.OUT)}
    if not rows:
        return NO_RUN
    steps = ("calibrate", "decompose", "sensitivity")
    lines = [
        (
            row["model"],
            f"{row['parameters'] / 1e6:.0f}",
            row["images"],
            row["dtype"],
            f"{row['peak_bytes'] / 2**30:.2f}",
            *(f"{row['times'][step] / 60:.1f}" for step in steps),
            f"{row['seconds'] / 60:.1f}",
        )
        for row in rows.values()
    ]
    minutes = (f"{step}, minutes" for step in steps)
    header = ("model", "million parameters", "images", "dtype", "GiB at most", *minutes, "all, minutes")
    return table(header, lines) + "\n" + conditions(list(rows.values())[-1])


def large() -> str:
    """The work of calibrating a large model on many images, and the hours of some numbers of GPUs."""
    model = scale.hollow(LARGE)
    work = Work.of(model, scale.tokens_of(model))
    lines = []
    for count in GPUS:
        seconds = ASSUMED.predict(work, LARGE_IMAGES, count)
        hours = f"{seconds['calibrate'] / 3600:.1f}"
        moved = 0 if count == 1 else 2 * (count - 1) / count * work.sums / 1e9
        lines.append((count, hours, f"{seconds['decompose'] / 3600:.2f}", f"{moved:.0f}"))
    header = ("GPUs", "calibrate, hours", "decompose, hours", "GB sent and received by each, once")
    return (
        f"{LARGE_IMAGES:,} images; {ASSUMED.passes / 1e12:.0f} TFLOP/s forward and back, {ASSUMED.grams / 1e12:.0f} "
        f"of Gram matrices, {ASSUMED.eigenvectors / 1e9:.0f} GFLOP/s of eigenvectors, "
        f"{ASSUMED.network / 1e9:.0f} GB/s.\n\n"
        f"An image: {work.passes / 1e12:.1f} TFLOP forward and back, {work.grams / 1e12:.2f} TFLOP of Gram matrices. "
        f"Sums: {work.sums / 1e9:.0f} GB. Decompositions: {work.eigenvectors / 1e15:.1f} PFLOP in float64.\n\n"
        + table(header, lines)
    )
