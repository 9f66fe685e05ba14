"""The ranks of a model's layers: allocated, and where sensitivity decides, measured and allocated again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from mixrank.allocate import NEAR, allocate, ranks_to_measure
from mixrank.arguments import Allocation, Running
from mixrank.decompose import Factorisation
from mixrank.measured_pull import measure_pull
from mixrank.plan import Plan
from mixrank.sample import PART, Sample
from mixrank.sensitivity import measure_sensitivity
from mixrank.stats import CalibrationStats
from mixrank.stopwatch import Stopwatch

SENSITIVITY_IMAGES = 128
SENSITIVITY_ROUNDS = (0.25, 0.75)
"""The share of these that each round of measurements has. The last one decides, on images that no plan was made by."""


def plan_ranks(
    model: nn.Module,
    factorisations: Mapping[str, Factorisation],
    sample: Sample,
    allocation: Allocation,
    running: Running,
    *,
    watch: Stopwatch | None = None,
    rounds: Sequence[float] = SENSITIVITY_ROUNDS,
) -> Plan:
    """The plan of an allocation; sensitivity is measured at one by weight energy, then at the plan that it gives.

    Args:
        model: the dense model.
        factorisations: of its layers.
        sample: the images to measure sensitivity on, after they were gone through.
        allocation: arguments of :func:`mixrank.allocate.allocate`.
        running: ``dtype`` and ``progress`` of :func:`mixrank.sensitivity.measure_sensitivity`.
        watch: notes the stages ``allocate`` and ``sensitivity``.
        rounds: the share of the sample that sensitivity is measured on, in (0, 1], once for each share: one portion
            after the other, and after the last image the first.

    Raises:
        InputError: from :func:`mixrank.allocate.allocate` and :func:`mixrank.sensitivity.measure_sensitivity`.
    """
    watch = watch or Stopwatch()
    measured = allocation["energy"] == "sensitivity" and allocation["ranks"] == "mixed"
    first = allocation.copy()
    if allocation["energy"] == "sensitivity":
        first["energy"] = "weight"
    with watch.stage("allocate"):
        plan = allocate(model, factorisations, **first)
    if not measured:
        return plan
    with watch.stage("sensitivity"):
        for number, portion in enumerate(portions(sample.images, rounds)):
            ranks = ranks_to_measure(model, factorisations, plan)
            found = measure_sensitivity(model, ranks, factorisations, portion.split(PART), **running)
            near = NEAR[min(number, len(NEAR) - 1)]
            plan = allocate(model, factorisations, sensitivities=found, near=near, **allocation)
    return plan


def plan_and_pull(
    model: nn.Module,
    first: Mapping[str, Factorisation],
    stats: CalibrationStats,
    make: Callable[..., Mapping[str, Factorisation]],
    sample: Sample,
    allocation: Allocation,
    running: Running,
    *,
    watch: Stopwatch | None = None,
) -> tuple[Plan, dict[str, float], Mapping[str, Factorisation]]:
    """:func:`plan_ranks`, then the pull that suits this plan, on the same images.

    Args:
        model: the dense model.
        first: the factorisations that the ranks go by, with the pull :data:`mixrank.measured_pull.FIRST`.
        stats: the statistics that these were made from.
        make: as for :func:`mixrank.measured_pull.measure_pull`.
        sample: as for :func:`plan_ranks`, of images held out.
        allocation: the same.
        running: the same, and for :func:`mixrank.measured_pull.measure_pull`.
        watch: notes the stage ``shrink`` too.

    Returns:
        The plan, the pull and its factorisations.

    Raises:
        InputError: from both.
    """
    watch = watch or Stopwatch()
    plan = plan_ranks(model, first, sample, allocation, running, watch=watch)
    with watch.stage("shrink"):
        return plan, *measure_pull(model, plan, first, stats, make, sample.parts, running)


def portions(images: Tensor, shares: Sequence[float]) -> Iterator[Tensor]:
    """A share of the images ``[B, ...]`` after the other, at least one image each, beginning again where they end."""
    first = 0
    for share in shares:
        count = max(1, round(share * len(images)))
        yield images[torch.arange(first, first + count) % len(images)]
        first += count
