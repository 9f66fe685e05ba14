"""Training a classifier with labels and a teacher: by itself, and as the loop in which :mod:`mixrank.uvc.run` searches.

A step is one of AdamW on the error of the labels and the distance from the teacher, its rate rises and then falls by
half a cosine, and the weights are averaged over the last steps.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mixrank.attributes import class_count
from mixrank.errors import InputError
from mixrank.evaluate import evaluate
from mixrank.processes import is_first, mean, shared
from mixrank.progress import track
from mixrank.uvc.data import TrainingData, seeded
from mixrank.uvc.objective import check_labels, objective
from mixrank.uvc.options import FinetuneOptions, FinetuneResult
from mixrank.uvc.state import Progress, key_of, load_state, moments_of, save_state, set_moments

if TYPE_CHECKING:
    from timm.utils import ModelEmaV3

_RISE = 0.05  # share of the steps in which the learning rate rises


def finetune_(
    model: nn.Module,
    data: TrainingData,
    *,
    options: FinetuneOptions | None = None,
    teacher: nn.Module | None = None,
    validation: Iterable | None = None,
    dtype: torch.dtype | None = None,
    state: Path | str | None = None,
    log: Callable[[dict], None] | None = None,
    progress: bool = False,
) -> FinetuneResult:
    """Train a classifier in place on labelled images; factored and pruned layers are trained as they are.

    Under ``torchrun``, once the process group is there, the processes share each step
    (:class:`torch.nn.parallel.DistributedDataParallel`) and all end with the same model; the first one writes.

    Args:
        model: any module from images to logits with ``num_classes``, in fp32, on any device; in evaluation mode
            afterwards.
        data: images and labels by epochs; under ``torchrun`` those of this process.
        options: see :class:`mixrank.uvc.options.FinetuneOptions`.
        teacher: whose answers are distilled, on the device of the model; None: the model as it comes.
        validation: batches of other images with labels as for :func:`mixrank.evaluate`, to tell top-1; a list or a
            loader, as it is gone through several times.
        dtype: run the models under autocast in this dtype; weights stay in fp32.
        state: a file in which the run is kept after each epoch; where it exists already the run goes on from it and
            ends with the same bits, on the same machine and number of threads.
        log: is called with each entry of the history as it is made.
        progress: show a progress bar with the time left.

    Raises:
        InputError: an option outside its range, labels outside the classes, a state of another run, a loss that is
            not finite (it says at which step; the state is that of the epoch before). The model is then as it was.

    Example:
        >>> import timm, torch
        >>> from mixrank.uvc.data import TensorData
        >>> model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)
        >>> data = TensorData(torch.randn(12, 3, 32, 32), torch.arange(12) % 3, batch_size=4)
        >>> finetune_(model, data, options=FinetuneOptions(epochs=2)).steps
        6
    """
    options = options or FinetuneOptions()
    options.check()
    trained = copy.deepcopy(model)
    training = Training(trained, model if teacher is None else teacher, data, options, validation, dtype, log)
    done = training.run(None if state is None else Path(state), progress)
    become(model, trained)
    return FinetuneResult(**done)


def become(model: nn.Module, other: nn.Module) -> None:
    """Give a model the contents of another one of its class, in evaluation mode."""
    model.__dict__.clear()
    model.__dict__.update(other.__dict__)
    model.eval()


class Training:
    """The loop; what a search does otherwise it does in methods of the same names."""

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        data: TrainingData,
        options: FinetuneOptions,
        validation: Iterable | None,
        dtype: torch.dtype | None,
        log: Callable[[dict], None] | None,
    ) -> None:
        self.model, self.data, self.options = model, data, options
        self.validation, self.dtype, self.log = validation, dtype, log
        self.teacher = copy.deepcopy(teacher).eval().requires_grad_(False) if options.distillation else None
        self.device = next(model.parameters()).device
        self.steps = max(1, round(options.epochs * data.steps))
        self.step, self.seconds = 0, 0.0
        self.history: list[dict] = []
        self.before: float | None = None
        self.mix = self._mix()
        self.average: ModelEmaV3 | None = None
        self.prepare()

    # What a search does in its own way.

    def prepare(self) -> None:
        """Make what is trained, and all that belongs to its parameters."""
        self.train_(shared(self.model), average_from=0)

    def before_step(self) -> None:
        """Is called before each step."""

    def forward(self, images: Tensor) -> Tensor:
        """The logits of a step."""
        return self.student(images)

    def after_step(self, loss: float) -> None:
        """Is called after each step, with its loss over all processes."""

    def part(self) -> tuple[int, int, float]:
        """First step of this part of the run, the one after its last, and the share of the rate at its end."""
        return 0, self.steps, 0.0

    @property
    def is_final(self) -> bool:
        """Whether what is trained has its last form."""
        return True

    def key(self) -> dict:
        """What makes a run the same run."""
        return key_of(self.model, self.options, self.steps, self.dtype)

    def known(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What else belongs into a state: numbers, and tensors by name."""
        return {}, {}

    def restore(self, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Set what :meth:`known` told; called before parameters are set."""

    # What every training does.

    def train_(self, student: nn.Module, *, average_from: int | None) -> None:
        """From now on train this module, which the model is, or is within, and average the weights from a step on."""
        from timm.optim import create_optimizer_v2
        from timm.utils import ModelEmaV3

        options = self.options
        self.student = student
        self.optimizer = create_optimizer_v2(
            self.model, opt="adamw", lr=options.learning_rate, weight_decay=options.weight_decay
        )
        if average_from is not None and options.ema:
            self.average, self.averaged_from = ModelEmaV3(self.model, decay=options.ema, use_warmup=True), average_from

    def run(self, path: Path | None, progress: bool) -> dict[str, Any]:
        """All steps that are left; returns the fields of a :class:`mixrank.uvc.options.FinetuneResult`."""
        key = self.key()
        if path is not None and path.exists():
            self._restore(path, key)
        else:
            self.before = self.top1(self.model)
        started = time.perf_counter() - self.seconds
        left = self.steps - self.step
        for images, labels in track(self._batches(), "training", total=left, enabled=progress):
            self.before_step()
            self._train_step(images, labels)
            self.step += 1
            if self.step % self.data.steps == 0:
                self.seconds = time.perf_counter() - started
                if self.is_final:
                    self.note({"top1": self.top1(self._final())})
                if path is not None and is_first():
                    self._save(path, key)
        if self.step < self.steps:
            raise InputError(
                f"data must give {self.data.steps} batches in each epoch, but it ended at step {self.step}"
            )
        final = self._final()
        if final is not self.model:
            self.model.load_state_dict(final.state_dict())
        return {
            "before": self.before,
            "after": self.top1(self.model),
            "history": self.history,
            "steps": self.steps,
            "seconds": time.perf_counter() - started,
            "options": self.options,
        }

    def rate(self) -> float:
        """The learning rate: in each part of the run a rise, then half a cosine."""
        first, last, lowest = self.part()
        done = (self.step - first + 1) / (last - first)
        if done < _RISE:
            return self.options.learning_rate * done / _RISE
        fall = 0.5 * (1 + math.cos(math.pi * (done - _RISE) / (1 - _RISE)))
        return self.options.learning_rate * (lowest + (1 - lowest) * fall)

    def top1(self, model: nn.Module) -> float | None:
        """On the validation images, in percent; None without them."""
        if self.validation is None:
            return None
        training = model.training
        top1 = evaluate(model, self.validation).top1
        model.train(training)
        return top1

    def note(self, entry: dict) -> None:
        """Add to the history."""
        self.history.append({"step": self.step} | entry)
        if self.log is not None:
            self.log(self.history[-1])

    def _save(self, path: Path, key: dict) -> None:
        numbers, own = self.known()
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self.average is not None:
            tensors |= {f"average.{name}": tensor for name, tensor in self.average.module.state_dict().items()}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in moments_of(self.model, self.optimizer)}
        tensors |= {f"search.{name}": tensor for name, tensor in own.items()}
        save_state(path, key, Progress(self.step, self.seconds, self.history, self.before, numbers), tensors)

    def _restore(self, path: Path, key: dict) -> None:
        """Go on from a state."""
        progress, tensors = load_state(path, key)

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        try:
            self.step, self.history, self.seconds = progress.step, progress.history, progress.seconds
            self.before = progress.before
            self.restore(progress.search, part("search."))
            self.model.load_state_dict(part("model."))
            if self.average is not None:
                self.average.module.load_state_dict(part("average."))
            set_moments(self.model, self.optimizer, part("optimizer."))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{path} is not the whole state of such a run: {error}") from error

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """As many batches as there are steps; what is drawn in an epoch depends on the seed and the epoch alone."""
        for epoch in range(self.step // self.data.steps, math.ceil(self.steps / self.data.steps)):
            with seeded(self.options.seed, epoch):
                for index, (images, labels) in enumerate(self.data.epoch(epoch)):
                    if epoch * self.data.steps + index == self.steps:
                        return
                    yield images, labels

    def _train_step(self, images: Tensor, labels: Tensor) -> None:
        check_labels(labels, class_count(self.model), f"step {self.step}")
        images, target = images.to(self.device), labels.to(self.device)
        if self.mix is not None:
            images, target = self.mix(images, target)
        self.student.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate() * group.get("lr_scale", 1.0)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            teacher = None
            if self.teacher is not None:
                with torch.no_grad():
                    teacher = self.teacher(images)
            logits = self.forward(images)
        options = self.options
        smoothing = {"share": options.distillation, "temperature": options.temperature, "smoothing": options.smoothing}
        loss = objective(logits, target, teacher, **smoothing)
        found = mean(loss.detach())
        if not math.isfinite(found):
            raise self.diverged()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), options.clip)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.model, step=self.step - self.averaged_from)
        self.after_step(found)

    def diverged(self) -> InputError:
        """What is raised where the training led to numbers that are not finite."""
        return InputError(
            f"the loss was not finite at step {self.step} of {self.steps}: take a lower learning_rate than "
            f"{self.options.learning_rate}"
        )

    def _final(self) -> nn.Module:
        return self.model if self.average is None else self.average.module

    def _mix(self) -> Any:
        if not self.options.mixup and not self.options.cutmix:
            return None
        from timm.data import Mixup

        alphas = {"mixup_alpha": self.options.mixup, "cutmix_alpha": self.options.cutmix}
        return Mixup(**alphas, label_smoothing=self.options.smoothing, num_classes=class_count(self.model))
