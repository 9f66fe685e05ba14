"""What a row of results says: ratios to peers and percents of the ceilings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from mixrank_bench.ceilings import Ceilings

# Names of variants in the rows.
SERVED, UNPACKED = "as served", "without packing"
SSYRK, ADDMM = "scipy ssyrk", "torch addmm_ in fp32"
OUT_DTYPE = "torch.mm to fp32, then add_"


@dataclass(frozen=True)
class Measure:
    """One row of the kind ``op`` beside the ceilings of its run.

    Attributes:
        row: the row as it stands in the results; without times where the gate is red.
        ceilings: the ceilings for the row's number of threads, or None where they were not measured.
    """

    row: dict[str, Any]
    ceilings: Ceilings | None

    @property
    def red(self) -> str | None:
        """Why there is no number, or None."""
        return self.row["gate"]

    @property
    def milliseconds(self) -> float:
        """The median of our operator as the layer serves it."""
        return self.row["milliseconds"]["ours"][SERVED]["median"]

    @property
    def unpacked_milliseconds(self) -> float | None:
        """The median of our operator on weights that are not packed, where that was timed."""
        timing = self.row["milliseconds"]["ours"].get(UNPACKED)
        return timing and timing["median"]

    @property
    def spread(self) -> float:
        """Slowest less fastest round, as a share of the median."""
        timing = self.row["milliseconds"]["ours"][SERVED]
        return (timing["high"] - timing["low"]) / timing["median"]

    def peers(self, group: str) -> dict[str, float]:
        """Milliseconds of each peer of a group that was timed."""
        return {name: timing["median"] for name, timing in self.row["milliseconds"].get(group, {}).items()}

    def best(self, *groups: str) -> tuple[str, float] | None:
        """Name and milliseconds of the fastest peer of some groups, or None where there is none."""
        found = [(name, time) for group in groups for name, time in self.peers(group).items()]
        return min(found, key=lambda peer: peer[1], default=None)

    def rate(self, flops: str = "flops") -> float:
        """Operations per second: those that have to be done, or those of a full product (``equivalent_flops``)."""
        return self.row[flops] / self.milliseconds * 1e3

    @property
    def arithmetic_milliseconds(self) -> float | None:
        """The least time that the arithmetic needs on this machine."""
        seconds = self.ceilings and self.ceilings.arithmetic_seconds(
            self.row["flops"], self.row.get("arithmetic", self.row["dtype"])
        )
        return 1e3 * seconds if seconds else None

    @property
    def memory_milliseconds(self) -> float | None:
        """The least time that moving every operand once needs, from where a working set of this size lies."""
        return 1e3 * self.ceilings.memory_seconds(self.row["bytes"]) if self.ceilings else None

    @property
    def percent(self) -> float | None:
        """Percent of the arithmetic ceiling."""
        least = self.arithmetic_milliseconds
        return 100 * least / self.milliseconds if least else None

    @property
    def least_milliseconds(self) -> float | None:
        """The least time of a kernel on this machine: its arithmetic or its bytes, and the call."""
        sides = self._sides
        return sides and max(sides["arithmetic"], sides["memory"]) + sides["call"]

    @property
    def roof(self) -> tuple[float, str] | None:
        """Percent of the roofline, and what takes most of it: ``arithmetic``, ``memory`` or the ``call``."""
        sides, least = self._sides, self.least_milliseconds
        return (100 * least / self.milliseconds, max(sides, key=sides.get)) if sides else None

    @property
    def _sides(self) -> dict[str, float] | None:
        arithmetic, memory = self.arithmetic_milliseconds, self.memory_milliseconds
        if arithmetic is None or memory is None:
            return None
        return {"arithmetic": arithmetic, "memory": memory, "call": 1e3 * self.ceilings.call}


def measures(rows: Iterable[dict[str, Any]]) -> list[Measure]:
    """The measurements among the rows of one run."""
    rows = list(rows)
    ceilings = {row["threads"]: Ceilings.from_json(row) for row in rows if row["kind"] == "ceiling"}
    return [Measure(row, ceilings.get(row["threads"])) for row in rows if row["kind"] == "op"]


def newest_runs(
    rows: Iterable[dict[str, Any]], by: Callable[[dict[str, Any]], object] = lambda row: row.get("threads")
) -> list[dict[str, Any]]:
    """The rows of the run that was recorded last, for each number of threads or whatever else ``by`` tells apart."""
    rows = [row for row in rows if "run" in row]
    newest = {by(row): row["run"] for row in rows}
    return [row for row in rows if row["run"] == newest[by(row)]]


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean of some positive numbers, at least one."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))
