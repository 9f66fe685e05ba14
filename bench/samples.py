"""Small cases of every kind, and rows of results made by hand: for tests of the suite."""

from __future__ import annotations

from typing import Any

import torch

from mixrank_bench.gpu_cases import bar_cases
from mixrank_bench.measures import ADDMM, OUT_DTYPE, SERVED
from mixrank_bench.ops import TOKENS, Case


def tiny_cases(dtype: torch.dtype) -> list[Case]:
    """Every kind of case, small."""
    linear = [Case("lowrank_linear", "tiny", dtype, 5, 48, 40, 8, 0.4)]
    residual = [
        Case("lowrank_residual_linear", "tiny", dtype, 5, 64, 96, 8, 0.4, residual)
        for residual in ("branch", "blocks 32", "blocks 16")
    ]
    grams = [
        Case("gram_accumulate_", "tiny", dtype, 2 * TOKENS, 24),
        Case("gram_accumulate_", "tiny heads", dtype, 50, 16, batch=3),
        Case("cross_gram_accumulate_", "tiny", dtype, 2 * TOKENS, 24, 16),
    ]
    pivoted = [Case("pivoted_linear", "tiny", dtype, 5, 48, 40, 16, 0.6)]
    sparse = [Case("sparse_linear", "tiny", dtype, 5, 48, 40, rank, density=0.4) for rank in (0, 8)]
    int8 = []
    if dtype == torch.float32:
        for dynamic in (True, False):
            int8 += [
                Case("int8_linear", "tiny", dtype, 5, 48, 40, dynamic=dynamic),
                Case("int8_lowrank_linear", "tiny", dtype, 5, 48, 40, 8, 0.4, dynamic=dynamic),
            ]
    return linear + residual + grams + pivoted + sparse + int8


def _timing(median: float) -> dict[str, float]:
    shares = {"low": 0.9 * median, "high": 1.1 * median, "quartiles": (0.95 * median, 1.05 * median)}
    return {"median": median, "rounds": 5} | shares


def op_row(case: Case, milliseconds: dict[str, dict[str, float]], **fields: Any) -> dict[str, Any]:
    """A row of results of a case with these medians by group and name."""
    nested = {group: {name: _timing(median) for name, median in named.items()} for group, named in milliseconds.items()}
    row = {"kind": "op", "run": "r1", "full": True, "threads": 1} | case.to_json()
    return row | {"milliseconds": nested, "absent": {}, "gate": None} | fields


def ceiling_row(float32: float = 1e11, bfloat16: float = 2e11, **fields: Any) -> dict[str, Any]:
    """A row of ceilings: operations per second, 10 GB/s of memory, 100 GB/s of cache, and a call that costs nothing."""
    flops = {"float32": float32, "bfloat16": bfloat16}
    bandwidth = {"524288": 1e11, "268435456": 1e10}
    limits = {"flops": flops, "bandwidth": bandwidth, "call": 0.0}
    return {"kind": "ceiling", "run": "r1", "full": True, "threads": 1} | limits | fields


def gpu_rows(ours: float, implementation: str = SERVED) -> list[dict[str, Any]]:
    """A run of the bars on a GPU in which ours takes ``ours`` milliseconds wherever the fastest peer takes two."""
    fields = {"timed": "cold", "device": "cuda", "threads": None, "refused": {}}
    linear = {"ours": {implementation: ours}, "factors": {"torch eager": 2.0}}
    gram = {"ours": {implementation: ours}, "gram": {ADDMM: 8.0, OUT_DTYPE: 2.0}}
    gram |= {"rounded": {"torch addmm_ in bfloat16": 1.0}}
    cases = list(bar_cases())
    rows = [op_row(case, gram if "gram" in case.op else linear, **fields) for case in cases]
    model = {"kind": "model", "timed": "compiled", "case": "vit_base_patch16_224", "batch": 64}
    times = {"dense": {"dense": 2.0}, "ours": {implementation: ours}}
    return [*rows, op_row(cases[0], times, **fields) | model]
