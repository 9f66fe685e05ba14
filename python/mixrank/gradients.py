"""The gradient of a classifier's loss with labels that are drawn from its own answer.

The expected outer product of this gradient is the Fisher information (labels of the data would give another matrix).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mixrank.errors import InputError


def backward(model: nn.Module, images: Tensor, numbers: list[int], names: list[str], draws: int, seed: int) -> None:
    """Pass images through a classifier and the gradients of its loss back, for whoever listens to tensors between.

    The loss is the sum over the images, divided by the square root of ``draws``, so that sums of squares over
    the draws are means.

    Args:
        model: images to logits ``[B, classes]``; its parameters receive no gradients.
        images: ``[B, C, H, W]``.
        numbers: B numbers, by which an image draws the same labels in every batch.
        names: B names for messages.
        draws: how many labels each image draws.
        seed: of the draws.

    Raises:
        InputError: the model does not return finite logits ``[B, classes]`` of two classes at least.
    """
    with torch.enable_grad(), _frozen(model):
        leaf = images.detach().clone().requires_grad_()
        logits = model(leaf.clone())  # a copy: a model may write over its input
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(images) or logits.shape[1] < 2:
            found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise InputError(f"gradients need a model that returns logits [B, classes], but it returned {found}")
        finite = logits.isfinite().all(dim=1)
        if not finite.all():
            raise InputError(f"gradients need finite logits, but those for {names[int(finite.int().argmin())]} are not")
        labels = draw(logits.detach(), numbers, draws, seed).to(logits.device)
        for i in range(draws):
            loss = nn.functional.cross_entropy(logits.float(), labels[:, i], reduction="sum") / draws**0.5
            torch.autograd.grad(loss, leaf, retain_graph=i + 1 < draws, allow_unused=True)


def draw(logits: Tensor, numbers: list[int], draws: int, seed: int) -> Tensor:
    """Labels ``[B, draws]`` from the softmax of logits ``[B, classes]``; by seed and image number, on any device."""
    shares = logits.double().softmax(-1).cumsum(-1).cpu()
    points = torch.stack([torch.rand(draws, generator=_generator(seed, n), dtype=torch.float64) for n in numbers])
    return torch.searchsorted(shares, points * shares[:, -1:], right=True).clamp(max=logits.shape[1] - 1)


def _generator(seed: int, number: int) -> torch.Generator:
    # Neighbouring seeds of this generator start alike only in its first state, which hash spreads.
    return torch.Generator().manual_seed(hash((seed, number)) % 2**63)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradient for parameters: what is needed for theirs alone would be kept in memory."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
