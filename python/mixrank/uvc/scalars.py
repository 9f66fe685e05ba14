"""What a training tells, as scalars for TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mixrank.errors import InputError


def scalars(entry: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Tag and value of all numbers in an entry of a history (:class:`mixrank.uvc.options.FinetuneResult`)."""
    for name, value in entry.items():
        if name != "step":
            yield from _flat(name, value)


def _flat(tag: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _flat(f"{tag}/{name}", part)
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from _flat(f"{tag}/block_{index}", part)
    elif value is not None:
        yield tag, float(value)


def writer(folder: Path) -> Callable[[dict[str, Any]], None]:
    """Return what writes the entries of a history into a folder that TensorBoard reads.

    Raises:
        InputError: TensorBoard is not installed, or the folder cannot be written.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError("--tensorboard needs the package tensorboard: pip install tensorboard") from error
    try:
        events = SummaryWriter(str(folder))
    except OSError as error:
        raise InputError(f"--tensorboard {folder} cannot be written: {error.strerror or error}") from error

    def write(entry: dict[str, Any]) -> None:
        for tag, value in scalars(entry):
            events.add_scalar(tag, value, entry["step"])
        events.flush()

    return write
