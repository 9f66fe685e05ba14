"""Gradients of the operators: each backward is made of differentiable operations, so it has gradients too.

The gradients of factors are contractions over the rows. Where Triton serves the operator, they are calls of the private
operator ``_factor_grad(x, down, grad)``, ``[..., K], [R, K], [..., N]`` to ``[R, N]``: ``(x @ down^T)^T @ grad`` over
all rows, the gradient of up^T in ``y = (x @ down^T) @ up^T``. It is an operator to have gradients itself and to be
traced. Elsewhere they are products of the libraries.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor

from mixrank_kernels._schema import Arguments, overload
from mixrank_kernels.reference import block_rows, expanded, unpacked_bits


class _Context(Protocol):
    """What autograd hands from a forward to its backward pass; PyTorch's own types have tuples of one entry."""

    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Any, ...]  # as they were saved: tensors, and None for the absent ones

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


def save_lowrank_linear(ctx: _Context, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    """Keep what :func:`lowrank_linear` reads."""
    ctx.save_for_backward(*inputs[:3])


def lowrank_linear(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, down, up and bias."""
    x, down, up = ctx.saved_tensors
    needed = _needed(ctx, 5)
    by_triton = _served_by_triton("lowrank_linear", x, down, up)
    if needed[0] and needed[1] and not by_triton:
        hidden_grad = _as_rows(grad) @ up  # serves both
        x_grad = (hidden_grad @ down).reshape(x.shape)
        down_grad = hidden_grad.mT @ _as_rows(x)
        _, up_grad = _factor_grads(by_triton, x, grad, down, up, (False, needed[2]))
    else:
        x_grad = overload("lowrank_linear")(grad, up.mT, down.mT) if needed[0] else None
        down_grad, up_grad = _factor_grads(by_triton, x, grad, down, up, needed[1:3])
    bias_grad = _as_rows(grad).sum(0) if needed[3] else None
    return (x_grad, down_grad, up_grad, bias_grad, None)[: len(ctx.needs_input_grad)]


def save_lowrank_residual_linear(ctx: _Context, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    """Keep what :func:`lowrank_residual_linear` reads."""
    x, down, up, _bias, residual_down, residual_up, crow, col, values, _packed = inputs
    ctx.save_for_backward(x, down, up, residual_down, residual_up, crow, col, values)


def lowrank_residual_linear(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, down, up, bias, residual_down, residual_up and values."""
    x, down, up, residual_down, residual_up, crow, col, values = ctx.saved_tensors
    needed = _needed(ctx, 10)
    by_triton = _served_by_triton(
        "lowrank_residual_linear", x, down, up, None, residual_down, residual_up, crow, col, values
    )
    residual_grads: tuple[Tensor | None, Tensor | None] = (None, None)
    values_grad = None
    if residual_down is not None:
        residual_grads = _factor_grads(by_triton, x, grad, residual_down, residual_up, needed[4:6])
    if needed[8]:
        b = values.shape[-1]
        row = block_rows(crow, col.shape[0])
        values_grad = _taken_blocks(_as_rows(grad), row, b).mT @ _taken_blocks(_as_rows(x), col, b)
    grads = (
        _residual_input_grad(grad, *ctx.saved_tensors) if needed[0] else None,
        *_factor_grads(by_triton, x, grad, down, up, needed[1:3]),
        _as_rows(grad).sum(0) if needed[3] else None,
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
    turned: tuple[Tensor | None, Tensor | None] = (None, None)
    # The parts of a residual are given together.
    if residual_down is not None:
        turned = (cast(Tensor, residual_up).mT, residual_down.mT)
    if values is not None:
        blocks = cast(Tensor, crow), cast(Tensor, col), values
        crow, col, values = _transposed_blocks(*blocks, x.shape[-1] // values.shape[-1])
    return overload("lowrank_residual_linear")(grad, up.mT, down.mT, None, *turned, crow, col, values)


def save_pivoted_linear(ctx: _Context, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    """Keep what :func:`pivoted_linear` reads."""
    ctx.save_for_backward(*inputs[:4])


def pivoted_linear(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, down, coefficients and bias."""
    x, down, coefficients, index = ctx.saved_tensors
    needed = _needed(ctx, 6)
    parts = _as_rows(grad).index_select(-1, index.long())
    to_hidden, to_others = parts.split([down.shape[0], coefficients.shape[0]], dim=-1)
    hidden_grad = to_hidden + to_others @ coefficients
    grads = (
        (hidden_grad @ down).reshape(x.shape) if needed[0] else None,
        hidden_grad.mT @ _as_rows(x) if needed[1] else None,
        to_others.mT @ (_as_rows(x) @ down.mT) if needed[2] else None,
        None,
        _as_rows(grad).sum(0) if needed[4] else None,
        None,
    )
    return grads[: len(ctx.needs_input_grad)]


def save_sparse_linear(ctx: _Context, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    """Keep what :func:`sparse_linear` reads."""
    ctx.save_for_backward(*inputs[:5])


def sparse_linear(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, values, down, up and bias; that of values is one of the dense weight, read where bits are set."""
    x, mask, values, down, up = ctx.saved_tensors
    needed = _needed(ctx, 7)
    rows, grad_rows = _as_rows(x), _as_rows(grad)
    hidden_grad = None if down is None or not (needed[0] or needed[3]) else grad_rows @ up
    x_grad = values_grad = None
    if needed[0]:
        x_grad = grad_rows @ expanded(mask, values, x.shape[-1])
        x_grad = (x_grad if hidden_grad is None else x_grad + hidden_grad @ down).reshape(x.shape)
    if needed[2]:
        count = unpacked_bits(mask, x.shape[-1]).flatten().cumsum(0)
        # The place of the i-th bit is the first with i bits up to it: no size depends on the contents.
        ordinal = torch.arange(1, values.shape[0] + 1, device=count.device)
        values_grad = (grad_rows.mT @ rows).flatten().index_select(0, torch.searchsorted(count, ordinal))
    grads = (
        x_grad,
        None,
        values_grad,
        hidden_grad.mT @ rows if hidden_grad is not None and needed[3] else None,
        grad_rows.mT @ (rows @ down.mT) if needed[4] else None,
        grad_rows.sum(0) if needed[5] else None,
        None,
    )
    return grads[: len(ctx.needs_input_grad)]


def _needed(ctx: _Context, count: int) -> tuple[bool, ...]:
    # The dispatcher drops trailing arguments that have their defaults.
    return (*ctx.needs_input_grad, *[False] * (count - len(ctx.needs_input_grad)))


def _as_rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _served_by_triton(op: str, *arguments: *Arguments) -> bool:
    from mixrank_kernels._register import served_by_triton  # which imports this module

    return served_by_triton(op, *arguments)


def _factor_grads(
    by_triton: bool,
    x: Tensor,  # [..., K]
    grad: Tensor,  # [..., N]
    down: Tensor,  # [R, K]
    up: Tensor,  # [N, R]
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None]:
    if by_triton:
        factor_grad = overload("_factor_grad")
        return (
            factor_grad(grad, up.mT, x) if needed[0] else None,
            factor_grad(x, down, grad).mT if needed[1] else None,
        )
    rows, grad_rows = _as_rows(x), _as_rows(grad)
    return (
        (grad_rows @ up).mT @ rows if needed[0] else None,
        grad_rows.mT @ (rows @ down.mT) if needed[1] else None,
    )


def save_factor_grad(ctx: _Context, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Keep what :func:`factor_grad` reads."""
    ctx.save_for_backward(*inputs)


def factor_grad(ctx: _Context, product_grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, down and grad in ``_factor_grad``."""
    x, down, grad = ctx.saved_tensors
    return (
        overload("lowrank_linear")(grad, product_grad, down.mT) if ctx.needs_input_grad[0] else None,
        overload("_factor_grad")(grad, product_grad, x) if ctx.needs_input_grad[1] else None,
        overload("lowrank_linear")(x, down, product_grad.mT) if ctx.needs_input_grad[2] else None,
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
