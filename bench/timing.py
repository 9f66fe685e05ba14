"""Interleaved timing: variants take turns, so that whatever else the machine does meets each of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

SETTLE_SECONDS = 0.002
SETTLE_THREADS_SECONDS = 0.02
"""ONNX Runtime's threads spin for a while after a call, on the processors that the next variant needs."""
FEWEST_ROUNDS = 3

Name = TypeVar("Name")


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call over the rounds."""

    median: float
    low: float
    high: float
    rounds: int


def interleaved(
    variants: dict[Name, Callable[[], object]],
    *,
    rounds: int = 15,
    turn_seconds: float = 0.02,
    settle_seconds: float = SETTLE_SECONDS,
    limit_seconds: float = float("inf"),
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[Name, Timing]:
    """Time every variant in turns; a turn repeats the call until ``turn_seconds`` have passed.

    The order turns around every round, so that no variant always runs on another one's heels. Each turn begins with
    a pause, in which thread pools of the one before stop spinning, and one call that does not count. Calls
    that fill a turn alone do without the latter. Where all rounds would take longer than ``limit_seconds``, there are
    fewer of them, but not below three.

    Raises:
        ValueError: ``rounds`` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, but it was {rounds}")
    samples: dict[Name, list[float]] = {name: [] for name in variants}
    once: dict[Name, float] = {}
    for name, call in variants.items():
        call()
        once[name] = _turn(call, 0.0, clock) / 1e3
    long = {name for name, seconds in once.items() if seconds >= turn_seconds}
    round_seconds = sum(max(seconds, turn_seconds) for seconds in once.values())
    fitting = int(min(rounds, limit_seconds / round_seconds))
    rounds = min(rounds, max(FEWEST_ROUNDS, fitting))
    for index in range(rounds):
        for name in list(variants)[:: 1 if index % 2 == 0 else -1]:
            sleep(settle_seconds)
            if name not in long:
                variants[name]()
            samples[name].append(_turn(variants[name], turn_seconds, clock))
    return {
        name: Timing(statistics.median(values), min(values), max(values), rounds) for name, values in samples.items()
    }


def _turn(call: Callable[[], object], seconds: float, clock: Callable[[], float]) -> float:
    """Milliseconds of one call, over as many calls as fit into ``seconds``, at least one."""
    calls, start = 0, clock()
    while True:
        call()
        calls += 1
        passed = clock() - start
        if passed >= seconds:
            return 1e3 * passed / calls
