"""The sums over calibration tokens that factors are made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerStats:
    """Sums over all calibration tokens on one side of a layer, each token times its weight.

    Attributes:
        side: ``"input"`` (S = K) or ``"output"`` (S = N, before the bias).
        gram: ``[S, S]`` float64, the sum of outer products of the rows.
        total: ``[S]`` float64, the sum of the rows.
        rows: the sum of the weights: without weights the number of tokens.
        gradient: ``[min(N, K), min(N, K)]`` float64, the sum of outer products of the gradients of the loss with
            respect to the outputs, in the coordinates of :func:`output_frame`; None where it was not asked for.
        images: how many images the tokens are from; None where that is not known.
        squares: ``[N]`` float64, the sum of the squared gradients of the loss with respect to the outputs: what is
            summed in place of ``gradient`` with the inputs of every layer; else None. Where gradients were scaled by
            image, their sum is that many times the power mean of the images' sums.

    Example:
        >>> x = torch.ones(10, 4, dtype=torch.float64)
        >>> stats = LayerStats("input", gram=x.T @ x, total=x.sum(0), rows=10.0)
        >>> (stats + stats).rows
        20.0
    """

    side: str
    gram: Tensor
    total: Tensor
    rows: float
    gradient: Tensor | None = None
    images: int | None = None
    squares: Tensor | None = None

    def __add__(self, other: LayerStats) -> LayerStats:
        """The sums over the tokens of both."""
        return LayerStats(
            self.side,
            self.gram + other.gram,
            self.total + other.total,
            self.rows + other.rows,
            None if self.gradient is None or other.gradient is None else self.gradient + other.gradient,
            None if self.images is None or other.images is None else self.images + other.images,
            None if self.squares is None or other.squares is None else self.squares + other.squares,
        )


class CalibrationStats(Mapping[str, LayerStats]):
    """Statistics by layer name. Layers that receive the same input may share one object.

    All but ``layers`` are attributes too.

    Args:
        layers: what the mapping holds.
        images: number of images that went in; further views of an image do not count.
        seconds: wall-clock time that calibration took.
        held_out: statistics of the images that were kept apart, or None.
        idle: names of the layers without statistics, because they were never called (or, where tokens are weighted
            by gradients, do not act on the output).
    """

    def __init__(
        self,
        layers: dict[str, LayerStats],
        images: int,
        seconds: float,
        held_out: CalibrationStats | None = None,
        idle: tuple[str, ...] = (),
    ) -> None:
        self._layers, self.images, self.seconds, self.held_out, self.idle = layers, images, seconds, held_out, idle

    @property
    def all_images(self) -> int:
        """Number of images, those held out included."""
        return self.images + (0 if self.held_out is None else self.held_out.images)

    def without_held_out(self) -> CalibrationStats:
        """Statistics of the images that were not held out, with none held out."""
        return CalibrationStats(self._layers, self.images, self.seconds, idle=self.idle)

    def whole(self, name: str) -> LayerStats:
        """Sums of one layer over all images, those held out included.

        Args:
            name: of the layer.
        """
        return self[name] if self.held_out is None else self[name] + self.held_out[name]

    def merged(self) -> CalibrationStats:
        """Statistics of all images, with none held out any more."""
        if self.held_out is None:
            return self
        sums: dict[int, LayerStats] = {}
        for name, layer in self._layers.items():
            if id(layer) not in sums:
                sums[id(layer)] = layer + self.held_out[name]
        layers = {name: sums[id(layer)] for name, layer in self._layers.items()}
        return CalibrationStats(layers, self.all_images, self.seconds, idle=self.idle)

    def __getitem__(self, name: str) -> LayerStats:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def output_frame(weight: Tensor) -> tuple[Tensor | None, Tensor]:
    """Coordinates for what a layer can output: ``weight = frame @ core``, on the CPU.

    Args:
        weight: ``[N, K]``.

    Returns:
        ``frame`` ``[N, K]`` with orthonormal columns and ``core`` ``[K, K]``, where N > K; else None (the identity) and
        the weight, ``[N, K]``: itself where it is on the CPU in one of these dtypes, else a copy. Both are float32, or
        float64 for a weight in float64: what rounding they have is that of the weight. The same for the same weight
        each time.
    """
    weight, dtype = weight.detach().cpu(), torch.promote_types(weight.dtype, torch.float32)
    if weight.shape[0] <= weight.shape[1]:
        return None, weight.to(dtype)
    frame, core = torch.linalg.qr(weight.double())
    return frame.to(dtype), core.to(dtype)
