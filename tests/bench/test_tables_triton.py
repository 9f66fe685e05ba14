"""What a kernel takes of a multiprocessor."""

from __future__ import annotations

import json

import pytest

from mixrank_bench import tables_triton


@pytest.mark.parametrize(
    ("architecture", "warps", "registers", "shared_kib", "blocks"),
    [
        ("sm_90", 1, 16, 0, 32),  # as many blocks as there can be
        ("sm_90", 8, 32, 0, 8),  # all warps
        ("sm_80", 8, 255, 0, 1),  # registers: two warps for each quarter
        ("sm_80", 4, 129, 0, 3),  # registers: 136 are given out, three warps for each quarter
        ("sm_80", 4, 32, 48, 3),  # shared memory: 1 KiB more for each block
        ("sm_90", 4, 32, 48, 4),
    ],
)
def test_blocks_of_a_multiprocessor(architecture, warps, registers, shared_kib, blocks):
    assert tables_triton.blocks_per_multiprocessor(architecture, warps, registers, shared_kib * 1024) == blocks


def test_the_table_gives_the_range_over_contiguous_forms(tmp_path, monkeypatch):
    row = {"kernel": "k", "configuration": "half-up", "num_warps": 4, "stack_bytes": 0, "shared_bytes": 48 * 1024}
    rows = [
        row | {"architecture": architecture, "layout": layout, "registers": registers, "triton": "3.8.0"}
        for architecture in ("sm_80", "sm_90")
        for layout, registers in (("contiguous", 64), ("contiguous", 128), ("odd", 255))
    ]
    monkeypatch.setattr(tables_triton, "TRITON_AOT", tmp_path / "aot.jsonl")
    tables_triton.TRITON_AOT.write_text("".join(json.dumps(one) + "\n" for one in rows))
    text = tables_triton.triton_resources()
    assert "| `k` | half-up | 4 | 64 to 128 | 0 | 48 | 3 | 64 to 128 | 0 | 48 | 4 |" in text
    assert "triton 3.8.0" in text
