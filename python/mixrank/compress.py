"""The one call: calibrate, decompose, allocate, apply."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from mixrank.allocate import ENERGIES, check_budget
from mixrank.apply import apply_, put_
from mixrank.arguments import Allocation, Measuring, Running, Strategy
from mixrank.automatic import classifies
from mixrank.calibrate import calibrate, check_calibration
from mixrank.compress_sparse import compress_sparse_
from mixrank.coverage import left_alone, remarks_of
from mixrank.decompose import FISHER_SHRINK, Factorisation, LayerShape, check_strategy, decompose
from mixrank.errors import InputError
from mixrank.forms import TRIAL_IMAGES, best_of, measure_forms, unmeasurable
from mixrank.measured_pull import first_pull, measure_pull
from mixrank.models import compressible_linears, expose_qkv_, hide_qkv_, split_qkv_
from mixrank.plan import FORMS
from mixrank.planning import SENSITIVITY_IMAGES, plan_ranks
from mixrank.processes import are_several
from mixrank.result import CompressionResult, layer_reports, notes
from mixrank.sample import Sample
from mixrank.sequential import RIDGE, check_ridge, compress_blocks_
from mixrank.shrinkage import MEASURED
from mixrank.stats import CalibrationStats
from mixrank.stopwatch import Stopwatch
from mixrank.weighting import AUTOMATIC, Weighting

FOR_SPARSE = (
    "keep", "max_bytes", "max_macs", "sensitivity_images", "held_out", "gradient_power", "draws", "seed", "dtype",
    "progress",
)  # fmt: skip
"""The options of :func:`compress` that sparse weights take."""
FORM = "pivoted"
"""Of low ranks the form that did best on two real models by images held out, see docs/accuracy.md."""


def compress(
    model: nn.Module,
    images: Iterable | None = None,
    keep: float | None = None,
    *,
    max_bytes: int | None = None,
    max_macs: int | None = None,
    factors: str | None = None,
    ranks: str = "mixed",
    energy: str | None = None,
    sensitivity_images: int = SENSITIVITY_IMAGES,
    centre: bool | None = None,
    shrink: float | str | None = None,
    fisher_shrink: float = FISHER_SHRINK,
    weighting: str | Weighting | None = None,
    held_out: float | None = None,
    gradient_power: float | None = None,
    draws: int = 1,
    seed: int = 0,
    split_qkv: bool = False,
    step: int = 8,
    min_rank: float | None = None,
    max_rank: float | None = None,
    sequential: bool = False,
    ridge: float = RIDGE,
    form: str | None = None,
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
            for classifiers) or ``"svd"``. None: fisher for classifiers, aware for others and for ``sequential``.
        ranks: ``"mixed"`` or ``"uniform"``.
        energy: what mixed ranks save: ``"weight"``, ``"output"``, ``"held_out"`` or ``"mixed"`` energy, or the
            divergence of the logits (``"sensitivity"``, for classifiers, measured layer by layer), see
            :func:`mixrank.allocate.allocate`. None: sensitivity for classifiers where it can be measured (the
            result says why not), ``"weight"`` for others, without images and for ``sequential``.
        sensitivity_images: how many images, drawn at random from those held out, the sensitivity is measured on: a
            quarter of them for a first plan, the others for the one that is used; of sparse weights all of them, once.
        centre: move the mean of what is lost into the bias; None: not for ``factors="svd"``.
        shrink: pull of the factors towards ``"svd"``, at least 0; guards against few calibration images. ``"auto"``:
            for each layer by the error on images held out; ``"oas"``: by the number of images; ``"measured"``, for
            classifiers: one for all layers, by the divergence of the whole compressed model on images held out, see
            :mod:`mixrank.measured_pull`. None: measured for fisher where it can be (the result says why not), else 0.3.
        fisher_shrink: pull of the gradients' Gram matrix towards the identity, for ``"fisher"``.
        weighting: how much each calibration token counts, see :mod:`mixrank.weighting`. None: by its gradients and
            alike, half and half, for fisher; else alike.
        held_out: share of the images on which factors made without them are judged, and the sensitivity measured; the
            factors in the model are made from all. None: a fifth, or none of fewer than five images.
        gradient_power: of each image's sum of squared gradients at a layer, in (0, 1]: below 1 few images of which the
            model is unsure do not decide all, see :mod:`mixrank.gradients`. None: 1, and 0.25 for sparse weights.
        draws: random probes of each image's answer where gradients are needed, see :mod:`mixrank.gradients`.
        seed: of these draws.
        split_qkv: give q, k and v ranks of their own instead of the fused layer's one.
        step: ranks are multiples of this.
        min_rank: lowest rank of a layer, a number or a share of its full rank.
        max_rank: highest rank of a layer, a number or a share of its full rank.
        sequential: fit each layer to the inputs that the compressed layers before it give, see
            :mod:`mixrank.sequential`. The ranks are those of the weights' energy, found without images, or (with
            another ``energy``) of a calibration of the dense model, so that ``images`` are gone through twice.
        ridge: pull of sequentially fitted weights towards the original ones, above 0.
        form: how layers of low rank are held: as ``"factors"``, or ``"pivoted"``: the same weights in fewer numbers, so
            higher ranks in the same budget, see :class:`mixrank.PivotedLinear`; factors suit bfloat16 better.
            ``"sparse"``: entries without structure beside factors, see :mod:`mixrank.compress_sparse`; of the other
            options only those of the budget, of gradients, ``sensitivity_images``, ``held_out``, ``seed`` and
            ``dtype`` are for it. ``"auto"``: for classifiers, pivoted or sparse, whichever is nearer to the dense
            model on a fifth of the images when made in a short way by the others, see :mod:`mixrank.forms`. None: auto
            on a CPU where it can be measured (the result says why not), else pivoted, and where options of low ranks
            are given.
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
    given = dict(locals())
    if form not in (None, *FORMS, "auto"):
        raise InputError(f"form must be one of {', '.join(FORMS)}, auto, but it was {form!r}")
    remarks: list[str] = []
    if form is None:
        form, images, reason = _usual_form(**given)
        given |= {"form": form, "images": images}
        remarks += reason
    if form == "auto":
        return _measured_form(**given)
    if form == "sparse":
        return _sparse(**given)
    watch = Stopwatch()
    undecided = images is not None and not sequential and None in (factors, energy)
    automatic = undecided and energy is None and ranks == "mixed"
    fisher = undecided and factors is None
    measured, unpulled = shrink == MEASURED and factors != "svd", shrink is None
    # What suits every model, so that all can be checked before the first image is touched.
    factors, energy = factors or "aware", energy or "weight"
    fused = dict(model.named_modules()) if split_qkv else {}
    exposed = expose_qkv_(model)
    split = split_qkv_(model) if split_qkv else ()
    try:
        allocation: Allocation = {
            "keep": keep, "max_bytes": max_bytes, "max_macs": max_macs, "ranks": ranks, "energy": energy, "step": step,
            "min_rank": min_rank, "max_rank": max_rank, "form": form,
        }  # fmt: skip
        calibrated = images is not None
        apart = calibrated and held_out != 0
        shrink, unweighted = first_pull(shrink), weighting is None
        weighting = weighting or "none"
        strategy: Strategy = {
            "factors": factors, "centre": centre, "shrink": shrink, "fisher_shrink": fisher_shrink,
        }  # fmt: skip
        centre = strategy["centre"] = check_strategy(**strategy, calibrated=calibrated, held_out=apart)
        measuring: Measuring = {
            "held_out": held_out, "weighting": weighting, "draws": draws, "gradients": factors == "fisher",
            "gradient_power": 1.0 if gradient_power is None else gradient_power,
        }  # fmt: skip
        check_calibration(model, **measuring)
        shapes = {name: LayerShape.of(linear, centre) for name, linear in compressible_linears(model).items()}
        check_budget(model, shapes, **allocation)
        alone = left_alone(model)
        remarks += remarks_of(alone, model)
        check_energy(energy, ranks, calibrated=calibrated, held_out=apart)
        twice = ranks == "mixed" and energy != "weight"
        if measured and (images is None or not apart or sequential):
            raise InputError("shrink='measured' needs images that are held out, and no sequential=True")
        if (undecided or measured) and images is not None:
            classifier, images = classifies(model, images)
            if measured and not classifier:
                raise InputError(f"shrink='measured' needs logits of classes, but {type(model).__name__} returns none")
            automatic, fisher = automatic and classifier, fisher and classifier
            if automatic:
                allocation["energy"] = "sensitivity"
            if fisher:
                strategy["factors"], measuring["gradients"] = "fisher", True
            if undecided and not classifier:
                remarks.append("the model returns no logits of classes, so the layers' outputs and weights decide all")
        if strategy["factors"] == "fisher":
            measured = measured or (unpulled and apart)
            measuring["weighting"] = AUTOMATIC if unweighted else weighting
        if sequential:
            check_sequential(images, factors, shrink, Weighting.of(weighting).kind, ridge, twice=twice)
        stats = None
        batches: Iterable = () if images is None else images
        sample = Sample(batches, sensitivity_images, seed, held_out)
        running: Running = {"progress": progress, "dtype": dtype}
        if calibrated and (twice or not sequential):
            with watch.stage("calibrate"):
                stats = calibrate(model, sample, seed=seed, **measuring, **running)
        svd: Strategy = {"factors": "svd", "centre": False}
        first = strategy if stats is not None or not sequential else svd

        def made(of: CalibrationStats | None, how: Strategy, **other: Any) -> dict[str, Factorisation]:
            found = decompose(model, of, progress=progress, **{**how, **other})
            return {name: replace(each, shape=shapes[name]) for name, each in found.items()}

        with watch.stage("decompose"):
            factorisations: Mapping[str, Factorisation] = made(stats, first)
        try:
            plan = plan_ranks(model, factorisations, sample, allocation, running, watch=watch)
        except InputError as error:
            if not automatic:
                raise
            allocation["energy"] = "weight"
            plan = plan_ranks(model, factorisations, sample, allocation, running, watch=watch)
            remarks.append(f"ranks go by the energy of the weights, as their sensitivity cannot be measured: {error}")
        ranks_of = plan.ranks()
        factorisations = {name: each.limited(ranks_of.get(name, 0)) for name, each in factorisations.items()}
        if measured and stats is not None and (stats.held_out is not None or not unpulled):
            try:
                with watch.stage("shrink"):
                    again = partial(made, how=strategy)
                    _, factorisations = measure_pull(model, plan, factorisations, stats, again, sample.parts, running)
            except InputError as error:
                if not unpulled:
                    raise
                remarks.append(f"shrink is {first_pull(None)}, as it cannot be measured: {error}")
        if sequential:
            del strategy["fisher_shrink"]
            with watch.stage("sequential"):
                fitted, count = compress_blocks_(model, batches, plan, ridge=ridge, strategy=strategy, **running)
            factorisations = {**factorisations, **fitted}
            put_(model, plan, fitted)
        else:
            count = 0 if stats is None else stats.all_images
            with watch.stage("apply"):
                apply_(model, plan, factorisations)
        reports = layer_reports(plan, factorisations)
    except BaseException:
        for name in split:
            model.set_submodule(name, fused[name])
        hide_qkv_(model, exposed)
        raise
    return CompressionResult(plan, reports, count, watch.seconds, remarks + notes(reports, stats), alone)


def _usual_form(model: nn.Module, images: Iterable | None, **options: Any) -> tuple[str, Iterable | None, list[str]]:
    """The form where none is given, all images again, and a remark where somebody may wonder."""
    parameter = next(model.parameters(), None)
    elsewhere = parameter is not None and parameter.device.type != "cpu"
    if images is None or elsewhere or are_several() or _of_low_ranks(options) or options["held_out"] == 0:
        return FORM, images, []
    classifier, images = classifies(model, images)
    if not classifier or getattr(images, "views", 1) != 1:
        return FORM, images, []
    if (reason := unmeasurable(images)) is not None:
        return FORM, images, [f"layers are {FORM}, as no other form can be tried: {reason}"]
    return "auto", images, []


def _measured_form(model: nn.Module, images: Iterable | None, **options: Any) -> CompressionResult:
    """Compress to the form that is measured to be the better one."""
    if images is None:
        raise InputError("form='auto' needs calibration images, but there were none")

    def make(trial: nn.Module, batches: Iterable, form: str, **short: Any) -> CompressionResult:
        suited = {name: value for name, value in options.items() if form != "sparse" or name in FOR_SPARSE}
        return compress(trial, batches, **(suited | short | {"form": form}))

    def tried(trial: nn.Module, batches: Iterable, form: str) -> CompressionResult:
        if form == "sparse":
            return make(trial, batches, form, held_out=0.0)
        few = min(options["sensitivity_images"], TRIAL_IMAGES)
        shrink = first_pull(None) if options["shrink"] is None else options["shrink"]
        return make(trial, batches, form, sensitivity_images=few, shrink=shrink)

    watch = Stopwatch()
    with watch.stage("form"):
        found = measure_forms(model, images, tried, dtype=options["dtype"])
    form, told = best_of(found)
    result = make(model, images, form)
    result.notes.append(told)
    result.seconds.update(watch.seconds)
    return result


def _sparse(model: nn.Module, images: Iterable | None, **options: Any) -> CompressionResult:
    """Compress to sparse weights; options of low ranks are refused."""
    if images is None:
        raise InputError("form='sparse' needs calibration images, but there were none")
    for name in _of_low_ranks(options):
        raise InputError(f"{name} is of low ranks and must be left out for form='sparse', but it was {options[name]!r}")
    return compress_sparse_(model, images, **{name: options[name] for name in FOR_SPARSE})


def _of_low_ranks(options: Mapping[str, Any]) -> list[str]:
    """Names of the options that are given and that sparse weights do not take."""
    defaults = {name: one.default for name, one in inspect.signature(compress).parameters.items()}
    others = (name for name in options if name not in FOR_SPARSE and name != "form")
    return [name for name in others if options[name] != defaults[name]]


def check_energy(energy: str, ranks: str, *, calibrated: bool, held_out: bool) -> None:
    """Raise InputError where mixed ranks go by an energy that the statistics to come will not have."""
    needed = ENERGIES[energy] if ranks == "mixed" else None
    if needed is not None and not (held_out if "held-out" in needed else calibrated):
        raise InputError(f"energy={energy!r} needs {needed}, but there are none")


def check_sequential(
    images: Iterable | None, factors: str, shrink: float | str, weighting: str, ridge: float, *, twice: bool
) -> None:
    """Raise InputError for what sequential calibration cannot do."""
    check_ridge(ridge)
    if are_several():
        raise InputError("sequential=True works in one process, as each block needs all images through the one before")
    if images is None:
        raise InputError("sequential=True needs calibration images, but there were none")
    if factors == "fisher" or shrink == "auto" or weighting != "none":
        raise InputError(
            "sequential=True takes factors='aware' or 'svd', a number or 'oas' as shrink and no weighting, but "
            f"factors={factors!r}, shrink={shrink!r} and weighting={weighting!r} were given"
        )
    if twice and isinstance(images, Iterator):
        raise InputError(
            "sequential=True with an energy other than 'weight' goes through the images twice, but they were an "
            "iterator: give a list or a loader"
        )
