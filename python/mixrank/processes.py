"""Several processes that share the work, where ``torch.distributed`` was set up; else one alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, nn

from mixrank.errors import InputError
from mixrank.launch import started_processes

Value = TypeVar("Value")
PATIENCE = timedelta(minutes=30)
"""How long a process waits for another one that was lost without a word."""


@contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Join the other processes that ``torchrun`` started, if it did; yields the device of this one.

    Raises:
        InputError: the connection to another process was lost inside the block.
    """
    if started_processes() == 1:
        yield device
        return
    on_gpu = device.type == "cuda"
    if on_gpu:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
    try:
        yield device
    except RuntimeError as error:
        if isinstance(error, torch.distributed.DistError) or "gloo" in str(error):
            raise InputError(
                "another process ended before its time, so this one did: see what that one said"
            ) from error
        raise
    finally:
        torch.distributed.destroy_process_group()


def place() -> tuple[int, int]:
    """The number of this process, from 0 on, and how many there are."""
    if not are_several():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def shared(module: nn.Module) -> nn.Module:
    """The module, with gradients averaged over all processes where there are several."""
    if not are_several():
        return module
    from torch.nn.parallel import DistributedDataParallel

    device = next(module.parameters()).device
    return DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None)


def are_several() -> bool:
    """Whether there are others."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return place()[0] == 0


def mean(value: Tensor) -> float:
    """Of a number over all processes, so that all of them see the same."""
    if are_several():
        value = value.clone()
        torch.distributed.all_reduce(value)
        value /= torch.distributed.get_world_size()
    return value.item()


def add_up_(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in place: the same bits in all of them."""
    if are_several():
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)


def gathered(value: Value) -> list[Value]:
    """What each process has, in the order of their numbers."""
    if not are_several():
        return [value]
    values: list[Value] = [value] * place()[1]
    torch.distributed.all_gather_object(values, value)
    return values


def divided(names: Mapping[str, int], do: Callable[[list[str]], dict[str, Value]]) -> dict[str, Value]:
    """Divide work over the processes by its cost; all of them get all results, in the order of ``names``.

    Args:
        names: of the pieces, with what each costs.
        do: makes the results of some of them.
    """
    number, count = place()
    loads = [0] * count
    chosen: dict[int, list[str]] = {}
    for name in sorted(names, key=lambda name: (-names[name], name)):
        least = loads.index(min(loads))
        chosen.setdefault(least, []).append(name)
        loads[least] += names[name]
    own = set(chosen.get(number, ()))
    results: dict[str, Value] = {}
    for part in gathered(do([name for name in names if name in own])):
        results |= part
    return {name: results[name] for name in names if name in results}
