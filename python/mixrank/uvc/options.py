"""How a model is compressed by training, and what came of it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field

from mixrank.errors import InputError

_POSITIVE = (
    "epochs",
    "learning_rate",
    "temperature",
    "gate_temperature",
    "gate_speed",
    "share_speed",
    "group_speed",
    "clip",
)
_SHARES = ("warm_up", "search", "smoothing", "distillation", "ema")
_NOT_NEGATIVE = ("weight_decay", "gate_weight", "mixup", "cutmix")


@dataclass(frozen=True)
class UVCOptions:
    """All that decides a run, beside the model and the data.

    Attributes:
        budget: share of the multiply-adds that may remain, in (0, 1).
        epochs: of the whole run; need not be whole.
        warm_up: share of the run before anything is removed.
        search: share of the run in which it is learnt what goes; the rest trains what stays.
        learning_rate: the highest, of AdamW, in both parts.
        weight_decay: of AdamW, not for biases and norms.
        smoothing: of labels.
        mixup: alpha of mixup; 0: none.
        cutmix: alpha of CutMix; 0: none.
        distillation: share of the distance from the model before compression in the loss.
        temperature: of that distance.
        clip: largest norm of the gradient.
        interval: steps between updates of shares, multipliers and gates.
        share_speed: how many times over a share can change by 1 while the target falls.
        group_speed: by how much a multiplier of groups grows in that time, of groups that hold all energy.
        gate_speed: by how much the logit of a gate can change in that time.
        gate_weight: of the multiplier of the budget in the gradient of the gates.
        gate_temperature: of the samples of the gates.
        reached: share of the search after which the target is the budget.
        ema: decay of the average of the weights of what stays, for each step; 0: none.
        seed: of everything drawn.
    """

    budget: float = 0.5
    epochs: float = 10.0
    warm_up: float = 0.1
    search: float = 0.4
    learning_rate: float = 3e-4
    weight_decay: float = 0.05
    smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    distillation: float = 0.5
    temperature: float = 1.0
    clip: float = 1.0
    interval: int = 5
    share_speed: float = 3.0
    group_speed: float = 20.0
    gate_speed: float = 10.0
    gate_weight: float = 0.01
    gate_temperature: float = 0.5
    reached: float = 0.7
    ema: float = 0.998
    seed: int = 0

    def check(self) -> None:
        """Raise InputError unless every option lies in its range."""
        if not 0 < self.budget < 1:
            raise InputError(f"budget must be above 0 and below 1, but it was {self.budget}")
        for name in _POSITIVE:
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be above 0, but it was {getattr(self, name)}")
        for name in _SHARES:
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 0 and below 1, but it was {getattr(self, name)}")
        for name in _NOT_NEGATIVE:
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be at least 0, but it was {getattr(self, name)}")
        if self.interval < 1:
            raise InputError(f"interval must be at least 1, but it was {self.interval}")
        if not 0 < self.reached <= 1:
            raise InputError(f"reached must be above 0 and at most 1, but it was {self.reached}")
        if not 0 < self.search <= 1 - self.warm_up:
            raise InputError(f"search must be above 0 and at most {1 - self.warm_up:g}, but it was {self.search}")


@dataclass(frozen=True)
class Removed:
    """Multiply-adds of one image that went, by what took them along."""

    blocks: int
    heads: int
    columns: int
    neurons: int


@dataclass(frozen=True)
class UVCResult:
    """What a run did.

    Attributes:
        macs_before: multiply-adds of one image.
        macs_after: the same of what stays.
        removed: what took them along.
        blocks: for each block that stays, its index in the first model, columns of each head, and neurons.
        before: top-1 on the validation images before, in percent; None without such images.
        landed: the same when the groups had just been removed.
        after: the same at the end.
        history: of each update and each epoch: step, loss, R, target, z, gates, shares, multipliers, top-1.
        steps: of the run.
        seconds: wall-clock time, that of an interrupted run that was gone on with included.
        options: of the run.
    """

    macs_before: int
    macs_after: int
    removed: Removed
    blocks: list[dict]
    before: float | None
    landed: float | None
    after: float | None
    history: list[dict] = field(repr=False)
    steps: int
    seconds: float
    options: UVCOptions

    def to_json(self) -> dict:
        """Return the result in terms of JSON."""
        return asdict(self)
