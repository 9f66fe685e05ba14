"""The bars that the kernels are to clear, and which of them a run says they do.

A ratio is the best peer's time over ours. The ceilings limit it too: no kernel takes less time than its arithmetic at
the measured peak, or its bytes at the measured bandwidth, and the call. Where even that would miss the bar, the line
says what the ceilings allow at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from mixrank_bench.measures import ADDMM, SSYRK, Measure, geometric_mean
from mixrank_bench.ops import KEEPS, TOKENS

CALIBRATION_SHARE = 25.0


@dataclass(frozen=True)
class Bar:
    """One requirement on many cases.

    Attributes:
        text: the requirement in words.
        wanted: the least that is wanted of :attr:`value`, over all cases by :attr:`over`.
        unit: ``"x"`` for a ratio, ``"%"`` for a percent.
        cases: which cases it speaks of.
        value: the figure of one case, or None where the run does not have it.
        limit: the largest figure that the ceilings allow, or None where that is not known.
        explained: the document that says what takes the rest where it is not met.
        over: ``min`` for every case, or the geometric mean.
    """

    text: str
    wanted: float
    unit: str
    cases: Callable[[Measure], bool]
    value: Callable[[Measure], float | None]
    limit: Callable[[Measure], float | None]
    explained: str
    over: Callable[[Iterable[float]], float] = min


@dataclass(frozen=True)
class Line:
    """A bar for one dtype and number of threads, as measured.

    Attributes:
        text, dtype, threads, wanted, unit: of the bar; ``wanted`` with its sign.
        measured: the figure over all cases, or None where a red gate left no number.
        met: whether the bar is cleared; never with a red gate among its cases.
        cases: how many cases it speaks of.
        missing: how many of them miss the bar by themselves, or have no number.
        worst: the case that is furthest below, with its figure.
        allowed: what the ceilings allow at most, where that is less than wanted.
        explained: the document that says what takes the rest.
    """

    text: str
    dtype: str
    threads: int
    wanted: str
    unit: str
    measured: float | None
    met: bool
    cases: int
    missing: int
    worst: str
    allowed: float | None
    explained: str = ""

    @property
    def note(self) -> str:
        """What to say of a bar that is not met."""
        if self.met:
            return ""
        parts = [f"worst: {self.worst}"] if self.worst else []
        if self.missing and self.cases > 1:
            parts.append(f"{self.missing} of {self.cases} cases below")
        if self.allowed is not None:
            parts.append(f"ceilings allow at most {self.allowed:.2f}{self.unit}")
        if self.explained:
            parts.append(f"see {self.explained}")
        return "; ".join(parts)


def _against(group: str, name: str | None = None) -> dict[str, Callable[[Measure], float | None]]:
    """Ratio to the fastest peer of a group, or to the one of that name, and what the ceiling lets it be."""

    def ratio(measure: Measure, milliseconds: float | None) -> float | None:
        times = [time for peer, time in measure.peers(group).items() if name in (None, peer)]
        return min(times) / milliseconds if times and milliseconds else None

    return {
        "value": lambda measure: ratio(measure, measure.milliseconds),
        "limit": lambda measure: ratio(measure, measure.least_milliseconds),
    }


def _percent_limit(measure: Measure) -> float | None:
    """Percent of the arithmetic ceiling that memory and the call leave."""
    least = measure.least_milliseconds
    return 100 * measure.arithmetic_milliseconds / least if least else None


_PERCENT = {"value": lambda measure: measure.percent, "limit": _percent_limit}


def _is(op: str, *, rows: tuple[float, float] = (0, float("inf")), **fields: Any) -> Callable[[Measure], bool]:
    """Cases of an operator with the number of rows within bounds, and other fields as given."""
    return lambda measure: (
        measure.row["op"] == op
        and rows[0] <= measure.row["m"] <= rows[1]
        and all(measure.row[name] == value for name, value in fields.items())
    )


def _wide_gram(measure: Measure) -> bool:
    return measure.row["op"] == "gram_accumulate_" and measure.row["k"] >= 192


def _any_gram(measure: Measure) -> bool:
    return measure.row["op"] in ("gram_accumulate_", "cross_gram_accumulate_")


_MANY = (TOKENS, float("inf"))
_LINEAR, _GRAM = "docs/kernels/lowrank_linear.md", "docs/kernels/gram.md"
BARS = (
    Bar(
        "lowrank_linear against the best peer at the same factors, every case",
        0.95,
        "x",
        _is("lowrank_linear"),
        **_against("factors"),
        explained=_LINEAR,
    ),
    Bar(
        "lowrank_linear against the best peer at the same factors, geometric mean",
        1.10,
        "x",
        _is("lowrank_linear"),
        **_against("factors"),
        explained=_LINEAR,
        over=geometric_mean,
    ),
    Bar(
        "lowrank_linear against the best peer at the same factors, every case with M <= 32",
        1.3,
        "x",
        _is("lowrank_linear", rows=(0, 32)),
        **_against("factors"),
        explained=_LINEAR,
    ),
    Bar(
        f"lowrank_linear at 40 % kept against the best dense peer, every case with M >= {TOKENS}",
        2.2,
        "x",
        _is("lowrank_linear", rows=_MANY, keep=KEEPS[0]),
        **_against("dense"),
        explained=_LINEAR,
    ),
    Bar(
        "lowrank_residual_linear against linear + add in torch eager, every case",
        1.5,
        "x",
        _is("lowrank_residual_linear"),
        **_against("add", "torch eager"),
        explained=_LINEAR,
    ),
    Bar(
        "lowrank_residual_linear against the best linear + add of all peers, every case",
        1.5,
        "x",
        _is("lowrank_residual_linear"),
        **_against("add"),
        explained=_LINEAR,
    ),
    Bar(
        "gram_accumulate_ in float32 against scipy ssyrk, every K >= 192",
        1.0,
        "x",
        lambda measure: _wide_gram(measure) and measure.row["dtype"] == "float32",
        **_against("gram", SSYRK),
        explained=_GRAM,
    ),
    Bar(
        "gram_accumulate_ in bfloat16 against torch addmm_ in fp32, every K >= 192",
        6.0,
        "x",
        lambda measure: _wide_gram(measure) and measure.row["dtype"] == "bfloat16",
        **_against("gram", ADDMM),
        explained=_GRAM,
    ),
    Bar(
        f"lowrank_linear, percent of the arithmetic ceiling, every case with M >= {TOKENS}",
        85.0,
        "%",
        _is("lowrank_linear", rows=_MANY),
        **_PERCENT,
        explained=_LINEAR,
    ),
    Bar(
        f"lowrank_residual_linear, percent of the arithmetic ceiling, every case with M >= {TOKENS}",
        85.0,
        "%",
        _is("lowrank_residual_linear", rows=_MANY),
        **_PERCENT,
        explained=_LINEAR,
    ),
    Bar(
        "Gram matrices, percent of the arithmetic ceiling, every case",
        85.0,
        "%",
        _any_gram,
        **_PERCENT,
        explained=_GRAM,
    ),
)


def judge(measures: Iterable[Measure], calibration: Iterable[dict[str, Any]] = ()) -> list[Line]:
    """Every bar for each dtype and number of threads that a run has cases of.

    Args:
        measures: the measurements of one run.
        calibration: rows of the kind ``calibration``; the newest for each number of threads counts.
    """
    measures = list(measures)
    lines = []
    for bar in BARS:
        groups: dict[tuple[int, str], list[Measure]] = {}
        for measure in filter(bar.cases, measures):
            groups.setdefault((measure.row["threads"], measure.row["dtype"]), []).append(measure)
        lines += [_line(bar, dtype, threads, found) for (threads, dtype), found in sorted(groups.items())]
    return lines + _calibration_lines(calibration)


def _line(bar: Bar, dtype: str, threads: int, found: list[Measure]) -> Line:
    wanted = f">= {bar.wanted:g}{bar.unit}"
    red = [measure for measure in found if measure.red]
    values = {id(m): bar.value(m) for m in found if not m.red}
    named = [(m, values[id(m)]) for m in found if values.get(id(m)) is not None]
    if not named:
        worst = f"{red[0].row['case']}: the error budget is exceeded" if red else "no peer was timed"
        cases = len(found)
        return Line(bar.text, dtype, threads, wanted, bar.unit, None, False, cases, cases, worst, None, bar.explained)
    measured = bar.over(value for _, value in named)
    below = sum(value < bar.wanted for _, value in named) + len(red)
    if red:
        worst = f"{red[0].row['case']}: the error budget is exceeded"
    else:
        case, value = min(named, key=lambda pair: pair[1])
        worst = f"{case.row['case']} {value:.2f}{bar.unit}"
    limits = [bar.limit(m) for m, _ in named]
    allowed = bar.over(limits) if None not in limits else None
    met = measured >= bar.wanted and not red
    # A bandwidth can be faster than what was measured of it: then its limit says nothing.
    ruled_out = allowed if allowed is not None and measured <= allowed < bar.wanted else None
    result = (measured, met, len(found), below, worst, ruled_out)
    return Line(bar.text, dtype, threads, wanted, bar.unit, *result, bar.explained)


def _calibration_lines(rows: Iterable[dict[str, Any]]) -> list[Line]:
    ours = [row for row in rows if row["method"] == "ours" and row["dtype"] == "bfloat16"]
    newest = {row["threads"]: row for row in ours}
    lines = []
    for threads, row in sorted(newest.items()):
        share = 100 * row["seconds_gram"] / row["seconds_forward"]
        met = share <= CALIBRATION_SHARE
        lines.append(
            Line(
                "Gram work in a calibration run of ViT-B/16, share of the forward pass",
                "bfloat16",
                threads,
                f"<= {CALIBRATION_SHARE:g}%",
                "%",
                share,
                met,
                1,
                0 if met else 1,
                f"{row['images']} images",
                None,
            )
        )
    return lines
