"""Interleaved timing: variants take turns, so that whatever else the machine does meets each of them."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

SETTLE_SECONDS = 0.002
SETTLE_THREADS_SECONDS = 0.02
"""ONNX Runtime's threads spin for a while after a call, on the processors that the next variant needs."""
FEWEST_ROUNDS = 3

Name = TypeVar("Name")
Turn = Callable[[Callable[[], object], float], float]
"""How a turn is timed: the milliseconds of one call, from as many calls as fit into some seconds, at least one."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call over the rounds."""

    median: float
    low: float
    high: float
    rounds: int
    quartiles: tuple[float, float]

    def divided(self, calls: int) -> Timing:
        """The timing of one of so many calls that were timed as one."""
        low, high = self.quartiles
        quartiles = (low / calls, high / calls)
        return replace(
            self, median=self.median / calls, low=self.low / calls, high=self.high / calls, quartiles=quartiles
        )


def interleaved(
    variants: dict[Name, Callable[[], object]],
    *,
    rounds: int = 15,
    turn_seconds: float = 0.02,
    settle_seconds: float = SETTLE_SECONDS,
    limit_seconds: float = float("inf"),
    turn: Turn | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[Name, Timing]:
    """Time every variant in turns; a turn repeats the call until ``turn_seconds`` have passed.

    The order turns around every round, so that no variant always runs on another one's heels. Each turn begins with
    a pause, in which thread pools of the one before stop spinning, and one call that does not count. Calls
    that fill a turn alone do without the latter. Where all rounds would take longer than ``limit_seconds``, there are
    fewer of them, but not below three.

    ``turn`` times the calls of a turn; by default ``clock`` is read around them.

    Raises:
        ValueError: ``rounds`` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, but it was {rounds}")
    if not variants:
        return {}
    turn = turn or functools.partial(clocked, clock=clock)
    samples: dict[Name, list[float]] = {name: [] for name in variants}
    once: dict[Name, float] = {}
    for name, call in variants.items():
        call()
        once[name] = turn(call, 0.0) / 1e3
    long = {name for name, seconds in once.items() if seconds >= turn_seconds}
    round_seconds = sum(max(seconds, turn_seconds) for seconds in once.values())
    fitting = int(min(rounds, limit_seconds / round_seconds))
    rounds = min(rounds, max(FEWEST_ROUNDS, fitting))
    for index in range(rounds):
        for name in list(variants)[:: 1 if index % 2 == 0 else -1]:
            sleep(settle_seconds)
            if name not in long:
                variants[name]()
            samples[name].append(turn(variants[name], turn_seconds))
    return {name: _summary(values) for name, values in samples.items()}


def _summary(values: list[float]) -> Timing:
    ordered = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * values
    return Timing(statistics.median(values), min(values), max(values), len(values), (ordered[0], ordered[2]))


def clocked(call: Callable[[], object], seconds: float, *, clock: Callable[[], float] = time.perf_counter) -> float:
    """Milliseconds of one call by ``clock``, over as many calls as fit into ``seconds``, at least one."""
    calls, start = 0, clock()
    while True:
        call()
        calls += 1
        passed = clock() - start
        if passed >= seconds:
            return 1e3 * passed / calls
