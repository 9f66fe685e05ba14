"""Compile every CUDA kernel with nvcc, without a GPU, and check what it needs against what a card has.

    python -m mixrank_bench.cuda_build --save bench/results/cuda_build.jsonl

compiles each kernel that the launch code of csrc/cuda launches for sm_80 and sm_90a, and reads ptxas' report and the
instructions. Exits with 1 when a kernel spills, does not fit, goes without the instructions that it is there for, or
nvcc warns. Needs nvcc, c++filt, and cuobjdump and nvdisasm, which come with Triton.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import triton

from mixrank_bench.environment import ROOT, environment, in_checkout

SOURCE = ROOT / "tests" / "kernels" / "cuda_build.cu"
TARGETS = {80: "80", 90: "90a"}
OF_EMPTY_KERNELS = ("MOV", "LDC", "EXIT", "BRA", "NOP")
COUNTED = ("HGMMA", "HMMA", "LDL", "STL", "UTMALDG", "LDGSTS")

# Of the CUDA C++ Programming Guide, table of technical specifications per compute capability.
THREADS_PER_SM, BLOCKS_PER_SM = 2048, 32
REGISTERS_PER_SM, REGISTER_UNIT, WARP_UNIT = 65536, 256, 4
SHARED_PER_SM = {80: 164 * 1024, 90: 228 * 1024}
SHARED_RESERVED, SHARED_UNIT = 1024, 128
# Code for sm_80 also runs on sm_86 and sm_89, where a block has the least.
SHARED_PER_BLOCK = {80: 99 * 1024, 90: 227 * 1024}


@dataclass(frozen=True)
class Build:
    """One kernel compiled for one architecture.

    ``target`` is the architecture as nvcc calls it, ``written_for`` the oldest that has the kernel's instructions,
    ``work`` the number of instructions that an empty kernel would not have, ``wanted_blocks_per_sm`` what its launch
    bounds say.
    """

    kernel: str
    architecture: int
    target: str
    written_for: int
    threads: int
    shared_bytes: int
    registers: int
    barriers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    work: int
    instructions: dict[str, int]
    blocks_per_sm: int
    wanted_blocks_per_sm: int

    def faults(self) -> Iterator[str]:
        """What is wrong with it, in words."""
        if self.written_for > self.architecture:
            if self.work:
                yield f"is for sm_{self.written_for}, but has {self.work} instructions"
            return
        found = self.instructions
        if self.stack_bytes or self.spill_store_bytes or self.spill_load_bytes or found["LDL"] or found["STL"]:
            yield (
                f"uses local memory: {self.stack_bytes} bytes of stack, {self.spill_store_bytes} stored and "
                f"{self.spill_load_bytes} loaded by spills, {found['LDL']} LDL, {found['STL']} STL"
            )
        wanted = ["HGMMA", "UTMALDG"] if self.written_for == 90 else ["HMMA", "LDGSTS"]
        if "Reduce" not in self.kernel:
            yield from (f"has no {name}" for name in wanted if not found[name])
        if self.shared_bytes > SHARED_PER_BLOCK[self.written_for]:
            yield f"asks for {self.shared_bytes} bytes of shared memory of {SHARED_PER_BLOCK[self.written_for]}"
        if self.blocks_per_sm < self.wanted_blocks_per_sm:
            yield f"has {self.blocks_per_sm} blocks on a multiprocessor instead of {self.wanted_blocks_per_sm}"


def run(*command: str | Path) -> str:
    """The standard output and error of a command.

    Raises:
        RuntimeError: it failed; the message has its output.
    """
    done = subprocess.run(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{Path(command[0]).name} failed:\n{done.stdout}")
    return done.stdout


def blocks_per_sm(architecture: int, threads: int, registers: int, shared_bytes: int) -> int:
    """Blocks that run on one multiprocessor at one time, as the occupancy calculator counts them."""
    warps = -(-threads // 32)
    warp_registers = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS_PER_SM // warp_registers // WARP_UNIT * WARP_UNIT // warps
    block_shared = -(-(shared_bytes + SHARED_RESERVED) // SHARED_UNIT) * SHARED_UNIT
    by_shared = SHARED_PER_SM[architecture] // block_shared
    return min(BLOCKS_PER_SM, THREADS_PER_SM // (warps * 32), by_registers, by_shared)


def demangled(symbols: list[str]) -> dict[str, str]:
    """Readable names without namespaces, of ``entry`` and ``sizes`` alike."""
    lines = run("c++filt", *symbols).splitlines()
    return {a: b.replace("mixrank::", "").replace("> >", ">>") for a, b in zip(symbols, lines, strict=True)}


def split_sizes(name: str) -> tuple[str, tuple[int, ...]]:
    """The kernel in a name of ``sizes``, and its architecture, threads, wanted blocks and shared memory."""
    found = re.fullmatch(r"void sizes<(.+), (\d+), (\d+), (\d+), (\d+)>\(\)", name)
    return found[1], tuple(map(int, found.groups()[1:]))


REPORT = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)'.*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill "
    r"stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers"
    r"(?:, used (?P<barriers>\d+) barriers)?(?:, (?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


def sass(cubin: Path) -> dict[str, Counter[str]]:
    """The instructions of each function of a cubin, without their suffixes, counted."""
    knobs = triton.knobs.nvidia
    text = run("env", f"PATH={Path(knobs.nvdisasm.path).parent}:/usr/bin:/bin", knobs.cuobjdump.path, "-sass", cubin)
    found = {}
    for part in text.split("Function : ")[1:]:
        names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(\w+)", part, re.MULTILINE)
        found[part.split(maxsplit=1)[0]] = Counter(names)
    return found


def compile_for(architecture: int, folder: Path) -> tuple[list[Build], list[str]]:
    """Every kernel for one architecture, and the lines in which the compiler complains."""
    cubin, target = folder / f"{architecture}.cubin", TARGETS[architecture]
    report = run(
        "nvcc", "-std=c++20", "-O3", f"-gencode=arch=compute_{target},code=sm_{target}", "-Xptxas", "-v", "-cubin",
        "-I", ROOT / "csrc", SOURCE, "-o", cubin,
    )  # fmt: skip
    complaints = [line for line in report.splitlines() if re.search(r"warning|advisory|C75\d\d", line, re.IGNORECASE)]
    used = {found["symbol"]: found for found in REPORT.finditer(report)}
    names = demangled(list(used))
    sizes = dict(split_sizes(name) for name in names.values() if name.startswith("void sizes<"))
    instructions = sass(cubin)
    builds = []
    for symbol, found in used.items():
        entry = re.match(r"void entry<(.+)>\(", names[symbol])
        if entry is None:
            continue
        kernel = entry[1].strip()
        written_for, threads, wanted, dynamic = sizes[kernel]
        counts, registers, shared = instructions[symbol], int(found["registers"]), dynamic + int(found["shared"] or 0)
        builds.append(
            Build(
                kernel=kernel,
                architecture=architecture,
                target=f"sm_{target}",
                written_for=written_for,
                threads=threads,
                shared_bytes=shared,
                registers=registers,
                barriers=int(found["barriers"] or 0),
                stack_bytes=int(found["stack"]),
                spill_store_bytes=int(found["stores"]),
                spill_load_bytes=int(found["loads"]),
                work=sum(count for name, count in counts.items() if name not in OF_EMPTY_KERNELS),
                instructions={name: counts[name] for name in COUNTED},
                blocks_per_sm=blocks_per_sm(architecture, threads, registers, shared),
                wanted_blocks_per_sm=wanted,
            )
        )
    return sorted(builds, key=lambda build: build.kernel), complaints


def compile_all() -> tuple[list[Build], list[str]]:
    """Every kernel for every architecture, and what is wrong with them or what the compiler complains of, in words."""
    builds, faults = [], []
    with TemporaryDirectory() as folder:
        for architecture in TARGETS:
            compiled, complaints = compile_for(architecture, Path(folder))
            builds += compiled
            faults += complaints
    faults += [f"{build.kernel} for {build.target} {fault}" for build in builds for fault in build.faults()]
    return builds, faults


def versions() -> dict[str, str]:
    """The compiler that everything depends on."""
    return {"nvcc": re.search(r"V([\d.]+)", run("nvcc", "--version"))[1]}


def main() -> int:
    """Compile, print and save what the command line asks for; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the results there, in place of what it had")
    arguments = parser.parse_args()
    if not in_checkout():
        sys.exit("the kernels' sources are in a checkout of mixrank-kernels; this is an installed copy")
    if shutil.which("nvcc") is None:
        parser.error("nvcc is not on the PATH")
    builds, faults = compile_all()
    for build in builds:
        counts = " ".join(f"{count} {name}" for name, count in build.instructions.items() if count)
        print(
            f"{build.target:<6} {build.kernel:<44} {build.registers:>3} registers {build.shared_bytes:>6} B"
            f" shared {build.blocks_per_sm:>2} on a multiprocessor  {counts}"
        )
    for fault in faults:
        print(f"FAULT: {fault}")
    if arguments.save:
        header = environment() | versions()
        lines = [json.dumps(asdict(build) | {"environment": header}, allow_nan=False) + "\n" for build in builds]
        arguments.save.write_text("".join(lines), encoding="utf-8")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
