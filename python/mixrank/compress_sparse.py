"""Compression to sparse weights with factors beside them: calibrate, choose the entries, split every layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mixrank.allocate import Budget, check_budget
from mixrank.arguments import Limits
from mixrank.attributes import note_
from mixrank.automatic import classifies
from mixrank.calibrate import calibrate
from mixrank.coverage import left_alone, remarks_of
from mixrank.decompose import LayerShape
from mixrank.errors import InputError
from mixrank.gradients import POWER
from mixrank.models import compressible_linears, expose_qkv_, hide_qkv_
from mixrank.nn_sparse import SparseLinear
from mixrank.plan import Plan
from mixrank.progress import track
from mixrank.result import CompressionResult, LayerReport, notes
from mixrank.sparse import PULL, Measures, Split, removal_costs, split
from mixrank.sparse_plan import RANK_SHARE, Prices, choose_entries, histogram, ranks_of, sparse_plan
from mixrank.stats import CalibrationStats
from mixrank.stopwatch import Stopwatch
from mixrank_kernels.reference import packed_bits


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
        seed: of these draws.
        dtype: run the calibration under autocast in this dtype.
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
        _budget(model, shapes, limits)
        classifier, images = classifies(model, images)
        alone = left_alone(model)
        remarks += remarks_of(alone, model)
        if not classifier:
            remarks.append("the model returns no logits of classes, so the outputs of the layers decide all")
        with watch.stage("calibrate"):
            stats = sparse_statistics(
                model, images, gradients=classifier, gradient_power=gradient_power, draws=draws, seed=seed,
                dtype=dtype, progress=progress,
            )  # fmt: skip
        plan, errors = put_sparse_(
            model, stats, **limits, rank_share=rank_share, pull=pull, watch=watch, progress=progress
        )
    except BaseException:
        hide_qkv_(model, exposed)
        raise
    reports = [
        LayerReport(layer.name, layer.in_features, layer.out_features, layer.rank, errors.get(layer.name, 0.0), None,
                    pull, [], None, [])
        for layer in plan.layers
    ]  # fmt: skip
    return CompressionResult(plan, reports, stats.all_images, watch.seconds, remarks + notes(reports, stats), alone)


def check_sparse(rank_share: float, pull: float) -> None:
    """Raise InputError where one of them is outside its range."""
    if not 0 <= rank_share < 1:
        raise InputError(f"rank_share must be at least 0 and below 1, but it was {rank_share}")
    if not 0 <= pull < float("inf"):
        raise InputError(f"pull must be a number of at least 0, but it was {pull}")


def sparse_statistics(
    model: nn.Module, images: Iterable, *, gradients: bool = True, gradient_power: float | None = None, **others: Any
) -> CalibrationStats:
    """What sparse weights are fitted by: the whole covariance of the inputs of each layer, its tokens alike.

    Args:
        model: as for :func:`mixrank.calibrate.calibrate`.
        images: the same.
        gradients: of a classifier, also its squared gradients.
        gradient_power: of these; None: :data:`mixrank.gradients.POWER`.
        **others: further arguments of that function.
    """
    power = POWER if gradient_power is None else gradient_power
    return calibrate(model, images, inputs=True, gradients=gradients, gradient_power=power, **others)


def put_sparse_(
    model: nn.Module,
    stats: CalibrationStats,
    keep: float | None = None,
    *,
    max_bytes: int | None = None,
    max_macs: int | None = None,
    rank_share: float = RANK_SHARE,
    pull: float = PULL,
    watch: Stopwatch | None = None,
    progress: bool = False,
) -> tuple[Plan, dict[str, float]]:
    """Replace the layers of a model by sparse ones, by statistics that were made before.

    Args:
        model: a dense model; it is changed in place.
        stats: of :func:`sparse_statistics`.
        keep: as for :func:`compress_sparse_`.
        max_bytes: the same.
        max_macs: the same.
        rank_share: the same.
        pull: the same.
        watch: notes the stages ``allocate`` and ``split``.
        progress: show progress bars.

    Returns:
        The plan, and by layer the squared error of its outputs by the measure of :mod:`mixrank.sparse`, relative to
        what they were.

    Raises:
        InputError: a bad budget, weight or option; the model is then as it was.
    """
    check_sparse(rank_share, pull)
    watch, linears = watch or Stopwatch(), compressible_linears(model)
    limits: Limits = {"keep": keep, "max_bytes": max_bytes, "max_macs": max_macs}
    shapes = {name: LayerShape.of(linear, True) for name, linear in linears.items()}
    budget, fixed = _budget(model, shapes, limits)
    idle = sum(budget.cost(name, shapes.pop(name), None) for name in stats.idle)
    with watch.stage("allocate"):
        available = budget.limit - fixed - idle
        ranks = ranks_of(shapes, budget, available, rank_share)
        prices = {name: Prices.of(budget, name, shape, ranks[name]) for name, shape in shapes.items()}
        histograms = {}
        for name in track(shapes, "weighing entries", enabled=progress):
            weight = linears[name].weight
            measures = Measures.of(weight, stats[name], pull=pull)
            histograms[name] = histogram(removal_costs(weight, measures, ranks[name]), prices[name].entry)
        entries = choose_entries(histograms, prices, available)
        options = {"form": "sparse", "rank_share": rank_share, "pull": pull}
        options |= {name: value for name, value in limits.items() if value is not None}
        plan = sparse_plan(model, shapes, ranks, entries, options)
    errors: dict[str, float] = {}
    layers: dict[str, SparseLinear] = {}
    with watch.stage("split"):
        for name in track(shapes, "splitting weights", enabled=progress):
            if (count := entries[name]) is not None:
                measures = Measures.of(linears[name].weight, stats[name], pull=pull)
                found = split(linears[name].weight, measures, count, ranks[name])
                errors[name], layers[name] = found.error, layer_of(linears[name], found)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    note_(model, "mixrank_plan", plan)
    return plan, errors


def _budget(model: nn.Module, shapes: dict[str, LayerShape], limits: Limits) -> tuple[Budget, int]:
    return check_budget(model, shapes, **limits, ranks="mixed", energy="weight", step=1, form="factors")


def layer_of(linear: nn.Linear, found: Split) -> SparseLinear:
    """The layer that holds a split weight, in the dtype, device and mode of the linear layer it was of."""
    bias = found.shift if linear.bias is None else found.shift + linear.bias.detach().cpu().double()

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(linear.weight.device, linear.weight.dtype).contiguous()

    layer = SparseLinear.from_parts(
        packed_bits(found.kept).to(linear.weight.device),
        cast(found.sparse[found.kept]),
        None if found.down is None else cast(found.down),
        None if found.up is None else cast(found.up),
        cast(bias),
        in_features=linear.in_features,
    )
    return layer.train(linear.training)
