"""The state of a training in one file, from which it goes on at the epoch that it had reached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixrank.errors import InputError
from mixrank.files import check_same_run, write_tensors
from mixrank.uvc.options import FinetuneOptions
from mixrank.uvc.primal_dual import KINDS, PrimalDual
from mixrank.uvc.shrink import KeptBlock

_KEY = "mixrank_uvc"


@dataclass
class Progress:
    """Where a training stands, in terms of JSON.

    Attributes:
        step: how many steps were made.
        seconds: time that they took.
        history: see :class:`mixrank.uvc.options.FinetuneResult`.
        before: top-1 at the start.
        search: what else a search knows.
    """

    step: int
    seconds: float
    history: list[dict]
    before: float | None
    search: dict[str, Any]


def key_of(model: nn.Module, options: FinetuneOptions, steps: int, dtype: torch.dtype | None) -> dict:
    """What makes a run the same run: its options, its length, and the weights that it starts with."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    kind = {"kind": type(options).__name__, "steps": steps, "dtype": str(dtype)}
    return kind | asdict(options) | {"weights": digest.hexdigest()}


def save_state(path: Path, key: dict, progress: Progress, tensors: dict[str, Tensor]) -> None:
    """Write a state, whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    content = {"key": key, "progress": asdict(progress)}
    # Each for itself: safetensors writes no memory twice.
    own = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    write_tensors(path, own, {_KEY: json.dumps(content)})


def load_state(path: Path, key: dict) -> tuple[Progress, dict[str, Tensor]]:
    """Read what :func:`save_state` wrote.

    Raises:
        InputError: it is not such a file, or the state of a run with another key.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            content = json.loads((file.metadata() or {})[_KEY])
            check_same_run(path, content["key"], key)
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return Progress(**content["progress"]), tensors
    except InputError:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is not the state of such a run: {error}") from error


def variables_of(duals: PrimalDual) -> Iterator[tuple[str, Tensor]]:
    """Shares and multipliers by name; written into, they are set."""
    for name, blocks in (("shares", duals.shares), ("multipliers", duals.multipliers)):
        for index, block in enumerate(blocks):
            for kind in KINDS:
                yield f"{name}.{index}.{kind}", getattr(block, kind)


def moments_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """The moments of Adam by name of the parameter, of those that were stepped."""
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter)
        if state:
            yield from ((f"{kind}.{name}", state[kind]) for kind in ("step", "exp_avg", "exp_avg_sq"))


def set_moments(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give an optimizer the moments that :func:`moments_of` named."""
    for name, parameter in model.named_parameters():
        if f"step.{name}" in tensors:
            moved = {kind: tensors[f"{kind}.{name}"].to(parameter.device) for kind in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": tensors[f"step.{name}"]} | moved


def kept_to_json(kept: Sequence[KeptBlock | None]) -> list[dict | None]:
    """What stays, in terms of JSON."""
    return [
        None if one is None else {"columns": [list(columns) for columns in one.columns], "neurons": list(one.neurons)}
        for one in kept
    ]


def kept_from_json(data: list[dict | None]) -> list[KeptBlock | None]:
    """Read what :func:`kept_to_json` wrote."""

    def block(one: dict) -> KeptBlock:
        return KeptBlock(tuple(tuple(columns) for columns in one["columns"]), tuple(one["neurons"]))

    return [None if one is None else block(one) for one in data]
