"""Ways to run sums of chains of linear layers: what a user would serve the factors, or the dense weight, with.

A program is a list of chains; a chain is a list of layers ``(weight [N, K], bias [N] or None)`` that follow each
other. Each engine turns a program and an input ``x [M, K]`` into a call that returns the sum ``[M, N]``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixrank_bench import affinity
from mixrank_kernels import backend

Chain = list[tuple[Tensor, Tensor | None]]
Program = list[Chain]
Engine = Callable[[Tensor, Program], Callable[[], Tensor]]


class Unavailable(Exception):
    """A peer cannot serve a case here; the message says why."""


def eager(x: Tensor, program: Program) -> Callable[[], Tensor]:
    """``F.linear`` after ``F.linear``, summed by ``+``, without the cost of calling modules."""

    def chained(chain: Chain) -> Tensor:
        hidden = x
        for weight, bias in chain:
            hidden = F.linear(hidden, weight, bias)
        return hidden

    def call() -> Tensor:
        total = chained(program[0])
        for chain in program[1:]:
            total = total + chained(chain)
        return total

    return call


def compiled(x: Tensor, program: Program) -> Callable[[], Tensor]:
    """``torch.compile`` for this very shape, with the weights frozen into the graph."""
    call = torch.compile(_Sum(program), dynamic=False, options={"freezing": True})
    return lambda: call(x)


def compiled_sum(x: Tensor, program: Program) -> Callable[[], Tensor]:
    """``torch.compile`` for this very shape, which takes the weights as arguments: one program for many weights."""
    call = _compiled_sum()
    return lambda: call(x, program)


@functools.cache
def _compiled_sum() -> Callable[[Tensor, Program], Tensor]:
    return torch.compile(_sum, dynamic=False)


def _sum(x: Tensor, program: Program) -> Tensor:
    return eager(x, program)()


def zentorch(x: Tensor, program: Program) -> Callable[[], Tensor]:
    """AMD's plug-in as the back end of ``torch.compile``."""
    _require("zentorch")
    call = torch.compile(_Sum(program), dynamic=False, backend="zentorch")
    return lambda: call(x)


def onednn(x: Tensor, program: Program) -> Callable[[], Tensor]:
    """OneDNN as Inductor calls it: weights reordered beforehand for this number of rows, sums as a post-operation."""
    if not reorders(x.dtype):
        raise Unavailable(f"oneDNN has no product of {str(x.dtype).removeprefix('torch.')} for this processor")
    linear, add = torch.ops.mkldnn._linear_pointwise.default, torch.ops.mkldnn._linear_pointwise.binary
    packed = [
        [(torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0]), bias) for weight, bias in chain]
        for chain in program
    ]

    def call() -> Tensor:
        total = None
        for *inner, (weight, bias) in packed:
            hidden = x
            for before, offset in inner:
                hidden = linear(hidden, before, offset, "none", [], "")
            if total is None:
                total = linear(hidden, weight, bias, "none", [], "")
            else:
                total = add(hidden, total, weight, bias, "add")
        return total

    return call


def reorders(dtype: torch.dtype) -> bool:
    """Whether oneDNN reorders weights of a dtype on this processor: bfloat16 only where it has instructions for it."""
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros(8, 8, dtype=dtype), 8)
    except RuntimeError:
        return False
    return True


def onnx_runtime(x: Tensor, program: Program) -> Callable[[], Tensor]:
    """ONNX Runtime on its CPU provider, input and output bound to PyTorch's memory."""
    _require("onnxruntime")
    _require("onnx")
    return _onnx_call(x, program, _onnx_model(x, program))


def _onnx_call(x: Tensor, program: Program, model: bytes) -> Callable[[], Tensor]:
    onnxruntime = _require("onnxruntime")
    options = onnxruntime.SessionOptions()
    threads = torch.get_num_threads()
    options.intra_op_num_threads = threads
    if threads > 1 and not affinity.unbound_workers(threads):
        # Processors count from one here; the calling thread is not among these.
        processors = ";".join(str(processor) for processor in range(2, threads + 1))
        options.add_session_config_entry("session.intra_op_thread_affinities", processors)
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented:
        dtype = str(x.dtype).removeprefix("torch.")
        raise Unavailable(f"its CPU provider has no {dtype} matrix product") from None
    y = x.new_empty(x.shape[0], program[0][-1][0].shape[0])
    binding = session.io_binding()
    binding.bind_input("x", "cpu", 0, x.numpy().dtype, list(x.shape), x.data_ptr())
    binding.bind_output("y", "cpu", 0, y.numpy().dtype, list(y.shape), y.data_ptr())

    def call() -> Tensor:
        session.run_with_iobinding(binding)
        return y

    return call


def _onnx_model(x: Tensor, program: Program) -> bytes:
    from onnx import TensorProto, helper

    kind = {torch.float32: TensorProto.FLOAT, torch.bfloat16: TensorProto.BFLOAT16}[x.dtype]
    nodes, constants, total = [], [], ""

    def constant(tensor: Tensor) -> str:
        name = f"c{len(constants)}"
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        constants.append(helper.make_tensor(name, kind, list(tensor.shape), raw, raw=True))
        return name

    for index, chain in enumerate(program):
        hidden = "x"
        for step, (weight, bias) in enumerate(chain):
            last = step + 1 == len(chain)
            offset = [total] if last and total else [] if bias is None else [constant(bias)]
            result = "y" if last and index + 1 == len(program) else f"h{index}_{step}"
            nodes.append(helper.make_node("Gemm", [hidden, constant(weight), *offset], [result], transB=1))
            hidden = result
        total = hidden
    shapes = {"x": list(x.shape), "y": [x.shape[0], program[0][-1][0].shape[0]]}
    infos = {name: helper.make_tensor_value_info(name, kind, shape) for name, shape in shapes.items()}
    graph = helper.make_graph(nodes, "linear", [infos["x"]], [infos["y"]], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    return model.SerializeToString()


def torch_int8(engine: str) -> Engine:
    """PyTorch's dynamically quantised linear layers: weights for each output channel, inputs for the whole tensor."""

    def build(x: Tensor, program: Program) -> Callable[[], Tensor]:
        if x.dtype != torch.float32:
            raise Unavailable("torch quantises inputs of float32 only")
        if engine not in torch.backends.quantized.supported_engines:
            raise Unavailable(f"this torch has no quantised kernels of {engine}")
        if len(program) != 1:
            raise Unavailable("its layers are not added")
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = engine
        try:
            layers = [torch.ops.quantized.linear_prepack(_quantised(weight), bias) for weight, bias in program[0]]
        finally:
            torch.backends.quantized.engine = before
        linear = partial(torch.ops.quantized.linear_dynamic, reduce_range=_in_seven_bits())

        def call() -> Tensor:
            hidden = x
            for layer in layers:
                hidden = linear(hidden, layer)
            return hidden

        return call

    return build


def _in_seven_bits() -> bool:
    """Whether one operand gives up a bit, since this processor adds pairs of 8-bit products in 16 bits, which overflow.

    The libraries advise it there; PyTorch's own layers do it everywhere.
    """
    return "avx512vnni" not in backend.isas()


def _quantised(weight: Tensor) -> Tensor:
    scale = (weight.abs().amax(1) / 127).double()
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that quantised tensors will move
        return torch.quantize_per_channel(weight, scale, torch.zeros(len(weight)).long(), 0, torch.qint8)


def onnx_runtime_int8(x: Tensor, program: Program) -> Callable[[], Tensor]:
    """ONNX Runtime's dynamic quantisation: weights for each output channel, inputs for the whole tensor."""
    _require("onnxruntime")
    onnx = _require("onnx")
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = os.path.join(folder, "int8.onnx")
        model = onnx.load_from_string(_onnx_model(x, program))
        quantize_dynamic(model, path, per_channel=True, weight_type=QuantType.QInt8, reduce_range=_in_seven_bits())
        content = Path(path).read_bytes()
    return _onnx_call(x, program, content)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what ONNX Runtime's quantiser logs about models that were not prepared for it."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


class _Sum(nn.Module):
    """A program as a module: the sum of chains of linear layers."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.chains = nn.ModuleList(nn.Sequential(*(_Linear(*layer) for layer in chain)) for chain in program)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        total = self.chains[0](x)
        for chain in self.chains[1:]:
            total = total + chain(x)
        return total


class _Linear(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def _require(module: str) -> ModuleType:
    """Import a peer that may be missing."""
    if importlib.util.find_spec(module) is None:
        raise Unavailable(f"{module} is not installed")
    return importlib.import_module(module)


@functools.cache
def _openblas() -> tuple[Callable, object, str]:
    """Scipy's ``ssyrk``, the handle of its OpenBLAS, and the kernels that this OpenBLAS chose.

    Where the processor has AVX-512, OpenBLAS is told to use its SkylakeX kernels, which on AMD it would not always
    choose by itself. It reads the choice when it is loaded.
    """
    _require("scipy")
    threadpoolctl = _require("threadpoolctl")
    before = os.environ.get("OPENBLAS_CORETYPE")
    if before is None and torch.backends.cpu.get_cpu_capability() == "AVX512":
        os.environ["OPENBLAS_CORETYPE"] = "SkylakeX"
    try:
        from scipy.linalg.blas import ssyrk
    finally:
        if before is None:
            os.environ.pop("OPENBLAS_CORETYPE", None)
    found = threadpoolctl.ThreadpoolController().select(internal_api="openblas")
    core = next((lib["architecture"] for lib in found.info() if "scipy" in lib["filepath"]), "unknown")
    return ssyrk, found, core


def openblas_core() -> str | None:
    """The name of the kernels that scipy's OpenBLAS uses in this process, or None without scipy."""
    try:
        return _openblas()[2]
    except Unavailable:
        return None


def ssyrk(x: Tensor, total: Tensor) -> Callable[[], Tensor]:
    """Scipy's symmetric product: adds the upper triangle of ``x.T @ x`` to ``total [K, K]``; fp32, other dtypes cast.

    ``total`` is fp32 and read by columns, so that what appears in it in PyTorch is the lower triangle.
    """
    function, controller, _ = _openblas()
    controller.limit(limits=torch.get_num_threads())
    columns = total.numpy().T

    def call() -> Tensor:
        function(1.0, x.float().numpy().T, beta=1.0, c=columns, overwrite_c=1)
        return total

    return call
