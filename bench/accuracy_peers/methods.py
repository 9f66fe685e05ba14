"""Every method by the name that its rows of results carry, with its source, and what it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from mixrank.allocate import allocate
from mixrank.apply import apply_
from mixrank.arguments import Allocation, Running
from mixrank.calibrate import calibrate
from mixrank.compress import FORM, compress
from mixrank.counting import count_bytes, count_macs
from mixrank.decompose import Factorisation, decompose
from mixrank.measured_pull import FIRST, first_pull
from mixrank.plan import Plan
from mixrank.planning import SENSITIVITY_IMAGES, plan_and_pull, plan_ranks
from mixrank.sample import Sample
from mixrank.shrinkage import MEASURED
from mixrank.sparse_fit import put_sparse_, sparse_statistics
from mixrank.sparse_sensitivity import weigh_layers
from mixrank.stats import CalibrationStats
from mixrank.weighting import AUTOMATIC, Weighting
from mixrank_bench.accuracy_peers import asvd, asvd_search, corda, eva, oats, structured, svd_llm
from mixrank_bench.accuracy_peers.factored import Compressed, compress_mixed, compress_uniform, compressed
from mixrank_bench.accuracy_peers.statistics import Calibration


@dataclass(frozen=True)
class Method:
    """One way to compress a model without training.

    Attributes:
        source: where it was published.
        ranks: how the budget is shared among the layers.
        prepare: what it does once for all budgets, from the dense model, which it leaves as it is.
        compress: the model, what ``prepare`` returned and the share of all parameters that may remain; it changes the
            model in place.
        reads_inputs: whether it reads the statistics of the inputs, which take a pass of the model.
    """

    source: str
    ranks: str
    prepare: Callable[[nn.Module, Calibration], Any]
    compress: Callable[[nn.Module, Any, float], Compressed]
    reads_inputs: bool = False


def _plain(model: nn.Module, _calibration: Calibration) -> dict[str, Factorisation]:
    return decompose(model, factors="svd")


def _images(_model: nn.Module, calibration: Calibration) -> Calibration:
    return calibration


def _product(model: nn.Module, factorisations: Mapping[str, Factorisation], keep: float, **options: Any) -> Compressed:
    plan = allocate(model, factorisations, keep=keep, **options)
    return compressed(apply_(model, plan, factorisations), plan)


@dataclass(frozen=True)
class _Calibrated:
    """What :func:`mixrank.compress` makes of the images before it knows the budget."""

    sample: Sample
    stats: CalibrationStats
    make: Callable[..., dict[str, Factorisation]]
    running: Running


def _calibrated(model: nn.Module, calibration: Calibration, *, weighting: str | Weighting = AUTOMATIC) -> _Calibrated:
    running: Running = {"dtype": calibration.dtype, "progress": False}
    sample = Sample(calibration.images, SENSITIVITY_IMAGES, seed=0, held_out=None)
    stats = calibrate(model, sample, gradients=True, weighting=weighting, held_out=None, **running)
    return _Calibrated(sample, stats, partial(decompose, model, factors="fisher"), running)


def _ours(model: nn.Module, found: _Calibrated, keep: float, *, shrink: float | str = MEASURED) -> Compressed:
    allocation: Allocation = {"keep": keep, "ranks": "mixed", "energy": "sensitivity", "form": FORM}
    first: Mapping[str, Factorisation] = found.make(found.stats, shrink=first_pull(shrink))
    if shrink == MEASURED:
        plan, _, first = plan_and_pull(model, first, found.stats, found.make, found.sample, allocation, found.running)
    else:
        plan = plan_ranks(model, first, found.sample, allocation, found.running)
    return compressed(apply_(model, plan, first), plan)


def _for_sparse(model: nn.Module, calibration: Calibration) -> tuple[CalibrationStats, Sequence[Tensor], Running]:
    running: Running = {"dtype": calibration.dtype, "progress": False}
    sample = Sample(calibration.images, SENSITIVITY_IMAGES, 0, None)
    return sparse_statistics(model, sample, held_out=None, **running), sample.parts, running


def _sparse(model: nn.Module, made: tuple[CalibrationStats, Sequence[Tensor], Running], keep: float) -> Compressed:
    stats, judging, running = made
    weights = weigh_layers(model, stats, judging, {"keep": keep}, **running)
    return _detailed(model, put_sparse_(model, stats, keep, weights=weights)[0])


def _defaults(model: nn.Module, calibration: Calibration, keep: float) -> Compressed:
    result = compress(model, calibration.images, keep, dtype=calibration.dtype)
    found = _detailed(model, result.plan)
    return Compressed(found.parameters, found.details | {"notes": result.notes})


def _detailed(model: nn.Module, plan: Plan) -> Compressed:
    """With what a sparse layer costs, which its rank does not tell."""
    found = compressed(model, plan)
    entries = {layer.name: layer.entries for layer in plan.layers}
    return Compressed(
        found.parameters,
        found.details | {"entries": entries, "bytes": count_bytes(model), "macs": count_macs(model)},
    )


UNIFORM, MIXED, SEARCHED, ONE_RATIO = "uniform", "mixed", "searched", "one ratio"
ASVD = "Yuan et al. 2023, arXiv 2312.05821"
TORCH_PRUNING = "Fang et al. 2023, arXiv 2301.12900; Torch-Pruning 1.6"

METHODS = {
    "plain SVD, mixed": Method("Eckart and Young 1936", MIXED, _plain, _product),
    "plain SVD, uniform": Method("Eckart and Young 1936", UNIFORM, _plain, partial(_product, ranks="uniform", step=1)),
    "ASVD, uniform": Method(ASVD, UNIFORM, asvd.prepare, compress_uniform, True),
    "ASVD, mixed": Method(ASVD, MIXED, asvd.prepare, compress_mixed, True),
    "SVD-LLM": Method("Wang et al. 2024, arXiv 2403.07378", UNIFORM, svd_llm.prepare, compress_uniform, True),
    "CorDA": Method("Yang et al. 2024, arXiv 2406.05223", UNIFORM, corda.prepare, compress_uniform, True),
    "EVA": Method("Paischer et al. 2024, arXiv 2410.07170", UNIFORM, eva.prepare, compress_uniform, True),
    "mixrank, low ranks": Method("this library", MIXED, _calibrated, _ours),
    "mixrank, tokens alike": Method(
        "this library", MIXED, partial(_calibrated, weighting="none"), partial(_ours, shrink=FIRST)
    ),
    "mixrank, sparse": Method("this library", MIXED, _for_sparse, _sparse),
    "mixrank, defaults": Method("this library", MIXED, _images, _defaults),
    "OATS": Method("Zhang and Papyan 2024, arXiv 2409.13652", UNIFORM, _images, oats.compress),
    "Torch-Pruning, uniform": Method(TORCH_PRUNING, ONE_RATIO, _images, partial(structured.compress, bottleneck=False)),
    "Torch-Pruning, bottleneck": Method(
        TORCH_PRUNING, ONE_RATIO, _images, partial(structured.compress, bottleneck=True)
    ),
    "ASVD, searched": Method(ASVD, SEARCHED, asvd_search.prepare, asvd_search.compress, True),
}
