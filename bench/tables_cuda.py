"""The table of docs/kernels/cuda.md: what each CUDA kernel takes of a multiprocessor."""

from __future__ import annotations

from collections.abc import Callable

from mixrank_bench.environment import RESULTS, read
from mixrank_bench.markdown import table

CUDA_BUILD = RESULTS / "cuda_build.jsonl"
TENSOR_INSTRUCTIONS = ("HGMMA", "HMMA")


def _tensor_instructions(row: dict) -> str:
    counts = row["instructions"]
    return " + ".join(f"{counts[name]} {name}" for name in TENSOR_INSTRUCTIONS if counts[name]) or "none"


COLUMNS: dict[str, Callable[[dict], object]] = {
    "compiled for": lambda row: row["target"],
    "threads": lambda row: row["threads"],
    "registers": lambda row: row["registers"],
    "shared memory, KiB": lambda row: f"{row['shared_bytes'] / 1024:.1f}",
    "blocks on one SM": lambda row: row["blocks_per_sm"],
    "tensor instructions": _tensor_instructions,
}


def build() -> str:
    """One line for each kernel; where the architectures that it is compiled for differ, the values of each in turn."""
    kernels: dict[str, list[dict]] = {}
    for row in read(CUDA_BUILD):
        if row["written_for"] <= row["architecture"]:
            kernels.setdefault(row["kernel"], []).append(row)
    if not kernels:
        return "No build has been recorded yet.\n"
    cells = [
        (f"`{kernel}`", *(" / ".join(dict.fromkeys(str(value(row)) for row in rows)) for value in COLUMNS.values()))
        for kernel, rows in kernels.items()
    ]
    e = next(reversed(kernels.values()))[-1]["environment"]
    return table(("kernel", *COLUMNS), cells) + f"\nCompiled by nvcc {e['nvcc']}, commit {e['commit']}, {e['date']}.\n"
