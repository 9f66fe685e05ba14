"""Accumulators: the running sums over one side of a layer, fed by forward hooks.

A layer's factors need the Gram matrix of its outputs (before the bias), ``W G W^T``, where G is the Gram matrix of
its inputs. A layer with N <= K therefore accumulates its own outputs, ``[N, N]``, and only a layer with N > K its
inputs, ``[K, K]``: each layer costs the square of its smaller side. Layers that receive the very same tensor (separate
q, k and v, the two halves of a gated MLP, the parts of a split layer) share one ``[K, K]`` of it where that is less.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mixrank.errors import InputError
from mixrank.gradients import tempered
from mixrank.processes import add_up_, gathered
from mixrank.stats import LayerStats, output_frame
from mixrank.weighting import Weighting
from mixrank_kernels import ops


@dataclass(frozen=True)
class Measure:
    """What is summed.

    Attributes:
        weighting: how much each token counts.
        prefix_tokens: number of the model's tokens before those of the patches.
        gradients: also sum the outer products of the gradients with respect to the outputs.
        inputs: sum over the inputs of every layer, and of the gradients only the squares.
        power: of the gradients of each image at each layer, see :func:`mixrank.gradients.tempered`.
    """

    weighting: Weighting
    prefix_tokens: int
    gradients: bool
    inputs: bool = False
    power: float = 1.0

    @property
    def backward(self) -> bool:
        """Whether gradients have to flow."""
        return self.gradients or self.weighting.kind == "gradient"

    @property
    def shared(self) -> bool:
        """Whether layers with the same input have the same sums over it."""
        return self.weighting.shared and not self.gradients


class Frames:
    """The coordinates that gradients are summed in, once for all who ask."""

    def __init__(self) -> None:
        self._known: dict[str, Tensor | None] = {}

    def of(self, name: str, weight: Tensor) -> Tensor | None:
        """Those of a layer, ``[N, K]`` float32 on the device of its weight ``[N, K]``, or None for the identity."""
        if name not in self._known:
            frame = output_frame(weight)[0]
            self._known[name] = None if frame is None else frame.to(weight.device, torch.float32)
        return self._known[name]


@dataclass
class _Sums:
    """Sums over rows, each times its weight: ``gram`` ``[S, S]`` and ``total`` ``[S]``, float64, and the weights'."""

    gram: Tensor
    total: Tensor
    rows: float = 0

    @classmethod
    def zeros(cls, size: int, device: torch.device) -> _Sums:
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        return cls(zeros(size, size), zeros(size))

    def add(self, observed: Tensor, weight: Tensor | None) -> None:
        ops.gram_accumulate_(self.gram, observed, weight, self.total)
        self.rows += observed.numel() // observed.shape[-1] if weight is None else weight.sum().item()

    def copied(self) -> _Sums:
        return _Sums(self.gram.clone(), self.total.clone(), self.rows)

    def add_share_(self, share: float, other: _Sums) -> None:
        """Add ``share`` times the other."""
        self.gram.add_(other.gram, alpha=share)
        self.total.add_(other.total, alpha=share)
        self.rows += share * other.rows


@dataclass
class _Call:
    """Rows of one call that wait for their weights."""

    observed: Tensor
    weight: Tensor


class Accumulator:
    """The running sums over one side of ``layers``: one layer, or several with the same input.

    ``names`` are those of the images that are passing through.
    """

    def __init__(self, layers: dict[str, nn.Linear], measure: Measure, frames: Frames) -> None:
        self.layers, self.measure = layers, measure
        self.side = "input" if measure.inputs else side_of(*layers.values())
        size = self.module.in_features if self.side == "input" else self.module.out_features
        device = self.module.weight.device
        self.sums = _Sums.zeros(size, device)
        self.alike = _Sums.zeros(size, device) if measure.weighting.alike else None
        self.gradient: Tensor | None = None
        self.squares: Tensor | None = None
        self.frame: Tensor | None = None
        if measure.gradients and measure.inputs:
            self.squares = torch.zeros(self.module.out_features, dtype=torch.float64, device=device)
        elif measure.gradients:
            smaller = min(self.module.weight.shape)
            self.frame = frames.of(self.name, self.module.weight)
            self.gradient = torch.zeros(smaller, smaller, dtype=torch.float64, device=device)
        self.tokens = 0
        self.names: list[str] = []
        self.waiting: list[_Call] = []

    @property
    def name(self) -> str:
        """The first of the layers, which is observed for all of them."""
        return next(iter(self.layers))

    @property
    def module(self) -> nn.Linear:
        return self.layers[self.name]

    def split(self, groups: list[list[str]]) -> list[Accumulator]:
        """Return an accumulator for the layers of each group; all of them go on from the sums so far."""
        idle = [name for name in self.layers if not any(name in group for group in groups)]
        parts = [{name: self.layers[name] for name in group if name in self.layers} for group in [*groups, idle]]
        parts = [part for part in parts if part]
        if len(parts) == 1:
            return [self]
        results = []
        for part in parts:
            result = copy.copy(self)
            result.layers, result.sums, result.waiting = part, self.sums.copied(), []
            result.alike = None if self.alike is None else self.alike.copied()
            results.append(result)
        return results

    def __call__(self, _module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        observed = (arguments[0] if self.side == "input" else output).detach()
        if self.measure.weighting.kind == "gradient":
            if output.requires_grad:
                # The model may write over the tensor before its gradient comes.
                call = _Call(observed.clone(), torch.zeros(output.shape[:-1], dtype=torch.float64))
                output.register_hook(lambda gradient: self._receive(gradient, call))
                self.waiting.append(call)
            elif self.alike is not None:
                self._add(observed, None)  # it does not see the images: a bias that is computed, as Swin v2 has them
            return
        if self.measure.gradients and output.requires_grad:
            output.register_hook(lambda gradient: self._receive(gradient, None))
        weight = self.measure.weighting.of_tokens(
            output.detach(), self.module.bias, len(self.names), self.measure.prefix_tokens
        )
        self._add(observed, weight)

    def _receive(self, gradient: Tensor, call: _Call | None) -> None:
        """Take the gradient of the loss with respect to one call's output, ``[..., N]``."""
        gradient = tempered(gradient.float(), len(self.names), self.measure.power)
        if call is not None:
            call.weight += gradient.square().sum(-1, dtype=torch.float64).to(call.weight.device)
        if self.gradient is not None:
            ops.gram_accumulate_(self.gradient, gradient if self.frame is None else gradient @ self.frame)
        if self.squares is not None:
            self.squares += gradient.flatten(0, -2).square().sum(0, dtype=torch.float64)

    def flush(self) -> None:
        """Add the calls whose weights the gradients have brought."""
        for call in self.waiting:
            self._add(call.observed, call.weight.to(call.observed.device))
        self.waiting = []

    def _add(self, observed: Tensor, weight: Tensor | None) -> None:
        if weight is not None or self.alike is None:
            self.sums.add(observed, weight)
        if self.alike is not None:
            self.alike.add(observed, None)
        self.tokens += observed.numel() // observed.shape[-1]
        if not all(sums.total.isfinite().all() for sums in (self.sums, self.alike) if sums is not None):
            raise InputError(
                f"the {self.side} of layer {self.name} has NaN or infinite values for {self._culprit(observed)}"
            )

    def _culprit(self, observed: Tensor) -> str:
        if observed.shape[0] != len(self.names):
            return f"one of the images {self.names[0]} to {self.names[-1]}"
        broken = ~observed.isfinite().flatten(1).all(1)
        return self.names[int(broken.nonzero()[0])] if broken.any() else "the sum over all images so far"

    def add_up(self) -> None:
        """Take the sums over all processes."""
        kinds = [self.sums] if self.alike is None else [self.sums, self.alike]
        counts = torch.tensor(
            [*(each.rows for each in kinds), self.tokens], dtype=torch.float64, device=self.sums.gram.device
        )
        tensors = [tensor for each in kinds for tensor in (each.gram, each.total)]
        add_up_([*tensors, counts, *(each for each in (self.gradient, self.squares) if each is not None)])
        *rows, tokens = counts.tolist()
        for each, count in zip(kinds, rows, strict=True):
            each.rows = count
        self.tokens = int(tokens)

    def finish(self, images: int) -> LayerStats:
        """Return the sums over some images, those of outputs with the bias taken out. Nothing can be added after."""
        if self.alike is not None:
            share = self.measure.weighting.alike * self.sums.rows / self.tokens
            self.sums.add_share_(share or 1.0, self.alike)
            self.alike = None
        return self._finished(self.sums, images)

    def finish_alike(self, images: int) -> LayerStats:
        """Return the sums of tokens that count alike, which are there beside the others, before :meth:`finish`."""
        assert self.alike is not None
        return self._finished(self.alike.copied(), images)

    def _finished(self, sums: _Sums, images: int) -> LayerStats:
        gram, total = sums.gram, sums.total
        if self.side == "output" and self.module.bias is not None:
            bias = self.module.bias.detach().double()
            cross = torch.outer(total, bias)
            with torch.inference_mode(gram.is_inference()):  # in place: the sums are most of what is held
                gram.sub_(cross).sub_(cross.mT).add_(torch.outer(bias, bias), alpha=sums.rows)
                total.sub_(bias, alpha=sums.rows)
        gradient, squares = (None if each is None else each.cpu() for each in (self.gradient, self.squares))
        if squares is not None and squares.sum() > 0:  # from the mean of powers to the power mean
            squares *= (squares.sum() / images) ** (1 / self.measure.power - 1)
        return LayerStats(self.side, gram.cpu(), total.cpu(), sums.rows, gradient, images, squares)


def side_of(*linears: nn.Linear) -> str:
    """The side of linear layers with the same input whose Gram matrices have fewer elements in all.

    That of one layer is ``"output"`` where N <= K, else ``"input"``. Several take ``"input"``, ``[K, K]`` once, where
    one of them has N > K or their ``[N, N]`` come to more.
    """
    size = linears[0].in_features
    outputs = [linear.out_features for linear in linears]
    return "output" if max(outputs) <= size and sum(n * n for n in outputs) <= size * size else "input"


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
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


def groups_of(linears: dict[str, nn.Linear], run: Callable[[], object]) -> list[list[str]]:
    """Names of the layers that ``run`` calls, in this order, together where they are handed the very same tensor.

    A layer that is called more than once stands alone.
    """
    # The tensors are kept too: memory that was freed and used again would look like the same tensor.
    calls: dict[str, list[tuple[Hashable, Tensor | None]]] = {}

    def recorder(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def record(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0] if arguments else None
            calls.setdefault(name, []).append((None if x is None else _identity(x), x))

        return record

    handles = (linear.register_forward_pre_hook(recorder(name)) for name, linear in linears.items())
    # Tensors made in inference mode do not count their changes in place.
    with torch.inference_mode(False), torch.no_grad(), hooked(handles):
        run()
    groups: dict[Hashable, list[str]] = {}
    for name, seen in calls.items():
        key = seen[0][0] if len(seen) == 1 else None
        groups.setdefault(name if key is None else key, []).append(name)
    return list(groups.values())


class Part:
    """The images that are held out, or those that are not: their accumulators and number."""

    def __init__(self, linears: dict[str, nn.Linear], measure: Measure, frames: Frames) -> None:
        self.linears, self.measure, self.frames = linears, measure, frames
        self.accumulators: list[Accumulator] = []
        self.images = 0

    def arrange(self, groups: list[list[str]]) -> None:
        """Take up the groups of layers that images of a new size show."""
        self.accumulators = [part for whole in self.accumulators for part in whole.split(groups)]
        known = {name for accumulator in self.accumulators for name in accumulator.layers}
        for group in groups:
            layers = {name: self.linears[name] for name in group if name not in known}
            if layers and self.measure.shared and (self.measure.inputs or side_of(*layers.values()) == "input"):
                self.accumulators.append(Accumulator(layers, self.measure, self.frames))
            else:
                alone = ({name: layer} for name, layer in layers.items())
                self.accumulators += [Accumulator(each, self.measure, self.frames) for each in alone]

    def run(self, forward: Callable[[], object], names: list[str]) -> None:
        """Sum what passes through the layers during ``forward``, a pass of the images with these names."""
        for accumulator in self.accumulators:
            accumulator.names = names
        with hooked(each.module.register_forward_hook(each) for each in self.accumulators):
            forward()
        for accumulator in self.accumulators:
            accumulator.flush()
        self.images += len(names)

    def add_up(self) -> None:
        """Take the sums and the number of images over all processes."""
        for accumulator in self.accumulators:
            accumulator.add_up()
        self.images = sum(gathered(self.images))

    def finish(self, views: int, *, alike: bool = False) -> dict[str, LayerStats]:
        """The statistics by layer name, of the layers that were called; an image came in ``views`` views.

        ``alike``: those of tokens that count alike, where they are summed beside others; before the others.
        """
        images = -(-self.images // views)
        finished = {
            name: stats
            for each in self.accumulators
            if each.tokens
            for stats in [each.finish_alike(images) if alike else each.finish(images)]
            for name in each.layers
        }
        return {name: finished[name] for name in self.linears if name in finished}
