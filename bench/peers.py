"""Who is timed on a case: our operator and everything that a user could take instead, in groups.

``ours``
    the operator as the layer serves it, with packed weights, and without packing.
``factors``
    the same factors through other libraries; for a residual, factors to which the branch was joined beforehand.
``add``
    factors and residual apart, and their sum.
``dense``
    one dense layer that does the same.
``gram``
    other ways to the same sum of products.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mixrank_bench import engines
from mixrank_bench.engines import Program, Unavailable
from mixrank_bench.measures import ADDMM, SERVED, SSYRK, UNPACKED
from mixrank_bench.ops import TOKENS, Case
from mixrank_kernels import ops, packing, reference, testing

ENGINES = {
    "torch eager": engines.eager,
    "oneDNN prepacked": engines.onednn,
    "torch.compile": engines.compiled,
    "ONNX Runtime": engines.onnx_runtime,
    "zentorch": engines.zentorch,
}
COMPILING = ("torch.compile", "zentorch")
_PEER_FACTOR = 4.0


@dataclass(frozen=True)
class Variant:
    """One way to serve a case: the call that is timed, and how its first result becomes a comparable tensor."""

    call: Callable[[], Tensor | None]
    answer: Callable[[Tensor], Tensor] = lambda result: result


@dataclass(frozen=True)
class Field:
    """All variants of a case by group and name, and the reason of each that is missing."""

    variants: dict[str, dict[str, Variant]]
    absent: dict[str, dict[str, str]]


def field(case: Case, *, compiling: bool = True, unpacked: bool = True) -> Field:
    """Build every variant of a case for torch's present number of threads.

    Args:
        case: what is to be served.
        compiling: also build the peers that compile each shape, which takes seconds for each.
        unpacked: also time our operator on weights that are not packed.
    """
    arguments = case.arguments()
    found = Field({}, {})

    def offer(group: str, name: str, build: Callable[[], Variant]) -> None:
        try:
            if name in COMPILING and not compiling:
                raise Unavailable(f"compiling takes seconds for each shape: timed at M = {TOKENS} only")
            found.variants.setdefault(group, {})[name] = build()
        except Unavailable as reason:
            found.absent.setdefault(group, {})[name] = str(reason)

    for name, variant in ours(case, arguments, unpacked=unpacked).items():
        offer("ours", name, lambda variant=variant: variant)
    if "gram" in case.op:
        for name, build in _gram_peers(case, arguments).items():
            offer("gram", name, build)
        return found
    torch.compiler.reset()
    for group, program in _programs(case, arguments).items():
        for name, engine in ENGINES.items():
            offer(group, name, lambda e=engine, p=program: Variant(e(arguments["x"], p)))
    if case.residual.startswith("blocks"):
        offer("add", "torch eager, sparse BSR", lambda: Variant(_sparse_add(case, arguments)))
    return found


def gate(case: Case, variants: Field) -> None:
    """Raise AssertionError unless our variants are within the error budget on the case's own inputs, and peers near it.

    Peers may err several times as much as ours; one that computes something else is no peer.
    """
    arguments = case.arguments()
    true = next(testing.run(getattr(reference, case.op), testing.exact(arguments)))
    yardstick = next(testing.run(testing.plain(case.op), arguments))
    for group, named in variants.variants.items():
        factor = 1.0 if group == "ours" else _PEER_FACTOR
        for name, variant in named.items():
            answer = variant.answer(variant.call()).to(yardstick.dtype)
            try:
                testing.assert_within_budget(
                    answer, true, yardstick, case.dtype, max_factor=2 * factor, rms_factor=factor
                )
            except AssertionError as error:
                raise AssertionError(f"{group}, {name}: {error}") from None


def ours(case: Case, arguments: dict[str, Tensor | None], *, unpacked: bool = False) -> dict[str, Variant]:
    """Our operator on these arguments, as the layer serves it, and with ``unpacked`` also without packed weights."""
    operator = getattr(ops, case.op)
    if "gram" in case.op:
        return {SERVED: Variant(lambda: operator(**arguments), lambda _: next(iter(arguments.values())).clone())}
    weights = {name: tensor for name, tensor in arguments.items() if name not in ("x", "bias")}
    packed = packing.packed(**weights)
    made = {SERVED: Variant(lambda: operator(**arguments, packed=packed))}
    if unpacked and packed is not None:
        made[UNPACKED] = Variant(lambda: operator(**arguments))
    return made


def _programs(case: Case, arguments: dict[str, Tensor | None]) -> dict[str, Program]:
    """What the engines serve in each group."""
    down, up, bias = arguments["down"], arguments["up"], arguments["bias"]
    factors, weight = [(down, None), (up, bias)], up.float() @ down.float()
    if not case.residual:
        return {"factors": [factors], "dense": [[(weight.to(case.dtype), bias)]]}
    if case.residual == "branch":
        branch = (arguments["residual_down"], arguments["residual_up"])
        residual, apart = branch[1].float() @ branch[0].float(), [(branch[0], None), (branch[1], None)]
        joined = [(torch.cat([down, branch[0]]), None), (torch.cat([up, branch[1]], dim=1), bias)]
        programs = {"factors": [joined]}
    else:
        residual = _bsr(case, arguments).to_dense()
        apart, programs = [(residual, None)], {}
    merged = (weight + residual.float()).to(case.dtype)
    return programs | {"add": [factors, apart], "dense": [[(merged, bias)]]}


def _bsr(case: Case, arguments: dict[str, Tensor | None]) -> Tensor:
    crow, col, values = arguments["crow"], arguments["col"], arguments["values"]
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that BSR tensors are in beta state
        return torch.sparse_bsr_tensor(crow, col, values, size=(case.n, case.k), check_invariants=True)


def _sparse_add(case: Case, arguments: dict[str, Tensor | None]) -> Callable[[], Tensor]:
    x = arguments["x"]
    residual = _bsr(case, arguments)
    dense = engines.eager(x, [[(arguments["down"], None), (arguments["up"], arguments["bias"])]])
    try:
        residual @ x.mT
    except RuntimeError as error:
        raise Unavailable(f"torch refuses it: {str(error).splitlines()[0]}") from None
    return lambda: dense() + (residual @ x.mT).mT


def _gram_peers(case: Case, arguments: dict[str, Tensor | None]) -> dict[str, Callable[[], Variant]]:
    x = arguments["x"]
    z = arguments.get("z", x)
    lead = (case.batch,) if case.batch else ()

    def zeros(extra: int = 0) -> Tensor:
        return torch.zeros(*lead, case.k + extra, (case.n or case.k) + extra)

    def addmm() -> Variant:
        total = zeros()
        add = total.baddbmm_ if case.batch else total.addmm_

        def call() -> Tensor:
            wide = x.float()
            return add(wide.mT, wide if z is x else z.float())

        return Variant(call, Tensor.clone)

    def images() -> Variant:
        """Matrices of single images, then their sum: the hook of published compressors."""
        total, images, targets = zeros(), x.view(-1, TOKENS, case.k), z.view(-1, TOKENS, z.shape[-1])

        def call() -> Tensor:
            wide = images.float()
            return total.add_((wide.mT @ (wide if z is x else targets.float())).sum(0))

        return Variant(call, Tensor.clone)

    def kronfluence() -> Variant:
        """A copy in fp32, a column of ones for the bias, and the product of all of it."""
        total = zeros(extra=1)

        def call() -> Tensor:
            wide = x.to(torch.float32, copy=True)
            wide = torch.cat([wide, wide.new_ones(len(wide), 1)], dim=-1)
            return total.addmm_(wide.mT, wide)

        return Variant(call, lambda result: result[:-1, :-1].clone())

    def scipy() -> Variant:
        total = zeros()
        parts = [(x, total)] if not case.batch else list(zip(x, total, strict=True))
        calls = [engines.ssyrk(rows, matrix) for rows, matrix in parts]

        def call() -> Tensor:
            for part in calls:
                part()
            return total

        return Variant(call, lambda result: result.tril() + result.tril(-1).mT)

    found = {ADDMM: addmm}
    if not case.batch:
        found["batched matmul, then sum"] = images
    if case.op == "gram_accumulate_":
        found[SSYRK] = scipy
        if not case.batch:
            found["as kronfluence does"] = kronfluence
    return found
