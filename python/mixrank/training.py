"""The training loop of error compensation: steps, looks at held-out images, and a state to go on from."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from mixrank.errors import InputError
from mixrank.fidelity import Fidelity, compare, logits_of
from mixrank.imitation import SCOPES, Imitation
from mixrank.nn import LowRankLinear, MixedRankLinear
from mixrank.nn_sparse import SparseLinear
from mixrank.progress import track
from mixrank.training_state import TrainingState
from mixrank.views import Views

TRAINED = ("factors", "residual", "all")
_EVALUATION_BATCH = 25
_WARM_UP = 0.03  # share of the steps
_CLIP = 1.0  # norm of the gradient
_BETAS = (0.9, 0.98)


@dataclass(frozen=True)
class CompensationOptions:
    """How :func:`compensate_` trains; all of it decides the result, together with the models and the images.

    Attributes:
        scope: ``"layer"``, ``"block"`` or ``"model"``.
        trained: ``"factors"``: the factored layers; ``"residual"``: of each of them only ``residual_rank`` columns of
            ``up`` and rows of ``down``, the last ones, which are a residual of that rank beside a frozen base (the
            paper's); ``"all"``: every parameter of the model. Of sparse layers the entries train with the factors, and
            their places stay; they have no ``"residual"``.
        residual_rank: Q, for ``"residual"``; at most all of a layer's rank is taken.
        batch_size: images in a step.
        learning_rate: the highest, of Adam, after a warm-up; it falls to zero along half a cosine.
        feature_weight: of the mean error of the taps in the loss of ``"model"``, beside the KL of the logits.
        min_scale: smallest share of an image in a random view; 1: no augmentation.
        mix: share of the views that are mixed with another one, in any proportion; in [0, 1].
        held_out: share of the images that only choose the best step.
        evaluations: how often the held-out images are looked at.
        patience: how many evaluations in a row may be no better than the best one; at one more the run stops.
        seed: of the views.
    """

    scope: str = "model"
    trained: str = "factors"
    residual_rank: int = 16
    batch_size: int = 16
    learning_rate: float = 2e-5
    feature_weight: float = 1.0
    min_scale: float = 0.5
    mix: float = 0.0
    held_out: float = 0.1
    evaluations: int = 10
    patience: int = 8
    seed: int = 0

    def check(self) -> None:
        """Raise InputError unless every option lies in its range."""
        for name, value, known in (("scope", self.scope, SCOPES), ("trained", self.trained, TRAINED)):
            if value not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, but it was {value!r}")
        for name in ("residual_rank", "batch_size", "evaluations", "patience"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, but it was {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate must be above 0, but it was {self.learning_rate}")
        if not 0 <= self.feature_weight < math.inf:
            raise InputError(f"feature_weight must be at least 0, but it was {self.feature_weight}")
        if not 0 < self.min_scale <= 1:
            raise InputError(f"min_scale must be in (0, 1], but it was {self.min_scale}")
        if not 0 <= self.mix <= 1:
            raise InputError(f"mix must be in [0, 1], but it was {self.mix}")
        if not 0 < self.held_out < 1:
            raise InputError(f"held_out must be above 0 and below 1, but it was {self.held_out}")


@dataclass(frozen=True)
class CompensationResult:
    """What :func:`compensate_` did.

    Attributes:
        before: fidelity to the dense model on the held-out images at the start.
        after: the same of the model as it was left: the best that was seen.
        history: for each look at the held-out images: step, divergence, agreement, mean training loss since the last.
        steps: how many steps were trained.
        best_step: after which step the model was best; 0: it was left as it was.
        seconds: wall-clock time, that of an interrupted run that was gone on with included.
        stopped: why it ended: ``"finished"``, ``"patience"``, ``"minutes"`` or ``"diverged"`` (a loss or an output that
            was not finite; what was best before was kept).
        options: of the run.
    """

    before: Fidelity
    after: Fidelity
    history: list[dict]
    steps: int
    best_step: int
    seconds: float
    stopped: str
    options: CompensationOptions

    def to_json(self) -> dict:
        """Return the result in terms of JSON."""
        return asdict(self)


@contextmanager
def modes(model: nn.Module, dense: nn.Module, trained: Mapping[str, Tensor]) -> Iterator[None]:
    """Both models in evaluation mode, gradients for ``trained`` alone; afterwards everything as it was."""
    before = {module: module.training for each in (model, dense) for module in each.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.eval(), dense.eval()
        chosen = {id(parameter) for parameter in trained.values()}
        for parameter in wanted:
            parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for module, mode in before.items():
            module.training = mode
        for parameter, mode in wanted.items():
            parameter.grad = None
            parameter.requires_grad_(mode)


class Training:
    """One run: the models, what is trained, and on which images."""

    def __init__(
        self,
        model: nn.Module,
        dense: nn.Module,
        options: CompensationOptions,
        dtype: torch.dtype | None,
        views: Views,
        held: Tensor,
    ) -> None:
        layers = [module for module in model.modules() if isinstance(module, LowRankLinear)]
        if not layers:
            raise InputError("the model has no factored layer to train: compress it first")
        inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
        everything = options.trained == "all"
        self.parameters = {n: p for n, p in model.named_parameters() if everything or id(p) in inside}
        wrong = next((name for name, p in self.parameters.items() if p.dtype != torch.float32), None)
        if wrong is not None:
            raise InputError(f"{wrong} must be torch.float32 to be trained, but it was {self.parameters[wrong].dtype}")
        # Parts of factors that keep their values: their gradients are set to zero, and Adam then leaves them alone.
        self.frozen: list[Callable[[], None]] = []
        if options.trained == "residual":
            sparse = [name for name, module in model.named_modules() if isinstance(module, SparseLinear)]
            if sparse:
                raise InputError(f"trained='residual' is of layers that are factors alone, but {sparse[0]} is sparse")
            for layer in layers:
                base, factors = max(0, layer.rank - options.residual_rank), cast(MixedRankLinear, layer)
                self.frozen += [partial(_freeze, factors.down, 0, base), partial(_freeze, factors.up, 1, base)]
        self.model, self.dense, self.options, self.dtype, self.views = model, dense, options, dtype, views
        self.device = next(model.parameters()).device
        self.imitation = Imitation(model, dense, options.scope, options.feature_weight)
        self.held = [batch.float() for batch in held.split(_EVALUATION_BATCH)]

    def set(self, values: dict[str, Tensor]) -> None:
        """Write values into the trained parameters."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])

    def run(self, steps: int | None, minutes: float | None, path: Path | None, progress: bool) -> CompensationResult:
        """Train, look at the held-out images from time to time, and leave the model at its best."""
        started = time.perf_counter()
        self.target = logits_of(self.dense, self.held, self.dtype)
        # Not the fused one: autograd does not count its writes, and what was packed earlier would seem up to date.
        optimizer = torch.optim.Adam(self.parameters.values(), lr=0.0, betas=_BETAS)
        state = self._begin(path, optimizer, steps, minutes)
        earlier = state.seconds
        every = math.ceil(state.steps / self.options.evaluations)
        deadline = math.inf if minutes is None else 60 * minutes
        losses: list[float] = []
        left = range(state.step, state.steps if state.stopped == "finished" else 0)
        for step in track(left, "compensating", enabled=progress):
            losses.append(self._step(step, state.steps, optimizer))
            state.step = step + 1
            state.seconds = earlier + time.perf_counter() - started
            finite = math.isfinite(losses[-1])
            if finite and state.step % every and state.step < state.steps and state.seconds < deadline:
                continue
            finite = finite and self._look(state, losses, optimizer)
            losses = []
            if not finite:
                state.stopped = "diverged"
            elif state.step < state.steps and len(state.history) - state.best_look > self.options.patience:
                state.stopped = "patience"
            elif state.step < state.steps and state.seconds >= deadline:
                state.stopped = "minutes"
            if path is not None:
                state.save(path)
            if state.stopped != "finished":
                break
        self.set(state.best)
        return CompensationResult(
            state.before,
            state.after,
            state.history,
            state.step,
            state.best_step,
            state.seconds,
            state.stopped,
            self.options,
        )

    def _begin(
        self, path: Path | None, optimizer: torch.optim.Optimizer, steps: int | None, minutes: float | None
    ) -> TrainingState:
        """The state to go on from: that of the file, or a new one."""
        key = self._key(steps, minutes)
        if path is not None and path.exists():
            state = TrainingState.load(path, key, self.parameters)
        else:
            fidelity = compare(logits_of(self.model, self.held, self.dtype), self.target)
            steps = self._affordable(cast(float, minutes)) if steps is None else steps
            state = TrainingState.new(key, steps, fidelity, self.parameters)
        self.set(state.current)
        for name, parameter in self.parameters.items():
            optimizer.state[parameter] = {
                "step": torch.tensor(float(state.step), device=parameter.device),
                "exp_avg": state.first[name].to(parameter.device),
                "exp_avg_sq": state.second[name].to(parameter.device),
            }
        return state

    def _key(self, steps: int | None, minutes: float | None) -> dict:
        """What makes a run the same run."""
        digest = hashlib.blake2b(digest_size=16)
        tensors = (*self.parameters.values(), *self.dense.parameters(), self.views.images, *self.held)
        for tensor in tensors:
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        return asdict(self.options) | {
            "steps": steps, "minutes": minutes, "dtype": str(self.dtype), "contents": digest.hexdigest()
        }  # fmt: skip

    def _affordable(self, minutes: float) -> int:
        """How many steps fit into the time, by the speed of one step and one look at the held-out images."""
        self._gradients(0)  # the first is slower
        started = time.perf_counter()
        self._gradients(1)
        step_seconds = time.perf_counter() - started
        started = time.perf_counter()
        logits_of(self.model, self.held[:1], self.dtype)
        look_seconds = (time.perf_counter() - started) * len(self.held)
        left = 60 * minutes - 2 * step_seconds - (self.options.evaluations + 1) * look_seconds
        return max(1, int(left / step_seconds))

    def _gradients(self, step: int) -> float:
        """Fill the gradients of one step; returns its loss."""
        images = self.views.batch(step).to(self.device)
        for parameter in self.parameters.values():
            parameter.grad = None
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            loss = self.imitation.loss(images)
        loss.backward()
        for freeze in self.frozen:
            freeze()
        return loss.item()

    def _step(self, step: int, steps: int, optimizer: torch.optim.Optimizer) -> float:
        loss = self._gradients(step)
        if math.isfinite(loss):
            optimizer.param_groups[0]["lr"] = self.options.learning_rate * _pace(step, steps)
            norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), _CLIP)
            if not norm.isfinite():
                return math.nan
            optimizer.step()
        return loss

    def _look(self, state: TrainingState, losses: list[float], optimizer: torch.optim.Optimizer) -> bool:
        """Compare with the dense model on the held-out images and note it; returns whether all is finite."""
        logits = logits_of(self.model, self.held, self.dtype)
        if not logits.isfinite().all():
            return False
        state.note(compare(logits, self.target), sum(losses) / len(losses))
        for name, parameter in self.parameters.items():
            moments = optimizer.state[parameter]
            state.keep(name, parameter, moments["exp_avg"], moments["exp_avg_sq"])
        return True


def _freeze(factor: Tensor, axis: int, count: int) -> None:
    """Set the gradient of the first ``count`` rows or columns of a factor to zero, where it has one."""
    if factor.grad is not None:
        factor.grad.narrow(axis, 0, count).zero_()


def _pace(step: int, steps: int) -> float:
    """The learning rate of a step relative to the highest: a linear warm-up, then half a cosine down to zero."""
    warm_up = max(1, round(_WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
