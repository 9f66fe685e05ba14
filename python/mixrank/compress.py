"""The one call: calibrate, decompose, allocate, apply."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import nn

from mixrank.allocate import allocate, check_budget
from mixrank.apply import apply_
from mixrank.calibrate import calibrate, check_calibration
from mixrank.decompose import FISHER_SHRINK, LayerShape, check_strategy, decompose
from mixrank.models import compressible_linears, expose_qkv_, hide_qkv_, split_qkv_
from mixrank.result import CompressionResult, layer_reports, notes
from mixrank.weighting import Weighting

Value = TypeVar("Value")


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
    shrink: float | str = 0.0,
    fisher_shrink: float = FISHER_SHRINK,
    weighting: str | Weighting = "none",
    held_out: float | None = None,
    draws: int = 1,
    seed: int = 0,
    split_qkv: bool = False,
    step: int = 8,
    min_rank: float | None = None,
    max_rank: float | None = None,
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
        factors: ``"aware"`` (least output error on the calibration images), ``"fisher"`` (least loss to second order,
            for classifiers) or ``"svd"``.
        ranks: ``"mixed"`` or ``"uniform"``.
        energy: what mixed ranks save: ``"weight"``, ``"output"``, ``"held_out"`` or ``"mixed"`` energy, see
            :func:`mixrank.allocate.allocate`.
        centre: move the mean of what is lost into the bias; None: not for ``factors="svd"``.
        shrink: pull of the factors towards ``"svd"``, at least 0; guards against few calibration images. ``"auto"``:
            for each layer by the error on images held out; ``"oas"``: by the number of images.
        fisher_shrink: pull of the gradients' Gram matrix towards the identity, for ``"fisher"``.
        weighting: how much each calibration token counts, see :mod:`mixrank.weighting`.
        held_out: share of the images on which factors made without them are judged; the factors in the model are
            made from all. None: a fifth, or none of fewer than five images.
        draws: labels that each image draws from the model's answer, where gradients are needed.
        seed: of these draws.
        split_qkv: give q, k and v ranks of their own instead of the fused layer's one.
        step: ranks are multiples of this.
        min_rank: lowest rank of a layer, a number or a share of its full rank.
        max_rank: highest rank of a layer, a number or a share of its full rank.
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
            "min_rank": min_rank, "max_rank": max_rank,
        }  # fmt: skip
        apart = images is not None and held_out != 0
        centre = check_strategy(
            factors, centre, shrink, calibrated=images is not None, held_out=apart, fisher_shrink=fisher_shrink
        )
        measuring = {
            "held_out": held_out, "weighting": weighting, "draws": draws, "gradients": factors == "fisher"
        }  # fmt: skip
        check_calibration(model, **measuring)
        shapes = {name: LayerShape.of(linear, centre) for name, linear in compressible_linears(model).items()}
        check_budget(model, shapes, **allocation)
        stats = None
        if images is not None:
            running = {"seed": seed, "progress": progress, "dtype": dtype}
            stats = timed("calibrate", lambda: calibrate(model, images, **measuring, **running))
        strategy = {"factors": factors, "centre": centre, "shrink": shrink, "fisher_shrink": fisher_shrink}
        factorisations = timed("decompose", lambda: decompose(model, stats, progress=progress, **strategy))
        plan = timed("allocate", lambda: allocate(model, factorisations, **allocation))
        reports = layer_reports(plan, factorisations)
        timed("apply", lambda: apply_(model, plan, factorisations))
    except BaseException:
        for name in split:
            model.set_submodule(name, fused[name])
        hide_qkv_(model, exposed)
        raise
    count = 0 if stats is None else stats.images + (0 if stats.held_out is None else stats.held_out.images)
    return CompressionResult(plan, reports, count, seconds, notes(reports, stats))
