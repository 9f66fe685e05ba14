"""Which weights a model has, told by a digest: a checkpoint names those that it was compressed from by it."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from mixrank.errors import InputError

_KEY = "dense_weights"


def digest(model: nn.Module) -> str:
    """SHA-256 of the names, dtypes, shapes and values of all parameters and persistent buffers, in hexadecimal."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def compressed_from(dense: nn.Module) -> dict[str, str]:
    """What the metadata of a checkpoint says of the dense model."""
    return {_KEY: digest(dense)}


def check_origin(metadata: dict[str, Any], dense: nn.Module, file: object, weights: object) -> None:
    """Raise InputError where a checkpoint says that it was compressed from other weights than those of ``dense``.

    Args:
        metadata: of the checkpoint; one that was not written by a command says nothing, and passes.
        dense: the model that is taken for its origin.
        file: the checkpoint's name.
        weights: where the weights of ``dense`` are from; None: they are timm's pretrained ones.
    """
    if _KEY in metadata and metadata[_KEY] != digest(dense):
        taken = "timm's pretrained weights" if weights is None else weights
        raise InputError(
            f"{file} was not compressed from {taken}, which it would be trained to follow: name its dense weights by "
            "--weights"
        )
