"""The variants of the ablation: what each switch is set to, everything else as in the reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mixrank.planning import SENSITIVITY_IMAGES, SENSITIVITY_ROUNDS
from mixrank.shrinkage import MEASURED
from mixrank.sparse_sensitivity import POWER
from mixrank.weighting import AUTOMATIC, WEIGHTINGS


@dataclass(frozen=True)
class Variant:
    """What differs from the reference.

    Attributes:
        switch: what is switched.
        value: to what.
        images: how many of the images, spread evenly; None: all.
        views: random views of each image that are added.
        calibration: arguments of :func:`mixrank.calibrate`.
        factors: arguments of :func:`mixrank.decompose`; the pull may be measured.
        ridge: fits the layers in sequence with this pull.
        allocation: arguments of :func:`mixrank.allocate`; None: the ranks of the reference.
        sparse: arguments of :func:`mixrank.sparse_fit.put_sparse_`, which then makes the layers; None: factors.
        weighed: sparse layers count by this power of what they were measured to do; 0: as foretold.
        blocks: size of the blocks of a sparse residual and their share of a layer's numbers; None: no such residual.
        training: options of a training afterwards; None: none.
        sensitivity: how many images it is measured on, and which share of them in each round.
        seen: measure it on images that the factors were made from, and without others to judge them.
        split: factor q, k and v apart.
        by_heart: judge it on images that the factors were made from too.
    """

    switch: str
    value: str
    images: int | None = None
    views: int = 0
    calibration: Mapping[str, Any] = field(default_factory=dict)
    factors: Mapping[str, Any] = field(default_factory=dict)
    ridge: float | None = None
    allocation: Mapping[str, Any] | None = None
    sparse: Mapping[str, Any] | None = None
    weighed: float = POWER
    blocks: tuple[int, float] | None = None
    training: Mapping[str, Any] | None = None
    sensitivity: tuple[int, tuple[float, ...]] = (48, (1.0, 1.0))
    seen: bool = False
    split: bool = False
    by_heart: bool = False

    @property
    def statistics(self) -> tuple:
        """What the statistics depend on."""
        return (self.images, self.views, self.seen, self.sensitivity[0], tuple(self.calibration.items()), self.split)


BASE = Variant("reference", "", allocation={})
DEFAULTS: dict[str, Any] = {
    "calibration": {"weighting": AUTOMATIC},
    "allocation": {},
    "sensitivity": (SENSITIVITY_IMAGES, SENSITIVITY_ROUNDS),
}
FORETOLD = "layers by squared gradients alone"
BOTH_MEASURED = {"shrink": MEASURED, "fisher_shrink": MEASURED}
VARIANTS = (
    BASE,
    Variant("defaults", "of low ranks", factors={"shrink": MEASURED}, **DEFAULTS),
    Variant("defaults", "of low ranks, with a measured pull of the metric", factors=BOTH_MEASURED, **DEFAULTS),
    Variant("factors", "plain SVD", factors={"factors": "svd", "centre": True}),
    Variant("factors", "plain SVD, not centred", factors={"factors": "svd", "centre": False}),
    Variant("factors", "activation-aware", factors={"factors": "aware"}),
    Variant("factors", "activation-aware, not centred", factors={"factors": "aware", "centre": False}),
    Variant("factors", "not centred", factors={"centre": False}),
    *(Variant("pull of the metric", f"{pull:g}", factors={"fisher_shrink": pull}) for pull in (0.5, 1.0, 5.0, 10.0)),
    *(Variant("shrink", str(pull), factors={"shrink": pull}) for pull in (0.0, 0.1, 1.0, 3.0, "auto", "oas", MEASURED)),
    Variant("shrink", "measured, and the pull of the metric", factors=BOTH_MEASURED),
    Variant("ranks", "uniform", allocation={"ranks": "uniform", "energy": "weight"}),
    *(Variant("energy", kind, allocation={"energy": kind}) for kind in ("weight", "output", "held_out", "mixed")),
    Variant("sensitivity", "one round", allocation={}, sensitivity=(48, (1.0,))),
    Variant("sensitivity", "three rounds", allocation={}, sensitivity=(48, (1.0, 1.0, 1.0))),
    Variant("form", "factors", allocation={"form": "factors"}),
    *(Variant("rank step", str(step), allocation={"step": step}) for step in (4, 16)),
    Variant("least rank", "a twelfth", allocation={"min_rank": 1 / 12}),
    Variant("highest rank", "a half", allocation={"max_rank": 0.5}),
    Variant("sensitivity", "on 32 images, then on 96 others", allocation={}, sensitivity=(128, (0.25, 0.75))),
    Variant("sensitivity", "on images that the factors were made from", allocation={}, seen=True),
    Variant("qkv", "split", allocation={}, split=True),
    Variant("images", "all", by_heart=True),  # first, as it has the statistics of the reference
    *(Variant("images", str(count), images=count, by_heart=True) for count in (100, 200, 400)),
    Variant("views", "2 random ones of each image more", views=2),
    *(Variant("weighting", kind, calibration={"weighting": kind}) for kind in WEIGHTINGS if kind != "none"),
    *(
        Variant(
            "weighting",
            f"gradient and alike, shrink {pull}",
            calibration={"weighting": AUTOMATIC},
            factors={"shrink": pull},
        )
        for pull in (0.1, 0.3, 0.6, 1.0, MEASURED)
    ),
    *(Variant("power of gradients", f"{power:g}", calibration={"gradient_power": power}) for power in (0.5, 0.25, 0.1)),
    Variant(
        "power of gradients",
        "0.25, tokens by gradient and alike",
        calibration={"weighting": AUTOMATIC, "gradient_power": 0.25},
    ),
    Variant("sparse weights", "a fifth of the numbers in factors", sparse={}),
    *(
        Variant("sparse weights", f"layers by power {power:g} of what was measured", sparse={}, weighed=power)
        for power in (0.2, 1.0)
    ),
    Variant("sparse weights", "pull of the covariance 1", sparse={"pull": 1.0}),
    Variant("sparse weights", FORETOLD, sparse={}, weighed=0),
    *(
        Variant("sparse weights", f"{FORETOLD}, {share:.0%} in factors", sparse={"rank_share": share}, weighed=0)
        for share in (0.0, 0.5, 0.7)
    ),
    Variant("sparse weights", "gradients as they are", sparse={}, calibration={"gradient_power": 1.0}),
    Variant(
        "sparse weights",
        f"{FORETOLD}, these as they are",
        sparse={},
        calibration={"gradient_power": 1.0},
        weighed=0,
    ),
    Variant("probes", "4 of each image", calibration={"draws": 4}),
    *(Variant("sequential", f"ridge {ridge:g}", ridge=ridge) for ridge in (0.1, 1.0, 10.0)),
    *(
        Variant("sparse residual", f"blocks of {size}, {share:.0%} of the numbers", blocks=(size, share))
        for size, share in ((16, 0.1), (16, 0.3), (32, 0.1))
    ),
    Variant("training", "of the factors, through the whole model", training={}),
    Variant("training", "logits alone", training={"feature_weight": 0.0}),
    Variant("training", "each block by itself", training={"scope": "block"}),
    Variant("training", "each layer by itself", training={"scope": "layer"}),
    Variant("training", "of a residual of rank 16", training={"trained": "residual"}),
    Variant("training", "of all parameters", training={"trained": "all"}),
    Variant("training", "without random views", training={"min_scale": 1.0}),
    Variant("training", "half of the views mixed", training={"mix": 0.5}),
    Variant("training", "all views mixed", training={"mix": 1.0}),
    *(Variant("training", f"learning rate {rate:g}", training={"learning_rate": rate}) for rate in (1e-5, 5e-5, 1e-4)),
)
