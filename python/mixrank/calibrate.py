"""Calibration: second-moment statistics of every compressible layer over a few hundred unlabelled images.

A layer's factors need the Gram matrix of its outputs (before the bias), ``W G W^T``, where G is the Gram matrix of
its inputs. A layer with N <= K therefore accumulates its own outputs, ``[N, N]``, and only a layer with N > K its
inputs, ``[K, K]``: each layer costs the square of its smaller side. Layers that receive the very same tensor (separate
q, k and v, the two halves of a gated MLP, the parts of a split layer) share one ``[K, K]`` of it where that is less.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mixrank.data import as_batch
from mixrank.errors import InputError
from mixrank.models import compressible_linears
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

    def __add__(self, other: LayerStats) -> LayerStats:
        """The sums over the tokens of both."""
        return LayerStats(self.side, self.gram + other.gram, self.total + other.total, self.rows + other.rows)


class CalibrationStats(Mapping[str, LayerStats]):
    """Statistics by layer name. Layers that receive the same input may share one object.

    Attributes:
        images: number of images that went in.
        seconds: wall-clock time that calibration took.
        held_out: statistics of the images that were kept apart, or None.
    """

    def __init__(
        self,
        layers: dict[str, LayerStats],
        images: int,
        seconds: float,
        held_out: CalibrationStats | None = None,
    ) -> None:
        self._layers, self.images, self.seconds, self.held_out = layers, images, seconds, held_out

    def merged(self) -> CalibrationStats:
        """Statistics of all images, with none held out any more."""
        if self.held_out is None:
            return self
        sums: dict[int, LayerStats] = {}
        for name, layer in self._layers.items():
            sums.setdefault(id(layer), layer + self.held_out[name])
        layers = {name: sums[id(layer)] for name, layer in self._layers.items()}
        return CalibrationStats(layers, self.images + self.held_out.images, self.seconds)

    def __getitem__(self, name: str) -> LayerStats:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


class _Accumulator:
    """The running sums over one side of ``layers``: one layer, or several with the same input.

    ``names`` are those of the images that are passing through.
    """

    def __init__(self, layers: dict[str, nn.Linear]) -> None:
        self.layers, self.side = layers, side_of(*layers.values())
        size = self.module.in_features if self.side == "input" else self.module.out_features
        device = self.module.weight.device
        self.gram = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.total = torch.zeros(size, dtype=torch.float64, device=device)
        self.rows = 0
        self.names: list[str] = []

    @property
    def name(self) -> str:
        """The first of the layers, which is observed for all of them."""
        return next(iter(self.layers))

    @property
    def module(self) -> nn.Linear:
        return self.layers[self.name]

    def split(self, groups: list[list[str]]) -> list[_Accumulator]:
        """Return an accumulator for the layers of each group; all of them go on from the sums so far."""
        parts = [{name: self.layers[name] for name in group if name in self.layers} for group in groups]
        parts = [part for part in parts if part]
        if len(parts) == 1:
            return [self]
        results = []
        for part in parts:
            result = copy.copy(self)
            result.layers, result.gram, result.total = part, self.gram.clone(), self.total.clone()
            results.append(result)
        return results

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


def side_of(*linears: nn.Linear) -> str:
    """The side of linear layers with the same input whose Gram matrices have fewer elements in all.

    That of one layer is ``"output"`` where N <= K, else ``"input"``. Several take ``"input"``, ``[K, K]`` once, where
    one of them has N > K or their ``[N, N]`` come to more.
    """
    size = linears[0].in_features
    outputs = [linear.out_features for linear in linears]
    return "output" if max(outputs) <= size and sum(n * n for n in outputs) <= size * size else "input"


@contextmanager
def _hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that are there only inside the block."""
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


def _identity(tensor: Tensor) -> Hashable:
    """Equal for two tensors that are alive with the same memory and contents; None where that cannot be told."""
    if tensor.is_inference() or tensor.numel() == 0:
        return None
    return tensor.device, tensor.dtype, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor._version


def _groups(model: nn.Module, linears: dict[str, nn.Linear], images: Tensor) -> list[list[str]]:
    """Names of the layers, together where the model hands them the very same tensor: one pass over ``images``.

    A layer that is not called exactly once stands alone.
    """
    # The tensors are kept too: memory that was freed and used again would look like the same tensor.
    calls: dict[str, list[tuple[Hashable, Tensor | None]]] = {name: [] for name in linears}

    def recorder(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0] if arguments else None
            calls[name].append((None if x is None else _identity(x), x))

        return record

    handles = (linear.register_forward_pre_hook(recorder(name)) for name, linear in linears.items())
    # Tensors made in inference mode do not count their changes in place.
    with torch.inference_mode(False), torch.no_grad(), _hooked(handles):
        model(images.clone())
    groups: dict[Hashable, list[str]] = {}
    for name, seen in calls.items():
        key = seen[0][0] if len(seen) == 1 else None
        groups.setdefault(name if key is None else key, []).append(name)
    return list(groups.values())


def _arrange(linears: dict[str, nn.Linear], groups: list[list[str]]) -> list[_Accumulator]:
    """Accumulators for groups of layers: one for all, or one for each layer where that is less."""
    result = []
    for group in groups:
        layers = {name: linears[name] for name in group}
        if side_of(*layers.values()) == "input":
            result.append(_Accumulator(layers))
        else:
            result.extend(_Accumulator({name: layer}) for name, layer in layers.items())
    return result


def _held_out(first: int, count: int, share: float) -> Tensor:
    """Which of ``count`` images from number ``first`` on are held out: evenly spread, whatever the batches are."""
    index = torch.arange(first, first + count + 1, dtype=torch.float64)
    return ((index * share + 1e-9).floor().diff() > 0).cpu()


class _Part:
    """The images that are held out, or those that are not: their accumulators and number."""

    def __init__(self) -> None:
        self.accumulators: list[_Accumulator] = []
        self.images = 0

    def arrange(self, linears: dict[str, nn.Linear], groups: list[list[str]]) -> None:
        """Take up the groups of layers that images of a new size show."""
        if self.accumulators:
            self.accumulators = [part for whole in self.accumulators for part in whole.split(groups)]
        else:
            self.accumulators = _arrange(linears, groups)

    def run(self, model: nn.Module, images: Tensor, names: list[str]) -> None:
        """Let images pass through the model and be summed."""
        for accumulator in self.accumulators:
            accumulator.names = names
        with _hooked(each.module.register_forward_hook(each) for each in self.accumulators):
            model(images)
        self.images += len(images)

    def finish(self, linears: dict[str, nn.Linear]) -> dict[str, LayerStats]:
        """The statistics by layer name.

        Raises:
            InputError: a layer was never called.
        """
        idle = [accumulator.name for accumulator in self.accumulators if accumulator.rows == 0]
        if idle:
            raise InputError(f"layer {idle[0]} ({len(idle)} in all) was never called, so it has no statistics")
        finished = {name: stats for each in self.accumulators for stats in [each.finish()] for name in each.layers}
        return {name: finished[name] for name in linears}


def calibrate(
    model: nn.Module,
    batches: Iterable,
    *,
    held_out: float = 0.0,
    progress: bool = False,
    dtype: torch.dtype | None = None,
) -> CalibrationStats:
    """Run the model over images and accumulate the statistics of every compressible layer.

    The model runs in evaluation mode without gradients, and comes back in the mode that it was in. The first image of
    each size passes through it once more, alone and before the others, to find the layers that share an input. Which
    layers do must not depend on anything but the size of the images.

    Args:
        model: a model whose linear layers :func:`mixrank.models.compressible_linears` finds.
        batches: :class:`mixrank.data.Batch` objects, image tensors ``[B, C, H, W]``, or tuples and lists that begin
            with one. Labels are not used.
        held_out: share of the images, in [0, 1), whose statistics are kept apart, to tell errors on images that the
            factors were not made from. They are spread evenly, and the same ones whatever the batches are.
        progress: show a progress bar with the time left.
        dtype: run the model under autocast in this dtype (bfloat16 is about twice as fast on recent CPUs);
            the sums stay in float64. None: the model's own dtype.

    Returns:
        Statistics by layer name.

    Raises:
        InputError: no images, or too few to hold any out; no layer to compress; a layer sees NaN or infinite values
            (named with the image).

    Example:
        >>> import timm, torch
        >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
        >>> calibrate(model, [torch.randn(2, 3, 32, 32)])["blocks.0.attn.proj"].gram.shape
        torch.Size([192, 192])
    """
    if not 0 <= held_out < 1:
        raise InputError(f"held_out must be at least 0 and below 1, but it was {held_out}")
    linears = compressible_linears(model)
    if not linears:
        raise InputError(f"the model ({type(model).__name__}) has no linear layer that can be compressed")
    parameter = next(model.parameters())
    training, started = model.training, time.perf_counter()
    parts = [_Part(), _Part()] if held_out else [_Part()]
    sizes: set[torch.Size] = set()
    try:
        model.eval()
        with torch.inference_mode(), torch.autocast(parameter.device.type, dtype, enabled=dtype is not None):
            for item in track(batches, "calibrating", enabled=progress):
                first = sum(part.images for part in parts)
                batch = as_batch(item, first)
                inputs = batch.images.to(parameter.device, parameter.dtype)
                if inputs.shape[1:] not in sizes:
                    groups = _groups(model, linears, inputs[:1])
                    for part in parts:
                        part.arrange(linears, groups)
                    sizes.add(inputs.shape[1:])
                apart = _held_out(first, len(inputs), held_out)
                for part, chosen in zip(parts, (~apart, apart), strict=False):
                    if chosen.any():
                        index = chosen.nonzero().flatten()
                        images = inputs if chosen.all() else inputs[index.to(inputs.device)]
                        part.run(model, images, [batch.names[i] for i in index.tolist()])
    finally:
        model.train(training)
    seconds = time.perf_counter() - started
    images = sum(part.images for part in parts)
    if images == 0:
        raise InputError("calibration needs at least one image, but there was none")
    if any(part.images == 0 for part in parts):
        raise InputError(f"held_out={held_out} needs more images, but there were {images}")
    layers, *others = (part.finish(linears) for part in parts)
    apart = CalibrationStats(others[0], parts[1].images, seconds) if others else None
    return CalibrationStats(layers, parts[0].images, seconds, apart)
