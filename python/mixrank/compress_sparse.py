"""Compression to sparse weights with factors beside them: calibrate, choose the entries, split every layer."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from mixrank.arguments import Limits
from mixrank.automatic import classifies
from mixrank.coverage import left_alone, remarks_of
from mixrank.decompose import LayerShape
from mixrank.errors import InputError
from mixrank.models import compressible_linears, expose_qkv_, hide_qkv_
from mixrank.plan import LayerPlan
from mixrank.planning import SENSITIVITY_IMAGES
from mixrank.result import CompressionResult, LayerReport, notes
from mixrank.sample import Sample
from mixrank.sparse import PULL
from mixrank.sparse_fit import Errors, budget_of, check_sparse, put_sparse_, sparse_statistics
from mixrank.sparse_plan import RANK_SHARE
from mixrank.sparse_sensitivity import weigh_layers
from mixrank.stopwatch import Stopwatch


def compress_sparse_(
    model: nn.Module,
    images: Iterable,
    keep: float | None = None,
    *,
    max_bytes: int | None = None,
    max_macs: int | None = None,
    rank_share: float = RANK_SHARE,
    pull: float = PULL,
    gradient_power: float | None = None,
    draws: int = 1,
    sensitivity_images: int = SENSITIVITY_IMAGES,
    held_out: float | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> CompressionResult:
    """Compress a trained model in place to :class:`mixrank.SparseLinear` layers, without training and without labels.

    Whether this or low ranks alone follow a model more closely is what :func:`mixrank.compress` measures with
    ``form="auto"``. Of the stored numbers some say where the entries are
    (:attr:`mixrank.SparseLinear.places`). An entry without structure costs the CPU kernel a little more than a number
    of a factor; on a GPU such a layer is multiplied out at every call, so there it saves memory alone.

    Args:
        model: a timm vision transformer, or any model whose ``nn.Linear`` layers are called as modules.
        images: batches of calibration images, see :func:`mixrank.calibrate.calibrate`.
        keep: share of *all* parameters that may remain, in (0, 1]. Or give ``max_bytes`` or ``max_macs``.
        max_bytes: bytes of parameters and persistent buffers that may remain.
        max_macs: multiply-accumulate operations for one image that may remain.
        rank_share: share of a layer's stored numbers that its factors take, in [0, 1).
        pull: of the inputs' covariance towards its diagonal, at least 0; guards against few images.
        gradient_power: of each image's sum of squared gradients at a layer, see :mod:`mixrank.gradients`; None: 0.25.
        draws: random probes of each image's answer, for the gradients of a classifier, see :mod:`mixrank.gradients`.
        sensitivity_images: of a classifier, how many of the images held out, drawn at random, tell how much each layer
            counts, see :mod:`mixrank.sparse_sensitivity`.
        held_out: share of the images that serves for this alone at first; the weights are then fitted to all images.
            None: a fifth, or none of fewer than five images. Without any, squared gradients alone decide.
        seed: of the draws.
        dtype: run the model under autocast in this dtype.
        progress: show progress bars with the time left.

    Returns:
        The plan, a report for each layer, and how long each step took.

    Raises:
        InputError: bad input; the model is then as it was.

    Example:
        >>> import timm, torch
        >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
        >>> compress_sparse_(model, [torch.randn(4, 3, 32, 32)], keep=0.5).plan.keep <= 0.5
        True
    """
    watch, remarks = Stopwatch(), []
    check_sparse(rank_share, pull)
    exposed = expose_qkv_(model)
    try:
        shapes = {name: LayerShape.of(linear, True) for name, linear in compressible_linears(model).items()}
        limits: Limits = {"keep": keep, "max_bytes": max_bytes, "max_macs": max_macs}
        budget_of(model, shapes, limits)
        classifier, images = classifies(model, images)
        alone = left_alone(model)
        remarks += remarks_of(alone, model)
        if not classifier:
            remarks.append("the model returns no logits of classes, so the outputs of the layers decide all")
        sample = Sample(images, sensitivity_images, seed, held_out)
        with watch.stage("calibrate"):
            stats = sparse_statistics(
                model, sample, gradients=classifier, gradient_power=gradient_power, draws=draws, seed=seed,
                held_out=held_out, dtype=dtype, progress=progress,
            )  # fmt: skip
        weights = None
        if classifier and stats.held_out is not None:
            try:
                with watch.stage("sensitivity"):
                    weights = weigh_layers(
                        model, stats, sample.parts, limits, rank_share, pull, dtype=dtype, progress=progress
                    )
            except InputError as error:
                remarks.append(f"layers count by their squared gradients, as they cannot be measured: {error}")
        plan, errors = put_sparse_(
            model, stats, **limits, rank_share=rank_share, pull=pull, weights=weights, watch=watch, progress=progress
        )
    except BaseException:
        hide_qkv_(model, exposed)
        raise
    none = Errors(0.0, None if stats.held_out is None else 0.0)
    reports = [_report(layer, errors.get(layer.name, none), pull) for layer in plan.layers]
    remarks += notes(reports, stats, remedy="")
    return CompressionResult(plan, reports, stats.all_images, watch.seconds, remarks, alone)


def _report(layer: LayerPlan, errors: Errors, pull: float) -> LayerReport:
    """Without the curves over ranks, which a sparse layer has none of."""
    return LayerReport(
        layer.name,
        layer.in_features,
        layer.out_features,
        layer.rank,
        errors.fitted,
        errors.held_out,
        pull,
        [],
        None,
        [],
    )
