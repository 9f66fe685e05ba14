"""Weights of the calibration tokens: how much each counts in the statistics of a layer.

The squared error that factors minimise is a sum over tokens; a weight multiplies a token's term.

``none``
    Every token counts alike.
``image``
    ``1 / |Y_b|^2``, ``Y_b`` the outputs of the layer for image b before the bias: every image's *relative* error counts
    alike (the objective of Azizi, Nazemi and Pedram 2024).
``token``
    ``1 / |y|^2``: every token's relative error counts alike.
``clip``
    ``min(1, c / |y|)^2``: tokens with an output longer than c count as if it were of length c. ``level`` from 1 on:
    c is this multiple of the median length in the image; below 1: c is this quantile of the lengths.
``class``
    Prefix tokens (class token, registers) together count ``level`` times as much as all patches together, by default
    as much.
``gradient``
    The squared norm of the gradient of the loss with respect to the layer's output at this token: how much the
    model's answer depends on it. No label is needed: the weights are the traces of the Fisher information of the
    outputs, see :mod:`mixrank.gradients`. ``level`` times the mean weight of all tokens is added to each: 0 by default,
    1 for sums that are half of gradients and half of all tokens alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from mixrank.errors import InputError

WEIGHTINGS = ("none", "image", "token", "clip", "class", "gradient")
_DEFAULT_LEVEL = {"clip": 2.0, "class": 1.0, "gradient": 0.0}


@dataclass(frozen=True)
class Weighting:
    """A way to weight tokens.

    Attributes:
        kind: one of ``none``, ``image``, ``token``, ``clip``, ``class``, ``gradient``; see the module.
        level: a number above 0 for ``clip`` (None: 2) and ``class`` (1), one of at least 0 for ``gradient`` (0).

    Raises:
        InputError: an unknown kind, or a level that is outside its range or not wanted.

    Example:
        >>> Weighting("clip").value, Weighting("clip", 3).value
        (2.0, 3)
    """

    kind: str = "none"
    level: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in WEIGHTINGS:
            raise InputError(f"weighting must be one of {', '.join(WEIGHTINGS)}, but it was {self.kind!r}")
        if self.level is None:
            return
        if self.kind not in _DEFAULT_LEVEL:
            raise InputError(f"weighting {self.kind!r} takes no level, but it was {self.level}")
        least_fits = self.level >= 0 if self.kind == "gradient" else self.level > 0
        if not (least_fits and self.level < float("inf")):
            allowed = "at least 0" if self.kind == "gradient" else "above 0"
            raise InputError(
                f"the level of weighting {self.kind!r} must be a number {allowed}, but it was {self.level}"
            )

    @classmethod
    def of(cls, weighting: str | Weighting) -> Weighting:
        """A weighting from its kind alone, or itself.

        Args:
            weighting: a kind with its default level, or what is returned as it is.
        """
        return weighting if isinstance(weighting, Weighting) else cls(weighting)

    @property
    def value(self) -> float | None:
        """The level, or its default."""
        return _DEFAULT_LEVEL.get(self.kind) if self.level is None else self.level

    @property
    def alike(self) -> float:
        """What is added to the weights of gradients, in units of their mean; 0 for other weights."""
        return self._known_value if self.kind == "gradient" else 0.0

    @property
    def _known_value(self) -> float:
        return cast(float, self.value)  # of a kind that has a default

    @property
    def shared(self) -> bool:
        """Whether layers with the same input give its tokens the same weights."""
        return self.kind in ("none", "class")

    def of_tokens(self, output: Tensor, bias: Tensor | None, images: int, prefix: int) -> Tensor | None:
        """The weights of one call's tokens; None: each counts 1.

        Args:
            output: ``[..., N]``, the layer's output, any floating dtype.
            bias: ``[N]`` or None, what is taken off it, any floating dtype.
            images: B; the leading dimensions hold the images one after the other, or all tokens count as one image's.
            prefix: number of tokens before the patches, in outputs ``[B, T, N]``.

        Returns:
            Float64, the leading dimensions of ``output``. A token without any output has weight 0 where it would be
            divided by.
        """
        if self.kind == "class":
            return _by_class(output.shape[:-1], images, prefix, self._known_value).to(output.device)
        if self.kind not in ("image", "token", "clip"):
            return None
        before_bias = output.float() if bias is None else output.float() - bias.float()
        squares = before_bias.square().sum(-1, dtype=torch.float64)
        if self.kind == "token" or squares.numel() == 0:
            return _inverse(squares)
        by_image = squares.reshape(images if squares.dim() and len(squares) % images == 0 else 1, -1)
        if self.kind == "image":
            weights = _inverse(by_image.sum(1, keepdim=True)).expand_as(by_image)
        else:
            value = self._known_value
            multiple, share = (value, 0.5) if value >= 1 else (1.0, value)
            limit = multiple**2 * by_image.quantile(share, dim=1, keepdim=True)
            weights = (limit * _inverse(by_image)).clamp(max=1)
        return weights.reshape(squares.shape)


AUTOMATIC = Weighting("gradient", 1.0)
"""How tokens count where gradients flow anyway and nothing else is asked for."""


def _by_class(shape: torch.Size, images: int, prefix: int, ratio: float) -> Tensor:
    """Ones, but for the prefix tokens of ``[B, T]``: each ``ratio`` times the patches by the prefix tokens."""
    weights = torch.ones(shape, dtype=torch.float64)
    if len(shape) == 2 and shape[0] == images and shape[1] > prefix:
        weights[:, :prefix] = ratio * (shape[1] - prefix) / prefix
    return weights


def _inverse(values: Tensor) -> Tensor:
    return torch.where(values > 0, 1 / values, 0.0)
