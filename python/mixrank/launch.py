"""How this process was started; without PyTorch, so that ``mixrank --help`` does not wait for it."""

from __future__ import annotations

import os


def started_processes() -> int:
    """How many ``torchrun`` started, this one included."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def usable_processors() -> int:
    """How many processors this process may use: of a machine's, those that it was not kept from by its affinity."""
    if hasattr(os, "sched_getaffinity"):  # not on every system
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
