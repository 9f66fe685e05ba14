"""Interleaved timing: variants take turns, so that whatever else the machine does meets each of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call over the rounds."""

    median: float
    low: float
    high: float
    rounds: int


def interleaved(
    variants: dict[str, Callable[[], object]], *, rounds: int = 15, turn_seconds: float = 0.02
) -> dict[str, Timing]:
    """Time every variant in turns; a turn repeats the call until ``turn_seconds`` have passed.

    The order turns around every round, so that no variant always runs on another one's heels.
    """
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        call()
    for index in range(rounds):
        for name in list(variants)[:: 1 if index % 2 == 0 else -1]:
            samples[name].append(_turn(variants[name], turn_seconds))
    return {
        name: Timing(statistics.median(values), min(values), max(values), rounds) for name, values in samples.items()
    }


def _turn(call: Callable[[], object], seconds: float) -> float:
    calls, start = 0, time.perf_counter()
    while True:
        call()
        calls += 1
        passed = time.perf_counter() - start
        if passed >= seconds:
            return 1e3 * passed / calls
