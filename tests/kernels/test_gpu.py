"""The operators on a CUDA device: gradients, compiled and captured, and what serves them.

Values are tested in ``test_ops.py``, and the whole of ``test_triton.py`` runs on the device too, where there is one.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from mixrank_kernels import backend, ops, testing
from mixrank_kernels._schema import SCHEMAS

pytestmark = pytest.mark.gpu

LINEAR = ("lowrank_linear", "lowrank_residual_linear")
IMPLEMENTATIONS = ("triton", "composite")


def identify(value: object) -> str:
    return str(value).removeprefix("torch.")


def on_device(arguments: dict) -> dict:
    return {name: None if tensor is None else tensor.cuda() for name, tensor in arguments.items()}


@pytest.fixture(autouse=True)
def no_tf32():
    """fp32 is fp32: a user's choice of TF32 would be honoured by the libraries."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("op", LINEAR)
def test_gradients_match_the_reference(op, implementation):
    sample = next(iter(testing.sample_inputs(op, real_sizes=True)))

    def gradients(name: str) -> list:
        arguments = on_device(sample.arguments(torch.float32))
        leaves = [t.requires_grad_() for t in arguments.values() if t is not None and t.is_floating_point()]
        with backend.use(name):
            getattr(ops, op)(**arguments).square().mean().backward()
        return [leaf.grad for leaf in leaves]

    for actual, expected in zip(gradients(implementation), gradients("reference"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=identify)
@pytest.mark.parametrize("op", LINEAR)
def test_compiled_and_captured_calls_give_the_same(op, dtype, implementation):
    sample = next(iter(testing.sample_inputs(op, real_sizes=True)))
    arguments = on_device(sample.arguments(dtype))

    def call() -> torch.Tensor:
        return getattr(ops, op)(**arguments)

    with backend.use(implementation) if implementation else torch.inference_mode():
        expected = call()
        assert torch.equal(torch.compile(call, fullgraph=True)(), expected)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, expected)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("op", LINEAR)
def test_compiled_gradients_are_those_of_eager_mode(op, dynamic):
    torch._dynamo.reset()
    sample = next(iter(testing.sample_inputs(op, real_sizes=True)))

    def gradients(function: Callable, rows: int) -> list[torch.Tensor]:
        arguments = on_device(sample.arguments(torch.float32))
        arguments["x"] = arguments["x"].reshape(-1, arguments["x"].shape[-1])[:rows].contiguous()
        leaves = [t.requires_grad_() for t in arguments.values() if t is not None and t.is_floating_point()]
        # What comes before and after is computed with the kernels in one graph.
        function(arguments).backward()
        return [leaf.grad for leaf in leaves]

    def loss(arguments: dict) -> torch.Tensor:
        return torch.relu(getattr(ops, op)(**arguments | {"x": arguments["x"] * 2})).square().mean()

    with backend.use("triton"):
        compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic)
        for rows in (24, 40):
            for ours, expected in zip(gradients(compiled, rows), gradients(loss, rows), strict=True):
                torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", SCHEMAS)
def test_compiled_code_launches_the_kernels_itself(op):
    torch._dynamo.reset()
    arguments = on_device(next(iter(testing.sample_inputs(op))).arguments(torch.float16))

    def call() -> torch.Tensor | None:
        return getattr(ops, op)(**arguments)

    with backend.use("triton"), torch.compiler.config.patch(force_disable_caches=True):
        _, sources = run_and_get_code(torch.compile(call, fullgraph=True))
    assert ("gram_reduce_kernel" if "gram" in op else "lowrank_up_kernel") in sources[0]
    assert "torch.ops.mixrank_kernels" not in sources[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=identify)
@pytest.mark.parametrize("m", [197, 12608])
def test_gradients_of_factors_stay_within_the_budget_and_give_the_same_bits_twice(m, dtype):
    from mixrank_kernels import triton

    x, down, grad = (torch.randn(shape, device="cuda").to(dtype) for shape in ((m, 768), (200, 768), (m, 3072)))
    first, second = (triton.factor_grad(x, down, grad) for _ in range(2))
    assert torch.equal(first, second)
    exact = (x.double() @ down.double().mT).mT @ grad.double()
    testing.assert_within_budget(first, exact, (x @ down.mT).mT @ grad, dtype)


@pytest.mark.parametrize("op", SCHEMAS)
def test_the_choice_is_explained_and_served(op):
    arguments = on_device(next(iter(testing.sample_inputs(op))).arguments(torch.float32))
    explanation = backend.explain(op, *arguments.values())
    assert explanation.chosen in IMPLEMENTATIONS
    assert explanation.reason
    with backend.use(explanation.chosen):
        forced = list(testing.run(getattr(ops, op), arguments))
    for ours, other in zip(testing.run(getattr(ops, op), arguments), forced, strict=True):
        assert torch.equal(ours, other)


def test_a_compressed_model_runs_compiled_and_in_a_graph():
    import mixrank

    torch.manual_seed(0)
    dense = torch.nn.Sequential(torch.nn.Linear(384, 1536), torch.nn.GELU(), torch.nn.Linear(1536, 384))
    model = torch.nn.Sequential(
        mixrank.MixedRankLinear.from_linear(dense[0], 120), dense[1], mixrank.MixedRankLinear.from_linear(dense[2], 120)
    ).cuda()
    x = torch.randn(8, 197, 384, device="cuda")
    with torch.inference_mode():
        expected = model(x)
        torch.testing.assert_close(torch.compile(model, mode="reduce-overhead")(x), expected, rtol=1e-4, atol=1e-4)
