"""Compiled graphs of CUDA tensors see Triton's kernels and no opaque call; ``without_device.py`` makes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mixrank_kernels import backend, ops

LAUNCH = "triton_kernel_wrapper_functional"


@pytest.fixture(scope="module")
def traced(without_interpreter) -> dict:
    result = without_interpreter(str(Path(__file__).with_name("without_device.py")))
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def is_operator(target: str) -> bool:
    return "mixrank_kernels" in target


# Launches: one for each product, two for each contraction over the rows.
@pytest.mark.parametrize(
    ("graph", "launches"),
    [
        ("chosen", 2),
        ("forced", 2),
        ("residual", 3),
        ("backward", 2 + 2 * 3),
        ("gram", 2),
        ("cross", 2),
        ("any number of rows", 2),
    ],
)
def test_what_triton_serves_is_traced_into_its_kernels(traced, graph, launches):
    assert traced[graph].count(LAUNCH) == launches
    assert not any(is_operator(target) for target in traced[graph])


@pytest.mark.parametrize("graph", ["not chosen", "forced away", "exported"])
def test_the_operator_is_kept_where_triton_does_not_serve_and_in_exported_programs(traced, graph):
    assert traced[graph] == ["mixrank_kernels.lowrank_linear.default"]


def test_the_number_of_rows_stays_open(traced):
    assert not traced["number of rows"].isdigit()


def launched(lines: list[str]) -> list[str]:
    """The names of the kernels, without the numbers that Inductor gives them."""
    return [line.split(".run(")[0].rpartition("_")[0] for line in lines]


def test_inductor_schedules_the_kernels_without_copies(traced):
    # x * 2 is computed once for both factors, and nothing is copied to be written to.
    assert launched(traced["inductor"]) == [
        "triton_poi_fused_mul",
        "lowrank_down_kernel",
        "lowrank_down_kernel",
        "lowrank_up_kernel",
        "triton_poi_fused_relu",
    ]


def test_inductor_schedules_the_backward_pass_without_copies(traced):
    names = launched(traced["inductor, backward"])
    assert sorted(name for name in names if not name.startswith("triton_")) == sorted(
        ["lowrank_down_kernel"] * 3 + ["lowrank_up_kernel"] + ["gram_partial_kernel", "gram_reduce_kernel"] * 2
    )
    assert names.count("triton_poi_fused_relu") == 1
    assert not any("copy" in name or "clone" in name for name in names)


def test_caches_of_compiled_graphs_tell_apart_what_serves(traced):
    kernels = ["lowrank_down_kernel", "lowrank_up_kernel", "gram_partial_kernel", "gram_reduce_kernel"]
    assert traced["caches"] == {"triton": kernels, "composite": []}


@pytest.mark.parametrize("op", ["lowrank_linear", "gram_accumulate_"])
def test_compiled_calls_are_compiled_anew_when_another_implementation_is_forced(op):
    torch._dynamo.reset()
    graphs = []

    def count(module, _inputs):
        graphs.append(module)
        return module.forward

    arguments = [torch.ones(shape) for shape in ((4, 4), (3, 4), (5, 3))[: 3 if op == "lowrank_linear" else 2]]
    compiled = torch.compile(lambda: getattr(ops, op)(*arguments), backend=count, fullgraph=True)
    for expected, name in ((1, "reference"), (2, "composite"), (2, "reference"), (2, "composite")):
        with backend.use(name):
            compiled()
        assert len(graphs) == expected
