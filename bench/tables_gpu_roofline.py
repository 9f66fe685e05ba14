"""The tables of docs/kernels/gpu.md: what bounds each case of the GPU suite, by the data sheets of two cards."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from mixrank_bench import gpu_cases, tables_gpu_results
from mixrank_bench.markdown import table
from mixrank_bench.measures import SERVED
from mixrank_bench.ops import RESIDUAL_RANK, Case

TILE = 128
"""Rows and columns of the tiles that are counted: the largest that one multiprocessor accumulates in registers."""
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Card:
    """What a data sheet says, dense: operations per second by dtype, bytes per second, multiprocessors."""

    name: str
    flops: dict[torch.dtype, float]
    bandwidth: float
    multiprocessors: int = 132

    def arithmetic(self, case: Case) -> float:
        """Microseconds that the case's operations take at the least."""
        return 1e6 * case.flops / self.flops[case.dtype]

    def memory(self, case: Case) -> float:
        """Microseconds that the case's bytes take at the least."""
        return 1e6 * case.bytes / self.bandwidth

    def floor(self, case: Case) -> float:
        """Microseconds that the case takes at the least."""
        return max(self.arithmetic(case), self.memory(case))

    def bound(self, case: Case) -> str:
        """What the floor is made of."""
        return "arithmetic" if self.arithmetic(case) > self.memory(case) else "bytes"


_FLOPS = {torch.bfloat16: 989e12, torch.float16: 989e12, torch.float32: 67e12}
H100, H200 = Card("H100 SXM", _FLOPS, 3.35e12), Card("H200 SXM", _FLOPS, 4.8e12)


def tiles(case: Case) -> tuple[int, ...]:
    """Output tiles of each product of a case: down and up, or those of one triangle, or of the rectangle."""
    rows, k, n = (_blocks(size) for size in (case.m, case.k, case.n))
    if case.op == "gram_accumulate_":
        return (max(1, case.batch) * k * (k + 1) // 2,)
    if case.op == "cross_gram_accumulate_":
        return (k * n,)
    return rows * _blocks(_rank(case)), rows * n


def splits(case: Case) -> tuple[int, ...]:
    """Into how many parts each product's sum has to be divided to give every multiprocessor a tile."""
    return tuple(math.ceil(H100.multiprocessors / count) for count in tiles(case))


def _blocks(size: int) -> int:
    return -(-size // TILE)


def _rank(case: Case) -> int:
    return case.rank + (RESIDUAL_RANK if case.residual == "branch" else 0)


def _bar_cases() -> Iterator[Case]:
    """The cases of the bars, few rows first."""
    yield from sorted(gpu_cases.bar_cases(), key=lambda case: (case.op != "lowrank_linear", case.m))


def fill() -> str:
    """Tiles of each product of the bars' cases, and the parts that the sums need."""
    lines = []
    for case in _bar_cases():
        counts, parts = (", ".join(str(number) for number in found) for found in (tiles(case), splits(case)))
        lines.append((case.op, case.name, counts, parts))
    return table(("operator", "case", f"tiles of {TILE} x {TILE}", "parts of the sum"), lines)


def fusing() -> str:
    """What one launch saves, and what it computes again, for the layers of the bars."""
    lines = []
    for case in _bar_cases():
        if case.op != "lowrank_linear":
            continue
        between = 2 * case.dtype.itemsize * case.m * case.rank
        again = (_blocks(case.n) - 1) * 2 * case.m * case.k * case.rank
        lines.append(
            (
                case.name,
                f"{H100.floor(case):.2f}",
                f"{1e6 * between / H100.bandwidth:.2f}",
                f"{1e6 * again / H100.flops[case.dtype]:.2f}",
            )
        )
    return table(
        ("case", "floor, µs", "intermediate out and in, µs", "down product again for each column of tiles, µs"), lines
    )


def roofline() -> str:
    """Operations, bytes, intensity and bounds of every case, and what of the floor was reached."""
    measured = _measured()
    lines = [
        (
            case.op,
            case.dtype_name,
            case.name,
            f"{case.flops / 1e9:.3f}",
            f"{case.bytes / 1e6:.2f}",
            f"{case.flops / case.bytes:.1f}",
            f"{H100.floor(case):.2f}",
            H100.bound(case),
            f"{H200.floor(case):.2f}",
            H200.bound(case),
            measured.get((case.op, case.dtype_name, case.name), NOT_MEASURED),
        )
        for case in gpu_cases.cases()
    ]
    header = ("operator", "dtype", "case", "GFLOP", "MB", "FLOP/byte", "H100, µs", "bound by", "H200, µs", "bound by")
    return table((*header, "reached"), lines)


def _measured() -> dict[tuple[str, str, str], str]:
    """By operator, dtype and case: the share of each card's floor that its newest run reached with a cold cache."""
    cases = {(case.op, case.dtype_name, case.name): case for case in gpu_cases.cases()}
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in tables_gpu_results.rows():
        key = (row.get("op"), row.get("dtype"), row.get("case"))
        if row["kind"] == "op" and row["timed"] == "cold" and key in cases:
            found.setdefault(key, []).append(_reached(row, cases[key]))
    return {key: ", ".join(shares) for key, shares in found.items()}


def _reached(row: dict[str, Any], case: Case) -> str:
    if row["gate"]:
        return "no number"
    card = H200 if "H200" in row["environment"]["gpu"] else H100
    share = 0.1 * card.floor(case) / row["milliseconds"]["ours"][SERVED]["median"]
    return f"{share:.0f} % ({card.name.split()[0]})"
