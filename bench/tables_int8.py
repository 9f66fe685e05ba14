"""The tables of docs/kernels/int8.md: speed beside other implementations, and what 8 bits change of a real model."""

from __future__ import annotations

from mixrank_bench import vit_b16, vit_b16_int8
from mixrank_bench.environment import RESULTS, read
from mixrank_bench.markdown import conditions, table
from mixrank_bench.measures import Measure, measures, newest_runs

OUT = RESULTS / "int8.jsonl"
NO_RUN = "No run has been recorded yet.\n"
FLOATING = {"ours in fp32": "ours in float32", "ours in bf16": "ours in bfloat16"}


def speed() -> str:
    """Each case of the newest run: milliseconds, and how many times as long others take."""
    rows = newest_runs(read(OUT))
    found = [one for one in measures(rows) if not one.red]
    if not found:
        return NO_RUN
    lines = []
    for one in found:
        floating = one.peers("floating")
        ratios = [floating.get(name) for name in FLOATING.values()]
        ratios += [best[1] if (best := one.best(group)) else None for group in ("factors", "dense")]
        cells = ["-" if time is None else f"{time / one.milliseconds:.2f}x" for time in ratios]
        lines.append((one.row["op"], one.row["case"], f"{one.milliseconds:.3f}", _rate(one), *cells))
    header = ("operator", "case", "ms", "Gop/s", *FLOATING, "best int8, factors", "best int8, dense weight")
    return table(header, lines) + "\n" + conditions(rows[-1])


def _rate(one: Measure) -> str:
    return f"{one.rate() / 1e9:.0f}"


def accuracy() -> str:
    """Each model beside itself in fp32."""
    rows = read(vit_b16_int8.OUT)
    if not rows:
        return NO_RUN
    full = next(row["bytes"] for row in read(vit_b16.OUT) if row["kind"] == "dense")
    lines = [
        (
            row["model"],
            "nothing" if row["in_8_bits"] == vit_b16_int8.PLAIN else row["in_8_bits"],
            f"{row['bytes'] / 1e6:.1f}",
            f"{100 * row['bytes'] / full:.1f}",
            f"{row['top1']:.1f}",
            f"{row['agreement']:.1f}",
            f"{row['kl']:.4f}",
        )
        for row in {(row["model"], row["in_8_bits"]): row for row in rows}.values()
    ]
    header = ("model", "in 8 bits", "MB", "% of dense fp32", "top-1, %", "agreement with fp32, %", "mean KL divergence")
    return table(header, lines) + f"\nOf {rows[-1]['images']} images. " + conditions(rows[-1])
