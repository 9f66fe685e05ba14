"""The operators on a CUDA device: gradients, compiled and captured, and what serves them.

Values are tested in ``test_ops.py``, and the whole of ``test_triton.py`` runs on the device too, where there is one.
"""

from __future__ import annotations

import pytest
import torch

from mixrank_kernels import backend, ops, testing
from mixrank_kernels._schema import SCHEMAS

pytestmark = pytest.mark.gpu

LINEAR = ("lowrank_linear", "lowrank_residual_linear")
IMPLEMENTATIONS = ("cuda", "triton", "composite")


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
