"""Sample inputs and the error budget, for tests and benchmarks of the operators and of whatever is built on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mixrank_kernels import reference
from mixrank_kernels._sample_makers import Sample, every_other_row, slice_of_wider, transposed
from mixrank_kernels._samples import sample_inputs
from mixrank_kernels._schema import Argument, tensor_of
from mixrank_kernels.reference import packed_bits

__all__ = [
    "Sample",
    "assert_within_budget",
    "densified",
    "every_other_row",
    "exact",
    "packed_bits",
    "plain",
    "plain_cross_gram_accumulate_",
    "plain_gram_accumulate_",
    "plain_int8_linear",
    "plain_int8_lowrank_linear",
    "plain_int8_sparse_linear",
    "plain_lowrank_linear",
    "plain_lowrank_residual_linear",
    "plain_pivoted_linear",
    "plain_sparse_linear",
    "run",
    "sample_inputs",
    "slice_of_wider",
    "transposed",
]

# Rounding of a half-precision result is common to every implementation, so a floor of whole ulps would hide real
# errors there; in the wide dtypes a few ulps cover another order of summation.
_FLOOR_ULPS = {torch.float64: 4.0, torch.float32: 4.0, torch.bfloat16: 1 / 16, torch.float16: 1 / 16}


def plain_lowrank_linear(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
    """What a user writes without this package: two linear layers in the dtype of the operands."""
    return F.linear(F.linear(x, down), up, bias)


def densified(crow: Tensor, col: Tensor, values: Tensor, k: int) -> Tensor:
    """The block-sparse matrix crow [N / b + 1], col [nnz], values [nnz, b, b] with all its zeros: [N, K]."""
    rows, b = crow.shape[0] - 1, values.shape[-1]
    places = (reference.block_rows(crow, col.shape[0]).long(), col.long())
    blocks = values.new_zeros(rows, k // b, b, b).index_put(places, values, accumulate=True)
    return blocks.transpose(1, 2).reshape(rows * b, k)


def plain_lowrank_residual_linear(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    residual_down: Tensor | None = None,
    residual_up: Tensor | None = None,
    crow: Tensor | None = None,
    col: Tensor | None = None,
    values: Tensor | None = None,
) -> Tensor:
    """What a user writes without this package: the layers of every part one by one, their outputs added."""
    y = plain_lowrank_linear(x, down, up, bias)
    if residual_down is not None:
        y = y + plain_lowrank_linear(x, residual_down, cast(Tensor, residual_up))
    if values is not None:
        y = y + F.linear(x, densified(cast(Tensor, crow), cast(Tensor, col), values, x.shape[-1]))
    return y


def plain_pivoted_linear(
    x: Tensor, down: Tensor, coefficients: Tensor, index: Tensor, bias: Tensor | None = None
) -> Tensor:
    """What a user writes without this package: two linear layers, and their outputs in their places."""
    hidden = F.linear(x, down)
    parts = torch.cat([hidden, F.linear(hidden, coefficients)], dim=-1)
    y = torch.empty_like(parts).index_copy(-1, index.long(), parts)
    return y if bias is None else y + bias


def plain_sparse_linear(
    x: Tensor,
    mask: Tensor,
    values: Tensor,
    down: Tensor | None = None,
    up: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """What a user writes without this package: the layer with all its zeros, and that of the factors, added."""
    y = F.linear(x, reference.expanded(mask, values, x.shape[-1]), bias)
    return y if down is None else y + plain_lowrank_linear(x, down, cast(Tensor, up))


def plain_gram_accumulate_(
    gram: Tensor, x: Tensor, row_weight: Tensor | None = None, column_sum: Tensor | None = None
) -> None:
    """What a user writes without this package: one product in fp32 (fp64 for fp64 x), added to the master."""
    wide = x.to(reference.accumulation_dtype(x.dtype))
    wide = wide if gram.dim() == 3 else wide.reshape(-1, x.shape[-1])
    weighted = wide if row_weight is None else wide * row_weight.to(wide.dtype).reshape(*wide.shape[:-1], 1)
    gram += weighted.mT @ wide
    if column_sum is not None:
        column_sum += weighted.sum(-2)


def plain_cross_gram_accumulate_(cross: Tensor, x: Tensor, z: Tensor) -> None:
    """What a user writes without this package: one product in fp32 (fp64 for fp64 x), added to the master."""
    wide = reference.accumulation_dtype(x.dtype)
    cross += x.to(wide).reshape(-1, x.shape[-1]).mT @ z.to(wide).reshape(-1, z.shape[-1])


def plain_int8_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, dynamic: bool = True
) -> Tensor:
    """What a user writes without this package: the weight made floating again, and a linear layer; ``x`` as it is."""
    return F.linear(x, (weight * scale[:, None].to(x.dtype)), bias)


def plain_int8_lowrank_linear(
    x: Tensor,
    down: Tensor,
    down_scale: Tensor,
    up: Tensor,
    up_scale: Tensor,
    bias: Tensor | None = None,
    dynamic: bool = True,
    index: Tensor | None = None,
) -> Tensor:
    """What a user writes without this package: both factors made floating again; ``x`` as it is."""
    hidden = plain_int8_linear(x, down, down_scale)
    y = plain_int8_linear(hidden, up, up_scale)
    if index is not None:
        y = torch.empty(*y.shape[:-1], len(index), dtype=y.dtype).index_copy_(-1, index, torch.cat([hidden, y], -1))
    return y if bias is None else y + bias


def plain_int8_sparse_linear(
    x: Tensor,
    mask: Tensor,
    values: Tensor,
    scale: Tensor,
    down: Tensor | None = None,
    down_scale: Tensor | None = None,
    up: Tensor | None = None,
    up_scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """What a user writes without this package: all weights made floating again, with all zeros of the sparse one."""
    y = F.linear(x, reference.expanded(mask, values.to(x.dtype), x.shape[-1]) * scale[:, None].to(x.dtype), bias)
    if down is None:
        return y
    hidden = plain_int8_linear(x, down, cast(Tensor, down_scale))
    return y + plain_int8_linear(hidden, cast(Tensor, up), cast(Tensor, up_scale))


def plain(op: str) -> Callable:
    """The yardstick of the error budget for the operator ``op``: plain PyTorch in the dtype of its operands."""
    yardsticks: dict[str, Callable] = {
        "lowrank_linear": plain_lowrank_linear,
        "lowrank_residual_linear": plain_lowrank_residual_linear,
        "pivoted_linear": plain_pivoted_linear,
        "sparse_linear": plain_sparse_linear,
        "gram_accumulate_": plain_gram_accumulate_,
        "cross_gram_accumulate_": plain_cross_gram_accumulate_,
        "int8_linear": plain_int8_linear,
        "int8_lowrank_linear": plain_int8_lowrank_linear,
        "int8_sparse_linear": plain_int8_sparse_linear,
    }
    return yardsticks[op]


def run(function: Callable, arguments: Mapping[str, Argument]) -> Iterator[Tensor]:
    """Call an operator on copies of what it changes, and yield its results: the output, or what it changed."""
    changed = {
        n: tensor_of(arguments, n).clone() for n in ("gram", "cross", "column_sum") if arguments.get(n) is not None
    }
    output = function(**{**arguments, **changed})
    yield from changed.values() if changed else (output,)


def exact(arguments: Mapping[str, Argument]) -> dict[str, Argument]:
    """The same (already rounded) values in fp64."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def assert_within_budget(
    actual: Tensor,
    reference64: Tensor,
    yardstick: Tensor,
    operand_dtype: torch.dtype,
    *,
    max_factor: float = 2.0,
    rms_factor: float = 1.0,
) -> None:
    """Fail where ``actual`` is less accurate than plain PyTorch on the same operands, both against fp64.

    The largest error may be ``max_factor`` times that of ``yardstick``, the root mean square error ``rms_factor``
    times, each plus a floor of a few units in the last place of ``operand_dtype``.

    Raises:
        AssertionError: the budget is exceeded, or shape, dtype or finiteness differ; the message has the numbers.
    """
    assert actual.shape == reference64.shape, f"shape {tuple(actual.shape)} instead of {tuple(reference64.shape)}"
    assert actual.dtype == yardstick.dtype, f"dtype {actual.dtype} instead of {yardstick.dtype}"
    if actual.numel() == 0:
        return
    assert actual.isfinite().all(), "the result has NaN or infinite entries"
    floor = _FLOOR_ULPS[operand_dtype] * torch.finfo(operand_dtype).eps
    error, base = (actual.double() - reference64), (yardstick.double() - reference64)
    largest, allowed = error.abs().max(), max_factor * base.abs().max() + floor * reference64.abs().max()
    assert largest <= allowed, f"largest error {largest:.3e}, allowed {allowed:.3e}"
    rms = error.square().mean().sqrt()
    allowed = rms_factor * base.square().mean().sqrt() + floor * reference64.square().mean().sqrt()
    assert rms <= allowed, f"root mean square error {rms:.3e}, allowed {allowed:.3e}"
