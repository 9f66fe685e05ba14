"""Several processes that share the steps of a training, where ``torch.distributed`` was set up; else one alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def joined(device: torch.device) -> Iterator[torch.device]:
    """Join the other processes that ``torchrun`` started, if it did; yields the device of this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    on_gpu = device.type == "cuda"
    if on_gpu:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield device
        torch.distributed.barrier()  # the first one writes: none is gone before
    finally:
        torch.distributed.destroy_process_group()


def place() -> tuple[int, int]:
    """The number of this process, from 0 on, and how many there are."""
    if not _several():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def shared(module: nn.Module) -> nn.Module:
    """The module, with gradients averaged over all processes where there are several."""
    if not _several():
        return module
    from torch.nn.parallel import DistributedDataParallel

    device = next(module.parameters()).device
    return DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None)


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return place()[0] == 0


def mean(value: Tensor) -> float:
    """Of a number over all processes, so that all of them see the same."""
    if _several():
        value = value.clone()
        torch.distributed.all_reduce(value)
        value /= torch.distributed.get_world_size()
    return value.item()
