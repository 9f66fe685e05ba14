"""Checks of one argument each, in the words that the C++ implementations use too."""

from __future__ import annotations

import torch
from torch import Tensor


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_device(op: str, name: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
    torch._check(
        tensor.device == like.device,
        lambda: f"{op}: {name} must be on {like.device} as {like_name} is, but it was on {tensor.device}",
    )


def check_dtype(op: str, name: str, tensor: Tensor, dtype: torch.dtype, like_name: str) -> None:
    torch._check(
        tensor.dtype == dtype,
        lambda: (
            f"{op}: {name} must have dtype {_names((dtype,))} as {like_name} has, but it was {_names((tensor.dtype,))}"
        ),
    )


def check_one_of(op: str, name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    torch._check(
        tensor.dtype in allowed,
        lambda: f"{op}: {name} must have one of the dtypes {_names(allowed)}, but it was {_names((tensor.dtype,))}",
    )


def check_shape(op: str, name: str, condition: bool, wanted: str, tensor: Tensor) -> None:
    torch._check(condition, lambda: f"{op}: {name} must have shape {wanted}, but it was {list(tensor.shape)}")


def check_contiguous(op: str, name: str, tensor: Tensor) -> None:
    torch._check(
        tensor.is_contiguous(), lambda: f"{op}: {name} must be contiguous, but its strides were {list(tensor.stride())}"
    )


def check_packed(op: str, packed: Tensor | None, x: Tensor) -> None:
    if packed is not None:
        torch._check(
            packed.dtype == torch.uint8,
            lambda: f"{op}: packed must have dtype uint8, but it was {_names((packed.dtype,))}",
        )
        check_shape(op, "packed", packed.dim() == 1, "[bytes]", packed)
        check_contiguous(op, "packed", packed)
        check_device(op, "packed", packed, x, "x")


def check_typed(op: str, name: str, tensor: Tensor, dtype: torch.dtype, x: Tensor) -> None:
    torch._check(
        tensor.dtype == dtype,
        lambda: f"{op}: {name} must have dtype {_names((dtype,))}, but it was {_names((tensor.dtype,))}",
    )
    check_contiguous(op, name, tensor)
    check_device(op, name, tensor, x, "x")


def check_like(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    check_device(op, name, tensor, x, "x")
    check_dtype(op, name, tensor, x.dtype, "x")


def check_together(op: str, parts: dict[str, Tensor | None]) -> None:
    absent = [name for name, tensor in parts.items() if tensor is None]
    torch._check(
        len(absent) in (0, len(parts)),
        lambda: f"{op}: {', '.join(parts)} must be given together or not at all, but {', '.join(absent)} was missing",
    )
