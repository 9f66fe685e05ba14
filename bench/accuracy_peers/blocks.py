"""A vision transformer of timm cut at its blocks, for methods that go through it one block at a time."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mixrank.errors import InputError


class _Stop(Exception):
    """Ends a forward pass once what was wanted is there."""


def check_blocks(model: nn.Module) -> nn.ModuleList | nn.Sequential:
    """Return the model's blocks; raise InputError where it does not hold them as timm's vision transformer does."""
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.ModuleList | nn.Sequential) or not hasattr(model, "forward_head"):
        raise InputError(f"model must be a vision transformer of timm with blocks, but was {type(model).__name__}")
    return blocks


def first_inputs(model: nn.Module, images: Iterable[Tensor], *, dtype: torch.dtype | None = None) -> list[Tensor]:
    """What the first block receives for each batch: ``[B, T, features]``."""
    found: list[Tensor] = []

    def catch(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        found.append(arguments[0])
        raise _Stop

    handle = check_blocks(model)[0].register_forward_pre_hook(catch)
    try:
        with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype is not None):
            for batch in images:
                try:
                    model(batch)
                except _Stop:
                    continue
    finally:
        handle.remove()
    return found


def run_block(block: nn.Module, states: Iterable[Tensor], *, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The outputs of one block for the inputs of each batch."""
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype is not None):
        return [block(state) for state in states]


def run_from(model: nn.Module, first: int, state: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """The logits ``[B, classes]`` in float32 of the blocks from number ``first`` on, and the head, for one batch."""
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype is not None):
        for block in check_blocks(model)[first:]:
            state = block(state)
        return model.forward_head(model.norm(state)).float()
