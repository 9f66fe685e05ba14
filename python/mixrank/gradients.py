"""Gradients of a classifier whose expected outer product is the Fisher information of its answer, without labels.

The loss of a label y has the gradient ``softmax(z) - e_y`` with respect to the logits z. For labels drawn from the
model's own answer p its second moment is ``diag(p) - p p^T`` (labels of the data would give another matrix). Where the
model is sure, such a gradient is nearly always tiny and very rarely large. What is passed back instead is the probe
``sqrt(p) n - p (sqrt(p) . n)`` of normal numbers n: the same second moment, from every image.

Even so a few images of which the model is unsure have most of the sum of squares, of the first layers above all, and
statistics of them are those of a few images. What is lost when a layer is replaced does not grow with the square there:
the answer of such an image is another one soon, and cannot be more wrong than wrong. So each image's gradients at a
layer can be scaled (:func:`tempered`) before they are summed: for sparse weights they are, where layers and outputs are
weighed by their sums. The metric of low ranks is pulled towards the plain one, and their budget goes by measurements.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mixrank.errors import InputError

POWER = 0.25
"""Of each image's sum of squared gradients at a layer, for sparse weights."""


def backward(model: nn.Module, images: Tensor, numbers: list[int], names: list[str], draws: int, seed: int) -> None:
    """Pass images through a classifier and the gradients of its loss back, for whoever listens to tensors between.

    What is passed back is divided by the square root of ``draws``, so that sums of squares over the draws are means.

    Args:
        model: images to logits ``[B, classes]``; its parameters receive no gradients.
        images: ``[B, C, H, W]``.
        numbers: B numbers, by which an image draws the same probes in every batch.
        names: B names for messages.
        draws: how many probes each image draws.
        seed: of the draws.

    Raises:
        InputError: the model does not return finite logits ``[B, classes]`` of two classes at least.
    """
    with torch.enable_grad(), _frozen(model):
        leaf = images.detach().clone().requires_grad_()
        logits = model(leaf.clone())  # a copy: a model may write over its input
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(images) or logits.shape[1] < 2:
            returned = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise InputError(f"gradients need a model that returns logits [B, classes], but it returned {returned}")
        finite = logits.isfinite().all(dim=1)
        if not finite.all():
            raise InputError(f"gradients need finite logits, but those for {names[int(finite.int().argmin())]} are not")
        found = probes(logits.detach(), numbers, draws, seed)
        for i in range(draws):
            loss = (logits.float() * found[:, i]).sum() / draws**0.5
            torch.autograd.grad(loss, leaf, retain_graph=i + 1 < draws, allow_unused=True)


def held_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes that a pass of images keeps for the way back, the model's own tensors aside."""
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    held: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), _frozen(model), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        leaf = images.detach().clone().requires_grad_()
        kept = model(leaf.clone())  # alive until all is counted, so no address comes twice
    del kept
    return sum(held.values())


def probes(logits: Tensor, numbers: list[int], draws: int, seed: int) -> Tensor:
    """Random vectors ``[B, draws, classes]`` of mean 0 and second moment ``diag(p) - p p^T``, p the softmax of logits.

    Args:
        logits: ``[B, classes]``.
        numbers: B numbers: an image's vectors are a function of its number, of ``seed`` and of its logits.
        draws: how many for each image.
        seed: of the normal numbers.
    """
    share = logits.float().softmax(-1)[:, None]
    normal = torch.stack([torch.randn(draws, logits.shape[1], generator=_generator(seed, n)) for n in numbers])
    spread = share.sqrt() * normal.to(logits.device)
    return spread - share * spread.sum(-1, keepdim=True)


def tempered(gradient: Tensor, images: int, power: float) -> Tensor:
    """Gradients at one layer, scaled for each image so that its sum of squares E becomes ``E ** power``.

    Args:
        gradient: ``[..., N]``, any floating dtype; it is not changed.
        images: B; the leading dimensions hold the images one after the other, or all of it counts as one image's.
        power: 1 leaves all as it is, 0 makes all images count alike.

    Returns:
        The shape and dtype of ``gradient``; an image without any gradient stays so.
    """
    if power == 1 or gradient.numel() == 0:
        return gradient
    by_image = gradient.reshape(images if gradient.dim() > 1 and len(gradient) % images == 0 else 1, -1)
    energy = by_image.square().sum(1, keepdim=True, dtype=torch.float64)
    scale = torch.where(energy > 0, energy ** ((power - 1) / 2), 0.0)
    return (by_image * scale.to(by_image.dtype)).reshape(gradient.shape)


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
