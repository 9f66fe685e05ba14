"""Every Triton kernel in every configuration, compiled for sm_80 and sm_90 and compared with what was recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mixrank_kernels.triton import config as configs
from mixrank_kernels.triton.aot import SHARED_LIMIT, faults
from mixrank_kernels.triton.variants import DTYPES, LAYOUTS, Variant, cover, variants

RECORD = Path(__file__).parents[2] / "bench" / "results" / "triton_aot.jsonl"
ARCHITECTURES = ("sm_80", "sm_90")

# One unit that registers are given out in, and the shared memory that a block takes anyway.
REGISTERS_MARGIN = 8
SHARED_MARGIN = 1024

KERNELS_AND_CONFIGURATIONS = sorted(
    {
        ("lowrank_down_kernel" if shape == "down" else "lowrank_up_kernel", f"{o}-{shape}")
        for o, shape in configs.LOWRANK
    }
    | {(f"gram_{part}_kernel", f"{o}-{shape}") for part in ("partial", "reduce") for o, shape in configs.GRAM}
)


def by_name(lines: str) -> dict[tuple[str, str], dict]:
    records = [json.loads(line) for line in lines.splitlines()]
    found = {(record["name"], record["architecture"]): record for record in records}
    assert len(found) == len(records)
    return found


def of(kernel: str, configuration: str, among: list[Variant]) -> list[Variant]:
    return [v for v in among if (v.kernel, v.configuration) == (kernel, configuration)]


@pytest.mark.parametrize(("kernel", "configuration"), KERNELS_AND_CONFIGURATIONS)
def test_the_cover_has_each_layout_form_and_dtype_of_each_kernel_in_each_configuration(kernel, configuration):
    members, everything = (of(kernel, configuration, among) for among in (cover(), variants()))
    for trait in ("layout", "form"):
        assert {getattr(v, trait) for v in members} == {getattr(v, trait) for v in everything}
    operands = configuration.split("-")[0]
    for dtype in (name for name, class_ in DTYPES.items() if class_ == operands):
        most = [
            max(len(v.pointers) for v in among if (v.dtype, v.layout) == (dtype, "contiguous"))
            for among in (members, everything)
        ]
        assert most[0] == most[1]


def test_there_are_variants_of_everything():
    everything = variants()
    assert {(v.kernel, v.configuration) for v in everything} == set(KERNELS_AND_CONFIGURATIONS)
    assert {v.layout for v in everything} == set(LAYOUTS)
    assert {v.dtype for v in everything} == set(DTYPES)
    assert len({v.name for v in everything}) == len(everything)
    assert {v.name for v in cover()} < {v.name for v in everything}


def test_the_record_has_a_line_for_every_member_of_the_cover():
    assert set(by_name(RECORD.read_text())) == {(v.name, a) for v in cover() for a in ARCHITECTURES}


@pytest.mark.slow
def test_kernels_take_no_more_than_recorded(tmp_path, without_interpreter):
    made = tmp_path / "made.jsonl"
    result = without_interpreter(
        "-m", "mixrank_kernels.triton.aot", "--cover", "--out", str(tmp_path), "--json", str(made)
    )
    assert result.returncode == 0, result.stdout + result.stderr
    records, recorded = by_name(made.read_text()), by_name(RECORD.read_text())
    assert set(records) == set(recorded)
    for (name, architecture), record in records.items():
        assert (tmp_path / f"{name}.{architecture}.cubin").read_bytes()[:4] == b"\x7fELF"
        known = recorded[name, architecture]
        assert 0 < record["registers"] <= known["registers"] + REGISTERS_MARGIN, (record, known)
        assert record["shared_bytes"] <= known["shared_bytes"] + SHARED_MARGIN, (record, known)
        assert record["stack_bytes"] <= known["stack_limit"], (record, known)
        # Tensor cores multiply fp64 too, but not fp32 without rounding it.
        multiplies = record["kernel"] != "gram_reduce_kernel" and record["dtype"] != "fp32"
        assert (record["tensor_core_instructions"] > 0) == multiplies, record


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"stack_bytes": 40}, "spills 40 bytes"),
        ({"shared_bytes": SHARED_LIMIT[80] + 1}, "shared memory"),
        ({"tensor_core_instructions": 0}, "does not use the tensor cores"),
    ],
    ids=["stack", "shared", "tensor-cores"],
)
def test_what_does_not_fit_is_a_fault(changed, fault):
    fine = {"architecture": "sm_80", "stack_bytes": 32, "stack_limit": 32, "shared_bytes": SHARED_LIMIT[80]}
    fine["tensor_core_instructions"] = 1
    assert faults(fine, tensor_cores=True) == []
    assert len(found := faults(fine | changed, tensor_cores=True)) == 1
    assert fault in found[0]


def test_nothing_compiles_under_the_interpreter():
    result = subprocess.run(
        [sys.executable, "-m", "mixrank_kernels.triton.aot", "--cover"],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert "TRITON_INTERPRET is set" in result.stderr
