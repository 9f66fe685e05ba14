"""Unified compression by training: learn what can go under one budget, take it away, train what stays.

The three parts of a run share one loop over the data: with everything there (``warm_up``), with gates and with groups
that shrink (``search``), and with the model as small as it will be, which is then trained on as a plain model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixrank.attributes import block_list
from mixrank.counting import count_macs
from mixrank.errors import InputError
from mixrank.processes import shared
from mixrank.uvc.data import TrainingData
from mixrank.uvc.finetune import Training, become
from mixrank.uvc.gates import Gates, gated
from mixrank.uvc.importance import Importance, Inputs, importance_of, observe, take_over_
from mixrank.uvc.landing import contributions, land, macs_of
from mixrank.uvc.options import UVCOptions, UVCResult
from mixrank.uvc.primal_dual import KINDS, PrimalDual, Rates, groups_of
from mixrank.uvc.shrink import KeptBlock, remaining_blocks, shrink_
from mixrank.uvc.state import kept_from_json, kept_to_json, variables_of
from mixrank.uvc.structure import parts_of, structure_of

_LOWEST = 0.1  # of the highest rate, at the end of the search
_UPDATES = 20  # of shares, multipliers and gates, at least


def compress_uvc_(
    model: nn.Module,
    data: TrainingData,
    *,
    options: UVCOptions | None = None,
    teacher: nn.Module | None = None,
    validation: Iterable | None = None,
    dtype: torch.dtype | None = None,
    state: Path | str | None = None,
    log: Callable[[dict], None] | None = None,
    progress: bool = False,
) -> UVCResult:
    """Compress a trained vision transformer in place, by training on labelled images.

    Under ``torchrun``, once the process group is there, the processes share each step
    (:class:`torch.nn.parallel.DistributedDataParallel`) and all end with the same model; the first one writes.

    Args:
        model: a classifier that :func:`mixrank.uvc.structure.parts_of` knows, in fp32, on any device; in evaluation
            mode afterwards.
        data: images and labels by epochs; under ``torchrun`` those of this process.
        options: see :class:`UVCOptions`.
        teacher: whose answers are distilled, on the device of the model; None: the model as it comes.
        validation: batches of other images with labels as for :func:`mixrank.evaluate`, to tell top-1; a list or a
            loader, as it is gone through several times.
        dtype: run the models under autocast in this dtype; weights stay in fp32.
        state: a file in which the run is kept after each epoch; where it exists already the run goes on from it and
            ends with the same bits, on the same machine and number of threads.
        log: is called with each entry of the history as it is made.
        progress: show a progress bar with the time left.

    Returns:
        What went by which mechanism, the history of the search, and top-1 before and after.

    Raises:
        InputError: an option outside its range, a budget that cannot be reached (it says the least), an architecture
            that is not supported (it says what is missing), labels outside the classes, a state of another run, a
            loss that is not finite (it says at which step; the state is that of the epoch before). The model is then
            as it was.

    Example:
        >>> import timm, torch
        >>> from mixrank.uvc.data import TensorData
        >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)
        >>> data = TensorData(torch.randn(12, 3, 32, 32), torch.arange(12) % 3, batch_size=4)
        >>> result = compress_uvc_(model, data, options=UVCOptions(budget=0.5, epochs=2))
        >>> result.macs_after <= 0.5 * result.macs_before
        True
    """
    options = options or UVCOptions()
    options.check()
    small = copy.deepcopy(model)
    run = _Search(small, model if teacher is None else teacher, data, options, validation, dtype, log)
    done = run.run(None if state is None else Path(state), progress)
    assert run.kept is not None  # it has landed before its last steps
    result = UVCResult(
        **done,
        macs_before=count_macs(model),
        macs_after=count_macs(small),
        removed=contributions(run.structure, run.kept),
        blocks=[block.to_json() for block in remaining_blocks(small) or ()],
        landed=run.landed,
    )
    become(model, small)
    return result


class _Student(nn.Module):
    """A model and its gates in one forward pass, so that whoever wraps it sees all parameters used."""

    def __init__(self, model: nn.Module, gates: Gates) -> None:
        super().__init__()
        self.model, self.gates = model, gates

    def forward(self, images: Tensor, uniform: Tensor, everything: bool) -> Tensor:
        values = self.gates.sample(uniform)
        with gated(block_list(self.model), 1 + 0 * values if everything else values):
            return self.model(images)


class _Search(Training):
    """A training in which gates and shares are learnt until all that is to go has gone."""

    options: UVCOptions

    def prepare(self) -> None:
        options = self.options
        self.structure = structure_of(self.model)
        self.gates = Gates(len(self.structure.blocks), options.gate_temperature).to(self.device)
        self.steps = max(3, self.steps)
        self.warm = round(options.warm_up * self.steps)
        searched = round((options.warm_up + options.search) * self.steps)
        self.end = min(self.steps - 1, max(self.warm + 1, searched))
        self.interval = max(1, min(options.interval, (self.end - self.warm) // _UPDATES))
        updates = max(1.0, options.reached * (self.end - self.warm) / self.interval)
        self.gate_rate = options.gate_speed / updates
        rates = Rates(share=options.share_speed / updates, group=options.group_speed / updates)
        self.duals = PrimalDual(self.structure, options.budget, rates)
        self.importance: list[Importance] | None = None
        self.kept: Sequence[KeptBlock | None] | None = None
        self.landed: float | None = None
        self.train_(shared(_Student(self.model, self.gates)), average_from=None)

    @property
    def is_final(self) -> bool:
        return self.kept is not None

    def part(self) -> tuple[int, int, float]:
        return (0, self.end, _LOWEST) if self.step < self.end else (self.end, self.steps, 0.0)

    def before_step(self) -> None:
        if self.step == self.warm and self.options.observed:
            self.importance = self._weigh(self._observe())
        if self.step == self.end:
            self._land()

    def forward(self, images: Tensor) -> Tensor:
        if self.kept is not None:
            return self.student(images)
        generator = torch.Generator().manual_seed(hash((self.options.seed, self.step, 1)) % 2**63)
        uniform = torch.rand(len(self.gates.logits), generator=generator).to(self.device)
        return self.student(images, uniform, self.step < self.warm)

    def after_step(self, loss: float) -> None:
        if self.warm <= self.step < self.end and (self.step + 1 - self.warm) % self.interval == 0:
            self._update(loss)

    def known(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        kept = None if self.kept is None else kept_to_json(self.kept)
        numbers = {"landed": self.landed, "pressure": self.duals.pressure, "kept": kept}
        tensors = {"gates": self.gates.logits} | dict(variables_of(self.duals))
        for index, one in enumerate(self.importance or ()):
            tensors |= {f"importance.{index}.{kind}": getattr(one, kind) for kind in KINDS}
        if self.gates.logits.grad is not None:  # of the steps since the last update
            tensors["gates_grad"] = self.gates.logits.grad
        return numbers, tensors

    def restore(self, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        if numbers["kept"] is not None:
            self._shrink(kept_from_json(numbers["kept"]))
        with torch.no_grad():
            self.gates.logits.copy_(tensors["gates"])
            for name, value in variables_of(self.duals):
                value.copy_(tensors[name])
        if "importance.0.heads" in tensors:
            found = ([tensors[f"importance.{i}.{kind}"] for kind in KINDS] for i in range(len(self.structure.blocks)))
            self.importance = [Importance(*each) for each in found]
        if "gates_grad" in tensors:
            self.gates.logits.grad = tensors["gates_grad"].to(self.device)
        self.landed, self.duals.pressure = numbers["landed"], numbers["pressure"]

    def _observe(self) -> list[tuple[Inputs, Inputs]]:
        options = self.options
        try:
            return observe(self.model, self.data, options.observed, seed=options.seed, dtype=self.dtype)
        except InputError as error:  # its logits are not finite
            if self.step == 0:
                raise
            raise self.diverged() from error

    def _weigh(self, found: list[tuple[Inputs, Inputs]]) -> list[Importance]:
        return [importance_of(*pair) for pair in zip(parts_of(self.model), found, strict=True)]

    def _update(self, loss: float) -> None:
        """Shares, multipliers, gates, and the weights of the groups that are to go."""
        options, parts = self.options, parts_of(self.model)
        groups, keep = groups_of(parts, self.importance), self.gates.probability()
        target = self._target()
        remaining, pull = self.duals.update(groups, keep.detach().cpu(), target)
        self.duals.shrink_weights_(parts, groups, self.rate() * self.interval)
        (slope,) = torch.autograd.grad(keep @ pull.to(keep), self.gates.logits)
        assert self.gates.logits.grad is not None  # of the steps since the last update
        self.gates.step_(self.gates.logits.grad / self.interval + options.gate_weight * slope, self.gate_rate)
        self.gates.logits.grad = None
        self.note(
            {
                "loss": loss,
                "remaining": remaining,
                "target": target,
                "pressure": self.duals.pressure,
                "keep": keep.tolist(),
                "shares": _summary(self.duals.shares),
                "multipliers": _summary(self.duals.multipliers),
            }
        )

    def _target(self) -> float:
        """What R is to be: it falls from 1 to the budget in a straight line."""
        done = (self.step + 1 - self.warm) / (self.options.reached * (self.end - self.warm))
        return max(self.options.budget, 1 - (1 - self.options.budget) * done)

    def _land(self) -> None:
        """Choose what stays, take the rest away, and start to train that."""
        options, parts, keep = self.options, parts_of(self.model), self.gates.probability().detach().cpu()
        found = self._observe() if options.observed else None
        groups = groups_of(parts, None if found is None else self._weigh(found))
        kept = land(self.structure, groups, self.duals.shares, keep, options.budget, options.multiple)
        if found is not None:
            stays = torch.tensor([float(one is not None) for one in kept])
            if not stays.all():
                with gated(block_list(self.model), stays.to(self.device)):
                    found = self._observe()  # what comes in where blocks are gone
            take_over_(parts, kept, found)
        self._shrink(kept)
        self.landed = self.top1(self.model)
        self.note({"landed": macs_of(self.structure, kept) / self.structure.macs(), "top1": self.landed})

    def _shrink(self, kept: Sequence[KeptBlock | None]) -> None:
        """Take away what is not kept, and go on with a plain model."""
        self.kept = kept
        shrink_(self.model, kept)
        self.train_(shared(self.model), average_from=self.end)


def _summary(variables: list) -> dict[str, list[float]]:
    return {
        "heads": [one.heads.item() for one in variables],
        "columns": [one.columns.mean().item() for one in variables],
        "neurons": [one.neurons.item() for one in variables],
    }
