"""Compile every Triton kernel ahead of time, without a GPU, and check what it needs against what a card has.

    python -m mixrank_kernels.triton.aot --out build/triton --json build/triton.json

compiles each kernel in each committed configuration for sm_80 and sm_90, writes the cubins and what each takes in
registers, stack (where spills go), shared memory and tensor-core instructions, and exits with 1 when one does not
compile, spills or does not fit. Nothing compiles under ``TRITON_INTERPRET``, so it must not be set.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from tempfile import NamedTemporaryFile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mixrank_kernels.triton import config as configs
from mixrank_kernels.triton import is_interpreted
from mixrank_kernels.triton.gram import gram_partial_kernel, gram_reduce_kernel
from mixrank_kernels.triton.lowrank_linear import lowrank_down_kernel, lowrank_up_kernel

ARCHITECTURES = (80, 90)

# Dynamic shared memory that one block may ask for, in bytes.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}

# Stack that the spills of one thread may take, in bytes. ptxas parks a value or two to reach a higher occupancy, also
# where registers are left; without aligned rows every element has an address of its own, which fills them.
STACK_LIMIT = {"contiguous": 32, "transposed": 32, "odd": 512, "strided": 512, "unit": 512}

KERNELS = {
    kernel.__name__: kernel
    for kernel in (lowrank_down_kernel, lowrank_up_kernel, gram_partial_kernel, gram_reduce_kernel)
}

DTYPES = {"bf16": "half", "fp16": "half", "fp32": "fp32", "fp64": "fp64"}

# Arguments that Triton specialises in each memory layout: those that are one, and multiples of 16.
_INNER = {"stride_xk", "stride_zk", "stride_dk", "stride_ur", "stride_rdk", "stride_ruq", "stride_bias", "stride_wm"}
_OUTER = {"stride_xb", "stride_xm", "stride_zb", "stride_zm", "stride_dr", "stride_un", "stride_rdq", "stride_run"}
_SIZES = {"K", "N", "R", "Q", "stride_hm"}
LAYOUTS = {
    "contiguous": (_INNER, _SIZES | _OUTER),
    "transposed": (
        {"stride_xk", "stride_dr", "stride_un", "stride_rdq", "stride_run", "stride_bias"},
        _SIZES | {"stride_xm", "stride_dk", "stride_ur", "stride_rdk", "stride_ruq"},
    ),
    "odd": (_INNER, set()),
    "strided": (set(), set()),
    # Every size is one, so that none is a tensor in the kernel any more.
    "unit": (_INNER | _OUTER | {"M", "K", "N", "R", "Q", "stride_hm", "splits", "split_rows", "stride_wb"}, set()),
}


# Arguments that are zero, a multiple of 16, where an operand is absent.
ABSENT = {
    "HAS_BRANCH": {"Q", "stride_rdq", "stride_rdk", "stride_run", "stride_ruq"},
    "HAS_BIAS": {"stride_bias"},
    "HAS_Z": {"stride_zb", "stride_zm", "stride_zk"},
    "HAS_WEIGHT": {"stride_wb", "stride_wm"},
}

# The layouts of which residual kernels are compiled too: what differs between them is the same in the plain kernels.
RESIDUAL_LAYOUTS = ("contiguous", "odd")


@dataclass(frozen=True)
class Variant:
    """One kernel to compile. ``pointers`` gives the element type of every pointer that is not None."""

    name: str
    kernel: str
    pointers: dict[str, str]
    constants: dict[str, int | bool]
    layout: str
    tensor_cores: bool
    num_warps: int
    num_stages: int


def _lowrank_variants() -> Iterator[Variant]:
    for (dtype, operands), ((class_, shape), config), layout in product(
        DTYPES.items(), configs.LOWRANK.items(), LAYOUTS
    ):
        if class_ != operands:
            continue
        wide = "fp64" if dtype == "fp64" else "fp32"
        options = (layout, operands == "half", config.num_warps, config.num_stages)
        factors = {"x_ptr": dtype, "down_ptr": dtype}
        blocks = {"BM": config.BM, "BR": config.BR, "BK": config.BK}
        name = f"{shape}-{dtype}-{layout}"
        if shape == "down":
            yield Variant(f"lowrank-{name}", "lowrank_down_kernel", {"hidden_ptr": wide, **factors}, blocks, *options)
            continue
        pointers = {"y_ptr": dtype, "up_ptr": dtype, **factors}
        pointers |= {"hidden_ptr": wide} if shape == "up" else {}
        constants = {"FUSED": shape != "up", "BN": config.BN, **blocks}
        for bias in (False, True):
            given = pointers | ({"bias_ptr": dtype} if bias else {})
            forms = constants | {"HAS_BIAS": bias, "HAS_BRANCH": False, "b": 0}
            yield Variant(f"lowrank-{name}" + "-bias" * bias, "lowrank_up_kernel", given, forms, *options)
        for branch, b in ((True, 0), (False, 16), (False, 32), (True, 32)) if layout in RESIDUAL_LAYOUTS else ():
            given = pointers | {"bias_ptr": dtype}
            given |= {"residual_down_ptr": dtype, "residual_up_ptr": dtype} if branch else {}
            given |= {"crow_ptr": "i64", "col_ptr": "i64", "values_ptr": dtype} if b else {}
            forms = constants | {"HAS_BIAS": True, "HAS_BRANCH": branch, "b": b}
            kind = "-branch" * branch + f"-blocks{b}" * bool(b)
            yield Variant(f"residual-{name}{kind}", "lowrank_up_kernel", given, forms, *options)


def _gram_variants() -> Iterator[Variant]:
    for (dtype, operands), ((class_, shape), config) in product(DTYPES.items(), configs.GRAM.items()):
        if class_ != operands:
            continue
        wide = "fp64" if dtype == "fp64" else "fp32"
        forms = {"any": ("plain", "weight", "cross"), "weighted": ("weight",)}.get(shape, ("plain", "cross"))
        for form, summed, layout in product(forms, (False, True), ("contiguous", "odd", "strided", "unit")):
            if form == "cross" and summed:
                continue
            pointers = {"partial_ptr": wide, "x_ptr": dtype}
            pointers |= {"plain": {}, "weight": {"weight_ptr": wide}, "cross": {"z_ptr": dtype}}[form]
            pointers |= {"partial_sum_ptr": wide} if summed else {}
            constants = {"HAS_Z": form == "cross", "HAS_WEIGHT": form == "weight", "HAS_SUM": summed}
            constants |= {"BM": config.BM, "BK": config.BK}
            name = f"gram-{shape}-{dtype}-{layout}" + f"-{form}" * (form != "plain") + "-sum" * summed
            options = (layout, operands == "half", config.num_warps, config.num_stages)
            yield Variant(name, "gram_partial_kernel", pointers, constants, *options)
        for master, form, layout in product(("fp32", "fp64"), ("plain", "sum", "cross"), ("contiguous", "unit")):
            pointers = {"gram_ptr": master, "partial_ptr": wide}
            pointers |= {"column_sum_ptr": master, "partial_sum_ptr": wide} if form == "sum" else {}
            constants = {"HAS_Z": form == "cross", "HAS_SUM": form == "sum", "BK": config.BK, "BS": config.BS}
            name = f"gram-reduce-{shape}-{dtype}-{master}-{layout}" + f"-{form}" * (form != "plain")
            yield Variant(name, "gram_reduce_kernel", pointers, constants, layout, False, 4, 3)


def variants(pattern: str = "") -> list[Variant]:
    """Every variant whose name the regular expression ``pattern`` is found in."""
    return [v for v in (*_lowrank_variants(), *_gram_variants()) if re.search(pattern, v.name)]


def _source(variant: Variant) -> ASTSource:
    """The kernel as Triton specialises it at a launch: None and 1 become constants, multiples of 16 are marked."""
    kernel = KERNELS[variant.kernel]
    zeros = set().union(*(names for flag, names in ABSENT.items() if variant.constants.get(flag) is False))
    ones, multiples = LAYOUTS[variant.layout][0] - zeros, LAYOUTS[variant.layout][1] | zeros
    signature, constants, attributes = {}, dict(variant.constants), {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in variant.pointers:
            signature[name] = "*" + variant.pointers[name]
        elif name.endswith("_ptr") or name in ones or parameter.is_constexpr:
            signature[name] = "constexpr"
            constants.setdefault(name, None if name.endswith("_ptr") else 1)
        else:
            signature[name] = "i32"
        if name in multiples or name in variant.pointers:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def _stack_and_registers(cubin: bytes) -> tuple[int, int]:
    """Bytes of stack and registers of each thread, as the cubin itself declares them."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(re.search(r"STACK:(\d+)", usage)[1]), int(re.search(r"REG:(\d+)", usage)[1])


def compile_variant(variant: Variant, architecture: int) -> tuple[dict, bytes]:
    """Compile one variant for ``sm_<architecture>``: its record, and the cubin."""
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    compiled = triton.compile(_source(variant), target=GPUTarget("cuda", architecture, 32), options=options)
    cubin = compiled.asm["cubin"]
    stack, registers = _stack_and_registers(cubin)
    record = {
        **asdict(variant),
        "architecture": f"sm_{architecture}",
        "registers": registers,
        "stack_bytes": stack,
        "shared_bytes": compiled.metadata.shared,
        "tensor_core_instructions": len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)\b", compiled.asm["ptx"])),
        "cubin_bytes": len(cubin),
    }
    record["faults"] = _faults(record, architecture)
    return record, cubin


def _faults(record: dict, architecture: int) -> list[str]:
    faults = []
    if record["stack_bytes"] > STACK_LIMIT[record["layout"]]:
        faults.append(f"spills {record['stack_bytes']} bytes")
    if record["shared_bytes"] > SHARED_LIMIT[architecture]:
        faults.append(f"asks for {record['shared_bytes']} bytes of shared memory of {SHARED_LIMIT[architecture]}")
    if record["tensor_cores"] and not record["tensor_core_instructions"]:
        faults.append("does not use the tensor cores")
    return faults


def main() -> int:
    """Compile what the command line asks for; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the cubins")
    parser.add_argument("--json", type=Path, help="file for the records")
    parser.add_argument("--select", default="", metavar="REGEX", help="compile only the variants with such a name")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one for each CPU)")
    arguments = parser.parse_args()
    if is_interpreted():
        parser.error("TRITON_INTERPRET is set, and nothing compiles under the interpreter; unset it")
    selected = list(product(variants(arguments.select), ARCHITECTURES))
    if not selected:
        parser.error(f"no variant has a name like {arguments.select!r}")

    records = []
    # Spawned, not forked: LLVM's threads do not survive a fork.
    with ProcessPoolExecutor(arguments.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for record, cubin in pool.map(compile_variant, *zip(*selected, strict=True)):
            records.append(record)
            if arguments.out:
                arguments.out.mkdir(parents=True, exist_ok=True)
                (arguments.out / f"{record['name']}.{record['architecture']}.cubin").write_bytes(cubin)
            print(
                f"{record['architecture']} {record['name']:<42} {record['registers']:>3} registers "
                f"{record['shared_bytes']:>6} B shared {record['tensor_core_instructions']:>4} tensor-core"
                + "".join(f"  FAULT: {fault}" for fault in record["faults"]),
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1) + "\n")
    faulty = sum(bool(record["faults"]) for record in records)
    print(f"{len(records)} kernels compiled, {faulty} at fault")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
