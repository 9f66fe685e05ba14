"""A compressed vision transformer beside the dense one on a GPU, as :mod:`mixrank_bench.gpu` times them.

Random weights, since only speed counts here; ranks are mixed, from the plain SVD of the weights. Everything is
captured: as ``torch.compile`` made it, and as the model is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mixrank
from mixrank_bench import models, peers
from mixrank_bench.gpu_timing import Surroundings, captured, turns
from mixrank_bench.measures import SERVED
from mixrank_bench.timing import interleaved
from mixrank_kernels import backend

MODES = {"compiled": functools.partial(torch.compile, dynamic=False), "eager": lambda model: model}
TURN_SECONDS, LIMIT_SECONDS = 0.05, 30.0


@dataclass(frozen=True)
class Setting:
    """Which model is compressed how far, and what it is given.

    Attributes:
        model: name of timm.
        arguments: further arguments of ``timm.create_model``.
        keep: share of the parameters that the compressed model keeps.
        batch: images of one call.
        dtype: name of the dtype.
        modes: of ``MODES``.
    """

    model: str = "vit_base_patch16_224"
    arguments: dict[str, Any] = field(default_factory=dict)
    keep: float = 0.4
    batch: int = 64
    dtype: str = "bfloat16"
    modes: tuple[str, ...] = tuple(MODES)


SMALL = Setting("vit_tiny_patch16_224", {"img_size": 32, "depth": 1}, 0.5, 2, modes=("eager",))


def rows(setting: Setting, device: torch.device, implementations: tuple[str, ...], rounds: int) -> Iterator[dict]:
    """Measure a model in every mode.

    Args:
        setting: the model.
        device: where it is served.
        implementations: by which of ours the compressed model is served, beside the default one.
        rounds: turns of each variant.

    Yields:
        A row for each mode, of the same form as that of an operator.
    """
    options = models.Options(
        (setting.model,), setting.arguments, (setting.keep,), (setting.dtype,), batches=(setting.batch,)
    )
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False):
        served = models.prepare(setting.model, options, Path(folder))
        loaded = {keep: mixrank.load(one.paths[setting.dtype]).to(device) for keep, one in served.items()}
    images = models.images_of(loaded[None], setting.batch).to(device, models.DTYPES[setting.dtype])
    parameters = {"dense": served[None].parameters, "compressed": served[setting.keep].parameters}
    for mode in setting.modes:
        torch.compiler.reset()
        made = {keep: MODES[mode](model) for keep, model in loaded.items()}
        play, refused = {}, {}
        for group, name, keep, within in _variants(setting.keep, implementations):
            try:
                play[group, name], logits = _captured(made[keep], images, device, within)
                models.gate(models.Variant(keep, mode), setting.dtype, logits, served[keep].logits)
            except Exception as error:  # compilers, captures and the gate fail with exceptions of many kinds
                play.pop((group, name), None)
                refused.setdefault(group, {})[name] = peers.in_words(error)
        timings = interleaved(
            play,
            rounds=rounds,
            turn_seconds=TURN_SECONDS,
            settle_seconds=0.0,
            limit_seconds=LIMIT_SECONDS,
            turn=turns(device),
        )
        gate = refused.get("ours", {}).get(SERVED) or refused.get("dense", {}).get("dense")
        times = {key: dataclasses.asdict(timing) for key, timing in timings.items()}
        yield {
            "kind": "model",
            "device": device.type,
            "threads": None,
            "case": setting.model,
            "keep": setting.keep,
            "batch": setting.batch,
            "dtype": setting.dtype,
            "parameters": parameters,
            "timed": mode,
            "gate": gate,
            "refused": refused,
            "milliseconds": {} if gate else peers.nested(times),
        }


def _variants(keep: float, implementations: tuple[str, ...]) -> list[tuple[str, str, float | None, Surroundings]]:
    """Group, name, share of the parameters and surroundings of everything that takes turns."""
    found = [("dense", "dense", None, contextlib.nullcontext), ("ours", SERVED, keep, contextlib.nullcontext)]
    return found + [("ours", name, keep, functools.partial(backend.use, name)) for name in implementations]


def _captured(
    model: nn.Module, images: Tensor, device: torch.device, within: Surroundings
) -> tuple[Callable[[], object], Tensor]:
    """The model as one callable, and the logits [B, classes] that a replay computed, as fp32 on the CPU."""
    play, logits = captured(functools.partial(model, images), device, within)
    play()
    return play, logits.float().cpu()
