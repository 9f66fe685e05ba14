"""What the commands check of their arguments before the long work."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mixrank.errors import InputError
from mixrank.files import check_writable

if TYPE_CHECKING:
    import torch

    from mixrank.data import ImageSource


def check_positive(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


def check_outputs(files: dict[str, Path | None], *inputs: Path | None) -> None:
    """Each file can be written, no two are the same, and none is an input of the same command."""
    seen: dict[Path, str] = {}
    read = {path.resolve() for path in inputs if path is not None}
    for option, path in files.items():
        if path is None:
            continue
        check_writable(path, option)
        if path.resolve() in read:
            raise InputError(f"{option} {path} would overwrite an input of this command")
        other = seen.setdefault(path.resolve(), option)
        if other != option:
            raise InputError(f"{other} and {option} name the same file {path}")


def first_images(source: ImageSource, count: int) -> torch.Tensor:
    """One batch to time the models on."""
    batch = next(iter(source.batches(count)), None)
    if batch is None:
        raise InputError("there is no image that decodes to time the model on")
    return batch.images
