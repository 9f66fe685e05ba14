"""The operators that pack their weights at run time and call another one: what compiled graphs hold.

A graph cannot ask for what is packed: it would keep the answer of the day it was traced. These ask at each call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from mixrank_kernels import _register
from mixrank_kernels._schema import INT8_SCHEMAS, NAMESPACE, SCHEMAS, Argument, library, overload

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)


def self_packed(op: str) -> str:
    """The name of the operator that packs at run time and calls ``op``."""
    return f"_{op}_self_packed"


def define(op: str, packed_of: Callable[..., Tensor | None]) -> None:
    """Define ``_{op}_self_packed``: one more way to call ``op``, which no implementation replaces.

    Its arguments are those of ``op`` but for ``packed``: x, the weights that ``packed_of`` takes, and bias.
    """
    name, operator = self_packed(op), overload(op)

    def plain(x: Tensor, *weights: Tensor | None) -> Tensor:
        return operator(x, *weights)

    def packing(x: Tensor, *weights_and_bias: Tensor | None) -> Tensor:
        *weights, bias = weights_and_bias
        return operator(x, *weights, bias, packed_of(*weights))

    def differentiable(x: Tensor, *weights: Tensor | None) -> Tensor:
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *weights)):
            return plain(x, *weights)
        with torch._C._AutoDispatchBelowAutograd():
            return overload(name)(x, *weights)

    def with_bias(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The dispatcher leaves out a trailing argument that has its default."""
        count = len(operator._schema.arguments) - 1
        return lambda *given: function(*given, *[None] * (count - len(given)))

    library.define(name + SCHEMAS[op].replace(", Tensor? packed=None", ""), tags=_TAGS)
    library.impl(name, with_bias(packing), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", _register.fake(op), lib=library)
    library.impl(name, with_bias(differentiable), "Autograd")
    for device_type in ("CPU", "CUDA"):
        # The operator itself casts; what is packed would be of no use to it.
        library.impl(name, with_bias(plain), f"Autocast{device_type}")


def define_int8(op: str, packed_of: Callable[..., Tensor | None]) -> None:
    """Define ``_{op}_self_packed`` for an operator of 8-bit weights, whose codes ``packed_of`` packs."""
    name = self_packed(op)
    library.define(name + INT8_SCHEMAS[op].replace(", Tensor? packed=None", ""), tags=_TAGS)
    library.impl(name, _int8_call(op, packed_of), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", _register.fake(op), lib=library)
    library.impl(name, _register.without_gradient(name), "Autograd")
    for device_type in ("cpu", "cuda"):
        key = "Autocast" + torch._C._dispatch_key_for_device(device_type)
        library.impl(name, _register.int8_autocast(name, device_type), key, with_keyset=True)


def _int8_call(name: str, packed_of: Callable[..., Tensor | None]) -> Callable[..., Tensor]:
    is_lowrank = name == "int8_lowrank_linear"

    def call(*arguments: Argument) -> Tensor:
        bound = list(_register.bind(name, *arguments))
        if is_lowrank:
            first, second, dynamic = bound[1], bound[3], bound[6]
        else:
            first, second, dynamic = bound[1], None, bound[4]
        codes = (cast(Tensor, first), cast("Tensor | None", second))
        return overload(name)(*bound[:-1], packed_of(*codes, dynamic=cast(bool, dynamic)))

    return call
