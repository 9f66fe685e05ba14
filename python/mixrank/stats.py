"""The sums over calibration tokens that factors are made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor


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
