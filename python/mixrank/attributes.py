"""Attributes of modules that PyTorch's types say nothing of: to them each is a tensor or a module."""

from __future__ import annotations

from typing import cast

from torch import nn


def note_(module: nn.Module, name: str, value: object) -> None:
    """Set an attribute that goes with the module into copies and checkpoints."""
    setattr(module, name, value)


def class_count(model: nn.Module) -> int:
    """``num_classes`` of a timm model, or of one that says as much."""
    return cast(int, model.num_classes)


def block_list(model: nn.Module) -> nn.Sequential | nn.ModuleList:
    """``blocks`` of a timm vision transformer."""
    return cast("nn.Sequential | nn.ModuleList", model.blocks)
