"""The table of docs/kernels/cuda.md: what each CUDA kernel takes of a multiprocessor."""

from __future__ import annotations

from mixrank_bench.environment import RESULTS, read
from mixrank_bench.markdown import table

CUDA_BUILD = RESULTS / "cuda_build.jsonl"
TENSOR_INSTRUCTIONS = ("HGMMA", "HMMA")


def build() -> str:
    """One line for each kernel and each architecture whose instructions it is written for."""
    rows = [row for row in read(CUDA_BUILD) if row["written_for"] <= row["architecture"]]
    if not rows:
        return "No build has been recorded yet.\n"
    cells = [
        (
            f"`{row['kernel']}`",
            f"sm_{row['architecture']}",
            row["threads"],
            row["registers"],
            f"{row['shared_bytes'] / 1024:.1f}",
            row["blocks_per_sm"],
            ", ".join(
                f"{row['instructions'][name]} {name}" for name in TENSOR_INSTRUCTIONS if row["instructions"][name]
            )
            or "-",
        )
        for row in rows
    ]
    header = ("kernel", "for", "threads", "registers", "shared memory, KiB", "blocks on one SM", "tensor instructions")
    e = rows[-1]["environment"]
    return table(header, cells) + f"\nCompiled by nvcc {e['nvcc']}, commit {e['commit']}, {e['date']}.\n"
