"""Which implementation of an operator serves a call, why, and how to force another one.

The names of the implementations:

``cpu``
    C++ on the CPU with the best instruction set of this machine; ``cpu-avx512bf16``, ``cpu-avx512vnni``,
    ``cpu-avx512``, ``cpu-avx2`` and ``cpu-portable`` force one of them.
``cuda``
    CUDA C++ kernels on CUDA tensors; what they do not serve (float64, for one) is served by what is chosen for it.
``triton``
    Triton kernels on CUDA tensors, or on CPU tensors under Triton's interpreter (``TRITON_INTERPRET=1``).
``composite``
    Calls of the vendor's libraries, everywhere. CUDA tensors are served by this, by ``triton`` or by ``cuda``, as a
    committed table of measurements says for each operator, dtype and size (:mod:`mixrank_kernels.choice`).
``reference``
    Plain PyTorch, everywhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mixrank_kernels import _register, cuda, packing
from mixrank_kernels._load import EXTENSION, REBUILD
from mixrank_kernels._schema import INT8_SCHEMAS, NAMESPACE, SCHEMAS, Argument

_CPU_PREFIX = "cpu-"
_DEVICES = ("cpu", "cuda")
_OPERATORS = SCHEMAS | INT8_SCHEMAS
_forced: list[str] = []
_overrides: torch.library.Library | None = None


@dataclass(frozen=True)
class Explanation:
    """Which implementation serves a call, and why each other one does not.

    Attributes:
        op: name of the operator.
        chosen: name of the implementation that serves the call.
        reason: why it does.
        refused: for every other implementation, the reason in words.
    """

    op: str
    chosen: str
    refused: dict[str, str]
    reason: str

    def __str__(self) -> str:
        lines = [f"{self.op}: served by {self.chosen}, {self.reason}"]
        return "\n".join(lines + [f"  not {name}: {reason}" for name, reason in self.refused.items()])


def isas() -> tuple[str, ...]:
    """Instruction sets of the C++ kernels that this machine can run, best first; empty without the extension.

    Example:
        >>> set(isas()) <= {"avx512bf16", "avx512vnni", "avx512", "avx2", "portable"}
        True
    """
    return tuple(_register.extension.supported_isas()) if _register.extension else ()


def implementations() -> tuple[str, ...]:
    """Names that :func:`use` knows, whether or not they can run here.

    Example:
        >>> implementations()[-1]
        'reference'
    """
    compiled = _register.extension.build_info()["isas"] if _register.extension else ()
    return ("cpu", *(_CPU_PREFIX + isa for isa in compiled), "cuda", "triton", "composite", "reference")


def available(device: str | torch.device = "cpu", op: str | None = None) -> tuple[str, ...]:
    """Names of the implementations that can serve tensors on ``device`` here, the default one first.

    Args:
        device: where the tensors are.
        op: name of an operator: only implementations that have it, the one that serves it by default first. None:
            implementations that have any.

    Returns:
        Names that :func:`use` takes.

    Raises:
        ValueError: no operator has this name.

    Example:
        >>> "reference" in available("cpu", "lowrank_linear")
        True
    """
    kind, wanted = torch.device(device).type, tuple(_OPERATORS) if op is None else (_known_operator(op),)
    names = [name for name in implementations() if any(_refusal(name, kind, one) is None for one in wanted)]
    first = next((name for one in wanted if (name := _default(kind, one)) != "reference"), "reference")
    return tuple(sorted(names, key=lambda name: name != first))


def _default(kind: str, op: str) -> str:
    candidates = {"cpu": "cpu", "cuda": "composite"}
    name = candidates.get(kind, "reference")
    return name if _refusal(name, kind, op) is None else "reference"


def _refusal(name: str, kind: str, op: str) -> str | None:
    """Why the implementation ``name`` cannot serve ``op`` on tensors on devices of ``kind``, or None when it can."""
    compiled = name.startswith("cpu") and _register.extension is not None
    if (
        (compiled and op not in _register.COMPILED_OPERATORS)
        or (name == "triton" and op not in _register.TRITON_OPERATORS)
        or (name in ("cuda", "composite") and op in INT8_SCHEMAS)
    ):
        return f"it has no kernel for {op}"
    return _obstacle(name, kind)


def _obstacle(name: str, kind: str) -> str | None:
    """Why the implementation ``name`` cannot serve tensors on devices of ``kind`` at all, or None when it can."""
    if name in ("composite", "reference"):
        return None
    if name == "cuda":
        return cuda.obstacle() if kind == "cuda" else f"it serves CUDA tensors only, and the tensors are on {kind}"
    if name == "triton":
        if not _register.HAS_TRITON:
            return "triton is not installed"
        if kind == "cuda":
            return None
        if kind != "cpu":
            return f"Triton kernels do not run on {kind} tensors"
        from mixrank_kernels import triton

        return None if triton.is_interpreted() else "CPU tensors need Triton's interpreter (set TRITON_INTERPRET=1)"
    if _register.extension is None:
        return f"the extension {EXTENSION} is not built; build it with: {REBUILD}"
    if kind != "cpu":
        return f"it serves CPU tensors only, and the tensors are on {kind}"
    isa = name.removeprefix(_CPU_PREFIX)
    return None if isa == "cpu" or isa in isas() else f"this machine does not have the instruction set {isa}"


def _known(name: str) -> str:
    if name not in implementations():
        raise ValueError(f"implementation must be one of {', '.join(implementations())}, but it was {name!r}")
    return name


def _known_operator(op: str) -> str:
    if op not in _OPERATORS:
        raise ValueError(f"op must be one of {', '.join(_OPERATORS)}, but it was {op!r}")
    return op


def explain(op: str, *args: Argument) -> Explanation:
    """Tell which implementation serves the operator ``op`` on these arguments, without running it.

    Args:
        op: name of an operator, such as ``"lowrank_linear"``.
        *args: the operator's arguments in their order, of the shapes and dtypes that it takes.

    Returns:
        The name of the implementation, why it is that one, and why it is none of the others.

    Raises:
        ValueError: no operator has this name.
        RuntimeError: the arguments do not fit the operator.

    Example:
        >>> import torch
        >>> explain("lowrank_linear", torch.ones(2, 8), torch.ones(3, 8), torch.ones(5, 3)).op
        'lowrank_linear'
    """
    arguments = _register.bind(_known_operator(op), *args)
    _register.check_of(op)(*arguments)
    kind = arguments[0].device.type
    unfit = cuda.refusal(op, *arguments) if kind == "cuda" else None
    forced = _forced[-1] if _forced and _refusal(_forced[-1], kind, op) is None else None
    if forced == "cuda" and unfit:
        forced = None
    if forced:
        chosen, reason = forced, "forced by backend.use"
    elif kind == "cuda" and op in SCHEMAS:
        choice = _register.chosen(op, *arguments)
        chosen, reason = choice.implementation, choice.reason
    else:
        chosen, reason = _default(kind, op), f"the first on {kind} tensors"
    # "cpu" is chosen only where there is the extension.
    served = _CPU_PREFIX + _register.extension.get_isa() if chosen == "cpu" and _register.extension else chosen
    refused = {}
    for name in implementations():
        if name in (chosen, served):
            continue
        comes_first = f"{forced} was forced by backend.use" if forced else f"{served} comes first on {kind} tensors"
        refused[name] = _refusal(name, kind, op) or (unfit if name == "cuda" else None) or comes_first
    return Explanation(op, served, refused, reason)


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Within the block, serve every operator that the implementation ``name`` has by it, in the whole process.

    An operator that it lacks keeps its default; :func:`explain` says which. Blocks nest. The choice holds for compiled
    and captured models too, as it is made in the dispatcher.

    Args:
        name: one of :func:`implementations`.

    Raises:
        ValueError: no implementation has this name.
        RuntimeError: it cannot run here; the message says why.

    Example:
        >>> import torch, mixrank_kernels
        >>> with use("reference"):
        ...     y = mixrank_kernels.lowrank_linear(torch.ones(1, 4), torch.ones(2, 4), torch.ones(3, 2))
        >>> y[0, 0].item()
        8.0
    """
    obstacles = [_obstacle(_known(name), kind) for kind in _DEVICES]
    if None not in obstacles:
        raise RuntimeError(f"implementation {name} cannot run here: {obstacles[0]}")
    _forced.append(name)
    try:
        _install(name)
        yield
    finally:
        _forced.pop()
        _install(_forced[-1] if _forced else None)


def _install(name: str | None) -> None:
    """Make ``name`` serve its operators wherever it can run; None restores the defaults."""
    global _overrides
    if _overrides is not None:
        _overrides._destroy()
        _overrides = None
    if _register.extension is not None:
        isa = name.removeprefix(_CPU_PREFIX) if name is not None and name.startswith(_CPU_PREFIX) else "auto"
        _register.extension.set_isa(isa)
        packing.clear()  # each instruction set has a layout of its own
    if name not in ("cuda", "triton", "composite", "reference"):
        return
    _overrides = torch.library.Library(NAMESPACE, "IMPL")
    for op in _OPERATORS:
        for kind in _DEVICES:
            if _refusal(name, kind, op) is None:
                implementation = _register.checked(op, _register.implementation(name, op))
                _overrides.impl(op, implementation, kind.upper(), allow_override=True)
