"""What a compression did: the plan, a report for each layer, and what its user should know."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import torch

from mixrank.coverage import LeftAlone
from mixrank.decompose import Factorisation
from mixrank.plan import Plan
from mixrank.stats import CalibrationStats

CURVE_POINTS = 33
# Errors on new images this many times those on the calibration images tell that there were too few of these.
GAP = 1.5


@dataclass(frozen=True)
class LayerReport:
    """One layer before and after, and its curves on a grid of at most 33 ranks.

    Attributes:
        name: the layer's name.
        in_features: K.
        out_features: N.
        rank: R, or None where the layer stayed dense.
        relative_error: squared output error on the calibration images relative to the output's energy; 0 for a
            dense layer; None without calibration. Of a layer that was fitted sequentially, the error of the truncation.
        held_out_error: the same on images that the factors were not made from (those compared are made without them);
            None where no images were held out.
        shrink: the pull of the factors towards ``"svd"``, ``"inf"`` for ``"svd"`` itself; None without one.
        energy_ranks: the grid of ranks.
        output_energy_kept: share of the (centred) output energy kept at each rank of the grid; None
            without calibration.
        weight_energy_kept: share of the squared singular values kept at each rank of the grid by truncated SVD.
    """

    name: str
    in_features: int
    out_features: int
    rank: int | None
    relative_error: float | None
    held_out_error: float | None
    shrink: float | str | None
    energy_ranks: list[int]
    output_energy_kept: list[float] | None
    weight_energy_kept: list[float]


@dataclass(frozen=True)
class CompressionResult:
    """What :func:`mixrank.compress` did.

    Attributes:
        plan: the ranks, as applied.
        layers: a report for each layer, in the order of the model.
        images: number of calibration images, those held out included; further views of an image do not count.
        seconds: wall-clock seconds of the steps: ``form`` where it was chosen, ``calibrate``, ``sensitivity`` where it
            was measured, ``allocate``, and ``decompose``, ``shrink`` and ``apply`` (or ``sequential``) of low ranks,
            ``split`` of sparse weights.
        notes: sentences that the user should read: layers that were never called, too few images, what stays dense.
        left_alone: the modules with matrices that are no layers to compress.
    """

    plan: Plan
    layers: list[LayerReport]
    images: int
    seconds: dict[str, float]
    notes: list[str] = field(default_factory=list)
    left_alone: list[LeftAlone] = field(default_factory=list)

    def to_json(self) -> dict:
        """Return the result in terms of JSON."""
        return {
            "plan": self.plan.to_json(),
            "layers": [asdict(layer) for layer in self.layers],
            "images": self.images,
            "seconds": self.seconds,
            "notes": self.notes,
            "left_alone": [asdict(module) for module in self.left_alone],
        }


def layer_reports(plan: Plan, factorisations: Mapping[str, Factorisation]) -> list[LayerReport]:
    """Describe every layer of a plan: its rank, its errors and its energy curves."""
    reports = []
    for layer in plan.layers:
        factorisation = factorisations[layer.name]
        full = min(layer.in_features, layer.out_features)
        grid = sorted({max(1, round(full * i / (CURVE_POINTS - 1))) for i in range(CURVE_POINTS)})
        index, errors, shrink = torch.tensor(grid), factorisation.output_error, factorisation.shrink
        kept = None
        if errors is not None:
            kept = (1 - errors[index] / errors[0] if errors[0] > 0 else torch.ones(len(grid))).tolist()

        reports.append(
            LayerReport(
                name=layer.name,
                in_features=layer.in_features,
                out_features=layer.out_features,
                rank=layer.rank,
                relative_error=_error(factorisation, layer.rank, held_out=False),
                held_out_error=_error(factorisation, layer.rank, held_out=True),
                shrink="inf" if shrink is not None and math.isinf(shrink) else shrink,
                energy_ranks=grid,
                output_energy_kept=kept,
                weight_energy_kept=factorisation.weight_energy.cumsum(0)[index - 1].tolist(),
            )
        )
    return reports


def _error(factorisation: Factorisation, rank: int | None, *, held_out: bool) -> float | None:
    known = factorisation.relative_error(rank or 1, held_out=held_out)
    return 0.0 if known is not None and rank is None else known


def notes(layers: list[LayerReport], stats: CalibrationStats | None, remedy: str = ", or a larger shrink") -> list[str]:
    """What the user should know of the layers and the calibration; ``remedy``: what helps beside more images."""
    if stats is None:
        return []
    found = []
    if stats.idle:
        found.append(f"layers that were never called stay dense: {stats.idle[0]} ({len(stats.idle)} in all)")
    factored = [
        (layer.relative_error, layer.held_out_error)
        for layer in layers
        if layer.rank is not None and layer.relative_error is not None and layer.held_out_error is not None
    ]
    if factored:
        seen, new = (sum(errors) / len(factored) for errors in zip(*factored, strict=True))
        if new > GAP * seen:
            found.append(
                f"the mean relative error is {new:.3f} on images held out but {seen:.3f} on the calibration images: "
                f"use more than {stats.all_images} images{remedy}"
            )
    return found
