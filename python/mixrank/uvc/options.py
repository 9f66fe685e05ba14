"""How a model is trained and compressed by training, and what came of it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import ClassVar

from mixrank.errors import InputError


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """All that decides a training, beside the model and the data.

    Attributes:
        epochs: of the whole run; need not be whole.
        learning_rate: the highest, of AdamW.
        weight_decay: of AdamW, not for biases and norms.
        smoothing: of labels.
        mixup: alpha of mixup; 0: none.
        cutmix: alpha of CutMix; 0: none.
        distillation: share of the distance from the teacher in the loss.
        temperature: of that distance.
        clip: largest norm of the gradient.
        ema: decay of the average of the weights, for each step; 0: none.
        seed: of everything drawn.
    """

    epochs: float = 10.0
    learning_rate: float = 3e-4
    weight_decay: float = 0.05
    smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    distillation: float = 0.5
    temperature: float = 1.0
    clip: float = 1.0
    ema: float = 0.998
    seed: int = 0

    _POSITIVE: ClassVar[tuple[str, ...]] = ("epochs", "learning_rate", "temperature", "clip")
    _SHARES: ClassVar[tuple[str, ...]] = ("smoothing", "distillation", "ema")
    _NOT_NEGATIVE: ClassVar[tuple[str, ...]] = ("weight_decay", "mixup", "cutmix")

    def check(self) -> None:
        """Raise InputError unless every option lies in its range."""
        for name in self._POSITIVE:
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be above 0, but it was {getattr(self, name)}")
        for name in self._SHARES:
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 0 and below 1, but it was {getattr(self, name)}")
        for name in self._NOT_NEGATIVE:
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be at least 0, but it was {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class UVCOptions(FinetuneOptions):
    """The same for a run that also learns what can go; the average is then that of the weights of what stays.

    Attributes:
        budget: share of the multiply-adds that may remain, in (0, 1).
        warm_up: share of the run before anything is removed.
        search: share of the run in which it is learnt what goes; the rest trains what stays.
        interval: steps between updates of shares, multipliers and gates; fewer in a search too short for 20 updates.
        share_speed: how many times over a share can change by 1 while the target falls.
        group_speed: by how much a multiplier of groups grows in that time, of groups that hold all energy.
        gate_speed: by how much the logit of a gate can change in that time.
        gate_weight: of the multiplier of the budget in the gradient of the gates.
        gate_temperature: of the samples of the gates.
        reached: share of the search after which the target is the budget.
        observed: training images by which it is told what a group means to the loss, when the search begins and again
            when groups go, and what those that stay can take over; 0: groups go by their norms alone, as in the paper.
        multiple: of which the numbers of columns of a head and of neurons of a block are that stay; processors like 8.
            Above 1 the heads of a block keep equally many columns, in steps of a quarter of a head at least.
    """

    budget: float = 0.5
    warm_up: float = 0.0
    search: float = 0.05
    interval: int = 5
    share_speed: float = 3.0
    group_speed: float = 20.0
    gate_speed: float = 10.0
    gate_weight: float = 0.01
    gate_temperature: float = 0.5
    reached: float = 0.7
    observed: int = 1024
    multiple: int = 8

    _POSITIVE = (*FinetuneOptions._POSITIVE, "gate_temperature", "gate_speed", "share_speed", "group_speed")
    _SHARES = (*FinetuneOptions._SHARES, "warm_up", "search")
    _NOT_NEGATIVE = (*FinetuneOptions._NOT_NEGATIVE, "gate_weight", "observed")

    def check(self) -> None:
        """Raise InputError unless every option lies in its range."""
        if not 0 < self.budget < 1:
            raise InputError(f"budget must be above 0 and below 1, but it was {self.budget}")
        super().check()
        if self.interval < 1:
            raise InputError(f"interval must be at least 1, but it was {self.interval}")
        if self.multiple < 1:
            raise InputError(f"multiple must be at least 1, but it was {self.multiple}")
        if not 0 < self.reached <= 1:
            raise InputError(f"reached must be above 0 and at most 1, but it was {self.reached}")
        if not 0 < self.search <= 1 - self.warm_up:
            raise InputError(f"search must be above 0 and at most {1 - self.warm_up:g}, but it was {self.search}")


@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """What a training did.

    Attributes:
        before: top-1 on the validation images before, in percent; None without such images.
        after: the same at the end.
        history: of each epoch: step, top-1; of a search also of each update: loss, R, target, z, gates, shares,
            multipliers.
        steps: of the run.
        seconds: wall-clock time, that of an interrupted run that was gone on with included.
        options: of the run.
    """

    before: float | None
    after: float | None
    history: list[dict] = field(repr=False)
    steps: int
    seconds: float
    options: FinetuneOptions

    def to_json(self) -> dict:
        """Return the result in terms of JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Removed:
    """Multiply-adds of one image that went, by what took them along."""

    blocks: int
    heads: int
    columns: int
    neurons: int


@dataclass(frozen=True, kw_only=True)
class UVCResult(FinetuneResult):
    """What a run did that also learnt what can go.

    Attributes:
        macs_before: multiply-adds of one image.
        macs_after: the same of what stays.
        removed: what took them along.
        blocks: for each block that stays, its index in the first model, columns of each head, and neurons.
        landed: top-1 when the groups had just been removed.
    """

    macs_before: int
    macs_after: int
    removed: Removed
    blocks: list[dict]
    landed: float | None
