"""Everyone who is timed computes the same."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mixrank_bench import engines, ops, peers
from mixrank_bench.ops import Case
from mixrank_bench.samples import tiny_cases
from mixrank_kernels._load import load_extension


def every_tiny_case() -> list[Case]:
    return [case for dtype in ops.DTYPES for case in tiny_cases(dtype)]


@pytest.mark.parametrize(
    "case", every_tiny_case(), ids=lambda case: f"{case.op}-{case.dtype_name}-{case.residual}-{case.arithmetic}"
)
def test_all_variants_of_a_case_pass_its_gate(case):
    with torch.inference_mode():
        field = peers.field(case, compiling=False)
        peers.gate(case, field)
    assert peers.SERVED in field.variants["ours"]
    offered = {group for group in (*field.variants, *field.absent) if group != "ours"}
    wanted = {"gram"} if "gram" in case.op else {"dense", "add" if case.residual or case.density else "factors"}
    if case.op in ops.INT8:
        wanted = {
            "floating",
            *(("dense",) if case.dynamic else ()),
            *(("factors",) if case.dynamic and case.rank else ()),
        }
    assert wanted <= offered
    assert all(field.absent[group][name] for group in field.absent for name in field.absent[group])


@pytest.mark.skipif(load_extension() is None, reason="only the C++ kernels read packed weights")
@pytest.mark.parametrize("op", ["lowrank_linear", "lowrank_residual_linear"])
def test_ours_is_served_with_packed_weights(op):
    for case in tiny_cases(torch.bfloat16):
        if case.op == op:
            with torch.inference_mode():
                assert list(peers.ours(case, case.arguments(), unpacked=True)) == [peers.SERVED, peers.UNPACKED]


def test_compiled_peers_compute_the_same():
    case = Case("lowrank_linear", "tiny", torch.float32, 5, 48, 40, 8, 0.4)
    with torch.inference_mode():
        field = peers.field(case)
        assert "torch.compile" in field.variants["factors"]
        peers.gate(case, field)


@pytest.mark.parametrize("group", ["ours", "factors"])
def test_a_variant_that_computes_something_else_is_named(group):
    case = Case("lowrank_linear", "tiny", torch.float32, 5, 48, 40, 8, 0.4)
    with torch.inference_mode():
        field = peers.field(case, compiling=False)
        name, good = next(iter(field.variants[group].items()))
        field.variants[group][name] = dataclasses.replace(good, answer=lambda result: result * 1.001)
        with pytest.raises(AssertionError, match=f"^{group}, {name}: "):
            peers.gate(case, field)


def test_a_product_that_the_processor_does_not_have_is_absent(monkeypatch):
    monkeypatch.setattr(engines, "reorders", lambda dtype: False)
    field = peers.field(Case("lowrank_linear", "tiny", torch.bfloat16, 5, 48, 40, 8, 0.4), compiling=False)
    assert field.absent["factors"]["oneDNN prepacked"] == "oneDNN has no product of bfloat16 for this processor"


def test_a_peer_that_is_missing_says_why(monkeypatch):
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    field = peers.field(Case("lowrank_linear", "tiny", torch.float32, 5, 48, 40, 8, 0.4), compiling=False)
    assert field.absent["factors"]["ONNX Runtime"] == "onnxruntime is not installed"
    assert field.absent["factors"]["torch.compile"].startswith("compiling takes seconds")


def test_scipy_runs_with_as_many_threads_as_torch():
    threadpoolctl = pytest.importorskip("threadpoolctl")
    total = torch.zeros(16, 16)
    engines.ssyrk(torch.ones(4, 16), total)()
    found = threadpoolctl.ThreadpoolController().select(internal_api="openblas").info()
    assert {library["num_threads"] for library in found} == {torch.get_num_threads()}
    assert torch.equal(total, torch.full((16, 16), 4.0).tril())
