"""Registration of fakes, reference fallback, Triton, autograd and autocast for every operator."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from mixrank_kernels import _checks, reference
from mixrank_kernels._load import load_extension
from mixrank_kernels._schema import NAMESPACE, SCHEMAS, library, overload

HAS_TRITON = importlib.util.find_spec("triton") is not None


def checked(name: str, implementation: Callable) -> Callable:
    """``implementation`` behind the checks of the operator ``name``, taking the schema's arguments."""
    check = getattr(_checks, name)

    def call(*args: Tensor | None, **kwargs: Tensor | None) -> Tensor | None:
        arguments = bind(name, *args, **kwargs)
        check(*arguments)
        return implementation(*arguments)

    return call


def bind(name: str, *args: Tensor | None, **kwargs: Tensor | None) -> tuple[Tensor | None, ...]:
    """All arguments of the operator ``name`` in the order of its schema, the absent ones as None."""
    schema = overload(name)._schema
    given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
    return tuple(given.get(argument.name) for argument in schema.arguments)


def triton_implementation(name: str) -> Callable:
    """The Triton launcher of the operator ``name``; Triton is imported at the first call, not before."""

    def launch(*arguments: Tensor | None) -> Tensor | None:
        from mixrank_kernels import triton

        return getattr(triton, name)(*arguments)

    return launch


def _fake_lowrank_linear(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
    _checks.lowrank_linear(x, down, up, bias)
    return x.new_empty((*x.shape[:-1], up.shape[0]))


def _fake_gram_accumulate_(
    gram: Tensor, x: Tensor, row_weight: Tensor | None = None, column_sum: Tensor | None = None
) -> None:
    _checks.gram_accumulate_(gram, x, row_weight, column_sum)


def _save_for_backward(ctx, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    x, down, up, _bias = inputs
    ctx.save_for_backward(x, down, up)


def _lowrank_linear_backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, down, up = ctx.saved_tensors
    # The dispatcher drops a trailing argument that has its default, here the bias.
    needs_x, needs_down, needs_up, *needs_bias = ctx.needs_input_grad
    rows, grad_rows = x.flatten(0, -2) if x.dim() > 1 else x[None], grad.reshape(-1, grad.shape[-1])
    return (
        overload("lowrank_linear")(grad, up.mT, down.mT) if needs_x else None,
        (grad_rows @ up).mT @ rows if needs_down else None,
        grad_rows.mT @ (rows @ down.mT) if needs_up else None,
        *(grad_rows.sum(0) if needed else None for needed in needs_bias),
    )


def _autocast_lowrank_linear(device_type: str) -> Callable:
    key = getattr(torch._C.DispatchKey, "Autocast" + torch._C._dispatch_key_for_device(device_type))

    def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        eligible = tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if eligible else tensor

    def kernel(_keys, *args: Tensor | None, **kwargs: Tensor | None) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return overload("lowrank_linear")(*(cast(t, dtype) for t in bind("lowrank_linear", *args, **kwargs)))

    return kernel


_FAKES = {"lowrank_linear": _fake_lowrank_linear, "gram_accumulate_": _fake_gram_accumulate_}

for _name in SCHEMAS:
    library.impl(_name, checked(_name, getattr(reference, _name)), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _FAKES[_name], lib=library)
    if HAS_TRITON:
        library.impl(_name, checked(_name, triton_implementation(_name)), "CUDA")

torch.library.register_autograd(
    f"{NAMESPACE}::lowrank_linear", _lowrank_linear_backward, setup_context=_save_for_backward, lib=library
)
for _device_type in ("cpu", "cuda"):
    library.impl(
        "lowrank_linear",
        _autocast_lowrank_linear(_device_type),
        "Autocast" + torch._C._dispatch_key_for_device(_device_type),
        with_keyset=True,
    )

extension = load_extension()
