"""The registry of what is timed: shapes of real vision transformers, and the peers of each operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mixrank_kernels import ops, testing

WIDTHS = {"vit-ti": 192, "vit-s": 384, "vit-b": 768}
ROWS = (1, 32, 197, 1576)
KEEP = 0.4


@dataclass(frozen=True)
class Case:
    """One operator on one shape: its arguments, its work, and who is timed on it. ``ours`` is always among them."""

    op: str
    name: str
    dtype: torch.dtype
    arguments: dict[str, Tensor | None]
    flops: int
    variants: dict[str, Callable[[], object]]


def cases() -> Iterator[Case]:
    """Every case of the suite, made one at a time."""
    for dtype in (torch.float32, torch.bfloat16):
        for model, width in WIDTHS.items():
            for layer, k, n in (("proj", width, width), ("fc1", width, 4 * width), ("fc2", 4 * width, width)):
                for m in ROWS:
                    yield _lowrank(f"{model} {layer}", m, k, n, dtype)
            yield _gram(model, 1576, width, dtype)


def _lowrank(name: str, m: int, k: int, n: int, dtype: torch.dtype) -> Case:
    r = max(8, round(KEEP * k * n / (k + n) / 8) * 8)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(m, k, generator=generator).to(dtype)
    down = (torch.randn(r, k, generator=generator) / k**0.5).to(dtype)
    up = (torch.randn(n, r, generator=generator) / r**0.5).to(dtype)
    bias = torch.randn(n, generator=generator).to(dtype)
    weight = (up.float() @ down.float()).to(dtype)
    arguments = {"x": x, "down": down, "up": up, "bias": bias}
    variants = {
        "ours": lambda: ops.lowrank_linear(x, down, up, bias),
        "torch, two linears": lambda: testing.plain_lowrank_linear(x, down, up, bias),
        "torch, dense": lambda: F.linear(x, weight, bias),
    }
    return Case("lowrank_linear", f"{name} M={m} K={k} N={n} R={r}", dtype, arguments, 2 * m * r * (k + n), variants)


def _gram(name: str, m: int, k: int, dtype: torch.dtype) -> Case:
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(0)).to(dtype)
    gram, wide = torch.zeros(k, k, dtype=torch.float64), torch.zeros(k, k)
    arguments = {"gram": gram, "x": x, "row_weight": None, "column_sum": None}
    variants = {
        "ours": lambda: ops.gram_accumulate_(gram, x),
        "torch, addmm_ in fp32": lambda: wide.addmm_(x.float().mT, x.float()),
    }
    return Case("gram_accumulate_", f"{name} M={m} K={k}", dtype, arguments, 2 * m * k * k, variants)
