"""The ranks of a model's layers: allocated, and where sensitivity decides, measured and allocated again."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from mixrank.allocate import NEAR, allocate, ranks_to_measure
from mixrank.arguments import Allocation, Running
from mixrank.decompose import Factorisation
from mixrank.plan import Plan
from mixrank.sample import Sample
from mixrank.sensitivity import measure_sensitivity
from mixrank.stopwatch import Stopwatch

SENSITIVITY_IMAGES = 48
SENSITIVITY_ROUNDS = 2


def plan_ranks(
    model: nn.Module,
    factorisations: Mapping[str, Factorisation],
    sample: Sample,
    allocation: Allocation,
    running: Running,
    *,
    watch: Stopwatch | None = None,
    rounds: int = SENSITIVITY_ROUNDS,
) -> Plan:
    """The plan of an allocation; sensitivity is measured at one by weight energy, then at the plan that it gives.

    Args:
        model: the dense model.
        factorisations: of its layers.
        sample: the images to measure sensitivity on, after they were gone through.
        allocation: arguments of :func:`mixrank.allocate.allocate`.
        running: ``dtype`` and ``progress`` of :func:`mixrank.sensitivity.measure_sensitivity`.
        watch: notes the stages ``allocate`` and ``sensitivity``.
        rounds: how often sensitivity is measured.

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
        for number in range(rounds):
            ranks = ranks_to_measure(model, factorisations, plan)
            found = measure_sensitivity(model, ranks, factorisations, sample.parts, **running)
            near = NEAR[min(number, len(NEAR) - 1)]
            plan = allocate(model, factorisations, sensitivities=found, near=near, **allocation)
    return plan
