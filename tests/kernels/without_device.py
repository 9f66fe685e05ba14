"""What ``torch.compile`` makes of the operators on CUDA tensors, found out without a device: prints it as JSON.

Fake tensors on CUDA go through AOTAutograd and through Inductor as far as the code that it generates. Triton is told
the target; what torch asks of a device while it compiles is answered here.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._functorch.aot_autograd import aot_function
from torch._guards import TracingContext, tracing
from torch._inductor import compile_fx, graph
from torch._inductor.fx_passes import joint_graph, post_grad
from torch._inductor.runtime.hints import DeviceProperties
from torch._library.triton import get_triton_kernels_for_op
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from triton.backends.compiler import GPUTarget

from mixrank_kernels import _autograd, backend, ops

ROWS, K, N, R, Q = 20000, 768, 3072, 200, 40


class Driver:
    """A driver of which only the target is asked."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def operands(dtype: torch.dtype, rows: int = ROWS) -> dict[str, Tensor]:
    shapes = {
        "x": (rows, K),
        "down": (R, K),
        "up": (N, R),
        "bias": (N,),
        "residual_down": (Q, K),
        "residual_up": (N, Q),
    }
    return {name: torch.empty(shape, device="cuda", dtype=dtype) for name, shape in shapes.items()}


def linear_operands(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(operands(dtype)[name] for name in ("x", "down", "up", "bias"))


def nodes(function: Callable, *arguments: Tensor) -> list[str]:
    """The targets of the graph that AOTAutograd makes of ``function``."""
    found = []

    def compiler(module: torch.fx.GraphModule, _inputs: list) -> Callable:
        found.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return module

    aot_function(function, fw_compiler=compiler)(*arguments)
    return found


def backward(x: Tensor, down: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The backward pass alone: the autograd engine would want a device."""
    return _autograd.lowrank_linear(
        SimpleNamespace(saved_tensors=(x, down, up), needs_input_grad=(True,) * 5), torch.relu(grad)
    )


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """Answer what Inductor asks of a device, and leave out the patterns that it would make with tensors on it."""
    known = {"multi_processor_count": 132, "major": 9, "regs_per_multiprocessor": 65536}
    known |= {"max_threads_per_multi_processor": 2048, "warp_size": 32}
    properties = SimpleNamespace(**known, minor=0, total_memory=2**36, name="a device", gcnArchName="")
    hints = DeviceProperties(type="cuda", index=0, cc=90, **known)
    answers = {
        "get_device_properties": properties, "get_device_capability": (9, 0), "current_device": 0, "device_count": 1,
        "is_available": True, "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None,
        "get_device_name": "a device", "synchronize": None, "_exchange_device": 0, "_maybe_exchange_device": 0,
    }  # fmt: skip
    interface = torch._dynamo.device_interface.CudaInterface
    patched = [(torch.cuda, name, answer) for name, answer in answers.items()]
    patched += [(interface, "get_compute_capability", 90), (interface, "is_available", True)]
    patched += [(interface.Worker, "get_device_properties", properties), (DeviceProperties, "create", hints)]
    patched += [(joint_graph, "lazy_init", None), (post_grad, "lazy_init", None)]
    with contextlib.ExitStack() as stack:
        for owner, name, answer in patched:
            stack.enter_context(mock.patch.object(owner, name, return_value=answer))
        stack.enter_context(torch.compiler.config.patch(force_disable_caches=True))
        stack.enter_context(torch._inductor.config.patch(compile_threads=1))
        yield


class Generated(BaseException):
    """Ends a compilation once the code is there, which no handler of errors is to see."""


def inductor_calls(mode: FakeTensorMode, function: Callable, *arguments: Tensor) -> list[str]:
    """The lines of Inductor's code for ``function`` that launch kernels or call operators."""
    original = graph.GraphLowering.codegen

    def codegen(self: graph.GraphLowering) -> None:
        raise Generated(original(self)[0].value)

    module = make_fx(function)(*arguments)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder))
        stack.enter_context(mock.patch.object(graph.GraphLowering, "codegen", codegen))
        stack.enter_context(tracing(TracingContext(mode)))
        stack.enter_context(answered())
        try:
            compile_fx.compile_fx(module, list(arguments))
        except Generated as generated:
            code = generated.args[0]
    body = code[code.index("def call(") : code.index("runner = ")]
    return [line.strip() for line in body.splitlines() if ".run(" in line or "torch.ops." in line or "extern_" in line]


def symbolic_rows(mode: FakeTensorMode) -> torch.SymInt:
    """A number of rows that the graph is to leave open."""
    source, shapes = ConstantSource("rows"), mode.shape_env
    symbol = shapes.create_symbol(ROWS, source, dynamic_dim=DimDynamic.DYNAMIC)
    return shapes.create_symintnode(symbol, hint=ROWS, source=source)


def kernels_in_caches(implementation: str) -> list[str]:
    """What torch's caches know ``lowrank_linear`` to be made of, once a graph with it has been made."""
    with backend.use(implementation):
        ops.lowrank_linear(*linear_operands(torch.float32))
    return [kernel.__name__ for kernel in get_triton_kernels_for_op("mixrank_kernels::lowrank_linear")]


def residual(x: Tensor, down: Tensor, up: Tensor, bias: Tensor, residual_down: Tensor, residual_up: Tensor) -> tuple:
    return (torch.relu(ops.lowrank_residual_linear(x * 2, down, up, bias, residual_down, residual_up)),)


class Layer(torch.nn.Module):
    """One operator, to export."""

    def forward(self, *arguments: Tensor) -> Tensor:
        return ops.lowrank_linear(*arguments)


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    mode, half, single, found = FakeTensorMode(shape_env=ShapeEnv()), torch.float16, torch.float32, {}
    with mode, torch.no_grad():
        gram, x = torch.empty(K, K, device="cuda"), torch.empty(64, 7, K, device="cuda", dtype=torch.bfloat16)
        weight, grad = torch.empty(64, 7, device="cuda"), torch.empty(ROWS, N, device="cuda", dtype=half)
        for_backward = (*linear_operands(half)[:3], grad)
        found["chosen"] = nodes(ops.lowrank_linear, *linear_operands(half))
        found["not chosen"] = nodes(ops.lowrank_linear, *linear_operands(single))
        with backend.use("composite"):
            found["forced away"] = nodes(ops.lowrank_linear, *linear_operands(half))
        with backend.use("triton"):
            found["forced"] = nodes(ops.lowrank_linear, *linear_operands(single))
            found["residual"] = nodes(residual, *operands(half).values())
            found["backward"] = nodes(backward, *for_backward)
            found["gram"] = nodes(lambda gram, x, weight: ops.gram_accumulate_(gram, x, weight), gram, x, weight)
            found["cross"] = nodes(lambda cross, x: ops.cross_gram_accumulate_(cross, x, x), gram, x)
            open_rows = torch.empty(symbolic_rows(mode), K, device="cuda", dtype=half)
            found["any number of rows"] = nodes(ops.lowrank_linear, open_rows, *linear_operands(half)[1:])
            found["number of rows"] = str(open_rows.shape[0])
            found["inductor"] = inductor_calls(mode, residual, *operands(half).values())
            found["inductor, backward"] = inductor_calls(mode, backward, *for_backward)
            exported = torch.export.export(Layer(), linear_operands(half))
            found["exported"] = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
        found["caches"] = {name: kernels_in_caches(name) for name in ("triton", "composite")}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
