"""What a run on a GPU has to show, and whether it does: ratios to the libraries within one run, with a cold cache.

A bar is judged for each of our implementations: one that is not yet the default shows here what it would win.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from mixrank_bench.gpu_cases import BAR_DTYPE, GRAM_WIDTHS, ROWS, bar_cases
from mixrank_bench.measures import geometric_mean
from mixrank_bench.ops import LAYERS
from mixrank_bench.peers import ROUNDED

Row = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """One thing that has to hold of all of its cases.

    Attributes:
        text: what is compared.
        wanted: the least ratio; above 1, ours is faster.
        groups: the fastest of these is what ours is compared with.
        cases: which rows it speaks of.
        of_all: how the ratios of the cases become one number.
        complete: number of cases without which nothing is said.
    """

    text: str
    wanted: float
    groups: tuple[str, ...]
    cases: Callable[[Row], bool]
    of_all: Callable[[list[float]], float]
    complete: int


@dataclass(frozen=True)
class Line:
    """A bar as one of our implementations meets it; ``measured`` is None where cases are missing."""

    bar: Bar
    implementation: str
    measured: float | None
    cases: int

    @property
    def met(self) -> bool:
        return self.measured is not None and self.measured >= self.bar.wanted

    def __str__(self) -> str:
        if self.measured is None:
            said = f"not measured: {self.cases} of {self.bar.complete} cases have a number"
        else:
            said = f"{self.measured:.2f}x, {'met' if self.met else 'not met'}"
        return f"{self.bar.text}, at least {self.bar.wanted:g}x, {self.implementation}: {said}"


def _is(kind: str, timed: str, **fields: Any) -> Callable[[Row], bool]:
    return lambda row: (
        (row["kind"], row.get("timed")) == (kind, timed)
        and all(row.get(name) == value for name, value in fields.items())
    )


_BAR_NAMES = {case.name for case in bar_cases()}


def _bar_row(op: str, **fields: Any) -> Callable[[Row], bool]:
    names = {case.name for case in bar_cases() if case.op == op}
    is_one = _is("op", "cold", op=op, dtype=str(BAR_DTYPE).removeprefix("torch."), **fields)
    return lambda row: is_one(row) and row["case"] in names


_LINEAR, _GRAM = _bar_row("lowrank_linear"), _bar_row("gram_accumulate_")
_MANY = _bar_row("lowrank_linear", m=ROWS[-1])
_MODEL = _is("model", "compiled")
_WIDTHS, _LAYERS = len(GRAM_WIDTHS), len(LAYERS)
BARS = (
    Bar(f"lowrank_linear against two products, M = {ROWS[-1]}, worst", 1.0, ("factors",), _MANY, min, _LAYERS),
    Bar("lowrank_linear against two products, mean", 1.2, ("factors",), _LINEAR, geometric_mean, _LAYERS * len(ROWS)),
    Bar("gram_accumulate_ against sums in fp32, worst", 1.5, ("gram",), _GRAM, min, _WIDTHS),
    Bar("gram_accumulate_ against addmm_ rounded to bfloat16, worst", 1.5, (ROUNDED,), _GRAM, min, _WIDTHS),
    Bar("compressed ViT-B/16 against the dense one, compiled and captured", 1.8, ("dense",), _MODEL, min, 1),
)


def judge(rows: Iterable[Row]) -> list[Line]:
    """Every bar for each of our implementations that a run has numbers of."""
    rows = [row for row in rows if row["kind"] in ("op", "model") and not row["gate"]]
    ours = dict.fromkeys(name for row in rows for name in row["milliseconds"].get("ours", {}))
    return [_line(bar, name, [row for row in rows if bar.cases(row)]) for bar in BARS for name in ours]


def _line(bar: Bar, implementation: str, rows: list[Row]) -> Line:
    ratios = [found for row in rows if (found := ratio(row, implementation, bar.groups)) is not None]
    measured = bar.of_all(ratios) if len(ratios) >= bar.complete else None
    return Line(bar, implementation, measured, len(ratios))


def ratio(row: Row, implementation: str, groups: Iterable[str]) -> float | None:
    """The time of the fastest peer over ours, or None where either is missing."""
    times = row["milliseconds"]
    peers = [timing["median"] for group in groups for timing in times.get(group, {}).values()]
    ours = times.get("ours", {}).get(implementation)
    return min(peers) / ours["median"] if peers and ours else None
