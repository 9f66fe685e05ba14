"""Where threads run: each on a processor of its own, as ONNX Runtime places its threads.

A worker that slept may be woken on the processor of the thread that it is to help; both then run at half speed until
the system moves one of them, which takes longer than a turn of a measurement.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

_TASKS = Path("/proc/self/task")


def _can_bind() -> bool:
    return hasattr(os, "sched_setaffinity") and _TASKS.is_dir()


def bind_workers(threads: int) -> list[int]:
    """Bind PyTorch's OpenMP workers to the processors after the first, for as long as this process lives.

    They are found as the threads that come up when PyTorch first works with so many: call it before that. Nothing
    happens for one thread, or where threads cannot be bound.

    Returns:
        The identifiers of the threads that were bound.
    """
    if threads < 2 or not _can_bind():
        return []
    processors = sorted(os.sched_getaffinity(0))
    known, before = {task.name for task in _TASKS.iterdir()}, torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.ones(1 << 20).add_(1)
        workers = sorted(int(task.name) for task in _TASKS.iterdir() if task.name not in known)
    finally:
        torch.set_num_threads(before)
    for index, worker in enumerate(workers, start=1):
        os.sched_setaffinity(worker, {processors[index % len(processors)]})
    return workers


@contextlib.contextmanager
def bound(threads: int) -> Iterator[None]:
    """Within the block, keep this thread on the first processor, if it works with several threads.

    Threads that are created within the block inherit that: create pools before.
    """
    if threads < 2 or not _can_bind():
        yield
        return
    processors = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(processors)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, processors)
