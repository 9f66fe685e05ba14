"""Which implementation serves CUDA tensors by default: a committed table of measurements, read once.

``choices.json`` has a line for each operator, class of operands (``half``, ``fp32``, ``fp64``) and range of sizes, with
the implementation and where it was measured to be the fastest. Where nothing was measured the libraries serve, which
is never wrong by much. Two rules come before the table: block-sparse residuals and fp16 factors go to Triton, because
the libraries have no kernels for the former and no range for the intermediate of the latter.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

import torch

from mixrank_kernels._schema import Argument, Arguments, overload, tensor_of

TABLE = "choices.json"


@dataclass(frozen=True)
class Choice:
    """The implementation for one call, and why it is that one."""

    implementation: str
    reason: str


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Attributes:
        op: name of the operator.
        operands: ``half``, ``fp32`` or ``fp64``.
        low, high: the sizes that it speaks of, both included; ``high`` None is no limit. For the linear operators the
            rows of x, for Gram matrices the larger side.
        implementation: ``cuda``, ``triton`` or ``composite``.
        measured: the device and run that it was measured in, or None.
    """

    op: str
    operands: str
    low: int
    high: int | None
    implementation: str
    measured: str | None


@functools.cache
def table() -> tuple[Line, ...]:
    """The committed lines."""
    text = resources.files("mixrank_kernels").joinpath(TABLE).read_text(encoding="utf-8")
    return tuple(Line(**line) for line in json.loads(text))


def operand_class(dtype: torch.dtype) -> str:
    """The class of operands of ``dtype``."""
    return {torch.float64: "fp64", torch.float32: "fp32"}.get(dtype, "half")


def size(op: str, arguments: Mapping[str, Argument]) -> int:
    """What the table distinguishes calls of ``op`` by."""
    if "gram" in op:
        return max(tensor_of(arguments, "gram" if op == "gram_accumulate_" else "cross").shape[-2:])
    x = tensor_of(arguments, "x")
    return x.numel() // x.shape[-1]


def choose(op: str, *args: *Arguments) -> Choice:
    """The implementation for a call of ``op`` on CUDA tensors.

    Args:
        op: name of the operator.
        *args: its arguments in the order of the schema.
    """
    names = (argument.name for argument in overload(op)._schema.arguments)
    arguments = dict(zip(names, args, strict=False))
    if op == "lowrank_residual_linear" and arguments.get("values") is not None:
        return Choice("triton", "libraries have no kernel for a block-sparse residual inside the same sum")
    dtype = tensor_of(arguments, "x").dtype
    operands = operand_class(dtype)
    if dtype == torch.float16 and op in ("lowrank_linear", "lowrank_residual_linear"):
        return Choice("triton", "libraries round the intermediate to float16, whose range it can leave")
    count = size(op, arguments)
    line = next(
        line
        for line in table()
        if (line.op, line.operands) == (op, operands)
        and line.low <= count
        and (line.high is None or count <= line.high)
    )
    reason = f"the fastest in {line.measured}" if line.measured else "not measured: the libraries are the safe choice"
    return Choice(line.implementation, reason)
