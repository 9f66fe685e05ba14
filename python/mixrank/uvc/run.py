"""Unified compression by training: learn what can go under one budget, take it away, train what stays.

The three parts of a run share one loop over the data: with everything there (``warm_up``), with gates and with groups
that shrink (``search``), and with the model as small as it will be, which is then trained on as a plain model.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixrank.errors import InputError
from mixrank.evaluate import evaluate
from mixrank.models import count_macs
from mixrank.progress import track
from mixrank.uvc.data import TrainingData, seeded
from mixrank.uvc.gates import Gates, gated
from mixrank.uvc.landing import contributions, land, macs_of
from mixrank.uvc.objective import check_labels, objective
from mixrank.uvc.options import UVCOptions, UVCResult
from mixrank.uvc.primal_dual import Groups, PrimalDual, Rates
from mixrank.uvc.processes import is_first, mean, shared
from mixrank.uvc.shrink import KeptBlock, remaining_blocks, shrink_
from mixrank.uvc.state import (
    Progress,
    kept_from_json,
    kept_to_json,
    key_of,
    load_state,
    moments_of,
    save_state,
    set_moments,
    variables_of,
)
from mixrank.uvc.structure import parts_of, structure_of

_RISE = 0.05  # share of each part in which the learning rate rises
_LOWEST = 0.1  # of the highest rate, at the end of the search


def compress_uvc_(
    model: nn.Module,
    data: TrainingData,
    *,
    options: UVCOptions | None = None,
    kept: Sequence[KeptBlock | None] | None = None,
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
        kept: what stays of each block, see :func:`mixrank.uvc.shrink.shrink_`, if that was chosen elsewhere: the whole
            run trains it, and nothing is searched for. None: it is learnt.
        teacher: whose answers are distilled, on the device of the model; None: the model as it comes.
        validation: batches of other images with labels as for :func:`mixrank.evaluate`, to tell top-1; a list or a
            loader, as it is gone through several times.
        dtype: run the models under autocast in this dtype; weights stay in fp32.
        state: a file in which the run is kept after each epoch; where it exists already the run goes on from it and
            ends with the same bits, on the same machine and number of threads.
        log: is called with each entry of the history as it is made.
        progress: show a progress bar with the time left.

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
    run = _Run(small, model if teacher is None else teacher, data, options, kept, validation, dtype, log)
    result = run.train(None if state is None else Path(state), progress)
    _become(model, small)
    return result


def _become(model: nn.Module, other: nn.Module) -> None:
    """Give a model the contents of another one of its class."""
    model.__dict__.clear()
    model.__dict__.update(other.__dict__)
    model.eval()


class _Student(nn.Module):
    """A model and its gates in one forward pass, so that whoever wraps it sees all parameters used."""

    def __init__(self, model: nn.Module, gates: Gates) -> None:
        super().__init__()
        self.model, self.gates = model, gates

    def forward(self, images: Tensor, uniform: Tensor, everything: bool) -> Tensor:
        values = self.gates.sample(uniform)
        with gated(self.model.blocks, 1 + 0 * values if everything else values):
            return self.model(images)


class _Run:
    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        data: TrainingData,
        options: UVCOptions,
        given: Sequence[KeptBlock | None] | None,
        validation: Iterable | None,
        dtype: torch.dtype | None,
        log: Callable[[dict], None] | None,
    ) -> None:
        self.model, self.data, self.options = model, data, options
        self.validation, self.dtype, self.log = validation, dtype, log
        self.teacher = copy.deepcopy(teacher).eval().requires_grad_(False) if options.distillation else None
        self.structure = structure_of(model)
        self.device = next(model.parameters()).device
        self.gates = Gates(len(self.structure.blocks), options.gate_temperature).to(self.device)
        self.student = shared(_Student(model, self.gates))
        self.steps = max(3, round(options.epochs * data.steps))
        self.warm = round(options.warm_up * self.steps)
        self.given = given
        self.end = min(self.steps - 1, max(self.warm + 1, round((options.warm_up + options.search) * self.steps)))
        if given is not None:
            self.warm = self.end = 0
        updates = max(1.0, options.reached * (self.end - self.warm) / options.interval)
        self.gate_rate = options.gate_speed / updates
        rates = Rates(share=options.share_speed / updates, group=options.group_speed / updates)
        self.duals = PrimalDual(self.structure, options.budget, rates)
        self.step, self.history, self.kept = 0, [], None
        self.landed: float | None = None
        self.average: nn.Module | None = None
        self.optimizer = self._optimizer()
        self.mix = self._mix()

    def train(self, path: Path | None, progress: bool) -> UVCResult:
        started = time.perf_counter()
        key = key_of(self.model, self.options, self.steps, self.dtype)
        key["kept"] = None if self.given is None else kept_to_json(self.given)
        before_macs = count_macs(self.model)
        if path is not None and path.exists():
            earlier, before = self._restore(*load_state(path, key))
        else:
            earlier, before = 0.0, self._top1(self.model)
        left = self.steps - self.step
        for images, labels in track(self._batches(), "compressing", total=left, enabled=progress):
            if self.step == self.end:
                self._land()
            self._train_step(images, labels)
            self.step += 1
            if self.step % self.data.steps == 0:
                if self.kept is not None:
                    self._note({"top1": self._top1(self._final())})
                if path is not None and is_first():
                    self._save(path, key, earlier + time.perf_counter() - started, before)
        if self.step < self.steps:
            raise InputError(
                f"data must give {self.data.steps} batches in each epoch, but it ended at step {self.step}"
            )
        final = self._final()
        if final is not self.model:
            self.model.load_state_dict(final.state_dict())
        return UVCResult(
            macs_before=before_macs,
            macs_after=count_macs(self.model),
            removed=contributions(self.structure, self.kept),
            blocks=[block.to_json() for block in remaining_blocks(self.model)],
            before=before,
            landed=self.landed,
            after=self._top1(self.model),
            history=self.history,
            steps=self.steps,
            seconds=earlier + time.perf_counter() - started,
            options=self.options,
        )

    def _save(self, path: Path, key: dict, seconds: float, before: float | None) -> None:
        kept = None if self.kept is None else kept_to_json(self.kept)
        progress = Progress(self.step, seconds, self.history, before, self.landed, self.duals.pressure, kept)
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self.average is not None:
            tensors |= {f"average.{name}": tensor for name, tensor in self.average.module.state_dict().items()}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in moments_of(self.model, self.optimizer)}
        tensors |= {"gates": self.gates.logits} | dict(variables_of(self.duals))
        if self.gates.logits.grad is not None:  # of the steps since the last update
            tensors["gates_grad"] = self.gates.logits.grad
        save_state(path, key, progress, tensors)

    def _restore(self, progress: Progress, tensors: dict[str, Tensor]) -> tuple[float, float | None]:
        """Go on from a state; returns the seconds and the top-1 before that it knows."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        if progress.kept is not None:
            self._shrink(kept_from_json(progress.kept))
        self.model.load_state_dict(part("model."))
        if self.average is not None:
            self.average.module.load_state_dict(part("average."))
        set_moments(self.model, self.optimizer, part("optimizer."))
        with torch.no_grad():
            self.gates.logits.copy_(tensors["gates"])
            for name, value in variables_of(self.duals):
                value.copy_(tensors[name])
        if "gates_grad" in tensors:
            self.gates.logits.grad = tensors["gates_grad"].to(self.device)
        self.step, self.history, self.landed = progress.step, progress.history, progress.landed
        self.duals.pressure = progress.pressure
        return progress.seconds, progress.before

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """As many batches as there are steps; what is drawn in an epoch depends on the seed and the epoch alone."""
        for epoch in range(self.step // self.data.steps, math.ceil(self.steps / self.data.steps)):
            with seeded(self.options.seed, epoch):
                for index, (images, labels) in enumerate(self.data.epoch(epoch)):
                    if epoch * self.data.steps + index == self.steps:
                        return
                    yield images, labels

    def _train_step(self, images: Tensor, labels: Tensor) -> None:
        classes = self.model.num_classes
        check_labels(labels, classes, f"step {self.step}")
        images, target = images.to(self.device), labels.to(self.device)
        if self.mix is not None:
            images, target = self.mix(images, target)
        self.student.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate() * group.get("lr_scale", 1.0)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            teacher = None
            if self.teacher is not None:
                with torch.no_grad():
                    teacher = self.teacher(images)
            logits = self._forward(images)
        options = self.options
        smoothing = {"share": options.distillation, "temperature": options.temperature, "smoothing": options.smoothing}
        loss = objective(logits, target, teacher, **smoothing)
        found = mean(loss.detach())
        if not math.isfinite(found):
            raise InputError(
                f"the loss was not finite at step {self.step} of {self.steps}: take a lower learning_rate than "
                f"{options.learning_rate}"
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), options.clip)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.model, step=self.step - self.end)
        if self.warm <= self.step < self.end and (self.step - self.warm) % options.interval == options.interval - 1:
            self._update(found)

    def _forward(self, images: Tensor) -> Tensor:
        if self.kept is not None:
            return self.student(images)
        generator = torch.Generator().manual_seed(hash((self.options.seed, self.step, 1)) % 2**63)
        uniform = torch.rand(len(self.gates.logits), generator=generator).to(self.device)
        return self.student(images, uniform, self.step < self.warm)

    def _update(self, loss: float) -> None:
        """Shares, multipliers, gates, and the weights of the groups that are to go."""
        options, parts = self.options, parts_of(self.model)
        groups, keep = [Groups.of(part) for part in parts], self.gates.probability()
        target = self._target()
        remaining, pull = self.duals.update(groups, keep.detach().cpu(), target)
        self.duals.shrink_weights_(parts, groups, self._rate() * options.interval)
        (slope,) = torch.autograd.grad(keep @ pull.to(keep), self.gates.logits)
        self.gates.step_(self.gates.logits.grad / options.interval + options.gate_weight * slope, self.gate_rate)
        self.gates.logits.grad = None
        self._note(
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
        kept = self.given
        if kept is None:
            groups = [Groups.of(part) for part in parts_of(self.model)]
            keep = self.gates.probability().detach().cpu()
            kept = land(self.structure, groups, self.duals.shares, keep, self.options.budget)
        self._shrink(kept)
        self.landed = self._top1(self.model)
        self._note({"landed": macs_of(self.structure, self.kept) / self.structure.macs(), "top1": self.landed})

    def _shrink(self, kept: Sequence[KeptBlock | None]) -> None:
        """Take away what is not kept, and go on with a plain model."""
        self.kept = kept
        shrink_(self.model, kept)
        self.student, self.optimizer = shared(self.model), self._optimizer()
        if self.options.ema:
            from timm.utils import ModelEmaV3

            self.average = ModelEmaV3(self.model, decay=self.options.ema, use_warmup=True)

    def _final(self) -> nn.Module:
        return self.model if self.average is None else self.average.module

    def _optimizer(self) -> torch.optim.Optimizer:
        from timm.optim import create_optimizer_v2

        rate, decay = self.options.learning_rate, self.options.weight_decay
        return create_optimizer_v2(self.model, opt="adamw", lr=rate, weight_decay=decay)

    def _mix(self) -> Any:
        if not self.options.mixup and not self.options.cutmix:
            return None
        from timm.data import Mixup

        alphas = {"mixup_alpha": self.options.mixup, "cutmix_alpha": self.options.cutmix}
        return Mixup(**alphas, label_smoothing=self.options.smoothing, num_classes=self.model.num_classes)

    def _rate(self) -> float:
        """The learning rate: in each of the two parts a rise, then half a cosine."""
        first, last, lowest = (0, self.end, _LOWEST) if self.step < self.end else (self.end, self.steps, 0.0)
        done, rise = (self.step - first + 1) / (last - first), _RISE
        if done < rise:
            return self.options.learning_rate * done / rise
        fall = 0.5 * (1 + math.cos(math.pi * (done - rise) / (1 - rise)))
        return self.options.learning_rate * (lowest + (1 - lowest) * fall)

    def _top1(self, model: nn.Module) -> float | None:
        if self.validation is None:
            return None
        training = model.training
        top1 = evaluate(model, self.validation).top1
        model.train(training)
        return top1

    def _note(self, entry: dict) -> None:
        self.history.append({"step": self.step} | entry)
        if self.log is not None:
            self.log(self.history[-1])


def _summary(variables: list) -> dict[str, list[float]]:
    return {
        "heads": [one.heads.item() for one in variables],
        "columns": [one.columns.mean().item() for one in variables],
        "neurons": [one.neurons.item() for one in variables],
    }
