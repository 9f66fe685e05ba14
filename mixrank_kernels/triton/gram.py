"""gram += (w * x)^T @ x and column_sum += (w * x).sum(rows), for one matrix or a batch; cross += x^T @ z.

Shapes: x [B, M, K] and z [B, M, N] with any strides, row_weight [B, M] with any strides, gram [B, K, K] and
column_sum [B, K] contiguous and of one dtype, fp64 or fp32; cross [K, N] alike. x and z are of one dtype: bf16, fp16,
fp32 or fp64; only for a product that is stored and not added may x be fp32 beside a z of fp16. The sizes are positive.

``gram_partial_kernel`` computes tiles, each over one range of rows (a split), in fp32 (fp64 for fp64 x): those of the
lower triangle only, unless there is a z. ``gram_reduce_kernel`` adds the splits in their order in gram's dtype, so that
results do not depend on timing, and adds the same number to both sides of the diagonal: the update is exactly
symmetric.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixrank_kernels.triton import config as configs
from mixrank_kernels.triton._common import accumulate_wide_product, as_rows, launch_guard, launchable


@triton.jit
def triangle_tile(i, n):
    """The (row, column) of tile i of the lower triangle of n x n tiles, 0 <= i < n (n + 1) / 2, in integers only.

    Row r of the triangle has r + 1 tiles and row n - 1 - r the n - r that fill it up to n + 1: the triangle folds into
    a rectangle n + 1 wide whose lines are one long row followed by one short one.
    """
    line = i // (n + 1)
    place = i % (n + 1)
    short = (place + line) // n
    row = (n - 1 - line) + short * (2 * line + 1 - n)
    return row, place - short * (n - line)


@triton.jit
def _tile(i, row_blocks, col_blocks, HAS_Z: tl.constexpr):
    """The (row, column) of tile i of a rectangle row by row, or of the lower triangle."""
    if HAS_Z:
        row = i // col_blocks
        col = i % col_blocks
    else:
        row, col = triangle_tile(i, row_blocks)
    return row, col


@triton.jit
def _column_sum(
    p_x,  # [BM, BK]
    p_weight,  # [BM], unused unless HAS_WEIGHT
    m_k,  # [BK]
    start,
    stop,
    stride_xm,
    stride_wm,
    HAS_WEIGHT: tl.constexpr,
    BM: tl.constexpr,
    wide: tl.constexpr,
):  # [BK]
    step = tl.full((), BM, tl.int64)
    b_sum = tl.zeros([m_k.shape[0]], dtype=wide)
    for i_m in range(start, stop, BM):
        m_m = i_m + tl.arange(0, BM) < stop
        b_x = tl.load(p_x, mask=m_m[:, None] & m_k[None, :], other=0.0).to(wide)  # [BM, BK]
        if HAS_WEIGHT:
            b_x *= tl.load(p_weight, mask=m_m, other=0.0).to(wide)[:, None]
            p_weight += step * stride_wm
        b_sum += tl.sum(b_x, axis=0)
        p_x += step * stride_xm
    return b_sum


@triton.jit
def gram_partial_kernel(
    partial_ptr,  # [B, splits, tiles, BK, BK]
    partial_sum_ptr,  # [B, splits, blocks, BK], unused unless HAS_SUM
    x_ptr,  # [B, M, K]
    z_ptr,  # [B, M, N], unused unless HAS_Z
    weight_ptr,  # [B, M], unused unless HAS_WEIGHT
    M,
    K,
    N,  # K unless HAS_Z
    splits,
    first_split,  # the splits before it are other launches'
    split_rows,
    stride_xb,
    stride_xm,
    stride_xk,
    stride_zb,
    stride_zm,
    stride_zk,
    stride_wb,
    stride_wm,
    HAS_Z: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SUM: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    wide: tl.constexpr = partial_ptr.dtype.element_ty
    blocks, col_blocks = tl.cdiv(K, BK), tl.cdiv(N, BK)
    tiles = blocks * col_blocks if HAS_Z else blocks * (blocks + 1) // 2
    i_part = tl.program_id(0) // tiles
    i_row, i_col = _tile(tl.program_id(0) % tiles, blocks, col_blocks, HAS_Z)
    i_b = i_part // splits
    start = (first_split + i_part % splits) * split_rows
    stop = tl.minimum(start + split_rows, M)

    o_i = i_row * BK + tl.arange(0, BK)
    o_j = i_col * BK + tl.arange(0, BK)
    m_i, m_j = o_i < K, o_j < N
    o_m = tl.arange(0, BM)
    p_rows = x_ptr + i_b.to(tl.int64) * stride_xb + (start + o_m).to(tl.int64)[:, None] * stride_xm
    p_i = p_rows + o_i.to(tl.int64)[None, :] * stride_xk
    if HAS_Z:
        p_j = z_ptr + i_b.to(tl.int64) * stride_zb + (start + o_m).to(tl.int64)[:, None] * stride_zm
        p_j += o_j.to(tl.int64)[None, :] * stride_zk
        stride_jm = stride_zm
    else:
        p_j = p_rows + o_j.to(tl.int64)[None, :] * stride_xk
        stride_jm = stride_xm
    p_weight = weight_ptr
    if HAS_WEIGHT:
        p_weight += i_b.to(tl.int64) * stride_wb + (start + o_m).to(tl.int64) * stride_wm
    step = tl.full((), BM, tl.int64)

    # A loop of its own: only diagonal tiles take it, and the sums need no place in the pipeline of the products.
    if HAS_SUM:
        if i_row == i_col:
            b_sum = _column_sum(p_i, p_weight, m_i, start, stop, stride_xm, stride_wm, HAS_WEIGHT, BM, wide)
            tl.store(partial_sum_ptr + i_part.to(tl.int64) * blocks * BK + o_i, b_sum)

    b_gram = tl.zeros([BK, BK], dtype=wide)
    for i_m in range(start, stop, BM):
        m_m = i_m + o_m < stop
        b_i = tl.load(p_i, mask=m_m[:, None] & m_i[None, :], other=0.0)  # [BM, BK]
        b_j = tl.load(p_j, mask=m_m[:, None] & m_j[None, :], other=0.0)  # [BM, BK]
        if HAS_WEIGHT:
            b_weight = tl.load(p_weight, mask=m_m, other=0.0).to(wide)
            b_gram = accumulate_wide_product(tl.trans(b_i.to(wide) * b_weight[:, None]), b_j, b_gram)
            p_weight += step * stride_wm
        elif b_i.dtype != b_j.dtype:
            b_gram = accumulate_wide_product(tl.trans(b_i), b_j, b_gram)
        else:
            b_gram = tl.dot(tl.trans(b_i), b_j, b_gram, input_precision="ieee", out_dtype=wide)
        p_i += step * stride_xm
        p_j += step * stride_jm
    p_tile = partial_ptr + tl.program_id(0).to(tl.int64) * BK * BK
    tl.store(p_tile + tl.arange(0, BK)[:, None] * BK + tl.arange(0, BK)[None, :], b_gram)


@triton.jit
def gram_reduce_kernel(
    gram_ptr,  # [B, K, K], or [B, K, N] if HAS_Z; of any dtype if STORED
    column_sum_ptr,  # [B, K], unused unless HAS_SUM
    partial_ptr,  # [B, splits, tiles, BK, BK]
    partial_sum_ptr,  # [B, splits, blocks, BK], unused unless HAS_SUM
    K,
    N,  # K unless HAS_Z
    splits,
    HAS_Z: tl.constexpr,
    HAS_SUM: tl.constexpr,
    STORED: tl.constexpr,  # gram is written, not added to
    BK: tl.constexpr,
    BS: tl.constexpr,
):
    master: tl.constexpr = partial_ptr.dtype.element_ty if STORED else gram_ptr.dtype.element_ty
    parts: tl.constexpr = BK // BS
    blocks, col_blocks = tl.cdiv(K, BK), tl.cdiv(N, BK)
    tiles = blocks * col_blocks if HAS_Z else blocks * (blocks + 1) // 2
    i_piece = tl.program_id(0) % (parts * parts)
    i_tile = tl.program_id(0) // (parts * parts) % tiles
    i_b = (tl.program_id(0) // (parts * parts) // tiles).to(tl.int64)
    i_row, i_col = _tile(i_tile, blocks, col_blocks, HAS_Z)

    o_si = i_piece // parts * BS + tl.arange(0, BS)
    o_sj = i_piece % parts * BS + tl.arange(0, BS)
    p_partial = partial_ptr + (i_b * splits * tiles + i_tile) * BK * BK + o_si[:, None] * BK + o_sj[None, :]
    b_update = tl.zeros([BS, BS], dtype=master)
    for _ in range(splits):
        b_update += tl.load(p_partial).to(master)
        p_partial += tl.full((), BK * BK, tl.int64) * tiles

    o_i = (i_row * BK + o_si).to(tl.int64)
    o_j = (i_col * BK + o_sj).to(tl.int64)
    p_lower = gram_ptr + i_b * K * N + o_i[:, None] * N + o_j[None, :]
    if HAS_Z:
        m_lower = (o_i < K)[:, None] & (o_j < N)[None, :]
    else:
        m_lower = (o_i < K)[:, None] & (o_j[None, :] <= o_i[:, None])
    if STORED:
        b_lower = b_update.to(gram_ptr.dtype.element_ty)
    else:
        b_lower = tl.load(p_lower, mask=m_lower) + b_update
    tl.store(p_lower, b_lower, mask=m_lower)
    if not HAS_Z:
        p_upper = gram_ptr + i_b * K * K + o_j[:, None] * K + o_i[None, :]
        m_upper = (o_i < K)[None, :] & (o_j[:, None] < o_i[None, :])
        tl.store(p_upper, tl.load(p_upper, mask=m_upper) + tl.trans(b_update), mask=m_upper)

    if HAS_SUM:
        if (i_row == i_col) & (i_piece % parts == 0):
            p_partial_sum = partial_sum_ptr + i_b * splits * blocks * BK + o_i
            b_sum = tl.zeros([BS], dtype=master)
            for _ in range(splits):
                b_sum += tl.load(p_partial_sum).to(master)
                p_partial_sum += tl.full((), BK, tl.int64) * blocks
            p_sum = column_sum_ptr + i_b * K + o_i
            tl.store(p_sum, tl.load(p_sum, mask=o_i < K) + b_sum, mask=o_i < K)


def row_schedule(m: int, tiles: int, scratch_splits: int, one_round: bool = False) -> tuple[int, int]:
    """How ``m`` rows are divided when a split has ``tiles`` tiles: rows of a split, and splits of one round.

    The partial tiles of at most ``scratch_splits`` splits fit in the scratch memory. With ``one_round`` the splits grow
    until that is enough; otherwise they stay short, and there are more rounds.
    """
    splits = max(
        triton.cdiv(m, configs.GRAM_ROWS_MAX),
        min(triton.cdiv(configs.GRAM_PROGRAMS, tiles), triton.cdiv(m, configs.GRAM_ROWS_MIN)),
    )
    round_splits = min(splits, max(1, scratch_splits))
    return triton.cdiv(m, round_splits if one_round else splits), round_splits


def gram_accumulate_(
    gram: Tensor,  # [K, K] or [B, K, K]
    x: Tensor,  # [..., K] or [B, M, K]
    row_weight: Tensor | None = None,  # x.shape[:-1]
    column_sum: Tensor | None = None,  # [K] or [B, K]
) -> None:
    """Triton's ``gram_accumulate_``; the arguments have passed the checks of the operator.

    Raises:
        RuntimeError: the tensors are not on CUDA and the interpreter is off, or it is on and they are bfloat16.
    """
    with launch_guard("gram_accumulate_", x):
        if x.numel() == 0:
            return
        rows = x if gram.dim() == 3 else as_rows(x)[None]  # [B, M, K]
        weights = None if row_weight is None else row_weight.reshape(rows.shape[:2])  # [B, M]
        _accumulate(gram, rows, None, weights, column_sum)


def cross_gram_accumulate_(
    cross: Tensor,  # [K, N]
    x: Tensor,  # [..., K]
    z: Tensor,  # [..., N]
) -> None:
    """Triton's ``cross_gram_accumulate_``; the arguments have passed the checks of the operator.

    Raises:
        RuntimeError: the tensors are not on CUDA and the interpreter is off, or it is on and they are bfloat16.
    """
    with launch_guard("cross_gram_accumulate_", x):
        if x.numel() > 0 and z.numel() > 0:
            _accumulate(cross, as_rows(x)[None], as_rows(z)[None], None, None)


def product_over_rows(
    x: Tensor,  # [M, K]
    z: Tensor,  # [..., N], M rows
) -> Tensor:  # [K, N]
    """x^T @ z in the dtype of ``z``; x has that dtype, or is fp32 beside a z of fp16. M is positive."""
    product = z.new_empty((x.shape[1], z.shape[-1]))
    _accumulate(product, x[None], as_rows(z)[None], None, None, stored=True)
    return product


def _accumulate(
    gram: Tensor,  # [K, N] or [B, K, K]
    x: Tensor,  # [B, M, K]
    z: Tensor | None,  # [B, M, N]
    weights: Tensor | None,  # [B, M]
    column_sum: Tensor | None,  # [K] or [B, K]
    stored: bool = False,
) -> None:
    b, m, k = x.shape
    n = gram.shape[-1]
    dtype = x.dtype if z is None else z.dtype
    split_in_registers = weights is not None or x.dtype != dtype
    config = configs.gram_config(dtype, max(k, n), split_in_registers)
    variant = {"HAS_Z": z is not None, "HAS_SUM": column_sum is not None, "BK": config.BK}
    blocks = triton.cdiv(k, config.BK)
    tiles = blocks * (blocks + 1) // 2 if z is None else blocks * triton.cdiv(n, config.BK)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tile_bytes = config.BK**2 * wide.itemsize
    scratch_splits = configs.GRAM_SCRATCH_BYTES // (b * tiles * tile_bytes)
    split_rows, round_splits = row_schedule(m, b * tiles, scratch_splits, one_round=stored)
    splits = triton.cdiv(m, split_rows)
    partial = gram.new_empty((b, round_splits, tiles, config.BK, config.BK), dtype=wide)
    partial_sum = gram.new_empty((b, round_splits, blocks, config.BK), dtype=wide) if column_sum is not None else None
    for i_round in range(triton.cdiv(splits, round_splits)):
        first = i_round * round_splits
        taken = min(round_splits, splits - first)
        launchable(gram_partial_kernel, x)[(b * taken * tiles,)](
            partial, partial_sum, x, z, weights, m, k, n, taken, first, split_rows, *x.stride(),
            *((0, 0, 0) if z is None else z.stride()), *((0, 0) if weights is None else weights.stride()),
            HAS_WEIGHT=weights is not None, BM=config.BM, num_warps=config.num_warps, num_stages=config.num_stages,
            **variant,
        )  # fmt: skip
        launchable(gram_reduce_kernel, x)[(b * tiles * (config.BK // config.BS) ** 2,)](
            gram, column_sum, partial, partial_sum, k, n, taken, STORED=stored, BS=config.BS, num_warps=4, **variant
        )
