"""What every Triton kernel here shares: the product with a wide left operand, and the guards of a launch."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor


@triton.jit
def accumulate_wide_product(b_wide, b_narrow, b_acc):
    """b_acc [A, D] + b_wide [A, C] @ b_narrow [C, D], with b_wide in fp32 (fp64) not rounded to b_narrow's dtype.

    Tensor cores want both operands in half precision. A wide value is therefore split into a high and a low half,
    two products into one accumulator: 16 bits are kept for bf16 and 22 for fp16.
    """
    if b_narrow.dtype == tl.bfloat16:
        b_high = b_wide.to(tl.bfloat16)
        # The rest of an infinity would be inf - inf: it must not turn an infinite result into NaN.
        b_rest = tl.where(tl.abs(b_high.to(tl.float32)) == float("inf"), 0.0, b_wide - b_high.to(tl.float32))
        b_acc = tl.dot(b_high, b_narrow, b_acc)
        b_acc = tl.dot(b_rest.to(tl.bfloat16), b_narrow, b_acc)
    elif b_narrow.dtype == tl.float16:
        # fp16 has fp32's range no more than its precision: each row is brought near one by a power of two (exact),
        # read off the exponent of its largest value and kept where its inverse is a normal number.
        b_exponent = tl.max(tl.abs(b_wide), axis=1).to(tl.int32, bitcast=True) & 0x7F800000
        b_exponent = tl.minimum(tl.maximum(b_exponent, 0x00800000), 0x7E800000)
        b_scaled = b_wide * (0x7F000000 - b_exponent).to(tl.float32, bitcast=True)[:, None]
        b_high = b_scaled.to(tl.float16)
        b_rest = tl.where(tl.abs(b_high.to(tl.float32)) == float("inf"), 0.0, b_scaled - b_high.to(tl.float32))
        b_product = tl.dot(b_high, b_narrow)
        b_product = tl.dot(b_rest.to(tl.float16), b_narrow, b_product)
        b_acc += b_product * b_exponent.to(tl.float32, bitcast=True)[:, None]
    else:
        b_acc = tl.dot(b_wide, b_narrow, b_acc, input_precision="ieee", out_dtype=b_acc.dtype)
    return b_acc


def is_interpreted() -> bool:
    """Whether the kernels run under Triton's interpreter (``TRITON_INTERPRET=1`` when they were imported)."""
    return not isinstance(accumulate_wide_product, triton.JITFunction)


def is_traced(x: Tensor) -> bool:
    """Whether a call on ``x`` is being recorded into a graph by AOTAutograd and no memory stands behind it."""
    return isinstance(x, FunctionalTensor)


def launchable(kernel: triton.JITFunction, x: Tensor) -> Any:
    """``kernel``, as what is recorded into the graph where the launch for ``x`` is traced."""
    # A wrapped kernel takes a millisecond to launch, so an eager call does without.
    return torch.library.wrap_triton(kernel) if is_traced(x) else kernel


def as_rows(x: Tensor) -> Tensor:
    """``x`` [..., K] as rows [M, K], copied only if they are not evenly spaced."""
    if is_traced(x) and x.is_contiguous() and x.storage_offset() == 0:
        # Inductor would compute what is not in memory yet once for each kernel that reads it, but what is read with
        # given strides lies in memory.
        k = x.shape[-1]
        return x.as_strided((x.numel() // k, k), (k, 1), 0)
    return x.reshape(-1, x.shape[-1])


def launch_guard(op: str, x: Tensor) -> contextlib.AbstractContextManager:
    """Refuse tensors that the kernels cannot serve; else the context that makes the device of ``x`` current.

    Raises:
        RuntimeError: ``x`` is neither on CUDA nor served by the interpreter, or the interpreter would get it wrong.
    """
    if is_interpreted():
        # Triton's interpreter holds bf16 as integers, and its dot multiplies those.
        if x.dtype == torch.bfloat16:
            raise RuntimeError(
                f"{op}: x must not be bfloat16 under Triton's interpreter, whose products are wrong there"
            )
        return contextlib.nullcontext()
    if not x.is_cuda:
        raise RuntimeError(f"{op}: x must be on a CUDA device for the Triton kernel, but it was on {x.device}")
    # The compiled graph makes the device current by itself.
    return contextlib.nullcontext() if is_traced(x) else torch.cuda.device(x.device)
