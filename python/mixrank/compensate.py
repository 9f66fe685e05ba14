"""Error compensation: the factors of a compressed model are trained to follow the dense one on unlabelled images.

After truncation every layer still sees inputs that the layers before it have changed, and its error was the least
for the layer and not for the model. Gradients mend both (Azizi, Nazemi, Pedram 2024, layer-wise error compensation,
widened here from a layer's outputs to a block's and to the model's):

``layer``
    every factored layer imitates the dense model's outputs of the same layer, from the inputs that the compressed
    layers before it give; the gradient stays within the layer (the paper's).
``block``
    the same for whole blocks.
``model``
    the gradient passes through the whole model, whose block outputs imitate the dense model's and whose logits are
    distilled (KL).

In all three the error of a tap (a layer or block) is the mean over tokens of ``|s - t|^2 / |t - mean(t)|^2``: relative
for each token, so that the few tokens of enormous norm do not drown the others.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mixrank.errors import InputError
from mixrank.fidelity import Fidelity, compare, logits_of
from mixrank.imitation import SCOPES, Imitation
from mixrank.nn import LowRankLinear
from mixrank.nn_pivoted import put_back_, unpivot_
from mixrank.progress import track
from mixrank.training_state import TrainingState
from mixrank.views import Views, gather

TRAINED = ("factors", "all")
_EVALUATION_BATCH = 25
_WARM_UP = 0.03  # share of the steps
_CLIP = 1.0  # norm of the gradient
_BETAS = (0.9, 0.98)


@dataclass(frozen=True)
class CompensationOptions:
    """How :func:`compensate_` trains; all of it decides the result, together with the models and the images.

    Attributes:
        scope: ``"layer"``, ``"block"`` or ``"model"``.
        trained: ``"factors"``: the factored layers; ``"all"``: every parameter of the model.
        batch_size: images in a step.
        learning_rate: the highest, of Adam, after a warm-up; it falls to zero along half a cosine.
        feature_weight: of the mean error of the taps in the loss of ``"model"``, beside the KL of the logits.
        min_scale: smallest share of an image in a random view; 1: no augmentation.
        held_out: share of the images that only choose the best step.
        evaluations: how often the held-out images are looked at.
        patience: evaluations without a better one after which the run stops.
        seed: of the views.
    """

    scope: str = "model"
    trained: str = "factors"
    batch_size: int = 16
    learning_rate: float = 1e-4
    feature_weight: float = 1.0
    min_scale: float = 0.5
    held_out: float = 0.1
    evaluations: int = 10
    patience: int = 4
    seed: int = 0

    def check(self) -> None:
        """Raise InputError unless every option lies in its range."""
        for name, value, known in (("scope", self.scope, SCOPES), ("trained", self.trained, TRAINED)):
            if value not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, but it was {value!r}")
        for name in ("batch_size", "evaluations", "patience"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, but it was {getattr(self, name)}")
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate must be above 0, but it was {self.learning_rate}")
        if not 0 <= self.feature_weight < math.inf:
            raise InputError(f"feature_weight must be at least 0, but it was {self.feature_weight}")
        if not 0 < self.min_scale <= 1:
            raise InputError(f"min_scale must be in (0, 1], but it was {self.min_scale}")
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


def compensate_(
    model: nn.Module,
    dense: nn.Module,
    images: Iterable,
    *,
    steps: int | None = None,
    minutes: float | None = None,
    options: CompensationOptions | None = None,
    dtype: torch.dtype | None = None,
    state: Path | str | None = None,
    progress: bool = False,
) -> CompensationResult:
    """Train a compressed model in place to follow the dense one on unlabelled images.

    The model is left at the step that followed the dense model best on the held-out images, which may be none: it is
    never left worse than it came. Both models run in evaluation mode (no dropout). Layers in the pivoted form are
    trained as factors and brought back into their form, the same up to rounding.

    Args:
        model: with factored layers; on any device, in fp32.
        dense: the model before compression, on the same device.
        images: batches as for :func:`mixrank.calibrate`; all are kept in memory, in fp16. Labels are not used.
        steps: how many steps to train; or
        minutes: how long to take, evaluation included; the number of steps follows from the speed of the first ones.
        options: see :class:`CompensationOptions`.
        dtype: train under autocast in this dtype (bfloat16 is faster on recent CPUs and GPUs); parameters and the
            optimizer stay in fp32.
        state: a file in which the run is kept from time to time; where it exists already the run goes on from it and
            ends with the same bits, on the same machine and number of threads.
        progress: show a progress bar with the time left.

    Raises:
        InputError: an option outside its range, not exactly one of ``steps`` and ``minutes``, no factored layer, too
            few images, parameters that are not fp32, a state of another run, a loss that is not finite. The model is
            then as it was.

    Example:
        >>> import timm, copy, torch
        >>> from mixrank import compress
        >>> dense = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
        >>> model, images = copy.deepcopy(dense), [torch.randn(8, 3, 32, 32)]
        >>> _ = compress(model, images, keep=0.5)
        >>> result = compensate_(model, dense, images, steps=2, options=CompensationOptions(batch_size=4))
        >>> result.after.divergence <= result.before.divergence
        True
    """
    options = options or CompensationOptions()
    options.check()
    _check_budget(steps, minutes)
    images = gather(images, least=2)
    apart = max(1, round(options.held_out * len(images)))
    if apart >= len(images):
        raise InputError(f"held_out={options.held_out} leaves none of the {len(images)} images to train on")
    # Evenly spread, as images of one class often lie together.
    index = torch.arange(len(images))
    held = ((index + 1) * apart // len(images)) > (index * apart // len(images))
    views = Views(images[~held], options.batch_size, seed=options.seed, min_scale=options.min_scale)
    pivoted = unpivot_(model)
    try:
        training = _Training(model, dense, options, dtype, views, images[held])
        original = {name: parameter.detach().clone() for name, parameter in training.parameters.items()}
        try:
            with _modes(model, dense, training.parameters):
                result = training.run(steps, minutes, None if state is None else Path(state), progress)
        except BaseException:
            training.set(original)
            raise
    except BaseException:
        put_back_(model, pivoted)
        raise
    put_back_(model, pivoted, trained=result.best_step > 0)
    return result


def _check_budget(steps: int | None, minutes: float | None) -> None:
    if (steps is None) == (minutes is None):
        raise InputError("exactly one of steps and minutes must be given")
    if steps is not None and steps < 1:
        raise InputError(f"steps must be at least 1, but it was {steps}")
    if minutes is not None and not 0 < minutes < math.inf:
        raise InputError(f"minutes must be above 0, but it was {minutes}")


@contextmanager
def _modes(model: nn.Module, dense: nn.Module, trained: dict[str, Tensor]) -> Iterator[None]:
    """Both models in evaluation mode, gradients for ``trained`` alone; afterwards everything as it was."""
    modes = {module: module.training for each in (model, dense) for module in each.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.eval(), dense.eval()
        chosen = {id(parameter) for parameter in trained.values()}
        for parameter in wanted:
            parameter.requires_grad_(id(parameter) in chosen)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, mode in wanted.items():
            parameter.grad = None
            parameter.requires_grad_(mode)


class _Training:
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
        self.model, self.dense, self.options, self.dtype, self.views = model, dense, options, dtype, views
        self.device = next(model.parameters()).device
        self.imitation = Imitation(model, dense, options.scope, options.feature_weight)
        self.held = [batch.float() for batch in held.split(_EVALUATION_BATCH)]
        self.target = logits_of(dense, self.held, dtype)

    def set(self, values: dict[str, Tensor]) -> None:
        """Write values into the trained parameters."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])

    def run(self, steps: int | None, minutes: float | None, path: Path | None, progress: bool) -> CompensationResult:
        """Train, look at the held-out images from time to time, and leave the model at its best."""
        started = time.perf_counter()
        optimizer = torch.optim.Adam(self.parameters.values(), lr=0.0, betas=_BETAS, fused=True)
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
            steps = self._affordable(minutes) if steps is None else steps
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
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
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


def _pace(step: int, steps: int) -> float:
    """The learning rate of a step relative to the highest: a linear warm-up, then half a cosine down to zero."""
    warm_up = max(1, round(_WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
