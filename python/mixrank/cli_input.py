"""What the commands check of their arguments before the long work."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixrank.errors import InputError
from mixrank.files import check_writable
from mixrank.precision import Precision

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


def check_budgets(name: str, *keeps: float) -> None:
    """Each share of the parameters is one."""
    for keep in keeps:
        if not 0 < keep <= 1:
            raise InputError(f"{name} must be above 0 and at most 1, got {keep:g}")


def check_device(name: str) -> None:
    """``--device`` names one that there is."""
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"--device must be auto, cpu or cuda, got {name}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: there is no GPU that PyTorch can use")


def chosen_device(name: str) -> torch.device:
    """The device that ``--device`` stands for."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def chosen_dtype(precision: Precision, device: torch.device) -> torch.dtype | None:
    """The dtype of the autocast that ``--dtype`` stands for, None for none; says so where it is a slow choice."""
    import torch

    from mixrank.precision import fast_dtype, multiplies_bfloat16

    if precision == Precision.auto:
        return fast_dtype(device)
    if precision == Precision.float32:
        return None
    if not multiplies_bfloat16(device):
        print(
            f"note: this {device.type.upper()} has no instructions for bfloat16, which makes it several times slower "
            "than float32; --dtype auto chooses",
            file=sys.stderr,
        )
    return torch.bfloat16


def model_arguments(text: str | None) -> dict[str, Any]:
    """``--model-args`` as a dictionary."""
    try:
        args = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise InputError(f"--model-args is not JSON: {error}") from None
    if not isinstance(args, dict):
        raise InputError(f"--model-args must be a JSON object, got {text}")
    return args


def first_images(source: ImageSource, count: int) -> torch.Tensor:
    """One batch to time the models on."""
    batch = next(iter(source.batches(count)), None)
    if batch is None:
        raise InputError("there is no image that decodes to time the model on")
    return batch.images
