"""A progress bar with the time left, on standard error, so that standard output stays clean."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import length_hint
from typing import TypeVar

Item = TypeVar("Item")


def track(
    iterable: Iterable[Item], description: str, *, total: int | None = None, enabled: bool = False
) -> Iterator[Item]:
    """Yield the items of ``iterable``; with ``enabled``, show how many are done and how long the rest will take."""
    if not enabled:
        yield from iterable
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    if total is None:
        total = length_hint(iterable) or None
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield from progress.track(iterable, description=description, total=total)
