"""Several processes that share the steps of a training, where ``torch.distributed`` was set up; else one alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
    return not _several() or torch.distributed.get_rank() == 0


def mean(value: Tensor) -> float:
    """Of a number over all processes, so that all of them see the same."""
    if _several():
        value = value.clone()
        torch.distributed.all_reduce(value)
        value /= torch.distributed.get_world_size()
    return value.item()
