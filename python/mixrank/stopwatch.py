"""How long the stages of a piece of work took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Wall-clock seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Note how long what stands under it takes; nothing is noted where it raises."""
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started
