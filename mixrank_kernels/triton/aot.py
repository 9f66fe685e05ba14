"""Compile every Triton kernel ahead of time, without a GPU, and check what it needs against what a card has.

    python -m mixrank_kernels.triton.aot --out build/triton --json build/triton.jsonl

compiles each kernel in each committed configuration for sm_80 and sm_90, writes the cubins and what each takes in
registers, stack (where spills go), shared memory and tensor-core instructions, and exits with 1 when one does not
compile, spills or does not fit. ``--cover`` leaves out combinations of what is there in others (see
:func:`mixrank_kernels.triton.variants.cover`); its lines are committed as ``bench/results/triton_aot.jsonl``. Nothing
compiles under ``TRITON_INTERPRET``, so it must not be set.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from tempfile import NamedTemporaryFile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mixrank_kernels.triton import KERNELS, is_interpreted
from mixrank_kernels.triton.variants import LAYOUTS, Variant, cover, variants

ARCHITECTURES = (80, 90)

# Dynamic shared memory that one block may ask for, in bytes.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}

# Stack that the spills of one thread may take, in bytes. ptxas parks a value or two to reach a higher occupancy, also
# where registers are left; without aligned rows every element has an address of its own, which fills them.
STACK_LIMIT = {"contiguous": 32, "transposed": 32, "odd": 512, "strided": 512, "unit": 512}

NAMED_KERNELS = {kernel.__name__: kernel for kernel in KERNELS}

# Arguments that are zero, a multiple of 16, where an operand is absent.
ABSENT = {
    "HAS_BRANCH": {"Q", "stride_rdq", "stride_rdk", "stride_run", "stride_ruq"},
    "HAS_BIAS": {"stride_bias"},
    "HAS_Z": {"stride_zb", "stride_zm", "stride_zk"},
    "HAS_WEIGHT": {"stride_wb", "stride_wm"},
}


def _source(variant: Variant) -> ASTSource:
    """The kernel as Triton specialises it at a launch: None and 1 become constants, multiples of 16 are marked."""
    kernel = NAMED_KERNELS[variant.kernel]
    zeros = set().union(*(names for flag, names in ABSENT.items() if variant.constants.get(flag) is False))
    ones, multiples = LAYOUTS[variant.layout][0] - zeros, LAYOUTS[variant.layout][1] | zeros
    signature, attributes = {}, {}
    constants: dict[str, int | bool | None] = {**variant.constants}
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
    return int(re.findall(r"STACK:(\d+)", usage)[0]), int(re.findall(r"REG:(\d+)", usage)[0])


def compile_variant(variant: Variant, architecture: int) -> tuple[dict, bytes]:
    """Compile one variant for ``sm_<architecture>``: its record, and the cubin."""
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    compiled = triton.compile(_source(variant), target=GPUTarget("cuda", architecture, 32), options=options)
    cubin = compiled.asm["cubin"]
    stack, registers = _stack_and_registers(cubin)
    record = {
        **{field: getattr(variant, field) for field in ("name", "kernel", "configuration", "dtype", "layout", "form")},
        "num_warps": variant.num_warps,
        "architecture": f"sm_{architecture}",
        "registers": registers,
        "stack_bytes": stack,
        "stack_limit": STACK_LIMIT[variant.layout],
        "shared_bytes": compiled.metadata.shared,
        "tensor_core_instructions": len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)\b", compiled.asm["ptx"])),
        "triton": triton.__version__,
    }
    return record, cubin


def faults(record: dict, tensor_cores: bool) -> list[str]:
    """What is wrong with a compiled variant that should use the tensor cores, or should not."""
    shared_limit = SHARED_LIMIT[int(record["architecture"].removeprefix("sm_"))]
    found = []
    if record["stack_bytes"] > record["stack_limit"]:
        found.append(f"spills {record['stack_bytes']} bytes")
    if record["shared_bytes"] > shared_limit:
        found.append(f"asks for {record['shared_bytes']} bytes of shared memory of {shared_limit}")
    if tensor_cores and not record["tensor_core_instructions"]:
        found.append("does not use the tensor cores")
    return found


def main() -> int:
    """Compile what the command line asks for; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the cubins")
    parser.add_argument("--json", type=Path, help="file for the records, one a line")
    parser.add_argument("--cover", action="store_true", help="only a part that has every kind of kernel")
    parser.add_argument("--select", default="", metavar="REGEX", help="compile only the variants with such a name")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one for each CPU)")
    arguments = parser.parse_args()
    if is_interpreted():
        parser.error("TRITON_INTERPRET is set, and nothing compiles under the interpreter; unset it")
    wanted = [v for v in (cover() if arguments.cover else variants()) if re.search(arguments.select, v.name)]
    if not wanted:
        parser.error(f"no variant has a name like {arguments.select!r}")

    selected = list(product(wanted, ARCHITECTURES))
    records, faulty = [], 0
    # Spawned, not forked: LLVM's threads do not survive a fork.
    with ProcessPoolExecutor(arguments.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        compiled = pool.map(compile_variant, *zip(*selected, strict=True))
        for (variant, _), (record, cubin) in zip(selected, compiled, strict=True):
            records.append(record)
            found = faults(record, variant.tensor_cores)
            faulty += bool(found)
            if arguments.out:
                arguments.out.mkdir(parents=True, exist_ok=True)
                (arguments.out / f"{record['name']}.{record['architecture']}.cubin").write_bytes(cubin)
            print(
                f"{record['architecture']} {record['name']:<42} {record['registers']:>3} registers "
                f"{record['shared_bytes']:>6} B shared {record['tensor_core_instructions']:>4} tensor-core"
                + "".join(f"  FAULT: {fault}" for fault in found),
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text("".join(json.dumps(record) + "\n" for record in records))
    print(f"{len(records)} kernels compiled, {faulty} at fault")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
