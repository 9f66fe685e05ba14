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

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mixrank.errors import InputError
from mixrank.stats import LayerStats
from mixrank_kernels import ops


class Accumulator:
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

    def split(self, groups: list[list[str]]) -> list[Accumulator]:
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


def groups_of(model: nn.Module, linears: dict[str, nn.Linear], images: Tensor) -> list[list[str]]:
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
    with torch.inference_mode(False), torch.no_grad(), hooked(handles):
        model(images.clone())
    groups: dict[Hashable, list[str]] = {}
    for name, seen in calls.items():
        key = seen[0][0] if len(seen) == 1 else None
        groups.setdefault(name if key is None else key, []).append(name)
    return list(groups.values())


def _arrange(linears: dict[str, nn.Linear], groups: list[list[str]]) -> list[Accumulator]:
    """Accumulators for groups of layers: one for all, or one for each layer where that is less."""
    result = []
    for group in groups:
        layers = {name: linears[name] for name in group}
        if side_of(*layers.values()) == "input":
            result.append(Accumulator(layers))
        else:
            result.extend(Accumulator({name: layer}) for name, layer in layers.items())
    return result


class Part:
    """The images that are held out, or those that are not: their accumulators and number."""

    def __init__(self) -> None:
        self.accumulators: list[Accumulator] = []
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
        with hooked(each.module.register_forward_hook(each) for each in self.accumulators):
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
