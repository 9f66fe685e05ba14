"""What this machine can do at most, measured before anything is compared with it.

Arithmetic: a loop of fused multiply-adds that never leaves the registers (``vdpbf16ps`` for bfloat16, for int8 what
multiplies codes of 8 bits). Memory: the better of a copy (bytes read and written) and a dot product (bytes read), for
several sizes of the working set. The call: what our operator takes where there is nothing to compute.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mixrank_kernels import ops, packing
from mixrank_kernels._load import load_extension

FOOTPRINTS = (1 << 19, 1 << 22, 1 << 24, 1 << 28)
"""Bytes that one measurement of bandwidth touches: within a second-level cache, a third-level one, and memory."""


@dataclass(frozen=True)
class Ceilings:
    """The limits of the machine for a number of threads.

    Attributes:
        threads: threads that worked at once, None on a GPU.
        flops: floating-point operations per second by dtype; a dtype is missing where the processor has no
            instruction for it.
        bandwidth: bytes per second by bytes of the working set, ascending.
        call: seconds of a call of our operator for a single number.
    """

    threads: int | None
    flops: dict[str, float]
    bandwidth: dict[int, float]
    call: float

    def arithmetic_seconds(self, flops: float, dtype: str) -> float | None:
        """The least time for so many operations, or None where the ceiling of the dtype is not known."""
        return flops / self.flops[dtype] if dtype in self.flops else None

    def memory_seconds(self, nbytes: float) -> float:
        """The least time to move so many bytes, which are the working set too."""
        return nbytes / next((rate for size, rate in self.bandwidth.items() if nbytes <= size), self._slowest())

    def _slowest(self) -> float:
        return list(self.bandwidth.values())[-1]

    def to_json(self) -> dict[str, Any]:
        """The ceilings as a row of results."""
        return {"kind": "ceiling"} | asdict(self) | {"bandwidth": {str(k): v for k, v in self.bandwidth.items()}}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Ceilings:
        """The ceilings that :meth:`to_json` wrote."""
        bandwidth = {int(size): rate for size, rate in row["bandwidth"].items()}
        return cls(row["threads"], dict(row["flops"]), dict(sorted(bandwidth.items())), row["call"])


def measure(threads: int, *, milliseconds: float = 100.0, repeats: int = 5) -> Ceilings:
    """Measure the ceilings for ``threads`` threads, in a few seconds; torch's own number of threads stays as it was."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rates = {dtype: _peak(dtype, threads, milliseconds, repeats) for dtype in ("float32", "bfloat16", "int8")}
        bandwidth = {size: max(_copy(size, repeats), _dot(size, repeats)) for size in FOOTPRINTS}
        call = _call(repeats)
    finally:
        torch.set_num_threads(before)
    return Ceilings(threads, {dtype: rate for dtype, rate in rates.items() if rate is not None}, bandwidth, call)


def _peak(dtype: str, threads: int, milliseconds: float, repeats: int) -> float | None:
    """Operations per second of all threads together, the best of ``repeats``; None without such an instruction."""
    extension = load_extension()
    if extension is None or (dtype == "bfloat16" and "avx512bf16" not in extension.supported_isas()):
        return None
    start = threading.Barrier(threads)

    def one(_: int) -> float:
        start.wait()
        return extension.peak_flops(dtype, milliseconds)

    with ThreadPoolExecutor(threads) as pool:
        return max(sum(pool.map(one, range(threads))) for _ in range(repeats))


def _copy(nbytes: int, repeats: int) -> float:
    source = torch.ones(nbytes // 8, dtype=torch.float32)
    target = torch.empty_like(source)
    return nbytes / _best(lambda: target.copy_(source), repeats)


def _dot(nbytes: int, repeats: int) -> float:
    left, right = torch.ones(2, nbytes // 8, dtype=torch.float32)
    return nbytes / _best(lambda: torch.dot(left, right), repeats)


def _call(repeats: int) -> float:
    down = up = x = torch.ones(1, 1)
    with torch.inference_mode():
        packed = packing.packed(down, up)
        return _best(lambda: ops.lowrank_linear(x, down, up, packed=packed), repeats)


def _best(call: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of several groups of calls."""
    call()
    best = float("inf")
    for _ in range(repeats):
        calls, start = 0, time.perf_counter()
        while (passed := time.perf_counter() - start) < 0.02 or calls == 0:
            call()
            calls += 1
        best = min(best, passed / calls)
    return best
