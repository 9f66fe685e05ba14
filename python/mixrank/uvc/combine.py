"""One budget for both systems: parts of the model are removed, then the ranks of what stays are lowered."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from mixrank.compress import compress
from mixrank.counting import count_macs
from mixrank.errors import InputError
from mixrank.nn_pivoted import put_back_, unpivot_
from mixrank.processes import are_several
from mixrank.result import CompressionResult
from mixrank.uvc.data import TrainingData
from mixrank.uvc.finetune import become, finetune_
from mixrank.uvc.options import FinetuneOptions, FinetuneResult, UVCOptions, UVCResult
from mixrank.uvc.run import compress_uvc_
from mixrank.uvc.split import measure_split

POWER = 0.25
"""Where it is not measured; the best at 0.15 to 0.3 of the multiply-adds of the embedded model."""


@dataclass(frozen=True, kw_only=True)
class CombinedOptions:
    """How one budget is divided.

    Attributes:
        power: of the budget that is left when parts have been removed: from a budget b, ``b ** power`` of the
            multiply-adds stay, of which the ranks then take the rest; above 0 and below 1. None: measured, see
            :mod:`mixrank.uvc.split`; under ``torchrun`` :data:`POWER`.
        last: share of the epochs in which the model of low ranks is trained, above 0 and below 1.
        learning_rate: the highest of these.
    """

    power: float | None = None
    last: float = 0.7
    learning_rate: float = 3e-4

    def check(self) -> None:
        """Raise InputError unless every option lies in its range."""
        for name, share in (("power", self.power), ("last", self.last)):
            if share is not None and not 0 < share < 1:
                raise InputError(f"{name} must be above 0 and below 1, but it was {share}")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate must be above 0, but it was {self.learning_rate}")

    def check_beside(self, options: UVCOptions) -> None:
        """Raise InputError where ``last`` does not leave the search its share of the run."""
        most = 1 - options.warm_up - options.search
        if self.last > most:
            raise InputError(
                f"last must be at most {most:g}, what warm_up = {options.warm_up:g} and search = {options.search:g} "
                f"leave of the run, but it was {self.last:g}"
            )


@dataclass(frozen=True, kw_only=True)
class CombinedResult:
    """What both did.

    Attributes:
        macs_before: multiply-adds of one image.
        macs_after: the same at the end.
        pruned: the removal.
        ranks: how the ranks were lowered.
        macs_by_ranks: multiply-adds that went with them.
        trained: the training after it.
        power: of the budget, by which it was divided.
        tried: where that was measured, by each power the divergence from the dense model without training, in nats.
    """

    macs_before: int
    macs_after: int
    pruned: UVCResult
    ranks: CompressionResult
    macs_by_ranks: int
    trained: FinetuneResult
    power: float
    tried: dict[float, float]

    def to_json(self) -> dict:
        """Return the result in terms of JSON."""
        own = {name: getattr(self, name) for name in ("macs_before", "macs_after", "macs_by_ranks", "power")}
        own["tried"] = {f"{power:g}": divergence for power, divergence in self.tried.items()}
        parts = {name: getattr(self, name).to_json() for name in ("pruned", "ranks", "trained")}
        return own | parts | {"removed": asdict(self.pruned.removed) | {"ranks": self.macs_by_ranks}}


def compress_combined_(
    model: nn.Module,
    data: TrainingData,
    images: Iterable,
    *,
    options: UVCOptions | None = None,
    combined: CombinedOptions | None = None,
    validation: Iterable | None = None,
    dtype: torch.dtype | None = None,
    state: Path | str | None = None,
    log: Callable[[dict], None] | None = None,
    progress: bool = False,
) -> CombinedResult:
    """Compress a trained vision transformer in place by both systems under one budget of multiply-adds.

    Args:
        model: as for :func:`mixrank.uvc.run.compress_uvc_`.
        data: images and labels by epochs, for all of the training.
        images: batches of images without labels to lower the ranks by, as for :func:`mixrank.compress`; a list or a
            loader. Under ``torchrun`` the same in every process.
        options: ``budget`` is that of the whole, ``epochs`` are all there are, of which ``warm_up`` and ``search`` are
            shares.
        combined: how the budget and the epochs are divided.
        validation: as for :func:`mixrank.uvc.run.compress_uvc_`.
        dtype: run the models under autocast in this dtype; weights stay in fp32.
        state: a file in which the run is kept, with :func:`states_of` a second one beside it; where they exist the run
            goes on and ends with the same bits, on the same machine and number of threads.
        log: is called with each entry of both histories as it is made.
        progress: show progress bars with the time left.

    Raises:
        InputError: as :func:`mixrank.uvc.run.compress_uvc_` and :func:`mixrank.compress`. The model is then as it was.

    Example:
        >>> import timm, torch
        >>> from mixrank.uvc.data import TensorData
        >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)
        >>> images, labels = torch.randn(12, 3, 32, 32), torch.arange(12) % 3
        >>> data = TensorData(images, labels, batch_size=4)
        >>> result = compress_combined_(model, data, [images], options=UVCOptions(budget=0.4, epochs=3))
        >>> result.macs_after <= 0.4 * result.macs_before
        True
    """
    options, combined = options or UVCOptions(), combined or CombinedOptions()
    options.check()
    combined.check()
    combined.check_beside(options)
    first, second = (None, None) if state is None else states_of(Path(state))
    before, small = count_macs(model), copy.deepcopy(model)
    tried: dict[float, float] = {}
    power = combined.power
    if power is None:
        if not are_several():
            tried = measure_split(model, data, images, options, dtype=dtype)
        power = min(tried, key=tried.__getitem__, default=POWER)
    part = 1 - combined.last
    warm_up = options.warm_up / part
    searching = replace(
        options,
        budget=options.budget**power,
        epochs=options.epochs * part,
        warm_up=warm_up,
        search=min(options.search / part, 1 - warm_up),
    )
    pruned = compress_uvc_(
        small, data, options=searching, validation=validation, dtype=dtype, state=first, log=log, progress=progress
    )
    between = count_macs(small)
    training = {field.name: getattr(options, field.name) for field in fields(FinetuneOptions)}
    training |= {"epochs": options.epochs * combined.last, "learning_rate": combined.learning_rate}
    ranks, trained = lower_ranks_(
        small,
        data,
        images,
        int(options.budget * before),
        options=FinetuneOptions(**training),
        teacher=model,
        validation=validation,
        dtype=dtype,
        state=second,
        log=None if log is None else partial(_log_later, log, pruned.steps),
        progress=progress,
    )
    after = count_macs(small)
    become(model, small)
    return CombinedResult(
        macs_before=before,
        macs_after=after,
        pruned=pruned,
        ranks=ranks,
        macs_by_ranks=between - after,
        trained=trained,
        power=power,
        tried=tried,
    )


def _log_later(log: Callable[[dict], None], steps: int, entry: dict) -> None:
    """Log an entry of a training that follows ``steps`` others."""
    log(entry | {"step": steps + entry["step"]})


def lower_ranks_(
    model: nn.Module,
    data: TrainingData,
    images: Iterable,
    max_macs: int,
    *,
    options: FinetuneOptions | None = None,
    teacher: nn.Module | None = None,
    validation: Iterable | None = None,
    dtype: torch.dtype | None = None,
    state: Path | str | None = None,
    log: Callable[[dict], None] | None = None,
    progress: bool = False,
) -> tuple[CompressionResult, FinetuneResult]:
    """Lower the ranks of a model in place, by the defaults of :func:`mixrank.compress`, and train what that leaves.

    Args:
        model: as for :func:`mixrank.compress`.
        data: images and labels by epochs.
        images: batches of images without labels to lower the ranks by.
        max_macs: multiply-adds of one image that may remain.
        options: of the training, and so is all that follows.
        teacher: as for :func:`mixrank.uvc.finetune.finetune_`; None: the model as it comes.
        validation: as there.
        dtype: run the model under autocast in this dtype.
        state: as there; the ranks are lowered anew, to the same bits.
        log: as there.
        progress: show progress bars with the time left.

    Returns:
        How the ranks were lowered, and what the training did.

    Raises:
        InputError: as both of these functions. The model is then as it was.
    """
    options, small = options or FinetuneOptions(), copy.deepcopy(model)
    ranks = compress(small, images, max_macs=max_macs, seed=options.seed, dtype=dtype, progress=progress)
    # The pivoted form is worse conditioned than the factors that it is made from: these are trained.
    pivoted = unpivot_(small)
    trained = finetune_(
        small,
        data,
        options=options,
        teacher=model if teacher is None else teacher,
        validation=validation,
        dtype=dtype,
        state=state,
        log=log,
        progress=progress,
    )
    put_back_(small, pivoted, trained=True)
    become(model, small)
    return ranks, trained


def states_of(state: Path) -> tuple[Path, Path]:
    """The files in which a run is kept: of the removal, and of the training after the ranks were lowered."""
    return state, state.with_name(f"{state.name}.ranks")
