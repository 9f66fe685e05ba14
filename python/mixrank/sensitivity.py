"""Sensitivity: how far the model's logits move when one layer alone is replaced by its compressed form.

An error of a layer's outputs says little about what the model makes of it: of two layers with the same relative error
one can move the logits a thousand times as far. So each layer is replaced alone, by factors of the rank that a first
plan gives it, and the divergence of the logits is measured. The divergences of single layers add up to about that of
the plan as a whole, and between neighbouring ranks a layer's divergence follows its output error; that is what
:func:`mixrank.allocate.allocate` with ``energy="sensitivity"`` makes of them. Sparse layers are measured in the same
way (:mod:`mixrank.sparse_sensitivity`).

Late layers see much that is an image's or a class's own. There, factors do so much better on the images that they
were made from than on others that the divergence on the former misleads; so trial factors are used where there are
any, which know nothing of the images held out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mixrank.blocks import block_of, blocks_of
from mixrank.decompose import Factorisation
from mixrank.errors import InputError
from mixrank.fidelity import compare
from mixrank.memory import trim
from mixrank.nn import MixedRankLinear
from mixrank.processes import divided, is_first
from mixrank.progress import track


@dataclass(frozen=True)
class Sensitivity:
    """What replacing one layer does.

    Attributes:
        rank: R, at which it was measured.
        divergence: mean KL of the model's logits from the dense model's, in nats, with this layer alone replaced.
    """

    rank: int
    divergence: float


def measure_sensitivity(
    model: nn.Module,
    ranks: Mapping[str, int],
    factorisations: Mapping[str, Factorisation],
    batches: Iterable[Tensor],
    *,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> dict[str, Sensitivity]:
    """Replace some layers, one at a time, and measure the divergence of the logits.

    One pass through the model for each layer and batch, from the layer's block on: what the blocks before it return is
    kept, for one batch at a time. Several processes divide the layers.

    Args:
        model: the dense model, in any mode; it is as it was afterwards.
        ranks: those to measure at, by layer name, see :func:`mixrank.allocate.ranks_to_measure`.
        factorisations: what :func:`mixrank.decompose.decompose` returned for the model. Where images were held out, the
            factors made without them are measured.
        batches: image tensors ``[B, C, H, W]``, of the images held out where there are any; a few dozen tell the
            layers apart.
        dtype: run the model under autocast in this dtype.
        progress: show a progress bar with the time left.

    Returns:
        By layer name.

    Raises:
        InputError: there is no image, or the model does not return finite logits of at least two classes.
    """

    def factored(name: str) -> nn.Module:
        factorisation = factorisations[name]
        return MixedRankLinear.from_factors(*(factorisation.trial or factorisation).factors(ranks[name])).eval()

    found = measure_layers(model, list(ranks), factored, batches, dtype=dtype, progress=progress)
    return {name: Sensitivity(ranks[name], divergence) for name, divergence in found.items()}


def measure_layers(
    model: nn.Module,
    names: Iterable[str],
    make: Callable[[str], nn.Module],
    batches: Iterable[Tensor],
    *,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> dict[str, float]:
    """Replace some layers, one at a time, by any others, and measure the divergence of the logits.

    Args:
        model: as for :func:`measure_sensitivity`.
        names: of the layers.
        make: what takes the place of the layer of a name, in evaluation mode; asked again for each batch.
        batches: as for :func:`measure_sensitivity`.
        dtype: the same.
        progress: the same.

    Returns:
        By layer name the mean KL of the model's logits from the dense model's, in nats.

    Raises:
        InputError: the same.
    """
    parameter, blocks = next(model.parameters()), list(blocks_of(model))
    batches = [batch.to(parameter.device, parameter.dtype) for batch in batches]
    if not batches:
        raise InputError("sensitivity needs at least one image, but there was none")
    modes = {module: module.training for module in model.modules()}
    model.eval()

    def work(names: list[str]) -> dict[str, float]:
        total, replay = dict.fromkeys(names, 0.0), None
        pairs = list(itertools.product(batches, names))
        for batch, name in track(pairs, "measuring layers", enabled=progress and is_first()):
            if replay is None or replay.batch is not batch:
                replay = _Replay(model, batch)
            total[name] += replay.divergence(name, make(name)) * len(batch)
        images = sum(map(len, batches))
        return {name: total[name] / images for name in names}

    try:
        with torch.inference_mode(), torch.autocast(parameter.device.type, dtype, enabled=dtype is not None):
            return divided({name: len(blocks) - len(_earlier(blocks, name)) for name in names}, work)
    finally:
        for module, mode in modes.items():
            module.training = mode
        trim()  # of the activations, and of weights in the dtype of the autocast


def _earlier(blocks: list[str], name: str) -> list[str]:
    """The blocks before a layer's own."""
    return blocks[: blocks.index(block_of(name, blocks))]


class _Replay:
    """The dense model on a batch, gone through again from any block on."""

    def __init__(self, model: nn.Module, batch: Tensor) -> None:
        self.model, self.batch, self.blocks = model, batch, blocks_of(model)
        self.outputs: dict[str, list[object]] = {name: [] for name in self.blocks}  # of each call
        handles = [
            block.register_forward_hook(lambda _m, _a, output, calls=self.outputs[name]: calls.append(output))
            for name, block in self.blocks.items()
        ]
        try:
            self.logits = model(batch).float()
        finally:
            for handle in handles:
                handle.remove()

    def divergence(self, name: str, layer: nn.Module) -> float:
        """Mean KL of the logits with one layer replaced."""
        linear = self.model.get_submodule(name)
        self.model.set_submodule(name, layer)
        try:
            with self._replayed(_earlier(list(self.blocks), name)):
                logits = self.model(self.batch)
        finally:
            self.model.set_submodule(name, linear)
        return compare(logits.float(), self.logits).divergence

    @contextmanager
    def _replayed(self, names: list[str]) -> Iterator[None]:
        """Blocks that return what they returned before, without any work."""
        try:
            for name in names:
                calls = iter(self.outputs[name])
                self.blocks[name].forward = lambda *_args, calls=calls, **_kwargs: next(calls)
            yield
        finally:
            for name in names:
                del self.blocks[name].forward
