"""The public operators. Each is one call into PyTorch's dispatcher, which picks the implementation.

Shapes use one alphabet: ``M`` rows (tokens), ``K`` in features, ``N`` out features, ``R`` rank,
``Q`` rank of the residual, ``b`` size of a square block of a block-sparse matrix, ``nnz`` stored entries, ``B`` batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixrank_kernels import backend
from mixrank_kernels._schema import absent, overload
from mixrank_kernels.ops_int8 import int8_linear, int8_lowrank_linear, int8_sparse_linear

__all__ = [
    "cross_gram_accumulate_",
    "gram_accumulate_",
    "int8_linear",
    "int8_lowrank_linear",
    "int8_sparse_linear",
    "lowrank_linear",
    "lowrank_residual_linear",
    "pivoted_linear",
    "sparse_linear",
]

_lowrank_linear = overload("lowrank_linear")
_lowrank_residual_linear = overload("lowrank_residual_linear")
_pivoted_linear = overload("pivoted_linear")
_sparse_linear = overload("sparse_linear")
_gram_accumulate_ = overload("gram_accumulate_")
_cross_gram_accumulate_ = overload("cross_gram_accumulate_")


def _follow_the_choice() -> None:
    # torch.compile keeps a graph as long as what was read to make it is the same. What Triton serves is traced into
    # its kernels, so what is forced must be read.
    if torch.compiler.is_compiling() and backend._forced:
        _ = backend._forced[-1]


def lowrank_linear(
    x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None, packed: Tensor | None = None
) -> Tensor:
    """Apply a linear layer whose weight is the product ``up @ down`` of two thin factors.

    Equivalent to ``F.linear(F.linear(x, down), up, bias)`` with the intermediate held in fp32 (fp64 for fp64
    operands) and one rounding at the end. On CPUs that multiply pairs of bf16, the intermediate of bf16 operands is
    rounded once to bf16, as two bf16 linear layers do.

    Args:
        x: ``[..., K]``, float32, bfloat16, float16 or float64, any strides.
        down: ``[R, K]``, the down projection; dtype and device of ``x``, any strides.
        up: ``[N, R]``, the up projection; dtype and device of ``x``, any strides.
        bias: ``[N]`` or None; dtype and device of ``x``.
        packed: ``down`` and ``up`` once more in the layout of the CPU kernels, made by
            :mod:`mixrank_kernels.packing`: ``[bytes]``, uint8, contiguous, device of ``x``; or None. It saves the
            kernels work and changes nothing else; implementations that have no use for it ignore it.

    Returns:
        ``[..., N]``, contiguous, dtype of ``x``. Differentiable in every argument but ``packed``. Under autocast the
        operands are cast to the dtype of the region, as for ``nn.Linear``; ``packed`` is left out if that changes one.

    Raises:
        RuntimeError: a shape, dtype or device does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> x, down, up = torch.ones(2, 8), torch.ones(3, 8), torch.ones(5, 3)
        >>> lowrank_linear(x, down, up)[0, 0].item()
        24.0
    """
    if x is None or down is None or up is None:
        absent("lowrank_linear", x=x, down=down, up=up)
    _follow_the_choice()
    return _lowrank_linear(x, down, up, bias, packed)


def lowrank_residual_linear(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    residual_down: Tensor | None = None,
    residual_up: Tensor | None = None,
    crow: Tensor | None = None,
    col: Tensor | None = None,
    values: Tensor | None = None,
    packed: Tensor | None = None,
) -> Tensor:
    """Apply a linear layer whose weight is ``up @ down`` plus a compact residual: thin factors, sparse blocks or both.

    Equivalent to ``F.linear(x, up @ down + residual_up @ residual_down + S, bias)``, where ``S`` ``[N, K]`` is
    ``torch.sparse_bsr_tensor(crow, col, values)``; intermediates are as those of :func:`lowrank_linear`, all parts are
    added in one accumulator, and there is one rounding at the end. Blocks that are not stored are not
    multiplied.

    Args:
        x: ``[..., K]``, float32, bfloat16, float16 or float64, any strides.
        down: ``[R, K]``, the down projection; dtype and device of ``x``, any strides.
        up: ``[N, R]``, the up projection; dtype and device of ``x``, any strides.
        bias: ``[N]`` or None; dtype and device of ``x``.
        residual_down: ``[Q, K]`` or None, the down projection of the residual; dtype and device of ``x``, any strides.
        residual_up: ``[N, Q]``, its up projection, dtype of ``x``; given exactly when ``residual_down`` is.
        crow: ``[N / b + 1]`` or None; int32 or int64, contiguous. The blocks ``crow[i]`` to ``crow[i + 1] - 1`` are in
            the i-th row of blocks.
        col: ``[nnz]``, dtype of ``crow``, contiguous: the column of blocks that each block is in. Any order within a
            row; blocks at the same place add up.
        values: ``[nnz, b, b]``, dtype and device of ``x``, contiguous: the blocks. ``b`` is 16 or 32 and divides ``K``
            and ``N``. ``crow``, ``col`` and ``values`` are given together or not at all.
        packed: the weights once more in the layout of the CPU kernels, as for :func:`lowrank_linear`.

    Returns:
        ``[..., N]``, contiguous, dtype of ``x``. Differentiable in every floating argument. Autocast as for
        :func:`lowrank_linear`.

    Raises:
        RuntimeError: a shape, dtype or device does not fit, a part of a residual is missing, or ``crow`` and ``col``
            are no valid indices; the message names the argument.

    Example:
        >>> import torch
        >>> x, down, up = torch.ones(2, 32), torch.ones(3, 32), torch.ones(16, 3)
        >>> crow, col, values = torch.tensor([0, 1]), torch.tensor([1]), torch.ones(1, 16, 16)
        >>> lowrank_residual_linear(x, down, up, crow=crow, col=col, values=values)[0, 0].item()
        112.0
    """
    if x is None or down is None or up is None:
        absent("lowrank_residual_linear", x=x, down=down, up=up)
    _follow_the_choice()
    return _lowrank_residual_linear(x, down, up, bias, residual_down, residual_up, crow, col, values, packed)


def pivoted_linear(
    x: Tensor,
    down: Tensor,
    coefficients: Tensor,
    index: Tensor,
    bias: Tensor | None = None,
    packed: Tensor | None = None,
) -> Tensor:
    """Apply a linear layer of which R rows of the weight are stored, and the others as combinations of these.

    A weight of rank R in ``R (K + N - R)`` numbers (PIFA: Zhao, Zhang, Cannistraci 2025). Equivalent to
    ``y[..., index[:R]] = h; y[..., index[R:]] = h @ coefficients.T; y += bias`` with ``h = x @ down.T`` held in fp32
    (fp64 for fp64 operands) and one rounding of each output. On CPUs that multiply pairs of bf16, the ``h`` that the
    coefficients multiply is rounded once to bf16, as two bf16 linear layers do; that in the output is not.

    Args:
        x: ``[..., K]``, float32, bfloat16, float16 or float64, any strides.
        down: ``[R, K]``, the stored rows of the weight; dtype and device of ``x``, any strides.
        coefficients: ``[N - R, R]``, which combination of those each other row is; dtype and device of ``x``, any
            strides. It may have no rows.
        index: ``[N]``, int16, int32 or int64, contiguous, device of ``x``: which rows of the weight ``down`` holds, and
            then which the coefficients stand for; each of 0 to N - 1 once, rising in both parts.
        bias: ``[N]`` or None; dtype and device of ``x``.
        packed: ``down``, ``coefficients`` and ``index`` once more, as for :func:`lowrank_linear`.

    Returns:
        ``[..., N]``, contiguous, dtype of ``x``. Differentiable in every floating argument. Autocast as for
        :func:`lowrank_linear`.

    Raises:
        RuntimeError: a shape, dtype or device does not fit, or ``index`` does not hold every row in its order; the
            message names the argument.

    Example:
        >>> import torch
        >>> x, down, coefficients = torch.ones(1, 8), torch.ones(2, 8), torch.ones(1, 2)
        >>> pivoted_linear(x, down, coefficients, torch.tensor([0, 2, 1]))
        tensor([[ 8., 16.,  8.]])
    """
    if x is None or down is None or coefficients is None or index is None:
        absent("pivoted_linear", x=x, down=down, coefficients=coefficients, index=index)
    _follow_the_choice()
    return _pivoted_linear(x, down, coefficients, index, bias, packed)


def sparse_linear(
    x: Tensor,
    mask: Tensor,
    values: Tensor,
    down: Tensor | None = None,
    up: Tensor | None = None,
    bias: Tensor | None = None,
    packed: Tensor | None = None,
) -> Tensor:
    """Apply a linear layer whose weight is sparse, any entries of it, plus the product ``up @ down`` where it is given.

    Equivalent to ``F.linear(x, S + up @ down, bias)`` with the intermediate held in fp32 (fp64 for fp64 operands), all
    parts added in one accumulator and one rounding at the end. Libraries, which serve CUDA tensors, multiply the dense
    weight, rounded once to bf16 for bf16 operands with factors. The CPU kernels do not multiply entries that are not
    stored, so what is not finite in ``x`` reaches the outputs alone that have an entry for it.

    Args:
        x: ``[..., K]``, float32, bfloat16, float16 or float64, any strides.
        mask: ``[N, ceil(K / 8)]``, uint8, contiguous, device of ``x``: entry (n, k) of ``S`` is stored where bit
            ``k % 8``, the least significant first, of byte ``k // 8`` of row n is set. Bits beyond ``K`` are zero.
        values: ``[nnz]``, dtype and device of ``x``, contiguous: the stored entries row by row, k rising; as many as
            bits are set, which may be none.
        down: ``[R, K]`` or None, the down projection; dtype and device of ``x``, any strides.
        up: ``[N, R]``, the up projection, dtype and device of ``x``, any strides; given exactly when ``down`` is.
        bias: ``[N]`` or None; dtype and device of ``x``.
        packed: the weights once more in the layout of the CPU kernels, as for :func:`lowrank_linear`.

    Returns:
        ``[..., N]``, contiguous, dtype of ``x``. Differentiable in every floating argument, with respect to ``values``
        at the stored entries. Autocast as for :func:`lowrank_linear`.

    Raises:
        RuntimeError: a shape, dtype or device does not fit, one of two factors is missing, or ``mask`` has another
            number of bits than there are values or one beyond ``K``; the message names the argument.

    Example:
        >>> import torch
        >>> x, mask = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0b101], [0b010]], dtype=torch.uint8)
        >>> sparse_linear(x, mask, torch.tensor([1.0, 10.0, 100.0]))
        tensor([[ 31., 200.]])
    """
    if x is None or mask is None or values is None:
        absent("sparse_linear", x=x, mask=mask, values=values)
    _follow_the_choice()
    return _sparse_linear(x, mask, values, down, up, bias, packed)


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
        RuntimeError: a shape, dtype or device does not fit, or what is changed shares memory with another argument;
            the message names the argument.

    Example:
        >>> import torch
        >>> gram = torch.zeros(4, 4, dtype=torch.float64)
        >>> gram_accumulate_(gram, torch.ones(10, 4))
        >>> gram[0, 3].item()
        10.0
    """
    if gram is None or x is None:
        absent("gram_accumulate_", gram=gram, x=x)
    _follow_the_choice()
    _gram_accumulate_(gram, x, row_weight, column_sum)


def cross_gram_accumulate_(cross: Tensor, x: Tensor, z: Tensor) -> None:
    """Add the products of the rows of ``x`` with those of ``z`` to ``cross``, in place.

    Equivalent to ``cross += x.T @ z``. Products are accumulated in fp32 (fp64 for fp64 ``x``) inside a call and in the
    dtype of ``cross`` across calls: give a float64 ``cross`` for long runs. Not differentiable.

    Args:
        cross: ``[K, N]``, float64 or float32, contiguous; changed in place.
        x: ``[..., K]`` (leading dimensions are rows), float32, bfloat16, float16 or float64, any strides.
        z: ``[..., N]``, leading dimensions and dtype of ``x``, any strides.

    Raises:
        RuntimeError: a shape, dtype or device does not fit, or ``cross`` shares memory with another argument; the
            message names the argument.

    Example:
        >>> import torch
        >>> cross = torch.zeros(4, 3, dtype=torch.float64)
        >>> cross_gram_accumulate_(cross, torch.ones(10, 4), torch.ones(10, 3))
        >>> cross[0, 2].item()
        10.0
    """
    if cross is None or x is None or z is None:
        absent("cross_gram_accumulate_", cross=cross, x=x, z=z)
    _follow_the_choice()
    _cross_gram_accumulate_(cross, x, z)
