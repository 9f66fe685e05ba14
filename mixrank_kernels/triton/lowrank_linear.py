"""y = (x @ down^T) @ up^T + (x @ residual_down^T) @ residual_up^T + x @ S^T + bias.

The intermediates are in fp32 (fp64 for fp64 operands).

Shapes: x [M, K], down [R, K], up [N, R], residual_down [Q, K], residual_up [N, Q], bias [N], y [M, N] contiguous; any
strides of x and the factors, in elements. S [N, K] is block-sparse: block row i holds the blocks crow[i] ..
crow[i + 1], block e lies at block column col[e] and is values[e] [b, b], contiguous, with b = 16 or 32. All operands
have one dtype: bf16, fp16, fp32 or fp64. The sizes are positive; the terms with residual_down, S and bias may be
absent.

One kernel makes y. It either computes the intermediates itself, BR ranks at a time, for its rows (``FUSED``: one
launch, repeated for every BN columns), or reads what ``lowrank_down_kernel`` stored. The ranks are looped over at run
time, so no rank needs a kernel of its own. Block rows of a tile go side by side through a batched product, one stored
block of each at a time, into the accumulator that the ranks then go on with.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixrank_kernels.triton._common import accumulate_wide_product, as_rows, launch_guard, launchable
from mixrank_kernels.triton.config import LowRankConfig, lowrank_config


@triton.jit
def _hidden_tile(
    x_ptr,  # [M, K]
    down_ptr,  # [R, K]
    o_m,  # [BM]
    o_r,  # [BR]
    M,
    R,
    K,
    stride_xm,
    stride_xk,
    stride_dr,
    stride_dk,
    BK: tl.constexpr,
    wide: tl.constexpr,
):  # [BM, BR]
    o_k = tl.arange(0, BK).to(tl.int64)
    p_x = x_ptr + o_m[:, None].to(tl.int64) * stride_xm + o_k[None, :] * stride_xk
    p_down = down_ptr + o_r[None, :].to(tl.int64) * stride_dr + o_k[:, None] * stride_dk
    step = tl.full((), BK, tl.int64)
    b_hidden = tl.zeros([o_m.shape[0], o_r.shape[0]], dtype=wide)
    for i_k in range(0, K, BK):
        m_k = o_k < K - i_k
        b_x = tl.load(p_x, mask=(o_m < M)[:, None] & m_k[None, :], other=0.0)  # [BM, BK]
        b_down = tl.load(p_down, mask=(o_r < R)[None, :] & m_k[:, None], other=0.0)  # [BK, BR]
        b_hidden = tl.dot(b_x, b_down, b_hidden, input_precision="ieee", out_dtype=wide)
        p_x += step * stride_xk
        p_down += step * stride_dk
    return b_hidden


@triton.jit
def lowrank_down_kernel(
    hidden_ptr,  # [M, first + R or more], rows stride_hm apart, of any dtype
    x_ptr,  # [M, K]
    down_ptr,  # [R, K]
    first,  # the column of hidden that the product begins in
    M,
    R,
    K,
    stride_xm,
    stride_xk,
    stride_dr,
    stride_dk,
    stride_hm,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    wide: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    i_m, i_r = tl.program_id(0) // tl.cdiv(R, BR), tl.program_id(0) % tl.cdiv(R, BR)
    o_m = i_m * BM + tl.arange(0, BM)
    o_r = i_r * BR + tl.arange(0, BR)
    b_hidden = _hidden_tile(x_ptr, down_ptr, o_m, o_r, M, R, K, stride_xm, stride_xk, stride_dr, stride_dk, BK, wide)
    p_hidden = hidden_ptr + first + o_m[:, None].to(tl.int64) * stride_hm + o_r[None, :]
    tl.store(p_hidden, b_hidden.to(hidden_ptr.dtype.element_ty), mask=(o_m < M)[:, None] & (o_r < R)[None, :])


@triton.jit
def _accumulate_ranks(
    b_y,  # [BM, BN]
    x_ptr,  # [M, K], unused unless FUSED
    down_ptr,  # [R, K], unused unless FUSED
    hidden_ptr,  # [M, R], rows stride_hm apart, unused if FUSED
    up_ptr,  # [N, R]
    o_m,  # [BM]
    o_n,  # [BN]
    M,
    N,
    R,
    K,
    stride_xm,
    stride_xk,
    stride_dr,
    stride_dk,
    stride_hm,
    stride_un,
    stride_ur,
    FUSED: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    wide: tl.constexpr,
):  # [BM, BN]
    for i_r in range(0, R, BR):
        o_r = i_r + tl.arange(0, BR)
        m_r = o_r < R
        if FUSED:
            b_hidden = _hidden_tile(
                x_ptr, down_ptr, o_m, o_r, M, R, K, stride_xm, stride_xk, stride_dr, stride_dk, BK, wide
            )
            # An infinite x times the zeros that stand for ranks past the last is NaN, which must not reach y.
            b_hidden = tl.where(m_r[None, :], b_hidden, 0.0)
        else:
            p_hidden = hidden_ptr + o_m[:, None].to(tl.int64) * stride_hm + o_r[None, :]
            b_hidden = tl.load(p_hidden, mask=(o_m < M)[:, None] & m_r[None, :], other=0.0)  # [BM, BR]
        p_up = up_ptr + o_n[None, :].to(tl.int64) * stride_un + o_r[:, None].to(tl.int64) * stride_ur
        b_up = tl.load(p_up, mask=(o_n < N)[None, :] & m_r[:, None], other=0.0)  # [BR, BN]
        b_y = accumulate_wide_product(b_hidden, b_up, b_y)
    return b_y


@triton.jit
def _block_sparse_tile(
    x_ptr,  # [M, K]
    crow_ptr,  # [N / b + 1]
    col_ptr,  # [nnz]
    values_ptr,  # [nnz, b, b]
    o_m,  # [BM]
    i_n,
    M,
    N,
    stride_xm,
    stride_xk,
    BN: tl.constexpr,
    b: tl.constexpr,
    wide: tl.constexpr,
):  # [BM, BN]
    o_row = i_n * (BN // b) + tl.arange(0, BN // b)  # the block rows of the tile, [G]
    m_row = o_row < N // b
    first = tl.load(crow_ptr + o_row, mask=m_row, other=0).to(tl.int64)
    last = tl.load(crow_ptr + o_row + 1, mask=m_row, other=0).to(tl.int64)
    o_b = tl.arange(0, b).to(tl.int64)
    p_x = x_ptr + o_m[None, :, None].to(tl.int64) * stride_xm + o_b[None, None, :] * stride_xk
    p_values = values_ptr + o_b[None, None, :] * b + o_b[None, :, None]  # transposed: values are [out, in]
    b_acc = tl.zeros([BN // b, o_m.shape[0], b], dtype=wide)
    for i in range(tl.max(last - first, axis=0).to(tl.int32)):
        m_e = first + i < last
        column = tl.load(col_ptr + first + i, mask=m_e, other=0).to(tl.int64) * b
        m_x = m_e[:, None, None] & (o_m < M)[None, :, None]
        b_x = tl.load(p_x + column[:, None, None] * stride_xk, mask=m_x, other=0.0)  # [G, BM, b]
        b_values = tl.load(p_values + (first + i)[:, None, None] * (b * b), mask=m_e[:, None, None], other=0.0)
        b_acc = tl.dot(b_x, b_values, b_acc, input_precision="ieee", out_dtype=wide)
    return tl.reshape(tl.permute(b_acc, (1, 0, 2)), [o_m.shape[0], BN])


@triton.jit
def lowrank_up_kernel(
    y_ptr,  # [M, N] contiguous
    x_ptr,  # [M, K], unused unless FUSED or b
    down_ptr,  # [R, K], unused unless FUSED
    hidden_ptr,  # [M, R + Q] contiguous, unused if FUSED
    up_ptr,  # [N, R]
    bias_ptr,  # [N], unused unless HAS_BIAS
    residual_down_ptr,  # [Q, K], unused unless FUSED and HAS_BRANCH
    residual_up_ptr,  # [N, Q], unused unless HAS_BRANCH
    crow_ptr,  # [N / b + 1], unused unless b
    col_ptr,  # [nnz], unused unless b
    values_ptr,  # [nnz, b, b], unused unless b
    M,
    N,
    R,
    Q,
    K,
    stride_xm,
    stride_xk,
    stride_dr,
    stride_dk,
    stride_un,
    stride_ur,
    stride_bias,
    stride_rdq,
    stride_rdk,
    stride_run,
    stride_ruq,
    FUSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    b: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    wide: tl.constexpr = tl.float64 if y_ptr.dtype.element_ty == tl.float64 else tl.float32
    # Neighbouring programs share the rows, whose blocks are the ones that do not stay in L2.
    i_m, i_n = tl.program_id(0) // tl.cdiv(N, BN), tl.program_id(0) % tl.cdiv(N, BN)
    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    m_n = o_n < N

    if b > 0:
        b_y = _block_sparse_tile(
            x_ptr, crow_ptr, col_ptr, values_ptr, o_m, i_n, M, N, stride_xm, stride_xk, BN, b, wide
        )
    else:
        b_y = tl.zeros([BM, BN], dtype=wide)
    b_y = _accumulate_ranks(
        b_y, x_ptr, down_ptr, hidden_ptr, up_ptr, o_m, o_n, M, N, R, K, stride_xm, stride_xk, stride_dr, stride_dk,
        R + Q, stride_un, stride_ur, FUSED, BR, BK, wide,
    )  # fmt: skip
    if HAS_BRANCH:
        p_hidden = hidden_ptr
        if not FUSED:
            p_hidden += R
        b_y = _accumulate_ranks(
            b_y, x_ptr, residual_down_ptr, p_hidden, residual_up_ptr, o_m, o_n, M, N, Q, K, stride_xm, stride_xk,
            stride_rdq, stride_rdk, R + Q, stride_run, stride_ruq, FUSED, BR, BK, wide,
        )  # fmt: skip

    if HAS_BIAS:
        b_y += tl.load(bias_ptr + o_n.to(tl.int64) * stride_bias, mask=m_n, other=0.0).to(wide)[None, :]
    p_y = y_ptr + o_m[:, None].to(tl.int64) * N + o_n[None, :]
    tl.store(p_y, b_y.to(y_ptr.dtype.element_ty), mask=(o_m < M)[:, None] & m_n[None, :])


def lowrank_linear(
    x: Tensor,  # [..., K]
    down: Tensor,  # [R, K]
    up: Tensor,  # [N, R]
    bias: Tensor | None = None,  # [N]
) -> Tensor:  # [..., N]
    """Triton's ``lowrank_linear``; the arguments have passed the checks of the operator.

    Raises:
        RuntimeError: the tensors are not on CUDA and the interpreter is off, or it is on and they are bfloat16.
    """
    return _launch("lowrank_linear", x, down, up, bias)


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
) -> Tensor:  # [..., N]
    """Triton's ``lowrank_residual_linear``; the arguments have passed the checks of the operator.

    Raises:
        RuntimeError: the tensors are not on CUDA and the interpreter is off, or it is on and they are bfloat16.
    """
    return _launch("lowrank_residual_linear", x, down, up, bias, residual_down, residual_up, crow, col, values)


def _launch(
    op: str,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    residual_down: Tensor | None = None,
    residual_up: Tensor | None = None,
    crow: Tensor | None = None,
    col: Tensor | None = None,
    values: Tensor | None = None,
) -> Tensor:
    (r, k), n = down.shape, up.shape[0]
    q = 0 if residual_down is None else residual_down.shape[0]
    y = x.new_empty((*x.shape[:-1], n))
    m = y.numel() // n
    with launch_guard(op, x):
        if m == 0:
            return y
        rows = as_rows(x)
        down_config, up_config = lowrank_config(x.dtype, m, k, n, r + q)
        hidden, fused = None, down_config is None
        if down_config is not None:
            hidden = x.new_empty((m, r + q), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
            launch_down(hidden, 0, rows, down, down_config)
            if residual_down is not None:
                launch_down(hidden, r, rows, residual_down, down_config)
        launchable(lowrank_up_kernel, x)[(triton.cdiv(m, up_config.BM) * triton.cdiv(n, up_config.BN),)](
            y, rows if fused or values is not None else None, down if fused else None, hidden, up, bias,
            residual_down if fused else None, residual_up, crow, col, values, m, n, r, q, k,
            *rows.stride(), *down.stride(), *up.stride(), 0 if bias is None else bias.stride(0),
            *((0, 0) if residual_down is None else residual_down.stride()),
            *((0, 0) if residual_up is None else residual_up.stride()),
            FUSED=fused, HAS_BIAS=bias is not None, HAS_BRANCH=residual_down is not None,
            b=0 if values is None else values.shape[-1],
            BM=up_config.BM, BN=up_config.BN, BR=up_config.BR, BK=up_config.BK,
            num_warps=up_config.num_warps, num_stages=up_config.num_stages,
        )  # fmt: skip
    return y


def launch_down(
    hidden: Tensor,  # [M, first + R or more], contiguous
    first: int,
    x: Tensor,  # [M, K]
    down: Tensor,  # [R, K]
    config: LowRankConfig,
) -> None:
    """Write x @ down^T, summed in fp32 (fp64 for fp64 x), to ``hidden`` from column ``first`` on, in its dtype.

    The sizes are positive. ``hidden`` is passed whole because a compiled graph would copy a part that is written to.
    """
    m, (r, k) = hidden.shape[0], down.shape
    launchable(lowrank_down_kernel, x)[(triton.cdiv(m, config.BM) * triton.cdiv(r, config.BR),)](
        hidden, x, down, first, m, r, k, *x.stride(), *down.stride(), hidden.stride(0),
        BM=config.BM, BR=config.BR, BK=config.BK, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
