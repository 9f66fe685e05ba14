"""The operators of layers whose weights are held in 8 bits; :mod:`mixrank_kernels.ops` has them too.

The alphabet is the one there.
"""

from __future__ import annotations

from torch import Tensor

from mixrank_kernels._schema import absent, overload

_int8_linear = overload("int8_linear")
_int8_lowrank_linear = overload("int8_lowrank_linear")
_int8_sparse_linear = overload("int8_sparse_linear")


def int8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    dynamic: bool = True,
    packed: Tensor | None = None,
) -> Tensor:
    """Apply a linear layer whose weight is held in 8 bits, with one scale for each output channel. For inference.

    Equivalent to ``F.linear(x', weight * scale[:, None], bias)``. With ``dynamic``, ``x'`` is each row of ``x`` in 256
    even steps between its least and its largest value (0 included), products are summed exactly in int32, and the rest
    is fp32; otherwise ``x'`` is ``x``, and the arithmetic is fp32. docs/kernels/int8.md defines the numbers.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16, any strides; K at most 65536. With ``dynamic``, a row that is not
            finite gives NaN, and one that spans 2^-100 or less counts as zero.
        weight: ``[N, K]``, int8, contiguous.
        scale: ``[N]``, float32, contiguous.
        bias: ``[N]`` or None; dtype of ``x``.
        dynamic: whether the rows of ``x`` are quantised too.
        packed: ``weight`` once more in the layout of the CPU kernels, made by
            :func:`mixrank_kernels.packing.packed_int8` for the same ``dynamic``; or None.

    Returns:
        ``[..., N]``, contiguous, dtype of ``x``. Under autocast ``x`` and ``bias`` are cast to the dtype of the region.

    Raises:
        RuntimeError: a shape, dtype or device does not fit, or an argument requires a gradient while gradients are
            recorded; the message names the argument.

    Example:
        >>> import torch
        >>> x, weight, scale = torch.ones(2, 8), torch.full((3, 8), 100, dtype=torch.int8), torch.full((3,), 0.01)
        >>> round(int8_linear(x, weight, scale)[0, 0].item(), 3)
        8.0
    """
    if x is None or weight is None or scale is None:
        absent("int8_linear", x=x, weight=weight, scale=scale)
    return _int8_linear(x, weight, scale, bias, dynamic, packed)


def int8_lowrank_linear(
    x: Tensor,
    down: Tensor,
    down_scale: Tensor,
    up: Tensor,
    up_scale: Tensor,
    bias: Tensor | None = None,
    dynamic: bool = True,
    index: Tensor | None = None,
    packed: Tensor | None = None,
) -> Tensor:
    """Apply a linear layer whose weight is the product of two thin factors that are held in 8 bits. For inference.

    Equivalent to :func:`int8_linear` with ``down`` and without a bias, then with ``up``; the intermediate is fp32, and
    with ``dynamic`` its rows are quantised as those of ``x`` are. With ``index`` the layer is pivoted: column ``r`` of
    the intermediate is the output's ``index[r]``, as it is, and the columns of the second product are the others.

    Args:
        x: ``[..., K]``, as for :func:`int8_linear`.
        down: ``[R, K]``, int8, contiguous.
        down_scale: ``[R]``, float32, contiguous.
        up: ``[N, R]``, int8, contiguous; ``[N - R, R]`` with ``index``.
        up_scale: one for each row of ``up``, float32, contiguous.
        bias: ``[N]`` or None, in the order of the output; dtype of ``x``.
        dynamic: whether the rows of ``x`` and of the intermediate are quantised too.
        index: ``[N]``, int64, contiguous, every number from 0 to N - 1 once; or None.
        packed: ``down`` and ``up`` once more, as for :func:`int8_linear`.

    Returns:
        ``[..., N]``, contiguous, dtype of ``x``. Autocast as for :func:`int8_linear`.

    Raises:
        RuntimeError: as :func:`int8_linear`, or ``index`` is no permutation.

    Example:
        >>> import torch
        >>> x, down, up = torch.ones(2, 8), torch.ones(3, 8, dtype=torch.int8), torch.ones(5, 3, dtype=torch.int8)
        >>> round(int8_lowrank_linear(x, down, torch.ones(3), up, torch.ones(5))[0, 0].item(), 3)
        24.0
    """
    if x is None or down is None or down_scale is None or up is None or up_scale is None:
        absent("int8_lowrank_linear", x=x, down=down, down_scale=down_scale, up=up, up_scale=up_scale)
    return _int8_lowrank_linear(x, down, down_scale, up, up_scale, bias, dynamic, index, packed)


def int8_sparse_linear(
    x: Tensor,
    mask: Tensor,
    values: Tensor,
    scale: Tensor,
    down: Tensor | None = None,
    down_scale: Tensor | None = None,
    up: Tensor | None = None,
    up_scale: Tensor | None = None,
    bias: Tensor | None = None,
    packed: Tensor | None = None,
) -> Tensor:
    """Apply a linear layer of a sparse weight, and of two thin factors where given, held in 8 bits. For inference.

    Equivalent to :func:`mixrank_kernels.sparse_linear` with each code times the scale of its row, rounded to fp32, as
    the weights; the arithmetic is fp32, the rows of ``x`` are not quantised.

    Args:
        x: ``[..., K]``, float32, bfloat16 or float16, any strides.
        mask: ``[N, ceil(K / 8)]``, uint8, contiguous: which entries are stored, as for ``sparse_linear``.
        values: ``[nnz]``, int8, contiguous: their codes row by row, k rising.
        scale: ``[N]``, float32, contiguous: those of the rows of ``values``.
        down: ``[R, K]``, int8, contiguous, or None.
        down_scale: ``[R]``, float32, contiguous; it and those up to ``up_scale`` are given exactly when ``down`` is.
        up: ``[N, R]``, int8, contiguous.
        up_scale: ``[N]``, float32, contiguous.
        bias: ``[N]`` or None; dtype of ``x``.
        packed: the weights once more in the layout of the CPU kernels, made by
            :func:`mixrank_kernels.packing.packed_int8_sparse`; or None.

    Returns:
        ``[..., N]``, contiguous, dtype of ``x``. Autocast as for :func:`mixrank_kernels.int8_linear`.

    Raises:
        RuntimeError: a shape, dtype or device does not fit, one of the parts of the factors is missing, ``mask`` has
            another number of bits than there are values or one beyond ``K``, or an argument requires a gradient while
            gradients are recorded; the message names the argument.

    Example:
        >>> import torch
        >>> x, mask = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0b101], [0b010]], dtype=torch.uint8)
        >>> int8_sparse_linear(x, mask, torch.tensor([1, 10, 100], dtype=torch.int8), torch.tensor([1.0, 0.5]))
        tensor([[ 31., 100.]])
    """
    if x is None or mask is None or values is None or scale is None:
        absent("int8_sparse_linear", x=x, mask=mask, values=values, scale=scale)
    return _int8_sparse_linear(x, mask, values, scale, down, down_scale, up, up_scale, bias, packed)
