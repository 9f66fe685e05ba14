"""The strategies that the real ViT-B/16 is compressed by, and the shapes that the defaults gave it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from mixrank.allocate import plan_of
from mixrank.compress import FORM
from mixrank.decompose import Factorisation
from mixrank.measured_pull import FIRST
from mixrank.plan import Plan
from mixrank.planning import SENSITIVITY_IMAGES
from mixrank.shrinkage import MEASURED
from mixrank.weighting import AUTOMATIC, Weighting

KEEPS = (0.6, 0.5, 0.4)


@dataclasses.dataclass(frozen=True)
class Strategy:
    """One way to compress; the fields are the arguments of :func:`mixrank.compress`."""

    keep: float
    factors: str
    ranks: str
    energy: str
    centre: bool
    split_qkv: bool
    shrink: float | str = 0.0
    form: str = "factors"
    weighting: str = "none"
    level: float | None = None
    sensitivity_images: int = SENSITIVITY_IMAGES  # in rows 48 too: each round on the same ones

    @property
    def tokens(self) -> Weighting:
        """How much each calibration token counts."""
        return Weighting(self.weighting, self.level)


def strategies() -> Iterator[Strategy]:
    """Every strategy at every budget; for uniform ranks the energy plays no part."""
    choices = itertools.product(("svd", "aware"), (("mixed", "weight"), ("uniform", "weight"), ("mixed", "output")))
    for (factors, (ranks, energy)), centre, split in itertools.product(choices, (False, True), (False, True)):
        for keep in KEEPS:
            yield Strategy(keep, factors, ranks, energy, centre, split)
    for keep, shrink in itertools.product(KEEPS, (0.3, 1.0)):
        yield Strategy(keep, "aware", "mixed", "weight", True, False, shrink)
    for keep, energy, form in itertools.product(KEEPS, ("weight", "sensitivity"), ("factors", "pivoted")):
        if (energy, form) != ("weight", "factors"):
            yield Strategy(keep, "aware", "mixed", energy, True, False, 0.3, form)
    yield from map(low_ranks, KEEPS)
    for keep in KEEPS:
        alike = dataclasses.replace(low_ranks(keep), weighting="none", level=None)
        yield from (alike, dataclasses.replace(alike, shrink=FIRST), dataclasses.replace(low_ranks(keep), shrink=FIRST))


def low_ranks(keep: float) -> Strategy:
    """What :func:`mixrank.compress` does with ``form="pivoted"`` and without other options."""
    tokens = (AUTOMATIC.kind, AUTOMATIC.level)
    return Strategy(keep, "fisher", "mixed", "sensitivity", True, False, MEASURED, FORM, *tokens)


def speed_name(keep: float) -> str:
    """What rows of speed call the model of these."""
    return f"keep {keep}, low ranks"


def low_rank_plans(
    dense: nn.Module, factorisations: Mapping[str, Factorisation], rows: Sequence[Mapping[str, Any]]
) -> dict[float, Plan]:
    """The plans of :func:`low_ranks` by budget: of the ranks in the last row of each.

    With factors of the plain SVD a model of such a plan is as fast as the one that was measured: only shapes count.
    """
    plans = {}
    for row in rows:
        strategy = Strategy(**row["strategy"]) if row["kind"] == "strategy" else None
        if strategy is not None and strategy == low_ranks(strategy.keep):
            plans[strategy.keep] = plan_of(dense, factorisations, row["ranks"], strategy.form)
    return plans
