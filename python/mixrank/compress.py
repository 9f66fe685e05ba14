"""The one call: calibrate, decompose, allocate, apply."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TypeVar

import torch
from torch import nn

from mixrank.allocate import allocate, check_budget
from mixrank.apply import apply_
from mixrank.calibrate import calibrate
from mixrank.decompose import Factorisation, LayerShape, check_strategy, decompose
from mixrank.models import compressible_linears, expose_qkv_, hide_qkv_, split_qkv_
from mixrank.plan import Plan

CURVE_POINTS = 33

Value = TypeVar("Value")


@dataclass(frozen=True)
class LayerReport:
    """One layer before and after, and its curves on a grid of at most 33 ranks.

    Attributes:
        name: the layer's name.
        in_features: K.
        out_features: N.
        rank: R, or None where the layer stayed dense.
        relative_error: squared output error on the calibration images relative to the output's energy; 0 for a
            dense layer; None without calibration.
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
    energy_ranks: list[int]
    output_energy_kept: list[float] | None
    weight_energy_kept: list[float]


@dataclass(frozen=True)
class CompressionResult:
    """What :func:`compress` did.

    Attributes:
        plan: the ranks, as applied.
        layers: a report for each layer, in the order of the model.
        images: number of calibration images.
        seconds: wall-clock seconds of the steps ``calibrate``, ``decompose``, ``allocate`` and ``apply``.
    """

    plan: Plan
    layers: list[LayerReport]
    images: int
    seconds: dict[str, float]

    def to_json(self) -> dict:
        """Return the result in terms of JSON."""
        return {
            "plan": self.plan.to_json(),
            "layers": [asdict(layer) for layer in self.layers],
            "images": self.images,
            "seconds": self.seconds,
        }


def layer_reports(plan: Plan, factorisations: Mapping[str, Factorisation]) -> list[LayerReport]:
    """Describe every layer of a plan: its rank, its error on the calibration images and its energy curves."""
    reports = []
    for layer in plan.layers:
        factorisation = factorisations[layer.name]
        full = min(layer.in_features, layer.out_features)
        grid = sorted({max(1, round(full * i / (CURVE_POINTS - 1))) for i in range(CURVE_POINTS)})
        index = torch.tensor(grid) - 1
        output = factorisation.output_energy
        if output is None:
            error = None
        else:
            error = 0.0 if layer.rank is None else factorisation.relative_error(layer.rank)
        reports.append(
            LayerReport(
                name=layer.name,
                in_features=layer.in_features,
                out_features=layer.out_features,
                rank=layer.rank,
                relative_error=error,
                energy_ranks=grid,
                output_energy_kept=None if output is None else output.cumsum(0)[index].tolist(),
                weight_energy_kept=factorisation.weight_energy.cumsum(0)[index].tolist(),
            )
        )
    return reports


def compress(
    model: nn.Module,
    images: Iterable | None = None,
    keep: float | None = None,
    *,
    max_bytes: int | None = None,
    max_macs: int | None = None,
    factors: str = "aware",
    ranks: str = "mixed",
    energy: str = "weight",
    centre: bool | None = None,
    shrink: float = 0.0,
    split_qkv: bool = False,
    step: int = 8,
    form: str = "factors",
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> CompressionResult:
    """Compress a trained model in place, without training and without labels.

    Args:
        model: a timm vision transformer, or any model whose ``nn.Linear`` layers are called as modules.
        images: batches of calibration images, see :func:`mixrank.calibrate.calibrate`; not needed for
            ``factors="svd"`` with ``energy="weight"`` and without centring.
        keep: share of *all* parameters that may remain, in (0, 1]. Or give ``max_bytes`` or ``max_macs``.
        max_bytes: bytes of parameters and persistent buffers that may remain.
        max_macs: multiply-accumulate operations for one image that may remain.
        factors: ``"aware"`` (least output error on the calibration images) or ``"svd"``.
        ranks: ``"mixed"`` or ``"uniform"``.
        energy: what mixed ranks save: ``"weight"`` or ``"output"`` energy, see :func:`mixrank.allocate.allocate`.
        centre: move the mean of what is lost into the bias; None: only for ``factors="aware"``.
        shrink: pull of ``"aware"`` factors towards ``"svd"``, at least 0; guards against few calibration images.
        split_qkv: give q, k and v ranks of their own instead of the fused layer's one.
        step: ranks are multiples of this.
        form: how layers of low rank are held: as ``"factors"``, or ``"pivoted"``: the same weights in fewer numbers, so
            higher ranks in the same budget, see :class:`mixrank.PivotedLinear`.
        dtype: run the calibration under autocast in this dtype.
        progress: show progress bars with the time left.

    Returns:
        The plan, a report for each layer, and how long each step took.

    Raises:
        InputError: bad input, see the four steps; the model is then as it was.

    Example:
        >>> import timm, torch
        >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
        >>> result = compress(model, [torch.randn(4, 3, 32, 32)], keep=0.5)
        >>> result.plan.keep <= 0.5
        True
    """
    seconds: dict[str, float] = {}

    def timed(name: str, step_: Callable[[], Value]) -> Value:
        started = time.perf_counter()
        value = step_()
        seconds[name] = time.perf_counter() - started
        return value

    fused = dict(model.named_modules()) if split_qkv else {}
    exposed = expose_qkv_(model)
    split = split_qkv_(model) if split_qkv else ()
    try:
        allocation = {
            "keep": keep, "max_bytes": max_bytes, "max_macs": max_macs, "ranks": ranks, "energy": energy, "step": step,
            "form": form,
        }  # fmt: skip
        centre = check_strategy(factors, centre, shrink, calibrated=images is not None)
        shapes = {name: LayerShape.of(linear, centre) for name, linear in compressible_linears(model).items()}
        check_budget(model, shapes, **allocation)
        stats = None
        if images is not None:
            stats = timed("calibrate", lambda: calibrate(model, images, progress=progress, dtype=dtype))
        strategy = {"factors": factors, "centre": centre, "shrink": shrink}
        factorisations = timed("decompose", lambda: decompose(model, stats, progress=progress, **strategy))
        plan = timed("allocate", lambda: allocate(model, factorisations, **allocation))
        reports = layer_reports(plan, factorisations)
        timed("apply", lambda: apply_(model, plan, factorisations))
    except BaseException:
        for name in split:
            model.set_submodule(name, fused[name])
        hide_qkv_(model, exposed)
        raise
    return CompressionResult(plan, reports, 0 if stats is None else stats.images, seconds)
