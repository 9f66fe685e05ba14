"""Calibration: second-moment statistics of every compressible layer over a few hundred unlabelled images.

A layer's factors need the Gram matrix of its outputs (before the bias), ``W G W^T``, where G is the Gram matrix of
its inputs. A layer with N <= K therefore accumulates its own outputs, ``[N, N]``, and only a layer with N > K its
inputs, ``[K, K]``: each layer costs the square of its smaller side.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mixrank.data import as_batch
from mixrank.errors import InputError
from mixrank.models import compressible_linears
from mixrank.nn import SplitLinear
from mixrank.progress import track
from mixrank_kernels import ops


@dataclass(frozen=True)
class LayerStats:
    """Sums over all calibration tokens on one side of a layer.

    Attributes:
        side: ``"input"`` (S = K) or ``"output"`` (S = N, before the bias).
        gram: ``[S, S]`` float64, the sum of outer products of the rows.
        total: ``[S]`` float64, the sum of the rows.
        rows: number of tokens.
    """

    side: str
    gram: Tensor
    total: Tensor
    rows: int


class CalibrationStats(Mapping[str, LayerStats]):
    """Statistics by layer name.

    Attributes:
        images: number of images that went in.
        seconds: wall-clock time that calibration took.
    """

    def __init__(self, layers: dict[str, LayerStats], images: int, seconds: float) -> None:
        self._layers, self.images, self.seconds = layers, images, seconds

    def __getitem__(self, name: str) -> LayerStats:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


class _Accumulator:
    """The running sums of one observed module. ``batch`` names the images that are passing through."""

    def __init__(self, name: str, module: nn.Module, side: str) -> None:
        self.name, self.side, self.module = name, side, module
        size = module.in_features if side == "input" else module.out_features
        device = module.weight.device
        self.gram = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.total = torch.zeros(size, dtype=torch.float64, device=device)
        self.rows = 0
        self.names: list[str] = []

    def __call__(self, _module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        observed = arguments[0] if self.side == "input" else output
        ops.gram_accumulate_(self.gram, observed, None, self.total)
        self.rows += observed.numel() // observed.shape[-1]
        if not self.total.isfinite().all():
            raise InputError(
                f"the {self.side} of layer {self.name} has NaN or infinite values for {self._culprit(observed)}"
            )

    def _culprit(self, observed: Tensor) -> str:
        if observed.shape[0] != len(self.names):
            return f"one of the images {self.names[0]} to {self.names[-1]}"
        broken = ~observed.isfinite().flatten(1).all(1)
        return self.names[int(broken.nonzero()[0])] if broken.any() else "the sum over all images so far"

    def finish(self) -> LayerStats:
        """Return the sums, those of outputs with the bias taken out."""
        gram, total = self.gram, self.total
        if self.side == "output" and self.module.bias is not None:
            bias = self.module.bias.detach().double()
            cross = torch.outer(total, bias)
            gram = gram - cross - cross.mT + self.rows * torch.outer(bias, bias)
            total = total - self.rows * bias
        return LayerStats(self.side, gram.cpu(), total.cpu(), self.rows)


def _accumulators(model: nn.Module) -> dict[str, _Accumulator]:
    """One accumulator for each compressible layer; the parts of a split layer share that of their common input."""
    shared: dict[str, _Accumulator] = {}
    for name, module in model.named_modules():
        if isinstance(module, SplitLinear):
            accumulator = _Accumulator(name, module, "input")
            shared |= {f"{name}.parts.{i}": accumulator for i in range(len(module.parts))}
    return {
        name: shared.get(name) or _Accumulator(name, linear, side_of(linear))
        for name, linear in compressible_linears(model).items()
    }


def side_of(linear: nn.Module) -> str:
    """The side with fewer features: ``"output"`` where N <= K, else ``"input"``."""
    return "output" if linear.out_features <= linear.in_features else "input"


def calibrate(
    model: nn.Module, batches: Iterable, *, progress: bool = False, dtype: torch.dtype | None = None
) -> CalibrationStats:
    """Run the model over images and accumulate the statistics of every compressible layer.

    The model runs in evaluation mode without gradients, and comes back in the mode that it was in.

    Args:
        model: a model whose linear layers :func:`mixrank.models.compressible_linears` finds.
        batches: :class:`mixrank.data.Batch` objects, image tensors ``[B, C, H, W]``, or tuples and lists that begin
            with one. Labels are not used.
        progress: show a progress bar with the time left.
        dtype: run the model under autocast in this dtype (bfloat16 is about twice as fast on recent CPUs);
            the sums stay in float64. None: the model's own dtype.

    Returns:
        Statistics by layer name.

    Raises:
        InputError: no images; no layer to compress; a layer sees NaN or infinite values (named with the image).

    Example:
        >>> import timm, torch
        >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
        >>> calibrate(model, [torch.randn(2, 3, 32, 32)])["blocks.0.attn.proj"].gram.shape
        torch.Size([192, 192])
    """
    accumulators = _accumulators(model)
    if not accumulators:
        raise InputError(f"the model ({type(model).__name__}) has no linear layer that can be compressed")
    distinct = list({id(accumulator): accumulator for accumulator in accumulators.values()}.values())
    parameter = next(model.parameters())
    training, images, started = model.training, 0, time.perf_counter()
    handles = [accumulator.module.register_forward_hook(accumulator) for accumulator in distinct]
    try:
        model.eval()
        with torch.inference_mode(), torch.autocast(parameter.device.type, dtype, enabled=dtype is not None):
            for item in track(batches, "calibrating", enabled=progress):
                batch = as_batch(item, images)
                for accumulator in distinct:
                    accumulator.names = batch.names
                model(batch.images.to(parameter.device, parameter.dtype))
                images += len(batch.images)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if images == 0:
        raise InputError("calibration needs at least one image, but there was none")
    idle = [accumulator.name for accumulator in distinct if accumulator.rows == 0]
    if idle:
        raise InputError(f"layer {idle[0]} ({len(idle)} in all) was never called, so it has no statistics")
    finished = {id(accumulator): accumulator.finish() for accumulator in distinct}
    layers = {name: finished[id(accumulator)] for name, accumulator in accumulators.items()}
    return CalibrationStats(layers, images, time.perf_counter() - started)
