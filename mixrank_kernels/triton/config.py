"""Block sizes of every Triton kernel for each class of operands and shapes: committed, never tuned at a call.

A class of operands is ``half`` (bf16, fp16: tensor cores), ``fp32`` (plain FMA, never TF32) or ``fp64``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mixrank_kernels.choice import operand_class


@dataclass(frozen=True)
class LowRankConfig:
    """Blocks of the low-rank kernels: BM rows, BN out features, BR ranks, BK in features."""

    BM: int
    BN: int
    BR: int
    BK: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class GramConfig:
    """Blocks of the Gram kernel: a tile is BK x BK, taken over BM rows at a time; BS x BS of it is one reduction."""

    BK: int
    BM: int
    BS: int
    num_warps: int
    num_stages: int


# One launch that recomputes the intermediate for every BN columns (``fused``), or a launch for each product (``down``
# and ``up``). Zero stands for a block that the kernel does not have.
LOWRANK = {
    ("half", "fused-rows16"): LowRankConfig(BM=16, BN=64, BR=64, BK=128, num_warps=4, num_stages=3),
    ("half", "fused"): LowRankConfig(BM=64, BN=128, BR=64, BK=64, num_warps=8, num_stages=3),
    ("half", "down"): LowRankConfig(BM=128, BN=0, BR=64, BK=64, num_warps=8, num_stages=3),
    ("half", "up"): LowRankConfig(BM=128, BN=128, BR=32, BK=0, num_warps=8, num_stages=3),
    ("fp32", "fused-rows16"): LowRankConfig(BM=16, BN=64, BR=32, BK=32, num_warps=4, num_stages=2),
    ("fp32", "fused"): LowRankConfig(BM=32, BN=64, BR=32, BK=32, num_warps=4, num_stages=2),
    ("fp32", "down"): LowRankConfig(BM=64, BN=0, BR=32, BK=16, num_warps=4, num_stages=2),
    ("fp32", "up"): LowRankConfig(BM=64, BN=64, BR=16, BK=0, num_warps=4, num_stages=2),
    ("fp64", "fused-rows16"): LowRankConfig(BM=16, BN=32, BR=32, BK=16, num_warps=4, num_stages=2),
    ("fp64", "fused"): LowRankConfig(BM=32, BN=32, BR=32, BK=16, num_warps=4, num_stages=2),
    ("fp64", "down"): LowRankConfig(BM=32, BN=0, BR=32, BK=16, num_warps=4, num_stages=2),
    ("fp64", "up"): LowRankConfig(BM=32, BN=32, BR=32, BK=0, num_warps=4, num_stages=2),
}

# A second launch costs about as much as this many recomputed multiply-adds.
FUSED_RECOMPUTED_MACS = 2**28

GRAM = {
    ("half", "narrow"): GramConfig(BK=64, BM=64, BS=32, num_warps=4, num_stages=3),
    ("half", "wide"): GramConfig(BK=128, BM=64, BS=32, num_warps=8, num_stages=3),
    ("half", "weighted"): GramConfig(BK=64, BM=32, BS=32, num_warps=4, num_stages=3),
    ("fp32", "any"): GramConfig(BK=64, BM=16, BS=32, num_warps=4, num_stages=2),
    ("fp64", "any"): GramConfig(BK=32, BM=16, BS=32, num_warps=4, num_stages=2),
}

# Features up to which small Gram tiles waste less on padding than large ones gain.
GRAM_NARROW_FEATURES = 256

# The rows are divided among so many programs at least, but none gets fewer than GRAM_ROWS_MIN, to be worth its
# reduction, nor more than GRAM_ROWS_MAX, which bounds the rounding of an fp32 accumulator. These are constants and
# not properties of a device, so that every card gives the same bits.
GRAM_PROGRAMS = 264
GRAM_ROWS_MIN = 512
GRAM_ROWS_MAX = 4096

# Partial tiles held at once, over which the rows are taken in rounds.
GRAM_SCRATCH_BYTES = 2**28


def lowrank_config(dtype: torch.dtype, m: int, k: int, n: int, r: int) -> tuple[LowRankConfig | None, LowRankConfig]:
    """The configurations of the down and the up kernel for x [M, K], down [R, K], up [N, R].

    None for the down kernel stands for the fused form, where the up kernel does both products.
    """
    operands = operand_class(dtype)
    fused = LOWRANK[operands, "fused-rows16" if m <= 16 else "fused"]
    recomputed = (-(-n // fused.BN) - 1) * m * k * r
    if m <= 16 or recomputed <= FUSED_RECOMPUTED_MACS:
        return None, fused
    return LOWRANK[operands, "down"], LOWRANK[operands, "up"]


def gram_config(dtype: torch.dtype, k: int, weighted: bool) -> GramConfig:
    """The configuration for rows of K features; weighted rows are split in registers, which leaves fewer to a tile."""
    operands = operand_class(dtype)
    if operands != "half":
        return GRAM[operands, "any"]
    if weighted:
        return GRAM[operands, "weighted"]
    return GRAM[operands, "narrow" if k <= GRAM_NARROW_FEATURES else "wide"]
