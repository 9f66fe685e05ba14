"""Who is timed on a case: our operator and everything that a user could take instead, in groups.

``ours``
    the operator as the layer serves it, with packed weights, and without packing.
``forms``
    the CUDA kernels in one launch and in two, with each tile: what their own choice rests on.
``factors``
    the same factors through other libraries; for a residual, factors to which the branch was joined beforehand; for the
    pivoted form, the factors of the same weight, also by our own operator.
``add``
    factors and residual, or factors and sparse weight, apart, and their sum.
``dense``
    one dense layer that does the same.
``floating``
    for 8-bit weights: what serves the same weights without quantisation, ours among them.
``gram``
    other ways to the same sum of products.
``rounded``
    the same sum rounded to the dtype of half-precision operands: no equal, and outside the error budget.

A case is served where its arguments are.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixrank_bench import engines as libraries
from mixrank_bench.engines import Engine, Program, Unavailable
from mixrank_bench.measures import SERVED, UNPACKED
from mixrank_bench.ops import INT8, TOKENS, Case
from mixrank_bench.peers_gram import gram_peers, rounded_gram
from mixrank_bench.variant import Variant
from mixrank_kernels import backend, cuda, ops, packing, reference, testing

ENGINES = {
    "torch eager": libraries.eager,
    "oneDNN prepacked": libraries.onednn,
    "torch.compile": libraries.compiled,
    "ONNX Runtime": libraries.onnx_runtime,
    "zentorch": libraries.zentorch,
}
DEVICE_ENGINES = {"torch eager": libraries.eager, "torch.compile": libraries.compiled_sum}
INT8_ENGINES = {
    "torch onednn int8": libraries.torch_int8("onednn"),
    "torch fbgemm int8": libraries.torch_int8("fbgemm"),
    "ONNX Runtime int8": libraries.onnx_runtime_int8,
}
COMPILING = ("torch.compile", "zentorch")
ROUNDED = "rounded"
FACTORED = ("lowrank_linear", "lowrank_residual_linear")
FORMS = {
    "one launch": cuda.Form(1),
    "two launches, tiles of 32": cuda.Form(2, cuda.Tile.SMALL),
    "two launches, tiles of 64": cuda.Form(2, cuda.Tile.MEDIUM),
    "two launches, tiles of 128": cuda.Form(2, cuda.Tile.LARGE),
}
_PEER_FACTOR = 4.0


@dataclass(frozen=True)
class Field:
    """All variants of a case by group and name, and the reason of each that is missing."""

    variants: dict[str, dict[str, Variant]]
    absent: dict[str, dict[str, str]]


def field(
    case: Case,
    arguments: dict[str, Tensor | None] | None = None,
    *,
    compiling: bool = True,
    unpacked: bool = True,
    engines: dict[str, Engine] | None = None,
    forced: Iterable[str] = (),
    rounded: bool = False,
) -> Field:
    """Build every variant of a case for torch's present number of threads.

    Args:
        case: what is to be served.
        arguments: the case's arguments, on the device that serves it; by default made anew on the CPU.
        compiling: also build the peers that compile each shape, which takes seconds for each.
        unpacked: also time our operator on weights that are not packed.
        engines: what serves the programs, by name; by default ``ENGINES``.
        forced: names of our implementations to time beside the default one.
        rounded: also time sums of halves that are rounded to halves.
    """
    arguments = case.arguments() if arguments is None else arguments
    on_cpu = arguments["x"].device.type == "cpu"
    found = Field({}, {})

    def offer(group: str, name: str, build: Callable[[], Variant]) -> None:
        try:
            if name in COMPILING and not compiling:
                raise Unavailable(f"compiling takes seconds for each shape: timed at M = {TOKENS} only")
            found.variants.setdefault(group, {})[name] = build()
        except Unavailable as reason:
            found.absent.setdefault(group, {})[name] = str(reason)

    for name, variant in ours(case, arguments, unpacked=unpacked, forced=forced).items():
        offer("ours", name, lambda variant=variant: variant)
    if "cuda" in forced and case.op in FACTORED and case.dtype == torch.bfloat16:
        for name, form in FORMS.items():
            offer("forms", name, lambda form=form: _in_form(case, arguments, form))
    if case.op in INT8:
        for group, named in _int8_peers(case, arguments).items():
            for name, build in named.items():
                offer(group, name, build)
        return found
    if "gram" in case.op:
        for name, build in gram_peers(case, arguments).items():
            offer("gram", name, build)
        if rounded and case.dtype.itemsize == 2:
            offer(ROUNDED, f"torch addmm_ in {case.dtype_name}", lambda: rounded_gram(case, arguments))
        return found
    programs = _sparse_programs(case, arguments) if case.density else _programs(case, arguments)
    for group, program in programs.items():
        for name, engine in (ENGINES if engines is None else engines).items():
            offer(group, name, lambda e=engine, p=program: Variant(e(arguments["x"], p)))
    if case.op == "pivoted_linear":
        offer("factors", "lowrank_linear", lambda: _factored(arguments))
    if on_cpu and case.density:
        offer("add", "torch eager, sparse CSR", lambda: Variant(_csr_add(case, arguments)))
    if on_cpu and case.residual.startswith("blocks"):
        offer("add", "torch eager, sparse BSR", lambda: Variant(_sparse_add(case, arguments)))
    return found


def gate(case: Case, variants: Field) -> None:
    """Raise AssertionError unless our variants are within the error budget on the case's own inputs, and peers near it.

    Peers may err several times as much as ours; one that computes something else is no peer.
    """
    for (group, name), reason in verdicts(case, variants).items():
        if reason:
            raise AssertionError(f"{group}, {name}: {reason}")


def verdicts(
    case: Case, variants: Field, arguments: dict[str, Tensor | None] | None = None
) -> dict[tuple[str, str], str | None]:
    """By group and name, why a variant has no place beside the others, or None.

    Args:
        case: what is served.
        variants: who serves it; Gram matrices must be zero still.
        arguments: the case's arguments, on the device that serves it; by default made anew on the CPU.
    """
    arguments = case.arguments() if arguments is None else arguments
    true = next(testing.run(getattr(reference, case.op), testing.exact(arguments)))
    yardstick = next(testing.run(testing.plain(case.op), arguments))
    found: dict[tuple[str, str], str | None] = {}
    for group, named in variants.variants.items():
        factor = 1.0 if group in ("ours", "forms") else _PEER_FACTOR
        for name, variant in named.items():
            found[group, name] = None
            try:
                answer = variant.answer(variant()).to(yardstick.dtype)
                if group != ROUNDED:
                    testing.assert_within_budget(
                        answer, true, yardstick, case.dtype, max_factor=2 * factor, rms_factor=factor
                    )
            except AssertionError as error:
                found[group, name] = str(error)
            except Exception as error:  # compilers and launches fail with exceptions of many kinds
                found[group, name] = in_words(error)
    return found


def nested(flat: dict[tuple[str, str], Any]) -> dict[str, dict[str, Any]]:
    """What is told by group and name, by group and then by name."""
    found: dict[str, dict[str, Any]] = {}
    for (group, name), value in flat.items():
        found.setdefault(group, {})[name] = value
    return found


def in_words(error: Exception) -> str:
    """The kind of an error and the first line of what it says, or two of them where the first one is a heading."""
    first, *others = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    return f"{type(error).__name__}: {' '.join([first, *others[:1]]) if first.endswith(':') else first}"


def ours(
    case: Case, arguments: dict[str, Tensor | None], *, unpacked: bool = False, forced: Iterable[str] = ()
) -> dict[str, Variant]:
    """Our operator on these arguments, as the layer serves it.

    With ``unpacked`` also without packed weights, and by each of the implementations ``forced``.
    """
    operator = getattr(ops, case.op)
    if "gram" in case.op:
        return {SERVED: _accumulating(case, arguments)} | {
            name: _accumulating(case, arguments, functools.partial(backend.use, name)) for name in forced
        }
    if case.op in INT8:
        first = arguments["down" if case.rank else "weight"]
        packed = packing.packed_int8(first, arguments.get("up"), dynamic=case.dynamic)
    else:
        weights = {name: tensor for name, tensor in arguments.items() if name not in ("x", "bias")}
        pack = {"pivoted_linear": packing.packed_pivots, "sparse_linear": packing.packed_sparse}
        packed = pack.get(case.op, packing.packed)(**weights)
    made = {SERVED: Variant(lambda: operator(**arguments, packed=packed))}
    if unpacked and packed is not None:
        made[UNPACKED] = Variant(lambda: operator(**arguments))
    for name in forced:
        made[name] = Variant(lambda: operator(**arguments), within=functools.partial(backend.use, name))
    return made


def _int8_peers(case: Case, arguments: dict[str, Tensor | bool | None]) -> dict[str, dict[str, Callable[[], Variant]]]:
    """Others on the same weights: in 8 bits for rows that are quantised, and without quantisation."""
    x, bias = arguments["x"], arguments["bias"]
    if case.rank:
        down = arguments["down"] * arguments["down_scale"][:, None]
        up = arguments["up"] * arguments["up_scale"][:, None]
        programs = {"factors": [[(down, None), (up, bias)]], "dense": [[(up @ down, bias)]]}
        floating: dict[str, Callable[[], Variant]] = {
            f"ours in {str(dtype).removeprefix('torch.')}": functools.partial(_floating, x, down, up, bias, dtype)
            for dtype in (torch.float32, torch.bfloat16)[: 1 + case.dynamic]  # bf16 rounds rows that are not codes
        }
    else:
        weight = arguments["weight"] * arguments["scale"][:, None]
        programs, floating = {"dense": [[(weight, bias)]]}, {}

    def served(engine: Engine, program: Program) -> Callable[[], Variant]:
        return lambda: Variant(engine(x, program))

    found = {"floating": floating}
    for group, program in programs.items():
        floating[f"torch eager, {group}"] = served(libraries.eager, program)
        if case.dynamic:
            found[group] = {name: served(engine, program) for name, engine in INT8_ENGINES.items()}
    return found


def _floating(x: Tensor, down: Tensor, up: Tensor, bias: Tensor, dtype: torch.dtype) -> Variant:
    """Our operator on the same factors in a floating dtype."""
    x, down, up, bias = (tensor.to(dtype) for tensor in (x, down, up, bias))
    packed = packing.packed(down, up)
    return Variant(lambda: ops.lowrank_linear(x, down, up, bias, packed))


def _in_form(case: Case, arguments: dict[str, Tensor | None], form: cuda.Form) -> Variant:
    """Our operator by the CUDA kernels in a form; what has no kernel in it is passed over, so it may be another one."""
    operator = getattr(ops, case.op)

    @contextlib.contextmanager
    def within() -> Iterator[None]:
        with backend.use("cuda"), cuda.form(*form):
            yield

    return Variant(lambda: operator(**arguments), within=within)


def _accumulating(
    case: Case, arguments: dict[str, Tensor | None], within: Callable = contextlib.nullcontext
) -> Variant:
    """Our operator with a Gram matrix of its own."""
    operator, (name, total) = getattr(ops, case.op), next(iter(arguments.items()))
    own = arguments | {name: total.clone()}
    return Variant(lambda: operator(**own), lambda _: own[name].clone(), within)


def _programs(case: Case, arguments: dict[str, Tensor | None]) -> dict[str, Program]:
    """What the engines serve in each group."""
    down, up, bias = arguments["down"], _up(arguments), arguments["bias"]
    factors, weight = [(down, None), (up, bias)], up.float() @ down.float()
    if not case.residual:
        return {"factors": [factors], "dense": [[(weight.to(case.dtype), bias)]]}
    if case.residual == "branch":
        branch = (arguments["residual_down"], arguments["residual_up"])
        residual, apart = branch[1].float() @ branch[0].float(), [(branch[0], None), (branch[1], None)]
        joined = [(torch.cat([down, branch[0]]), None), (torch.cat([up, branch[1]], dim=1), bias)]
        programs = {"factors": [joined]}
    else:
        residual = testing.densified(arguments["crow"], arguments["col"], arguments["values"], case.k)
        apart, programs = [(residual, None)], {}
    merged = (weight + residual.float()).to(case.dtype)
    return programs | {"add": [factors, apart], "dense": [[(merged, bias)]]}


def _sparse_programs(case: Case, arguments: dict[str, Tensor | None]) -> dict[str, Program]:
    """A dense layer of the same weight."""
    weight = reference.expanded(arguments["mask"], arguments["values"], case.k).float()
    if case.rank:
        weight += arguments["up"].float() @ arguments["down"].float()
    return {"dense": [[(weight.to(case.dtype), arguments["bias"])]]}


def _up(arguments: dict[str, Tensor | None]) -> Tensor:
    """The second factor [N, R]; of the pivoted form, that of the same weight."""
    if "index" not in arguments:
        return arguments["up"]
    coefficients, index = arguments["coefficients"], arguments["index"].long()
    rank = coefficients.shape[1]
    stored = torch.eye(rank, dtype=coefficients.dtype, device=coefficients.device)
    return stored.new_empty(len(index), rank).index_copy_(0, index, torch.cat([stored, coefficients]))


@torch.inference_mode(False)
def _factored(arguments: dict[str, Tensor | None]) -> Variant:
    """The same weight as factors, by our operator for these."""
    x, down, up, bias = arguments["x"], arguments["down"], _up(arguments), arguments["bias"]
    packed = packing.packed(down, up)
    return Variant(lambda: ops.lowrank_linear(x, down, up, bias, packed))


def _bsr(case: Case, arguments: dict[str, Tensor | None]) -> Tensor:
    crow, col, values = arguments["crow"], arguments["col"], arguments["values"]
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that BSR tensors are in beta state
        return torch.sparse_bsr_tensor(crow, col, values, size=(case.n, case.k), check_invariants=True)


def _sparse_add(case: Case, arguments: dict[str, Tensor | None]) -> Callable[[], Tensor]:
    x = arguments["x"]
    residual = _bsr(case, arguments)
    dense = libraries.eager(x, [[(arguments["down"], None), (arguments["up"], arguments["bias"])]])
    try:
        residual @ x.mT
    except RuntimeError as error:
        raise Unavailable(f"torch refuses it: {str(error).splitlines()[0]}") from None
    return lambda: dense() + (residual @ x.mT).mT


def _csr_add(case: Case, arguments: dict[str, Tensor | None]) -> Callable[[], Tensor]:
    x, bias = arguments["x"], arguments["bias"]
    dense = reference.expanded(arguments["mask"], arguments["values"], case.k)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that CSR tensors are in beta state
        weight = dense.to_sparse_csr()
    try:
        torch.sparse.mm(weight, x.mT)
    except RuntimeError as error:
        raise Unavailable(f"torch refuses it: {str(error).splitlines()[0]}") from None
    if not case.rank:
        return lambda: torch.sparse.mm(weight, x.mT).mT + bias
    factors = libraries.eager(x, [[(arguments["down"], None), (arguments["up"], bias)]])
    return lambda: factors() + torch.sparse.mm(weight, x.mT).mT
