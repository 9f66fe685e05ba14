"""The precision that a model runs in: what a device multiplies fast."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Precision(StrEnum):
    """What ``--dtype`` takes; ``auto`` is bfloat16 where the device multiplies it, and else float32."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


def multiplies_bfloat16(device: str | torch.device = "cpu") -> bool:
    """Whether the device has instructions for products of bfloat16; without them these are several times slower.

    Of a CPU the C++ kernels know it; without them the answer is no.
    """
    import torch

    from mixrank_kernels import backend

    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return "avx512bf16" in backend.isas()


def fast_dtype(device: str | torch.device = "cpu") -> torch.dtype | None:
    """The ``dtype`` of :func:`mixrank.compress` and of the trainings that is the fastest on a device.

    Args:
        device: where the model runs.

    Returns:
        bfloat16 where the device multiplies it, and None, the model's own precision, elsewhere.

    Example:
        >>> import mixrank
        >>> import torch
        >>> mixrank.fast_dtype("cpu") in (None, torch.bfloat16)
        True
    """
    import torch

    return torch.bfloat16 if multiplies_bfloat16(device) else None
