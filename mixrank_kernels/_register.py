"""Registration of fakes, reference fallback, Triton, autograd and autocast for every operator."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

from mixrank_kernels import _autograd, _checks, _checks_int8, _contents, choice, composite, cuda, reference
from mixrank_kernels._load import load_extension
from mixrank_kernels._schema import INT8_SCHEMAS, NAMESPACE, SCHEMAS, Argument, Arguments, library, overload

AUTOCAST = ("cpu", "cuda")
HAS_TRITON = importlib.util.find_spec("triton") is not None

# Stated here, as asking mixrank_kernels.triton would import Triton.
TRITON_OPERATORS = tuple(name for name in SCHEMAS if name not in ("pivoted_linear", "sparse_linear"))


def check_of(name: str) -> Callable[..., None]:
    """What raises RuntimeError unless the arguments of the operator ``name`` fit together, taking all of them."""
    return getattr(_checks_int8 if name in INT8_SCHEMAS else _checks, name)


def checked(name: str, implementation: Callable) -> Callable:
    """``implementation`` behind the checks of the operator ``name``, taking the schema's arguments."""
    check = check_of(name)
    names = [argument.name for argument in overload(name)._schema.arguments]

    def call(*args: Argument, **kwargs: Argument) -> Tensor | None:
        arguments = bind(name, *args, **kwargs)
        check(*arguments)
        _contents.memory_and_contents(name, dict(zip(names, arguments, strict=True)))
        with _without_autocast(arguments[0].device.type):
            return implementation(*arguments)

    return call


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """What an operator is made of is not cast: its operands have been, where they are to be."""
    if device_type in AUTOCAST and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def bind(name: str, *args: Argument, **kwargs: Argument) -> Arguments:
    """All arguments of the operator ``name`` in the order of its schema, the absent ones with their defaults."""
    schema = overload(name)._schema
    given = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
    bound = tuple(given.get(argument.name, argument.default_value) for argument in schema.arguments)
    return cast(Arguments, bound)  # the dispatcher calls nothing without its tensors


def triton_implementation(name: str) -> Callable:
    """The Triton launcher of the operator ``name``; Triton is imported at the first call, not before."""
    # The packing has the layout of the CPU kernels.
    takes_packed = overload(name)._schema.arguments[-1].name == "packed"

    def launch(*arguments: Argument) -> Tensor | None:
        from mixrank_kernels import triton

        return getattr(triton, name)(*(arguments[:-1] if takes_packed else arguments))

    return launch


def implementation(name: str, op: str) -> Callable:
    """The function by which an implementation of Python modules serves the operator ``op``, without checks."""
    if name == "triton":
        return triton_implementation(op)
    if name == "cuda":
        return cuda_implementation(op)
    return getattr({"composite": composite, "reference": reference}[name], op)


def cuda_implementation(op: str) -> Callable:
    """The CUDA C++ kernels; calls that they have no kernel for are served by what is chosen for them."""

    def call(*arguments: *Arguments) -> Tensor | None:
        if cuda.refusal(op, *arguments) is None:
            return getattr(cuda, op)(*arguments)
        return chosen_implementation(op)(*arguments)

    return call


def chosen_implementation(op: str) -> Callable:
    """Serves each call of the operator ``op`` by what :mod:`mixrank_kernels.choice` chooses for it."""

    def call(*arguments: *Arguments) -> Tensor | None:
        return implementation(chosen(op, *arguments).implementation, op)(*arguments)

    return call


def chosen(op: str, *arguments: *Arguments) -> choice.Choice:
    """The choice for a call of ``op`` on CUDA tensors; where it cannot be had, the libraries serve."""
    found = choice.choose(op, *arguments)
    if found.implementation == "triton" and not (HAS_TRITON and op in TRITON_OPERATORS):
        return choice.Choice("composite", f"there is no Triton kernel here, else {found.reason}")
    if found.implementation == "cuda" and (refusal := cuda.refusal(op, *arguments)):
        return choice.Choice("composite", f"not cuda: {refusal}; else {found.reason}")
    return found


def served_by_triton(op: str, *arguments: *Arguments) -> bool:
    """Whether a call of ``op`` on these arguments is served by Triton, by choice or because it is forced."""
    # Most calls on the CPU are answered by this: there Triton is loaded only to be forced.
    if not HAS_TRITON or (arguments[0].device.type == "cpu" and "mixrank_kernels.triton" not in sys.modules):
        return False
    from mixrank_kernels import backend  # which imports this module

    return backend.explain(op, *arguments).chosen == "triton"


def trace_rule(launch: Callable, serves: Callable[..., bool]) -> Callable:
    """How AOTAutograd records a call: as the Triton kernels of ``launch`` where Triton ``serves`` it, else as it is.

    Triton's kernels are then nodes of the graph, among which Inductor plans memory and order. The choice is made when
    the graph is, as are the checks, but for those of an argument's contents. Exported programs keep the operator.
    """

    def rule(mode: FunctionalTensorMode, op: torch._ops.OpOverload, types: tuple, args: tuple, kwargs: dict) -> object:
        from torch.export._trace import custom_triton_ops_decomposition_disabled

        arguments = bind(op._schema.name.split("::")[1], *args, **(kwargs or {}))
        kept = (
            not {FunctionalTensor}.issubset(types)
            or not {FunctionalTensor, FakeTensor, Tensor}.issuperset(types)
            or custom_triton_ops_decomposition_disabled()
            or arguments[0].device.type != "cuda"
            or not serves(*arguments)
            or _interpreted()
        )
        if kept:
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode:
            return launch(*arguments)

    return rule


def _name_kernels_to_caches(op: str, *arguments: *Arguments) -> None:
    """Make the sources of the kernels that a call is going to be traced into a part of what caches know it by.

    torch looks compiled graphs up by the graph with the operator in it, before it is traced into anything. Of what an
    operator is made of it knows through a table of its own, which :func:`torch.library.triton_op` fills.
    """
    if arguments[0].device.type != "cuda" or not HAS_TRITON:
        return
    from torch._library.triton import triton_ops_to_kernels

    kernels: list[object] = []
    if served_by_triton(op, *arguments) and not _interpreted():
        from mixrank_kernels.triton import KERNELS

        kernels.extend(KERNELS)
    triton_ops_to_kernels[f"{NAMESPACE}::{op}"] = kernels


def _interpreted() -> bool:
    from mixrank_kernels import triton

    return triton.is_interpreted()


def fake(name: str) -> Callable:
    """The fake of the operator ``name``: its checks, and the output as memory without contents."""
    check = check_of(name)

    def call(*args: Argument, **kwargs: Argument) -> Tensor | None:
        arguments = bind(name, *args, **kwargs)
        check(*arguments)
        _name_kernels_to_caches(name, *arguments)
        if name.endswith("_"):
            return None
        x = arguments[0]
        return x.new_empty((*x.shape[:-1], _out_features(name, arguments)))

    return call


def _out_features(name: str, arguments: Sequence[Argument]) -> int:
    if name == "int8_linear":
        return _rows(arguments[1])
    if name == "int8_lowrank_linear":
        _x, down, _down_scale, up, _up_scale, _bias, _dynamic, index, _packed = arguments
        return _rows(up) + (0 if index is None else _rows(down))
    of_index_or_mask = {"pivoted_linear": 3, "sparse_linear": 1, "int8_sparse_linear": 1}
    return _rows(arguments[of_index_or_mask.get(name, 2)])  # else of up


def _rows(weight: Argument) -> int:
    return cast(Tensor, weight).shape[0]


def _autocast(name: str, device_type: str) -> Callable:
    key = getattr(torch._C.DispatchKey, "Autocast" + torch._C._dispatch_key_for_device(device_type))

    def lowered(argument: Argument, dtype: torch.dtype) -> Argument:
        if isinstance(argument, Tensor) and argument.is_floating_point() and argument.dtype != torch.float64:
            return argument.to(dtype)
        return argument

    def kernel(_keys: torch._C.DispatchKeySet, *args: Argument, **kwargs: Argument) -> Tensor:
        dtype = torch.get_autocast_dtype(device_type)
        *given, packed = list(bind(name, *args, **kwargs))
        wanted = [lowered(argument, dtype) for argument in given]
        # The packing holds the values of the tensors before the cast.
        unchanged = all(new is old for new, old in zip(wanted, given, strict=True))
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return overload(name)(*wanted, packed if unchanged else None)

    return kernel


def _factor_grad(x: Tensor, down: Tensor, grad: Tensor) -> Tensor:
    from mixrank_kernels.triton import factor_grad

    return factor_grad(x, down, grad)


def _fake_factor_grad(x: Tensor, down: Tensor, grad: Tensor) -> Tensor:
    return grad.new_empty((down.shape[0], grad.shape[-1]))


for _name in SCHEMAS:
    library.impl(_name, checked(_name, getattr(reference, _name)), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", fake(_name), lib=library)
    library.impl(_name, checked(_name, chosen_implementation(_name)), "CUDA")
    torch.library.register_torch_dispatch(
        f"{NAMESPACE}::{_name}",
        FunctionalTensorMode,
        trace_rule(triton_implementation(_name), functools.partial(served_by_triton, _name)),
        lib=library,
    )

# The operands are those of a backward pass, which the forward pass has checked.
library.impl("_factor_grad", _factor_grad, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::_factor_grad", _fake_factor_grad, lib=library)
torch.library.register_autograd(
    f"{NAMESPACE}::_factor_grad", _autograd.factor_grad, setup_context=_autograd.save_factor_grad, lib=library
)
torch.library.register_torch_dispatch(
    f"{NAMESPACE}::_factor_grad", FunctionalTensorMode, trace_rule(_factor_grad, lambda *_: True), lib=library
)

for _name in ("lowrank_linear", "lowrank_residual_linear", "pivoted_linear", "sparse_linear"):
    torch.library.register_autograd(
        f"{NAMESPACE}::{_name}",
        getattr(_autograd, _name),
        setup_context=getattr(_autograd, f"save_{_name}"),
        lib=library,
    )
    for _device_type in AUTOCAST:
        library.impl(
            _name,
            _autocast(_name, _device_type),
            "Autocast" + torch._C._dispatch_key_for_device(_device_type),
            with_keyset=True,
        )


def without_gradient(name: str) -> Callable:
    """The operator below autograd; it has no gradient, so it refuses to take part where one is recorded."""
    names = [argument.name for argument in overload(name)._schema.arguments]

    def call(*args: Argument, **kwargs: Argument) -> Tensor:
        if torch.is_grad_enabled():
            for argument, value in zip(names, bind(name, *args, **kwargs), strict=True):
                if isinstance(value, Tensor) and value.requires_grad:
                    raise RuntimeError(
                        f"{name}: {argument} must not require a gradient, as 8-bit layers are for inference, but it "
                        "does: call the model under torch.no_grad() or torch.inference_mode()"
                    )
        with torch._C._AutoDispatchBelowAutograd():
            return overload(name)(*args, **kwargs)

    return call


def int8_autocast(name: str, device_type: str) -> Callable:
    """Casts x and bias to the dtype of the region; codes and scales stay, and with them what is packed."""
    key = getattr(torch._C.DispatchKey, "Autocast" + torch._C._dispatch_key_for_device(device_type))
    names = [argument.name for argument in overload(name)._schema.arguments]

    def kernel(_keys: torch._C.DispatchKeySet, *args: Argument, **kwargs: Argument) -> Tensor:
        arguments = dict(zip(names, bind(name, *args, **kwargs), strict=True))
        dtype = torch.get_autocast_dtype(device_type)
        for given in ("x", "bias"):
            value = arguments[given]
            if isinstance(value, Tensor) and value.is_floating_point():
                arguments[given] = value.to(dtype)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return overload(name)(**arguments)

    return kernel


for _name in INT8_SCHEMAS:
    library.impl(_name, checked(_name, getattr(reference, _name)), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", fake(_name), lib=library)
    library.impl(_name, without_gradient(_name), "Autograd")
    for _device_type in AUTOCAST:
        library.impl(
            _name,
            int8_autocast(_name, _device_type),
            "Autocast" + torch._C._dispatch_key_for_device(_device_type),
            with_keyset=True,
        )

extension = load_extension()

# Asked before backend.use can register anything for the same key.
COMPILED_OPERATORS = tuple(
    name
    for name in SCHEMAS | INT8_SCHEMAS
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CPU")
)
