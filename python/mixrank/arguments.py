"""Arguments that several functions have in common, under their names, as they are passed on with ``**``.

What they mean is said where they are taken: by :func:`mixrank.allocate.allocate`,
:func:`mixrank.decompose.decompose` and :func:`mixrank.calibrate.calibrate`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    import torch

    from mixrank.weighting import Weighting


class Limits(TypedDict, total=False):
    """The budget, of which one is given."""

    keep: float | None
    max_bytes: int | None
    max_macs: int | None


class Bounds(TypedDict, total=False):
    """The ranks that a layer can have."""

    step: int
    min_rank: float | None
    max_rank: float | None


class Allocation(Limits, Bounds, total=False):
    """How ranks are chosen."""

    ranks: str
    energy: str
    form: str


class Strategy(TypedDict, total=False):
    """How factors are made."""

    factors: str
    centre: bool | None
    shrink: float | str
    fisher_shrink: float


class Measuring(TypedDict):
    """What a calibration measures."""

    held_out: float | None
    weighting: str | Weighting
    draws: int
    gradients: bool
    gradient_power: float


class Running(TypedDict):
    """How a model is run over images."""

    dtype: torch.dtype | None
    progress: bool
