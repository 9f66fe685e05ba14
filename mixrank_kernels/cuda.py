"""CUDA C++ implementations of the operators: bf16, fp16 (Gram matrices only) and fp32 tensors on a CUDA device.

fp32 values are multiplied in terms of bf16 whose sum they are: in three (all 24 bits) where PyTorch computes fp32
products in full precision, in two (16 bits) where it has been told that less will do, by
``torch.set_float32_matmul_precision("high")`` or the like. Sums are fp32 always. Importing this module loads nothing;
the extension ``mixrank_kernels._cuda`` is loaded at the first question. Alphabet as in :mod:`mixrank_kernels.ops`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from mixrank_kernels._load import CUDA_EXTENSION, REBUILD, load_cuda_extension
from mixrank_kernels._schema import Arguments

LEAST_CAPABILITY = (8, 0)


class Tile(IntEnum):
    """Tiles of 16 x 32, 32 x 32, 64 x 64 (128 x 64 on Hopper) and 128 x 128: ProductTile of launch_product.h."""

    BY_SIZE = 0
    FEW_ROWS = 1
    SMALL = 2
    MEDIUM = 3
    LARGE = 4


class Form(NamedTuple):
    """How a linear operator is served: launches (0 is by size), and the tile of two launches."""

    launches: int = 0
    tile: Tile = Tile.BY_SIZE


_form = Form()


@contextlib.contextmanager
def form(launches: int = 0, tile: Tile = Tile.BY_SIZE) -> Iterator[None]:
    """Within the block, serve linear operators in this form where there is a kernel for it, in the whole process.

    For measurements: what is chosen by size rests on them. fp32 has one form.

    Raises:
        ValueError: ``launches`` is none of 0, 1 and 2.
    """
    global _form
    if launches not in (0, 1, 2):
        raise ValueError(f"launches must be 0, 1 or 2, but it was {launches}")
    before, _form = _form, Form(launches, Tile(tile))
    try:
        yield
    finally:
        _form = before


@functools.cache
def obstacle() -> str | None:
    """Why these kernels cannot run on any CUDA tensor of this process, or None."""
    if load_cuda_extension() is None:
        return f"the extension {CUDA_EXTENSION} is not built; build it where nvcc is, with: {REBUILD}"
    return None


def refusal(op: str, *arguments: *Arguments) -> str | None:
    """Why the call of ``op`` with these arguments, which fit the operator, is not served here; None where it is."""
    if reason := obstacle():
        return reason
    if op in ("pivoted_linear", "sparse_linear"):
        return f"it has no kernel for {op}"
    x = arguments[1] if "gram" in op else arguments[0]
    if x.dtype == torch.float64:
        return "tensor cores have no terms for float64"
    if x.dtype == torch.float16 and "gram" not in op:
        return "its intermediate is in the dtype of x, whose range float16 values can leave"
    if x.is_cuda and _capability(x.device) < LEAST_CAPABILITY:
        return f"it needs compute capability {'.'.join(map(str, LEAST_CAPABILITY))} or higher"
    return None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a device; the least where there is none, as for tensors without memory."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else LEAST_CAPABILITY


def lowrank_linear(
    x: Tensor,  # [..., K]
    down: Tensor,  # [R, K]
    up: Tensor,  # [N, R]
    bias: Tensor | None = None,  # [N]
    packed: Tensor | None = None,  # [bytes], the layout of the CPU kernels: of no use here
) -> Tensor:  # [..., N]
    """Two launches, of which the second begins while the first ends; the arguments are checked, and not refused."""
    return lowrank_residual_linear(x, down, up, bias)


def lowrank_residual_linear(
    x: Tensor,  # [..., K]
    down: Tensor,  # [R, K]
    up: Tensor,  # [N, R]
    bias: Tensor | None = None,  # [N]
    residual_down: Tensor | None = None,  # [Q, K]
    residual_up: Tensor | None = None,  # [N, Q]
    crow: Tensor | None = None,  # [N / b + 1]
    col: Tensor | None = None,  # [nnz]
    values: Tensor | None = None,  # [nnz, b, b]
    packed: Tensor | None = None,  # [bytes], the layout of the CPU kernels: of no use here
) -> Tensor:  # [..., N]
    """The same two launches, every residual in the sum of the second; the arguments are checked, and not refused."""
    shape = (*x.shape[:-1], up.shape[0])
    rows = _rows(x.reshape(-1, x.shape[-1]))
    if rows.shape[0] == 0:
        return x.new_empty(shape)
    factors = [None if t is None else _rows(t) for t in (down, up, residual_down, residual_up)]
    bias, crow, col, values = (None if t is None else t.contiguous() for t in (bias, crow, col, values))
    y = torch.ops.mixrank_kernels._cuda_linear(
        rows, factors[0], factors[1], bias, factors[2], factors[3], crow, col, values, _terms(), *_form
    )
    return y.reshape(shape)


def gram_accumulate_(
    gram: Tensor,  # [K, K] or [B, K, K]
    x: Tensor,  # [..., K] or [B, M, K]
    row_weight: Tensor | None = None,  # x.shape[:-1]
    column_sum: Tensor | None = None,  # [K] or [B, K]
) -> None:
    """Tiles of one triangle, split over the rows; the arguments are checked, and not refused."""
    rows = _rows(x if gram.dim() == 3 else x.reshape(1, -1, x.shape[-1]))
    if 0 in rows.shape:
        return
    weights = None if row_weight is None else row_weight.reshape(rows.shape[:2]).to(torch.float32).contiguous()
    sums = column_sum[None] if column_sum is not None and gram.dim() == 2 else column_sum
    masters = gram[None] if gram.dim() == 2 else gram
    torch.ops.mixrank_kernels._cuda_gram_(masters, rows, None, weights, sums, _terms())


def cross_gram_accumulate_(
    cross: Tensor,  # [K, N]
    x: Tensor,  # [..., K]
    z: Tensor,  # [..., N]
) -> None:
    """Tiles of the whole product, split over the rows; the arguments are checked, and not refused."""
    rows, targets = (_rows(t.reshape(1, -1, t.shape[-1])) for t in (x, z))
    if rows.shape[1]:
        torch.ops.mixrank_kernels._cuda_gram_(cross[None], rows, targets, None, None, _terms())


def _terms() -> int:
    """Terms of bf16 in an fp32 value: what PyTorch was told about fp32 products holds here too."""
    return 3 if torch.backends.cuda.matmul.fp32_precision in ("ieee", "none") else 2


def _rows(tensor: Tensor) -> Tensor:
    """``tensor``, or a copy if its rows overlap or their elements are not adjacent."""
    if tensor.stride(-1) == 1 and tensor.stride(-2) >= tensor.shape[-1]:
        return tensor
    return tensor.contiguous()
