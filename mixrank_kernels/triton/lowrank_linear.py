"""y = (x @ down^T) @ up^T + bias with the intermediate in fp32 (fp64 for fp64 operands).

Shapes: x [M, K], down [R, K], up [N, R], bias [N], y [M, N] contiguous; any strides of x, down and up, in elements.
All operands have one dtype: bf16, fp16, fp32 or fp64. The sizes are positive.

One kernel makes y. It either computes the intermediate itself, BR ranks at a time, for its rows (``FUSED``: one
launch, repeated for every BN columns), or reads what ``lowrank_down_kernel`` stored. The ranks are looped over at run
time, so no rank needs a kernel of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mixrank_kernels.triton._common import accumulate_wide_product, launch_guard
from mixrank_kernels.triton.config import lowrank_config


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
    hidden_ptr,  # [M, R] contiguous
    x_ptr,  # [M, K]
    down_ptr,  # [R, K]
    M,
    R,
    K,
    stride_xm,
    stride_xk,
    stride_dr,
    stride_dk,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
):
    i_m, i_r = tl.program_id(0) // tl.cdiv(R, BR), tl.program_id(0) % tl.cdiv(R, BR)
    o_m = i_m * BM + tl.arange(0, BM)
    o_r = i_r * BR + tl.arange(0, BR)
    b_hidden = _hidden_tile(
        x_ptr, down_ptr, o_m, o_r, M, R, K, stride_xm, stride_xk, stride_dr, stride_dk, BK, hidden_ptr.dtype.element_ty
    )
    p_hidden = hidden_ptr + o_m[:, None].to(tl.int64) * R + o_r[None, :]
    tl.store(p_hidden, b_hidden, mask=(o_m < M)[:, None] & (o_r < R)[None, :])


@triton.jit
def lowrank_up_kernel(
    y_ptr,  # [M, N] contiguous
    x_ptr,  # [M, K], unused unless FUSED
    down_ptr,  # [R, K], unused unless FUSED
    hidden_ptr,  # [M, R] contiguous, unused if FUSED
    up_ptr,  # [N, R]
    bias_ptr,  # [N], unused unless HAS_BIAS
    M,
    N,
    R,
    K,
    stride_xm,
    stride_xk,
    stride_dr,
    stride_dk,
    stride_un,
    stride_ur,
    stride_bias,
    FUSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
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
    m_m, m_n = o_m < M, o_n < N

    b_y = tl.zeros([BM, BN], dtype=wide)
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
            p_hidden = hidden_ptr + o_m[:, None].to(tl.int64) * R + o_r[None, :]
            b_hidden = tl.load(p_hidden, mask=m_m[:, None] & m_r[None, :], other=0.0)  # [BM, BR]
        p_up = up_ptr + o_n[None, :].to(tl.int64) * stride_un + o_r[:, None].to(tl.int64) * stride_ur
        b_up = tl.load(p_up, mask=m_n[None, :] & m_r[:, None], other=0.0)  # [BR, BN]
        b_y = accumulate_wide_product(b_hidden, b_up, b_y)

    if HAS_BIAS:
        b_y += tl.load(bias_ptr + o_n.to(tl.int64) * stride_bias, mask=m_n, other=0.0).to(wide)[None, :]
    p_y = y_ptr + o_m[:, None].to(tl.int64) * N + o_n[None, :]
    tl.store(p_y, b_y.to(y_ptr.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


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
    (r, k), n = down.shape, up.shape[0]
    y = x.new_empty((*x.shape[:-1], n))
    m = y.numel() // n
    with launch_guard("lowrank_linear", x):
        if m == 0:
            return y
        rows = x.reshape(m, k)
        down_config, up_config = lowrank_config(x.dtype, m, k, n, r)
        factor_strides = (*rows.stride(), *down.stride())
        hidden = None
        if down_config is not None:
            hidden = x.new_empty((m, r), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
            lowrank_down_kernel[(triton.cdiv(m, down_config.BM) * triton.cdiv(r, down_config.BR),)](
                hidden, rows, down, m, r, k, *factor_strides,
                BM=down_config.BM, BR=down_config.BR, BK=down_config.BK,
                num_warps=down_config.num_warps, num_stages=down_config.num_stages,
            )  # fmt: skip
        lowrank_up_kernel[(triton.cdiv(m, up_config.BM) * triton.cdiv(n, up_config.BN),)](
            y, rows, down, hidden, up, bias, m, n, r, k, *factor_strides, *up.stride(),
            0 if bias is None else bias.stride(0), FUSED=hidden is None, HAS_BIAS=bias is not None,
            BM=up_config.BM, BN=up_config.BN, BR=up_config.BR, BK=up_config.BK,
            num_warps=up_config.num_warps, num_stages=up_config.num_stages,
        )  # fmt: skip
    return y
