"""Every specialisation of the Triton kernels that a launch can ask for, and a selection that leaves out no kind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from mixrank_kernels.triton import config as configs

DTYPES = {"bf16": "half", "fp16": "half", "fp32": "fp32", "fp64": "fp64"}

# Arguments that Triton specialises in each memory layout: those that are one, and multiples of 16 (zero is one).
_INNER = {"stride_xk", "stride_zk", "stride_dk", "stride_ur", "stride_rdk", "stride_ruq", "stride_bias", "stride_wm"}
_OUTER = {"stride_xb", "stride_xm", "stride_zb", "stride_zm", "stride_dr", "stride_un", "stride_rdq", "stride_run"}
_SIZES = {"K", "N", "R", "Q", "stride_hm"}
_STARTS = {"first", "first_split"}
LAYOUTS = {
    "contiguous": (_INNER, _SIZES | _OUTER | _STARTS),
    "transposed": (
        {"stride_xk", "stride_dr", "stride_un", "stride_rdq", "stride_run", "stride_bias"},
        _SIZES | _STARTS | {"stride_xm", "stride_dk", "stride_ur", "stride_rdk", "stride_ruq"},
    ),
    "odd": (_INNER, set()),
    "strided": (set(), _STARTS),
    # Every size is one, so that none is a tensor in the kernel any more.
    "unit": (_INNER | _OUTER | {"M", "K", "N", "R", "Q", "stride_hm", "splits", "split_rows", "stride_wb"}, _STARTS),
}
GRAM_LAYOUTS = ("contiguous", "odd", "strided", "unit")
REDUCE_LAYOUTS = ("contiguous", "unit")

# The layouts of which residual kernels are compiled too, always with a bias: what differs between them is the same in
# the plain kernels.
RESIDUAL_LAYOUTS = ("contiguous", "odd")


@dataclass(frozen=True)
class Variant:
    """One kernel to compile.

    Attributes:
        name: distinguishes it from all others.
        kernel: name of the kernel.
        configuration: class of operands and name of its block sizes in :mod:`mixrank_kernels.triton.config`.
        dtype, layout, form: of its operands, a key of LAYOUTS, and which of them there are.
        pointers: element type of every pointer that is not None.
        constants: its constexpr arguments.
        tensor_cores: whether it is to use them.
        num_warps, num_stages: as at the launch.
    """

    name: str
    kernel: str
    configuration: str
    dtype: str
    layout: str
    form: str
    pointers: dict[str, str]
    constants: dict[str, int | bool]
    tensor_cores: bool
    num_warps: int
    num_stages: int


def variants() -> list[Variant]:
    """All of them."""
    return [*_lowrank(), *_gram()]


def cover() -> list[Variant]:
    """A part of all variants which has every kernel in every configuration, each with all that it is combined with.

    Of each kernel and configuration there is every dtype in contiguous layout with as many operands as there can be,
    every layout and every form; but not every combination of these.
    """
    taken: list[Variant] = []
    seen: set[tuple[str, ...]] = set()
    richest_first = sorted(variants(), key=lambda v: (v.layout != "contiguous", -len(v.pointers), -_block(v)))
    for variant in richest_first:
        traits = {("form", variant.form), ("layout", variant.layout)}
        traits |= {("dtype", variant.dtype)} if variant.layout == "contiguous" else set()
        new = {(variant.kernel, variant.configuration, *trait) for trait in traits} - seen
        if new:
            taken.append(variant)
            seen |= new
    return taken


def _block(variant: Variant) -> int:
    return variant.constants.get("b", 0)


def _wide(dtype: str) -> str:
    return "fp64" if dtype == "fp64" else "fp32"


def _lowrank() -> Iterator[Variant]:
    for (dtype, operands), ((class_, shape), config), layout in product(
        DTYPES.items(), configs.LOWRANK.items(), LAYOUTS
    ):
        if class_ != operands:
            continue
        blocks: dict[str, int | bool] = {"BM": config.BM, "BR": config.BR, "BK": config.BK}
        options = (operands == "half", config.num_warps, config.num_stages)
        place = (f"{operands}-{shape}", dtype, layout)
        name = f"{shape}-{dtype}-{layout}"
        x_and_down = {"x_ptr": dtype, "down_ptr": dtype}
        if shape == "down":
            # For the gradients of bf16 factors the intermediate is rounded.
            for hidden in (_wide(dtype), *(("bf16",) if dtype == "bf16" else ())):
                pointers = {"hidden_ptr": hidden, **x_and_down}
                full_name = f"lowrank-{name}" + "-rounded" * (hidden == "bf16")
                yield Variant(full_name, "lowrank_down_kernel", *place, hidden, pointers, blocks, *options)
            continue
        fused = shape != "up"
        needed = {"y_ptr": dtype, "up_ptr": dtype} | (x_and_down if fused else {"hidden_ptr": _wide(dtype)})
        constants = {"FUSED": fused, "BN": config.BN, **blocks}
        for bias in (False, True):
            pointers = needed | ({"bias_ptr": dtype} if bias else {})
            forms = constants | {"HAS_BIAS": bias, "HAS_BRANCH": False, "b": 0}
            form = "bias" if bias else "plain"
            full_name = f"lowrank-{name}" + "-bias" * bias
            yield Variant(full_name, "lowrank_up_kernel", *place, form, pointers, forms, *options)
        for branch, b in (
            ((True, 0), (False, 16), (False, 32), (True, 16), (True, 32)) if layout in RESIDUAL_LAYOUTS else ()
        ):
            pointers = needed | {"bias_ptr": dtype}
            pointers |= {"residual_up_ptr": dtype} if branch else {}
            pointers |= {"residual_down_ptr": dtype} if branch and fused else {}
            pointers |= {"x_ptr": dtype, "crow_ptr": "i64", "col_ptr": "i64", "values_ptr": dtype} if b else {}
            forms = constants | {"HAS_BIAS": True, "HAS_BRANCH": branch, "b": b}
            form = "-".join(["branch"] * branch + [f"blocks{b}"] * bool(b))
            yield Variant(f"residual-{name}-{form}", "lowrank_up_kernel", *place, form, pointers, forms, *options)


def _gram() -> Iterator[Variant]:
    for (dtype, operands), ((class_, shape), config) in product(DTYPES.items(), configs.GRAM.items()):
        if class_ != operands:
            continue
        place, options = (f"{operands}-{shape}", dtype), (config.num_warps, config.num_stages)
        for form, layout in product(_gram_forms(shape, dtype), GRAM_LAYOUTS):
            crossed, weighted, summed = "cross" in form, "weight" in form, "sum" in form
            pointers = {"partial_ptr": _wide(dtype), "x_ptr": _wide(dtype) if form == "wide-cross" else dtype}
            pointers |= {"z_ptr": dtype} if crossed else {}
            pointers |= {"weight_ptr": _wide(dtype)} if weighted else {}
            pointers |= {"partial_sum_ptr": _wide(dtype)} if summed else {}
            constants: dict[str, int | bool] = {"HAS_Z": crossed, "HAS_WEIGHT": weighted, "HAS_SUM": summed}
            constants |= {"BM": config.BM, "BK": config.BK}
            name = f"gram-{shape}-{dtype}-{layout}-{form}"
            tensor_cores = operands == "half"
            yield Variant(
                name, "gram_partial_kernel", *place, layout, form, pointers, constants, tensor_cores, *options
            )
        for form, layout in product(_reduce_forms(shape, dtype), REDUCE_LAYOUTS):
            for gram in (dtype,) if form == "stored" else ("fp32", "fp64"):
                pointers = {"gram_ptr": gram, "partial_ptr": _wide(dtype)}
                pointers |= {"column_sum_ptr": gram, "partial_sum_ptr": _wide(dtype)} if form == "sum" else {}
                constants = {"HAS_Z": form in ("cross", "stored"), "HAS_SUM": form == "sum", "STORED": form == "stored"}
                constants |= {"BK": config.BK, "BS": config.BS}
                name = f"gram-reduce-{shape}-{dtype}-{layout}-{form}-{gram}"
                full_form = form if form == "stored" else f"{form}-{gram}"
                yield Variant(name, "gram_reduce_kernel", *place, layout, full_form, pointers, constants, False, 4, 3)


def _gram_forms(shape: str, dtype: str) -> tuple[str, ...]:
    """The operands that the configuration ``shape`` is launched with: as ``gram_config`` chooses."""
    weighted = ("weight", "weight-sum")
    if shape == "weighted":
        return (*weighted, "wide-cross") if dtype == "fp16" else weighted
    return ("plain", "plain-sum", "cross", *(weighted if shape == "any" else ()))


def _reduce_forms(shape: str, dtype: str) -> tuple[str, ...]:
    """How the partial tiles that the configuration ``shape`` makes are reduced."""
    crossed = [form for form in _gram_forms(shape, dtype) if "cross" in form]
    stored = "wide-cross" in crossed or (crossed and dtype != "fp16")
    return ("plain", "sum", *(["cross"] if "cross" in crossed else []), *(["stored"] if stored else []))
