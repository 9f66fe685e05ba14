"""A process of the ladder: times the operators of one build of mixrank_kernels against torch eager, on request.

``python -P -m mixrank_bench.ladder_child`` with the folder of the build in ``PYTHONPATH``. It first writes where
the modules of mixrank_kernels were imported from, then answers each line of its input, a request in JSON, with a line
of JSON. Of this package it imports only the timing: other modules need the newest mixrank_kernels, and the build may
be old.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mixrank_kernels
from mixrank_bench.timing import interleaved

# Old builds have no such module, and an editable install would lend them that of the checkout.
PACKING = Path(mixrank_kernels.__file__).with_name("packing.py")


@dataclass(frozen=True)
class Contest:
    """Both calls of a case, and the relative root mean square error of each against fp64."""

    ours: Callable[[], object]
    reference: Callable[[], object]
    error: float
    reference_error: float


@functools.cache
def contest(op: str, dtype: str, m: int, k: int, n: int, rank: int) -> Contest:
    """Make the inputs of a case, the same ones in every process, and both calls on them."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(getattr(torch, dtype))

    x = normal(m, k)
    if op == "gram_accumulate_":
        return _gram(x)
    down, up, bias = normal(rank, k, scale=k**-0.5), normal(n, rank, scale=rank**-0.5), normal(n)
    return _lowrank(x, down, up, bias)


def _lowrank(x: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> Contest:
    ours = functools.partial(mixrank_kernels.lowrank_linear, x, down, up, bias)
    if PACKING.is_file():
        ours = functools.partial(ours, packed=importlib.import_module("mixrank_kernels.packing").packed(down, up))

    def reference() -> Tensor:
        return F.linear(F.linear(x, down), up, bias)

    true = F.linear(F.linear(x.double(), down.double()), up.double(), bias.double())
    return Contest(ours, reference, _error(ours(), true), _error(reference(), true))


def _gram(x: Tensor) -> Contest:
    gram = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    total = torch.zeros(x.shape[1], x.shape[1])
    ours = functools.partial(mixrank_kernels.gram_accumulate_, gram, x)

    def reference() -> None:
        wide = x.float()
        total.addmm_(wide.mT, wide)

    ours()
    reference()
    true = x.double().mT @ x.double()
    return Contest(ours, reference, _error(gram, true), _error(total, true))


def _error(actual: Tensor, true: Tensor) -> float:
    return ((actual.double() - true).square().mean() / true.square().mean()).sqrt().item()


def answer(request: dict[str, Any]) -> dict[str, float]:
    """Time one turn of each side.

    Args:
        request: ``case``, the arguments of :func:`contest`; ``turn_seconds``; ``reverse``, whether the reference
            comes first.

    Returns:
        Milliseconds of a call and the error, of ours and of the reference.
    """
    found = contest(**request["case"])
    sides = ["ours", "reference"][:: -1 if request["reverse"] else 1]
    calls = {side: getattr(found, side) for side in sides}
    with torch.inference_mode():
        timings = interleaved(calls, rounds=1, turn_seconds=request["turn_seconds"])
    return {
        "milliseconds": timings["ours"].median,
        "reference_milliseconds": timings["reference"].median,
        "error": found.error,
        "reference_error": found.reference_error,
    }


def main() -> None:
    torch.set_num_threads(1)
    files = [module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "mixrank_kernels"]
    print(json.dumps({"files": files, "extension": mixrank_kernels.HAS_EXTENSION}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
