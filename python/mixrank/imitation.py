"""The losses by which a compressed model imitates the dense one: of layers, of blocks, or of the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from mixrank.blocks import blocks_of
from mixrank.fidelity import divergence
from mixrank.nn import LowRankLinear

SCOPES = ("layer", "block", "model")


class Imitation:
    """The loss of a compressed model against the dense one, by hooks on both that are there only inside a step.

    Args:
        model: the compressed model.
        dense: the dense model, with the same blocks and layers.
        scope: ``"layer"``, ``"block"`` or ``"model"``, see :mod:`mixrank.compensate`.
        feature_weight: of the mean error of the blocks beside the KL of the logits, for ``"model"``.
    """

    def __init__(self, model: nn.Module, dense: nn.Module, scope: str, feature_weight: float) -> None:
        self.model, self.dense, self.scope, self.feature_weight = model, dense, scope, feature_weight
        taps: dict[str, nn.Module]
        if scope == "layer":
            taps = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
        else:
            taps = blocks_of(model)
        self.taps = {name: (module, dense.get_submodule(name)) for name, module in taps.items()}

    def loss(self, images: Tensor) -> Tensor:
        """The loss on images ``[B, C, H, W]``, a scalar in fp32 that carries gradients."""
        targets: dict[str, Tensor] = {}
        with torch.no_grad(), self._hooks(1, lambda name: _keep(targets, name)):
            dense_logits = self.dense(images)
        errors: list[Tensor] = []
        local = self.scope != "model"
        with self._hooks(0, lambda name: _compare(errors, targets, name)), self._detached(local):
            logits = self.model(images)
        features = torch.stack(errors).mean() if errors else logits.new_zeros(())
        return features if local else divergence(logits, dense_logits).mean() + self.feature_weight * features

    @contextmanager
    def _hooks(self, side: int, make: Callable[[str], Callable]) -> Iterator[None]:
        with ExitStack() as stack:
            for name, pair in self.taps.items():
                stack.callback(pair[side].register_forward_hook(make(name)).remove)
            yield

    @contextmanager
    def _detached(self, wanted: bool) -> Iterator[None]:
        """Keep gradients within the taps: what they receive counts as given."""
        with ExitStack() as stack:
            for module, _ in self.taps.values() if wanted else ():
                stack.callback(module.register_forward_pre_hook(_detach).remove)
            yield


def _detach(_module: nn.Module, arguments: tuple) -> tuple:
    return tuple(value.detach() if isinstance(value, Tensor) else value for value in arguments)


def _keep(targets: dict[str, Tensor], name: str) -> Callable:
    def hook(_module: nn.Module, _arguments: tuple, output: Tensor) -> None:
        targets[name] = output

    return hook


def _compare(errors: list[Tensor], targets: dict[str, Tensor], name: str) -> Callable:
    def hook(_module: nn.Module, _arguments: tuple, output: Tensor) -> None:
        errors.append(relative_error(output, targets.pop(name)))

    return hook


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over the tokens of ``|output - target|^2 / |target - mean|^2``, the mean over all tokens of the batch.

    Args:
        output: ``[..., C]`` in any floating dtype.
        target: the same shape.
    """
    output, target = output.float().flatten(0, -2), target.float().flatten(0, -2)
    spread = (target - target.mean(0)).square().sum(-1)
    floor = 1e-3 * spread.mean() + torch.finfo(torch.float32).tiny
    return ((output - target).square().sum(-1) / spread.clamp(min=floor)).mean()
