"""What the published methods want to know of a layer: moments of its inputs over the calibration images.

The product sums a layer's smaller side; these methods are all written on the input side, ``[K, K]`` for every layer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mixrank.errors import InputError
from mixrank.models import compressible_linears
from mixrank_kernels import ops

PARTS = ("gram", "total", "absolute")


@dataclass(frozen=True)
class InputStats:
    """Sums over all calibration tokens x ``[K]`` that a layer received.

    Attributes:
        gram: ``[K, K]`` float64, the sum of ``x x^T``.
        total: ``[K]`` float64, the sum of x.
        absolute: ``[K]`` float64, the sum of ``|x|``.
        rows: number of tokens.
    """

    gram: Tensor
    total: Tensor
    absolute: Tensor
    rows: int


@dataclass(frozen=True)
class Calibration:
    """What every method may use: unlabelled images, and the statistics of the dense model on them.

    Attributes:
        images: the batches, each ``[B, C, H, W]``.
        layers: statistics by layer name.
        dtype: the dtype of the autocast that the model runs in on these images, or None for its own.
    """

    images: list[Tensor]
    layers: dict[str, InputStats]
    dtype: torch.dtype | None = None


class _Accumulator:
    """The running sums of one layer's inputs: a forward hook."""

    def __init__(self, linear: nn.Linear) -> None:
        size = linear.in_features
        self.gram = torch.zeros(size, size, dtype=torch.float64)
        self.total, self.absolute = (torch.zeros(size, dtype=torch.float64) for _ in range(2))
        self.rows = 0

    def __call__(self, _module: nn.Module, arguments: tuple[Tensor, ...], _output: Tensor) -> None:
        x = arguments[0]
        ops.gram_accumulate_(self.gram, x, None, self.total)
        self.absolute += x.abs().flatten(0, -2).sum(0, dtype=torch.float32)
        self.rows += x.numel() // x.shape[-1]

    def finish(self) -> InputStats:
        return InputStats(self.gram, self.total, self.absolute, self.rows)


def input_statistics(
    model: nn.Module, images: Iterable[Tensor], *, dtype: torch.dtype | None = None
) -> dict[str, InputStats]:
    """Run a model over images and sum the moments of every compressible layer's inputs.

    Args:
        model: the dense model; it runs in evaluation mode and comes back in the mode that it was in.
        images: batches ``[B, C, H, W]``.
        dtype: run under autocast in this dtype; the sums stay in float64. None: the model's own dtype.

    Raises:
        InputError: there is no image, a layer was never called, or its inputs are not finite.
    """
    sums = {name: _Accumulator(linear) for name, linear in compressible_linears(model).items()}
    handles = [model.get_submodule(name).register_forward_hook(each) for name, each in sums.items()]
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype is not None):
            for batch in images:
                model(batch)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    for name, each in sums.items():
        if each.rows == 0:
            raise InputError(f"images must reach every layer, but {name} was never called")
        if not each.gram.isfinite().all():
            raise InputError(f"the inputs of layer {name} must be finite, but some are NaN or infinite")
    return {name: each.finish() for name, each in sums.items()}


def save(path: Path, layers: dict[str, InputStats], made_from: dict[str, Any], **others: Tensor) -> None:
    """Write statistics, and other tensors by name, to a safetensors file, with what they were made from."""
    tensors = {f"{name}.{part}": getattr(stats, part) for name, stats in layers.items() for part in PARTS}
    rows = {name: stats.rows for name, stats in layers.items()}
    save_file(tensors | others, path, {"statistics": json.dumps({"rows": rows, "made_from": made_from})})


def load(path: Path, made_from: dict[str, Any]) -> tuple[dict[str, InputStats], dict[str, Tensor]]:
    """Read what :func:`save` wrote: the statistics by layer name, and the other tensors.

    Raises:
        InputError: it was made from something else.
    """
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["statistics"])
        if header["made_from"] != made_from:
            raise InputError(f"the cache {path} must be made from {made_from}, but was from {header['made_from']}")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    layers = {
        name: InputStats(*(tensors.pop(f"{name}.{part}") for part in PARTS), rows)
        for name, rows in header["rows"].items()
    }
    return layers, tensors
