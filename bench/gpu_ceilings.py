"""What a device can do at most: matrix products of its own library, copies, and launches.

Arithmetic: a large square product of random numbers, which a card draws more power for than for zeros. Memory: a copy
(bytes read and written) within the second-level cache and far beyond it. The call: what our operator takes for a single
number, recorded like the cases; ``eager_call`` is the same from Python.
"""

from __future__ import annotations

from typing import Any

import torch

from mixrank_bench.ceilings import Ceilings
from mixrank_bench.gpu_timing import recorded, turns
from mixrank_bench.timing import interleaved
from mixrank_kernels import ops

SIDE = 8192
FOOTPRINTS = (1 << 24, 1 << 31)
"""Bytes that one copy touches."""
_REPEATS = 16
MATMULS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "tf32": torch.float32}


def measure(
    device: torch.device, *, side: int = SIDE, footprints: tuple[int, ...] = FOOTPRINTS
) -> tuple[Ceilings, dict[str, Any]]:
    """Measure the ceilings of ``device``, and what is recorded beside them."""
    flops = {name: 2 * side**3 / _product_seconds(name, side, device) for name in MATMULS}
    bandwidth = {size: size / _copy_seconds(size, device) for size in footprints}
    x = torch.ones(1, 1, device=device)
    calls = [lambda: ops.lowrank_linear(x, x, x)]
    turn = turns(device)
    graph = recorded(calls * _REPEATS, device)
    call = 1e-3 * turn(graph, 0.02) / _REPEATS
    return Ceilings(None, flops, bandwidth, call), {"eager_call": 1e-3 * turn(calls[0], 0.02), "side": side}


def _product_seconds(name: str, side: int, device: torch.device) -> float:
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(side, side, generator=generator, device=device).to(MATMULS[name]) for _ in range(2))
    out, before = torch.empty_like(left), torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if name == "tf32" else "ieee"
    try:
        timing = interleaved(
            {name: recorded([lambda: torch.mm(left, right, out=out)], device)},
            rounds=5, turn_seconds=0.02, settle_seconds=0.0, turn=turns(device),
        )[name]  # fmt: skip
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    return 1e-3 * timing.median


def _copy_seconds(nbytes: int, device: torch.device) -> float:
    source = torch.randint(0, 1 << 30, (nbytes // 8,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    calls = [lambda: target.copy_(source)] * _REPEATS
    timing = interleaved(
        {"copy": recorded(calls, device)}, rounds=5, turn_seconds=0.02, settle_seconds=0.0, turn=turns(device)
    )["copy"]
    return 1e-3 * timing.median / _REPEATS
