"""The public operators. Each is one call into PyTorch's dispatcher, which picks the implementation.

Shapes use one alphabet: ``M`` rows (tokens), ``K`` in features, ``N`` out features, ``R`` rank, ``B`` batch.
"""

from __future__ import annotations

from torch import Tensor

from mixrank_kernels import _register  # noqa: F401  (registers the operators)
from mixrank_kernels._schema import overload

_lowrank_linear = overload("lowrank_linear")
_gram_accumulate_ = overload("gram_accumulate_")


def lowrank_linear(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply a linear layer whose weight is the product ``up @ down`` of two thin factors.

    Equivalent to ``F.linear(F.linear(x, down), up, bias)`` with the intermediate held in fp32 (fp64 for fp64
    operands) and one rounding at the end.

    Args:
        x: ``[..., K]``, float32, bfloat16, float16 or float64, any strides.
        down: ``[R, K]``, the down projection; dtype and device of ``x``, any strides.
        up: ``[N, R]``, the up projection; dtype and device of ``x``, any strides.
        bias: ``[N]`` or None; dtype and device of ``x``.

    Returns:
        ``[..., N]``, contiguous, dtype of ``x``. Differentiable in every argument. Under autocast the operands
        are cast to the dtype of the region, as for ``nn.Linear``.

    Raises:
        RuntimeError: a shape, dtype or device does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> x, down, up = torch.ones(2, 8), torch.ones(3, 8), torch.ones(5, 3)
        >>> lowrank_linear(x, down, up)[0, 0].item()
        24.0
    """
    return _lowrank_linear(x, down, up, bias)


def gram_accumulate_(
    gram: Tensor, x: Tensor, row_weight: Tensor | None = None, column_sum: Tensor | None = None
) -> None:
    """Add the (weighted) Gram matrix of the rows of ``x`` to ``gram``, and their sum to ``column_sum``, in place.

    Equivalent to ``gram += (w * x).T @ x`` and ``column_sum += (w * x).sum(rows)``. Only one triangle is computed;
    the update is exactly symmetric. Products are accumulated in fp32 (fp64 for fp64 ``x``) inside a call and in the
    dtype of ``gram`` across calls: give a float64 ``gram`` for long runs.

    Args:
        gram: ``[K, K]`` or ``[B, K, K]``, float64 or float32, contiguous; changed in place.
        x: ``[..., K]`` (leading dimensions are rows) for a ``[K, K]`` gram, ``[B, M, K]`` for a batched one; float32,
            bfloat16, float16 or float64, any strides.
        row_weight: one weight for each row, shape ``x.shape[:-1]``, any floating dtype, or None for ones.
        column_sum: ``[K]`` or ``[B, K]``, dtype of ``gram``, contiguous; changed in place. None: not wanted.

    Raises:
        RuntimeError: a shape, dtype or device does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> gram = torch.zeros(4, 4, dtype=torch.float64)
        >>> gram_accumulate_(gram, torch.ones(10, 4))
        >>> gram[0, 3].item()
        10.0
    """
    _gram_accumulate_(gram, x, row_weight, column_sum)
