"""Calls recorded as one, and the clocks of a device: events on CUDA, the wall clock on the CPU."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from mixrank_bench.timing import Turn, clocked

FLUSH_BYTES = 1 << 28
"""Read to drive everything out of a second-level cache of 50 or 60 MB; reading leaves nothing to be written back."""
_LAUNCHES = 1 << 12
"""Launches between two events at most, that a queue never fills up."""

Surroundings = Callable[[], contextlib.AbstractContextManager]
Result = TypeVar("Result")


def recorded(
    calls: Sequence[Callable[[], object]], device: torch.device, within: Surroundings = contextlib.nullcontext
) -> Callable[[], object]:
    """One callable that makes all ``calls`` in their order, as :func:`captured` does."""
    return captured(functools.partial(_each, calls), device, within)[0]


def captured(
    call: Callable[[], Result], device: torch.device, within: Surroundings = contextlib.nullcontext
) -> tuple[Callable[[], object], Result]:
    """A CUDA graph of ``call``, made ``within`` something, as a callable, and the result, which a replay writes anew.

    It is called once before, so that whatever is compiled or set up at a first call is not in the graph. Where the
    device is not CUDA, ``call`` itself, which is then always made within it.
    """
    if device.type != "cuda":
        play = functools.partial(_within, within, call)
        return play, play()
    with within():
        return _graph(call, device)


def _within(within: Surroundings, call: Callable[[], Result]) -> Result:
    with within():
        return call()


def _graph(call: Callable[[], Result], device: torch.device) -> tuple[Callable[[], object], Result]:
    # cuBLAS and Triton set themselves up at a first call, which a capture does not allow.
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph.replay, result


def _each(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        call()


def turns(device: torch.device, *, cold: bool = False) -> Turn:
    """How a turn is timed on ``device``.

    Args:
        device: where the calls work.
        cold: drive everything out of the second-level cache before each call, outside its time.
    """
    if device.type != "cuda":
        return clocked
    if not cold:
        return functools.partial(_between_events, device)
    return functools.partial(_after_flushes, torch.ones(FLUSH_BYTES // 4, device=device))


def _between_events(device: torch.device, call: Callable[[], object], seconds: float) -> float:
    """As many calls as fill ``seconds`` one after another, by an event before and one after them all."""
    calls = 1
    while True:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(device)
        start.record(stream)
        for _ in range(calls):
            call()
        stop.record(stream)
        stop.synchronize()
        passed = start.elapsed_time(stop)
        if passed >= 1e3 * seconds or calls >= _LAUNCHES:
            return passed / calls
        calls = min(_LAUNCHES, max(2 * calls, int(1.1 * calls * 1e3 * seconds / max(passed, 1e-3))))


def _after_flushes(flush: torch.Tensor, call: Callable[[], object], seconds: float) -> float:
    """As many calls as fill ``seconds``, each between two events of its own and after the cache was flushed."""
    passed, calls = 0.0, 0
    while calls == 0 or passed < 1e3 * seconds:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(flush.device)
        flush.sum()
        start.record(stream)
        call()
        stop.record(stream)
        stop.synchronize()
        passed += start.elapsed_time(stop)
        calls += 1
    return passed / calls
