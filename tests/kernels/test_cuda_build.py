"""What nvcc makes of the CUDA kernels: nothing spilled, tensor cores used, as many blocks at one time as meant."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from mixrank_bench import cuda_build
from mixrank_bench.environment import read
from mixrank_bench.tables_cuda import CUDA_BUILD

from .cuda_emulated import Kernels

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc on the PATH")

# Registers are allocated eight at a time for each thread: compilers of other versions differ by less.
MARGIN = 8


@pytest.fixture(scope="module")
def compiled() -> tuple[list[cuda_build.Build], list[str]]:
    return cuda_build.compile_all()


def test_nothing_is_wrong_with_any_kernel(compiled):
    assert compiled[1] == []


def test_every_kernel_that_the_emulator_runs_is_compiled(compiled):
    expected = Kernels().reachable
    for architecture in cuda_build.TARGETS:
        assert {build.kernel for build in compiled[0] if build.architecture == architecture} == expected


def test_registers_stay_at_the_record(compiled):
    record = {(row["kernel"], row["architecture"]): row["registers"] for row in read(CUDA_BUILD)}
    now = {(build.kernel, build.architecture): build.registers for build in compiled[0]}
    assert now.keys() == record.keys(), "record the kernels anew: python -m mixrank_bench.cuda_build --save"
    assert {key: count for key, count in now.items() if count > record[key] + MARGIN} == {}


SM80 = {"kernel": "ProductSm80", "architecture": 80, "target": "sm_80", "written_for": 80}
SM80 |= {"instructions": {"HGMMA": 0, "HMMA": 4, "LDL": 0, "STL": 0, "UTMALDG": 0, "LDGSTS": 2}}
SM90 = {"kernel": "GramSm90", "architecture": 90, "target": "sm_90a", "written_for": 90}
SM90 |= {"instructions": {"HGMMA": 4, "HMMA": 0, "LDL": 0, "STL": 0, "UTMALDG": 2, "LDGSTS": 0}}
REST = {
    "threads": 288, "shared_bytes": 98304, "registers": 90, "barriers": 1, "stack_bytes": 0, "spill_store_bytes": 0,
    "spill_load_bytes": 0, "work": 100, "blocks_per_sm": 1, "wanted_blocks_per_sm": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("good", "changed", "fault"),
    [
        (SM80, {"stack_bytes": 8}, "uses local memory: 8 bytes of stack"),
        (SM80, {"spill_load_bytes": 4}, "4 loaded by spills"),
        (SM80, {"spill_store_bytes": 4}, "4 stored"),
        (SM80, {"instructions": SM80["instructions"] | {"LDL": 3}}, "3 LDL"),
        (SM90, {"instructions": SM90["instructions"] | {"STL": 3}}, "3 STL"),
        (SM80, {"instructions": SM80["instructions"] | {"HMMA": 0}}, "has no HMMA"),
        (SM80, {"instructions": SM80["instructions"] | {"LDGSTS": 0}}, "has no LDGSTS"),
        (SM90, {"instructions": SM90["instructions"] | {"HGMMA": 0}}, "has no HGMMA"),
        (SM90, {"instructions": SM90["instructions"] | {"UTMALDG": 0}}, "has no UTMALDG"),
        (SM80, {"shared_bytes": 99 * 1024 + 16}, "asks for 101392 bytes of shared memory of 101376"),
        (SM90, {"shared_bytes": 227 * 1024 + 16}, "asks for 232464 bytes of shared memory of 232448"),
        (SM90, {"wanted_blocks_per_sm": 2}, "has 1 blocks on a multiprocessor instead of 2"),
        (SM90, {"architecture": 80}, "is for sm_90, but has 100 instructions"),
    ],
)
def test_faults_are_seen(good, changed, fault):
    build = cuda_build.Build(**good, **REST)
    assert list(build.faults()) == []
    (found,) = replace(build, **changed).faults()
    assert fault in found


@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared_bytes", "blocks"),
    [
        # By the table of the CUDA C++ Programming Guide: registers, shared memory, threads and blocks decide in turn.
        (90, 288, 96, 0, 2),
        (90, 288, 97, 0, 1),
        (80, 256, 128, 1024, 2),
        (80, 256, 129, 1024, 1),
        (80, 128, 32, 81 * 1024, 2),
        (80, 128, 32, 81 * 1024 + 1, 1),
        (90, 128, 32, 113 * 1024, 2),
        (90, 128, 32, 113 * 1024 + 1, 1),
        (80, 1024, 16, 0, 2),
        (80, 32, 16, 0, 32),
    ],
)
def test_blocks_on_one_multiprocessor(architecture, threads, registers, shared_bytes, blocks):
    assert cuda_build.blocks_per_sm(architecture, threads, registers, shared_bytes) == blocks


def test_complaints_of_the_compiler_are_faults(tmp_path, monkeypatch):
    source = tmp_path / "warned.cu"
    source.write_text("static void never_called() {}\n__global__ void nothing() {}\n")
    monkeypatch.setattr(cuda_build, "SOURCE", source)
    _, complaints = cuda_build.compile_for(80, tmp_path)
    assert any("never_called" in line for line in complaints), complaints
