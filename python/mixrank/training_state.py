"""The state of a training run in one file, from which the run goes on and ends with the same bits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixrank.errors import InputError
from mixrank.fidelity import Fidelity
from mixrank.files import check_same_run, write_tensors

_PARTS = ("current", "best", "first", "second")
_FIELDS = ("steps", "step", "seconds", "best_step", "best_look", "stopped", "history")
_KEY = "mixrank_training"


@dataclass
class TrainingState:
    """Where a run stands.

    Attributes:
        key: what makes it this run, in terms of JSON.
        steps: how many there are to be.
        step: how many were made.
        seconds: time that they took.
        before: fidelity on the held-out images at the start.
        after: that of the best step.
        best_step: after which step the model was best; 0: at the start.
        best_look: which look at the held-out images that was; 0: at the start.
        stopped: ``"finished"``, or why the run ends before its last step.
        history: what every look found.
        current: the parameters by name, as the last look found them.
        best: those of the best step.
        first: Adam's first moments, of ``current``.
        second: its second moments.
    """

    key: dict
    steps: int
    step: int
    seconds: float
    before: Fidelity
    after: Fidelity
    best_step: int
    best_look: int
    stopped: str
    history: list[dict]
    current: dict[str, Tensor]
    best: dict[str, Tensor]
    first: dict[str, Tensor]
    second: dict[str, Tensor]

    @classmethod
    def new(cls, key: dict, steps: int, fidelity: Fidelity, parameters: Mapping[str, Tensor]) -> TrainingState:
        """The state before the first step."""
        whole = {"memory_format": torch.contiguous_format}  # as files hold them
        values = {name: parameter.detach().cpu().clone(**whole) for name, parameter in parameters.items()}
        zeros = [{name: torch.zeros_like(value) for name, value in values.items()} for _ in range(2)]
        best = {name: value.clone() for name, value in values.items()}
        return cls(key, steps, 0, 0.0, fidelity, fidelity, 0, 0, "finished", [], values, best, *zeros)

    def note(self, fidelity: Fidelity, loss: float) -> None:
        """Record what a look at the held-out images found."""
        found = {"divergence": fidelity.divergence, "agreement": fidelity.agreement, "loss": loss}
        self.history.append({"step": self.step} | found)
        if fidelity.divergence < self.after.divergence:
            self.after, self.best_step, self.best_look = fidelity, self.step, len(self.history)

    def keep(self, name: str, parameter: Tensor, first: Tensor, second: Tensor) -> None:
        """Take over a parameter and its moments after :meth:`note`."""
        for part, value in ((self.current, parameter), (self.first, first), (self.second, second)):
            part[name].copy_(value.detach())
        if self.best_step == self.step:
            self.best[name].copy_(parameter.detach())

    def save(self, path: Path) -> None:
        """Write the state to a file, whole or not at all.

        Raises:
            InputError: it cannot be written.
        """
        content = {"key": self.key, "before": asdict(self.before), "after": asdict(self.after)}
        content |= {name: getattr(self, name) for name in _FIELDS}
        tensors = {f"{part}.{name}": value for part in _PARTS for name, value in getattr(self, part).items()}
        write_tensors(path, tensors, {_KEY: json.dumps(content)})

    @classmethod
    def load(cls, path: Path, key: dict, parameters: Mapping[str, Tensor]) -> TrainingState:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: it is not such a file, or the state of a run with another key or of other parameters.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                content = json.loads((file.metadata() or {})[_KEY])
                check_same_run(path, content["key"], key)
                parts = {part: {n: file.get_tensor(f"{part}.{n}").clone() for n in parameters} for part in _PARTS}
            values: dict[str, Any] = {name: content[name] for name in _FIELDS}
            before, after = (Fidelity(**content[name]) for name in ("before", "after"))
        except InputError:
            raise
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path} is not the state of a training run: {error}") from error
        return cls(key=key, before=before, after=after, **values | parts)
