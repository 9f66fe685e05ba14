"""Where threads run: each on a processor of its own.

A worker that slept may be woken on the processor of the thread that it is to help; both then run at half speed until
the system moves one of them, which takes longer than a turn of a measurement. OpenMP binds its workers where
``OMP_PROC_BIND=true`` is set when the process starts. It then binds the first thread too, from which every thread that
is created later, of whatever library, would inherit that: so this thread is bound only while something is timed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

TASKS = Path("/proc/self/task")


def unbound_workers(threads: int) -> str | None:
    """Say in words that OpenMP does not bind its workers, or return None where it does or has none."""
    if threads < 2 or os.environ.get("OMP_PROC_BIND", "false").lower() not in ("false", ""):
        return None
    return "the threads of OpenMP are not bound, and may share a processor: set OMP_PROC_BIND=true"


def release() -> None:
    """Let every thread that exists run on every processor; call it before OpenMP has workers."""
    if hasattr(os, "sched_setaffinity"):
        threads = [int(task.name) for task in TASKS.iterdir()] if TASKS.is_dir() else [0]
        for thread in threads:
            os.sched_setaffinity(thread, _processors())


def _processors() -> range:
    """All of the machine; the system leaves out those that this process may not use."""
    return range(os.cpu_count() or 1)


@contextlib.contextmanager
def bound(threads: int) -> Iterator[None]:
    """Within the block, keep this thread on the first processor, if it works with several that are bound."""
    if threads < 2 or unbound_workers(threads) or not hasattr(os, "sched_setaffinity"):
        yield
        return
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    try:
        yield
    finally:
        os.sched_setaffinity(0, _processors())
