"""Gradients of the operators: each backward is made of differentiable operations, so it has gradients too."""

from __future__ import annotations

import torch
from torch import Tensor

from mixrank_kernels._schema import overload
from mixrank_kernels.reference import block_rows


def save_lowrank_linear(ctx, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    """Keep what :func:`lowrank_linear` reads."""
    ctx.save_for_backward(*inputs[:3])


def lowrank_linear(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, down, up and bias."""
    x, down, up = ctx.saved_tensors
    needed = _needed(ctx, 5)
    rows, grad_rows = _as_rows(x), _as_rows(grad)
    grads = (
        overload("lowrank_linear")(grad, up.mT, down.mT) if needed[0] else None,
        *_factor_grads(rows, grad_rows, down, up, needed[1:3]),
        grad_rows.sum(0) if needed[3] else None,
        None,
    )
    return grads[: len(ctx.needs_input_grad)]


def save_lowrank_residual_linear(ctx, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    """Keep what :func:`lowrank_residual_linear` reads."""
    x, down, up, _bias, residual_down, residual_up, crow, col, values, _packed = inputs
    ctx.save_for_backward(x, down, up, residual_down, residual_up, crow, col, values)


def lowrank_residual_linear(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, down, up, bias, residual_down, residual_up and values."""
    x, down, up, residual_down, residual_up, crow, col, values = ctx.saved_tensors
    needed = _needed(ctx, 10)
    rows, grad_rows = _as_rows(x), _as_rows(grad)
    residual_grads, values_grad = (None, None), None
    if residual_down is not None:
        residual_grads = _factor_grads(rows, grad_rows, residual_down, residual_up, needed[4:6])
    if needed[8]:
        b = values.shape[-1]
        row = block_rows(crow, col.shape[0])
        values_grad = _taken_blocks(grad_rows, row, b).mT @ _taken_blocks(rows, col, b)
    grads = (
        _residual_input_grad(grad, *ctx.saved_tensors) if needed[0] else None,
        *_factor_grads(rows, grad_rows, down, up, needed[1:3]),
        grad_rows.sum(0) if needed[3] else None,
        *residual_grads,
        None,
        None,
        values_grad,
        None,
    )
    return grads[: len(ctx.needs_input_grad)]


def _residual_input_grad(
    grad: Tensor,  # [..., N]
    x: Tensor,
    down: Tensor,
    up: Tensor,
    residual_down: Tensor | None,
    residual_up: Tensor | None,
    crow: Tensor | None,
    col: Tensor | None,
    values: Tensor | None,
) -> Tensor:  # [..., K]
    turned = (None, None) if residual_down is None else (residual_up.mT, residual_down.mT)
    if values is not None:
        crow, col, values = _transposed_blocks(crow, col, values, x.shape[-1] // values.shape[-1])
    return overload("lowrank_residual_linear")(grad, up.mT, down.mT, None, *turned, crow, col, values)


def _needed(ctx, count: int) -> tuple[bool, ...]:
    # The dispatcher drops trailing arguments that have their defaults.
    return (*ctx.needs_input_grad, *[False] * (count - len(ctx.needs_input_grad)))


def _as_rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _factor_grads(
    rows: Tensor,  # [M, K]
    grad_rows: Tensor,  # [M, N]
    down: Tensor,  # [R, K]
    up: Tensor,  # [N, R]
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None]:
    return (
        (grad_rows @ up).mT @ rows if needed[0] else None,
        grad_rows.mT @ (rows @ down.mT) if needed[1] else None,
    )


def _taken_blocks(rows: Tensor, index: Tensor, b: int) -> Tensor:
    """The columns of ``rows`` [M, K] in blocks of ``b``, of which those at ``index``: [nnz, M, b]."""
    return rows.reshape(-1, rows.shape[-1] // b, b).transpose(0, 1).index_select(0, index)


def _transposed_blocks(crow: Tensor, col: Tensor, values: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """The block-sparse matrix transposed, in the same form; no size depends on the contents."""
    ordered, order = torch.sort(col, stable=True)
    bounds = torch.arange(columns + 1, dtype=col.dtype, device=col.device)
    turned = torch.searchsorted(ordered, bounds, out_int32=col.dtype == torch.int32)
    return turned, block_rows(crow, col.shape[0])[order], values[order].mT.contiguous()
