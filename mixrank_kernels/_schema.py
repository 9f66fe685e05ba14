"""The schema of every operator: the one place where names, argument order and tags are decided.

The schemas are defined here, and not in C++, so that the reference, the fakes, autograd and Triton work
where no extension is built. Compiled code only adds implementations under its device key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn, TypeAlias, cast

import torch
from torch import Tensor

NAMESPACE = "mixrank_kernels"

SCHEMAS = {
    "lowrank_linear": "(Tensor x, Tensor down, Tensor up, Tensor? bias=None, Tensor? packed=None) -> Tensor",
    "lowrank_residual_linear": (
        "(Tensor x, Tensor down, Tensor up, Tensor? bias=None, Tensor? residual_down=None, Tensor? residual_up=None, "
        "Tensor? crow=None, Tensor? col=None, Tensor? values=None, Tensor? packed=None) -> Tensor"
    ),
    "pivoted_linear": (
        "(Tensor x, Tensor down, Tensor coefficients, Tensor index, Tensor? bias=None, Tensor? packed=None) -> Tensor"
    ),
    "sparse_linear": (
        "(Tensor x, Tensor mask, Tensor values, Tensor? down=None, Tensor? up=None, Tensor? bias=None, "
        "Tensor? packed=None) -> Tensor"
    ),
    "gram_accumulate_": "(Tensor(a!) gram, Tensor x, Tensor? row_weight=None, Tensor(b!)? column_sum=None) -> ()",
    "cross_gram_accumulate_": "(Tensor(a!) cross, Tensor x, Tensor z) -> ()",
}

# Layers of 8-bit weights, for inference: no gradient, no choice among implementations. The extension serves them on the
# CPU, the reference everywhere else.
INT8_SCHEMAS = {
    "int8_linear": (
        "(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None, bool dynamic=True, Tensor? packed=None) -> Tensor"
    ),
    "int8_lowrank_linear": (
        "(Tensor x, Tensor down, Tensor down_scale, Tensor up, Tensor up_scale, Tensor? bias=None, bool dynamic=True, "
        "Tensor? index=None, Tensor? packed=None) -> Tensor"
    ),
    "int8_sparse_linear": (
        "(Tensor x, Tensor mask, Tensor values, Tensor scale, Tensor? down=None, Tensor? down_scale=None, "
        "Tensor? up=None, Tensor? up_scale=None, Tensor? bias=None, Tensor? packed=None) -> Tensor"
    ),
}

# What backward passes are made of where Triton serves: no public function, no choice among implementations.
PRIVATE_SCHEMAS = {"_factor_grad": "(Tensor x, Tensor down, Tensor grad) -> Tensor"}

Argument: TypeAlias = Tensor | bool | None
# All arguments of an operator in the order of its schema: the first two are tensors in every one.
Arguments: TypeAlias = tuple[Tensor, Tensor, *tuple[Argument, ...]]

library = torch.library.Library(NAMESPACE, "DEF")
for _name, _signature in (SCHEMAS | INT8_SCHEMAS | PRIVATE_SCHEMAS).items():
    library.define(_name + _signature, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))


def overload(name: str) -> torch._ops.OpOverload:
    """The dispatcher's entry of the operator ``name``."""
    return getattr(torch.ops.mixrank_kernels, name).default


def tensor_of(arguments: Mapping[str, Argument], name: str) -> Tensor:
    """The argument ``name``, which has to be a tensor where it is asked for."""
    return cast(Tensor, arguments[name])


def absent(op: str, **tensors: Tensor | None) -> NoReturn:
    """Raise RuntimeError that names the first tensor that is None."""
    # The dispatcher takes None for a tensor, and whatever serves it would trip over that in words of its own.
    name = next(name for name, tensor in tensors.items() if tensor is None)
    raise RuntimeError(f"{op}: {name} must be a tensor, but it was None")
