"""The table of docs/kernels/triton.md: what each Triton kernel takes of a multiprocessor, as it was compiled."""

from __future__ import annotations

from collections.abc import Iterable

from mixrank_bench.environment import RESULTS, read
from mixrank_bench.markdown import table

TRITON_AOT = RESULTS / "triton_aot.jsonl"

# What a multiprocessor of either architecture has, and the units that it is given out in.
REGISTERS, REGISTERS_OF_WARP = 65536, 256
PARTITIONS = 4
WARPS, BLOCKS = 64, 32
SHARED = {"sm_80": 164 * 1024, "sm_90": 228 * 1024}
SHARED_UNIT, SHARED_RESERVED = 128, 1024


def blocks_per_multiprocessor(architecture: str, warps: int, registers: int, shared_bytes: int) -> int:
    """How many blocks run on one multiprocessor at once.

    Args:
        architecture: ``sm_80`` or ``sm_90``.
        warps: of one block.
        registers: of one thread.
        shared_bytes: of one block, without what the system reserves.
    """
    of_warp = _rounded_up(registers * 32, REGISTERS_OF_WARP)
    by_registers = REGISTERS // PARTITIONS // of_warp * PARTITIONS // warps
    by_shared = SHARED[architecture] // _rounded_up(shared_bytes + SHARED_RESERVED, SHARED_UNIT)
    return min(BLOCKS, WARPS // warps, by_registers, by_shared)


def _rounded_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def triton_resources() -> str:
    """For each kernel and configuration the least and the most that its forms take in contiguous layout."""
    groups: dict[tuple[str, str, int], dict[str, list[dict]]] = {}
    rows = read(TRITON_AOT)
    for row in rows:
        if row["layout"] == "contiguous":
            group = groups.setdefault((row["kernel"], row["configuration"], row["num_warps"]), {})
            group.setdefault(row["architecture"], []).append(row)
    cells = (
        (f"`{kernel}`", configuration, warps, *(cell for name in SHARED for cell in _taken(group[name])))
        for (kernel, configuration, warps), group in sorted(groups.items())
    )
    header = ["kernel", "configuration", "warps"]
    for name in SHARED:
        header += [f"{name}: registers", "stack, B", "shared, KiB", "blocks per SM"]
    versions = ", ".join(sorted({row["triton"] for row in rows}))
    return table(header, cells) + f"\nCompiled by triton {versions}.\n"


def _taken(rows: list[dict]) -> tuple[str, ...]:
    blocks = (
        blocks_per_multiprocessor(row["architecture"], row["num_warps"], row["registers"], row["shared_bytes"])
        for row in rows
    )
    return (
        _range(row["registers"] for row in rows),
        _range(row["stack_bytes"] for row in rows),
        _range(round(row["shared_bytes"] / 1024) for row in rows),
        _range(blocks),
    )


def _range(values: Iterable[int]) -> str:
    ordered = sorted(values)
    return str(ordered[0]) if ordered[0] == ordered[-1] else f"{ordered[0]} to {ordered[-1]}"
