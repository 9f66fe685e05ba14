"""The operators on a CUDA device: values, gradients, compiled and captured, and what serves them.

The whole of ``test_triton.py`` runs on the device too, where there is one.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from mixrank_kernels import backend, cuda, ops, reference, testing
from mixrank_kernels._schema import SCHEMAS

pytestmark = pytest.mark.gpu

LINEAR = ("lowrank_linear", "lowrank_residual_linear")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
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
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.parametrize("real_sizes", [False, True], ids=["small", "real"])
@pytest.mark.parametrize("op", SCHEMAS)
def test_values_are_within_the_budget(op, real_sizes, dtype, implementation):
    for sample in testing.sample_inputs(op, real_sizes=real_sizes):
        arguments = on_device(sample.arguments(dtype))
        exact = testing.run(getattr(reference, op), testing.exact(arguments))
        plain = testing.run(testing.plain(op), arguments)
        with backend.use(implementation):
            ours = list(testing.run(getattr(ops, op), arguments))
        for actual, reference64, yardstick in zip(ours, exact, plain, strict=True):
            testing.assert_within_budget(actual, reference64, yardstick, dtype)


def small_integers(*shape: int, dtype: torch.dtype, kept: int | None = None) -> torch.Tensor:
    """Integers from -1 to 1; in each row all but about ``kept`` are zero, so that sums stay exact in bf16."""
    made = torch.randint(-1, 2, shape, device="cuda")
    if kept is not None:
        made *= torch.rand(shape, device="cuda") < kept / shape[-1]
    return made.to(dtype)


# Each kernel of the CUDA C++ implementation: few rows, tiles of 64 and of 128, ranks that fill boxes and that do not.
LINEAR_SHAPES = [
    (1, 768, 2304, 124), (16, 768, 768, 64), (197, 768, 3072, 248), (197, 761, 3001, 123), (1576, 768, 3072, 248),
    (1576, 3072, 768, 248), (12608, 384, 1536, 128), (12608, 1024, 4096, 328), (12608, 768, 3072, 249),
]  # fmt: skip


@pytest.mark.parametrize("launches", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=identify)
@pytest.mark.parametrize(("m", "k", "n", "r"), LINEAR_SHAPES)
def test_cuda_products_are_exact_on_integers(m, k, n, r, dtype, launches):
    assert cuda.obstacle() is None
    x, down = small_integers(m, k, dtype=dtype), small_integers(r, k, dtype=dtype, kept=256)
    up, bias = small_integers(n, r, dtype=dtype, kept=4), small_integers(n, dtype=dtype)
    factors = small_integers(40, k, dtype=dtype, kept=8), small_integers(n, 40, dtype=dtype, kept=1)
    for residual in ((None, None), factors):
        for terms in (2, 3):
            y = torch.ops.mixrank_kernels._cuda_linear(x, down, up, bias, *residual, None, None, None, terms, launches)
            wide = [None if t is None else t.double() for t in (x, down, up, bias, *residual)]
            assert torch.equal(y.double(), reference.lowrank_residual_linear(*wide))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=identify)
@pytest.mark.parametrize(
    ("b", "m", "k"), [(1, 12608, 384), (1, 12608, 768), (12, 1576, 64), (3, 197, 1000), (1, 5000, 3072)]
)
def test_cuda_gram_matrices_are_exact_and_repeatable(b, m, k, dtype):
    assert cuda.obstacle() is None
    x = small_integers(b, m, k, dtype=dtype)
    gram, column_sum = torch.zeros(b, k, k, device="cuda"), torch.zeros(b, k, device="cuda")
    with backend.use("cuda"):
        ops.gram_accumulate_(gram, x, None, column_sum)
        assert torch.equal(gram.double(), x.double().mT @ x.double())
        assert torch.equal(column_sum.double(), x.double().sum(1))
        again = [torch.zeros_like(gram) for _ in range(2)]
        for target in again:
            ops.gram_accumulate_(target, x.normal_(generator=torch.Generator("cuda").manual_seed(0)))
    assert torch.equal(*again)


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
