"""Compressed models as plain PyTorch: layers multiplied out, or kept as products that any runtime has."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixrank.errors import InputError
from mixrank.nn import LowRankLinear, MixedRankLinear, SplitLinear
from mixrank.nn_int8 import Int8Layer, Int8Linear, Int8MixedRankLinear, Int8PivotedLinear
from mixrank.nn_int8_sparse import Int8SparseLinear
from mixrank.nn_pivoted import PivotedLinear
from mixrank.nn_sparse import SparseLinear
from mixrank_kernels import reference


class _Mergeable(Protocol):
    def merge(self) -> nn.Linear: ...


def merged(model: nn.Module) -> nn.Module:
    """A copy of the model with every factored, sparse or quantised layer multiplied out to a plain ``nn.Linear``."""
    return _replaced(model, lambda layer: cast(_Mergeable, layer).merge(), (LowRankLinear, SplitLinear, Int8Layer))


def plain(model: nn.Module) -> nn.Module:
    """A copy of the model that needs nothing but PyTorch to run: two products for a layer of low rank.

    Weights of 8 bits stay so, and are widened when they are used. Sparse weights get their zeros back, and those of 32
    bits are multiplied out: PyTorch has no product of a sparse weight that exporters know.

    Raises:
        InputError: a layer has no such form.
    """
    return _replaced(model, _plain, (LowRankLinear, Int8Layer))


def _replaced(model: nn.Module, make: Callable[[nn.Module], nn.Module], kinds: tuple[type, ...]) -> nn.Module:
    if isinstance(model, kinds):
        return make(model)
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, kinds):
                setattr(module, name, make(child))
    return model


def _plain(layer: nn.Module) -> nn.Module:
    made: nn.Module
    match layer:
        case MixedRankLinear():
            made = nn.Sequential(_linear(layer.down, None), _linear(layer.up, layer.bias))
        case PivotedLinear():
            made = _Pivoted(_linear(layer.down, None), _linear(layer.coefficients, None), layer.index, layer.bias)
        case SparseLinear():
            made = layer.merge()
        case Int8Linear():
            made = _Int8(layer.codes, layer.scale, layer.bias, layer.dynamic)
        case Int8MixedRankLinear():
            first = _Int8(layer.down_codes, layer.down_scale, None, layer.dynamic)
            made = nn.Sequential(first, _Int8(layer.up_codes, layer.up_scale, layer.bias, layer.dynamic))
        case Int8PivotedLinear():
            first = _Int8(layer.down_codes, layer.down_scale, None, layer.dynamic)
            second = _Int8(layer.coefficients_codes, layer.coefficients_scale, None, layer.dynamic)
            made = _Pivoted(first, second, layer.index, layer.bias)
        case Int8SparseLinear():
            made = _Int8(layer.sparse_codes, layer.scale, layer.bias, False)
            if layer.down_codes is not None:
                first = _Int8(layer.down_codes, cast(Tensor, layer.down_scale), None, False)
                second = _Int8(cast(Tensor, layer.up_codes), cast(Tensor, layer.up_scale), None, False)
                made = _Sum(made, nn.Sequential(first, second))
        case _:
            raise InputError(f"{type(layer).__name__} has no form in plain PyTorch")
    return made.train(layer.training)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear


class _Pivoted(nn.Module):
    """Some outputs from the input, the others from these, then all in their order."""

    order: Tensor
    bias: nn.Parameter | None

    def __init__(self, first: nn.Module, second: nn.Module, index: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.register_buffer("order", index.long().argsort())
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))

    def forward(self, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        hidden = self.first(x)
        y = torch.cat([hidden, self.second(hidden)], dim=-1).index_select(-1, self.order)
        return y if self.bias is None else y + self.bias


class _Sum(nn.Module):
    """Two layers of the same input, their outputs added."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        return self.first(x) + self.second(x)


class _Int8(nn.Module):
    """8-bit codes times one scale for each output; ``dynamic``: of an input rounded to 256 steps for each row."""

    codes: Tensor
    scale: Tensor
    bias: nn.Parameter | None

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None, dynamic: bool) -> None:
        super().__init__()
        self.dynamic = dynamic
        self.register_buffer("codes", codes.detach().clone())
        self.register_buffer("scale", scale.detach().clone())
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone(), False))

    def forward(self, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        weight = self.codes.float() * self.scale[:, None]
        wide = x.float()
        if self.dynamic:
            codes, step = reference.quantise_rows(wide)
            wide = codes * step
        y = F.linear(wide, weight)
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)
