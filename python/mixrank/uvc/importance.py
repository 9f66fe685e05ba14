"""What the loss says of a group, and what the groups that stay can take over from those that go.

A norm of weights says nothing of what comes in, nor of what becomes of it. The importance of a group is the Fisher
information of a factor on what it contributes: the mean over images of the squared derivative of the loss with respect
to that factor (Theis et al. 2018; Molchanov et al. 2019), about twice by how much the loss grows when the group goes,
in the same unit for all groups of a model. Labels are drawn from the model itself, see :mod:`mixrank.gradients`.

What goes is mostly not new to what stays: inputs of a projection are correlated. So the columns that stay take over,
by least squares over the inputs seen, what the others contributed, and the bias takes over their mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mixrank.accumulate import hooked
from mixrank.gradients import backward
from mixrank.processes import add_up_, place
from mixrank.uvc.data import TrainingData, seeded
from mixrank.uvc.shrink import KeptBlock, columns_that_stay
from mixrank.uvc.structure import BlockParts, parts_of
from mixrank_kernels import ops

RIDGE = 0.01
"""Of the mean variance of the inputs, in the least squares."""
_DRAWS = 1


@dataclass
class Inputs:
    """Of one projection, ``attn.proj`` or ``mlp.fc2``: sums over tokens and images, float64.

    Attributes:
        gram: ``[K, K]``, over tokens, of the inputs.
        total: ``[K]``, over tokens, of the inputs.
        rows: ``[]``, how many tokens these are.
        columns: ``[K]``, over images, of the squared derivative by a factor on each column.
        heads: ``[H]``, the same by a factor on all columns of a head; of ``mlp.fc2`` one for all neurons.
        images: ``[]``, how many images these are.
    """

    gram: Tensor
    total: Tensor
    rows: Tensor
    columns: Tensor
    heads: Tensor
    images: Tensor

    @classmethod
    def zeros(cls, linear: nn.Linear, heads: int) -> Inputs:
        """Of nothing, where the layer is."""
        columns = linear.in_features
        sizes = ((columns, columns), (columns,), (), (columns,), (heads,), ())
        return cls(*(torch.zeros(size, dtype=torch.float64, device=linear.weight.device) for size in sizes))

    def tensors(self) -> list[Tensor]:
        """All of them; written into, they are set."""
        return [getattr(self, field.name) for field in fields(self)]

    def cpu(self) -> Inputs:
        """The same on the CPU."""
        return Inputs(*(tensor.cpu() for tensor in self.tensors()))


@dataclass(frozen=True)
class Importance:
    """Of the groups of a block, each for one unit of the squared norm that its columns had, float64.

    Attributes:
        heads: ``[H]``.
        columns: ``[columns of all heads]``.
        neurons: ``[n]``.
    """

    heads: Tensor
    columns: Tensor
    neurons: Tensor


def observe(
    model: nn.Module, data: TrainingData, images: int, *, seed: int, dtype: torch.dtype | None
) -> list[tuple[Inputs, Inputs]]:
    """What passes through the projections of each block, of the first training images; with processes, of all of them.

    Args:
        model: a classifier that :func:`mixrank.uvc.structure.parts_of` knows, in any mode; it is left as it is.
        data: its epoch 0 is begun.
        images: how many, rounded up to whole batches.
        seed: of the views of the images and of the labels.
        dtype: of the autocast.

    Returns:
        For each block those of ``attn.proj`` and those of ``mlp.fc2``, on the CPU.

    Raises:
        InputError: the model does not return finite logits.
    """
    number, count = place()
    parts, training, device = parts_of(model), model.training, next(model.parameters()).device
    found = [(Inputs.zeros(part.attention.proj, len(part.columns)), Inputs.zeros(part.mlp.fc2, 1)) for part in parts]
    model.eval()
    try:
        with _listening(parts, found), seeded(seed, 0), torch.autocast(device.type, dtype, enabled=dtype is not None):
            for step, (batch, _) in enumerate(data.epoch(0)):
                first = (step * count + number) * len(batch)
                if first >= images:
                    break
                numbers = list(range(first, first + len(batch)))
                names = [f"training image {number}" for number in numbers]
                backward(model, batch.to(device), numbers, names, _DRAWS, seed)
    finally:
        model.train(training)
    add_up_(tensor for pair in found for each in pair for tensor in each.tensors())
    return [(attention.cpu(), mlp.cpu()) for attention, mlp in found]


@contextmanager
def _listening(parts: Sequence[BlockParts], found: Sequence[tuple[Inputs, Inputs]]) -> Iterator[None]:
    """Add to ``found`` what passes through the projections inside the block."""

    def listen(linear: nn.Linear, widths: Sequence[int], sums: Inputs) -> RemovableHandle:
        def receive(x: Tensor, gradient: Tensor) -> None:
            by_image = (x.float() * gradient.float()).flatten(1, -2).sum(1)
            heads = torch.stack([one.sum(1) for one in by_image.split(list(widths), 1)], 1)
            sums.columns += by_image.double().square().sum(0)
            sums.heads += heads.double().square().sum(0)

        def see(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0]
            seen = x.detach()
            ops.gram_accumulate_(sums.gram, seen, None, sums.total)
            sums.rows += seen.numel() // seen.shape[-1]
            sums.images += len(seen)
            x.register_hook(lambda gradient: receive(seen, gradient))

        return linear.register_forward_pre_hook(see)

    handles = []
    for part, (attention, mlp) in zip(parts, found, strict=True):
        handles.append(listen(part.attention.proj, part.columns, attention))
        handles.append(listen(part.mlp.fc2, (part.mlp.fc2.in_features,), mlp))
    with hooked(handles):
        yield


def importance_of(part: BlockParts, inputs: tuple[Inputs, Inputs]) -> Importance:
    """That of the groups of a block by what was observed with its weights as they are."""
    attention, mlp = inputs
    columns, neurons = squared_norms(part)
    heads = torch.stack([one.sum() for one in columns.split(part.columns)])

    def per_norm(sums: Tensor, images: Tensor, norms: Tensor) -> Tensor:
        return sums / images / norms.clamp(min=torch.finfo(norms.dtype).tiny)

    return Importance(
        per_norm(attention.heads, attention.images, heads),
        per_norm(attention.columns, attention.images, columns),
        per_norm(mlp.columns, mlp.images, neurons),
    )


def squared_norms(part: BlockParts) -> tuple[Tensor, Tensor]:
    """Of the columns of ``proj`` and of those of ``fc2``, float64 on the CPU."""
    proj, fc2 = (layer.weight.detach().double().square().sum(0).cpu() for layer in (part.attention.proj, part.mlp.fc2))
    return proj, fc2


def take_over_(
    parts: Sequence[BlockParts], kept: Sequence[KeptBlock | None], found: Sequence[tuple[Inputs, Inputs]]
) -> None:
    """Let the columns that stay contribute what those that go did, as far as they can, and the bias its mean; in place.

    With C the covariance of the inputs, those that stay S, those that go G: ``W_S += W_G C_GS (C_SS + ridge)^-1``.

    Args:
        parts: of each block, before anything is removed.
        kept: what stays of each block.
        found: what was observed of the inputs.
    """
    for part, one, (attention, mlp) in zip(parts, kept, found, strict=True):
        if one is not None:
            _take_over_(part.attention.proj, columns_that_stay(part, one), attention)
            _take_over_(part.mlp.fc2, list(one.neurons), mlp)


def _take_over_(linear: nn.Linear, stays: list[int], inputs: Inputs) -> None:
    goes = sorted(set(range(linear.in_features)) - set(stays))
    if not goes:
        return
    # Without a bias nothing takes over the mean, which then is part of what is fitted.
    mean = inputs.total / inputs.rows if linear.bias is not None else torch.zeros_like(inputs.total)
    covariance = inputs.gram / inputs.rows - torch.outer(mean, mean)
    within = covariance[stays][:, stays]
    within.diagonal().add_(RIDGE * covariance.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny))
    share = torch.linalg.solve(within, covariance[stays][:, goes])
    weight = linear.weight.detach()
    lost = weight[:, goes].double().cpu()
    with torch.no_grad():
        weight[:, stays] += (lost @ share.mT).to(weight)
        if linear.bias is not None:
            linear.bias.add_((lost @ (mean[goes] - share.mT @ mean[stays])).to(linear.bias))
