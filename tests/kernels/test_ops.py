"""Every operator on every implementation: values, gradients, opcheck, torch.compile, autocast, error messages.

One body per property, parametrised over what this machine can run: C++ on each instruction set, Triton (under its
interpreter on a CPU), and the reference.
"""

from __future__ import annotations

import pytest
import torch

import mixrank_kernels
from mixrank_kernels import backend, ops, reference, testing
from mixrank_kernels._schema import SCHEMAS, overload
from mixrank_kernels.flops import FlopCounterMode

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IMPLEMENTATIONS = [name for name in backend.available("cpu") if name != "cpu"]
LINEAR, GRAM = "lowrank_linear", "gram_accumulate_"


def identify(value: object) -> str:
    return str(value).removeprefix("torch.")


def cases(ops_: tuple[str, ...] = (LINEAR, GRAM), *, real_sizes: bool = False) -> list:
    return [
        pytest.param(op, sample, id=f"{op}-{sample}")
        for op in ops_
        for sample in testing.sample_inputs(op, real_sizes=real_sizes)
    ]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    with backend.use(request.param):
        yield request.param


def skip_what_the_interpreter_cannot_do(implementation: str, dtype: torch.dtype) -> None:
    if implementation == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter does not multiply bfloat16 blocks correctly; the GPU tests cover it")


def check_value(op: str, arguments: dict) -> None:
    dtype = arguments["x"].dtype
    exact = list(testing.run(getattr(reference, op), testing.exact(arguments)))
    yardstick = testing.run(testing.plain(op), arguments)
    actual = testing.run(getattr(ops, op), arguments)
    for ours, true, plain in zip(actual, exact, yardstick, strict=True):
        testing.assert_within_budget(ours, true, plain, dtype)


def test_every_compiled_implementation_of_this_machine_is_tested():
    assert mixrank_kernels.HAS_EXTENSION, "build the extension first: make test does it"
    assert {f"cpu-{isa}" for isa in backend.isas()} | {"triton", "reference"} == set(IMPLEMENTATIONS)
    assert "portable" in backend.isas()


@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.parametrize(("op", "sample"), cases())
def test_value_on_small_shapes(implementation, op, sample, dtype):
    skip_what_the_interpreter_cannot_do(implementation, dtype)
    check_value(op, sample.arguments(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=identify)
@pytest.mark.parametrize(("op", "sample"), cases(real_sizes=True))
@pytest.mark.parametrize("implementation_", [name for name in IMPLEMENTATIONS if name != "triton"])
def test_value_on_layers_of_real_models(implementation_, op, sample, dtype):
    with backend.use(implementation_):
        check_value(op, sample.arguments(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.parametrize(("op", "sample"), cases())
def test_small_integers_are_exact(implementation, op, sample, dtype):
    skip_what_the_interpreter_cannot_do(implementation, dtype)
    arguments = {
        name: None if tensor is None else tensor.copy_(torch.randint(-2, 3, tensor.shape))
        for name, tensor in sample.arguments(dtype).items()
    }
    if op == LINEAR:
        # |hidden| stays below 2^8 and |y| below the dtype's last exact integer, so one sparse row each is enough.
        arguments["down"][..., 8:] = 0
        arguments["up"][..., 4:] = 0
    exact = testing.run(getattr(reference, op), testing.exact(arguments))
    for ours, true in zip(testing.run(getattr(ops, op), arguments), exact, strict=True):
        assert torch.equal(ours.double(), true)


@pytest.mark.parametrize("offset", range(8))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=identify)
def test_operands_at_any_offset_of_a_poisoned_buffer(implementation, dtype, offset):
    """Every one-element shift of every operand, NaN around it: nothing outside is read into the result."""

    def shifted(*shape: int) -> torch.Tensor:
        buffer = torch.full((offset + torch.Size(shape).numel() + 64,), float("nan"), dtype=dtype)
        view = buffer[offset : offset + torch.Size(shape).numel()].view(shape)
        return view.copy_(torch.randn(shape))

    linear = {"x": shifted(19, 37), "down": shifted(11, 37), "up": shifted(23, 11), "bias": shifted(23)}
    check_value(LINEAR, linear)
    check_value(
        GRAM,
        {"gram": torch.zeros(37, 37, dtype=torch.float64), "x": shifted(19, 37)}
        | dict.fromkeys(["row_weight", "column_sum"]),
    )


@pytest.mark.parametrize(("op", "sample"), cases((LINEAR,)))
def test_gradients(implementation, op, sample):
    def gradients(function, dtype=torch.float32):
        arguments = {
            n: None if t is None else t.detach().to(dtype).requires_grad_() for n, t in sample.arguments().items()
        }
        output = function(**arguments)
        torch.manual_seed(1)
        output.backward(torch.randn(output.shape).to(dtype))
        return [t.grad for t in arguments.values() if t is not None]

    exact = gradients(testing.plain_lowrank_linear, torch.float64)
    for ours, true, plain in zip(
        gradients(ops.lowrank_linear), exact, gradients(testing.plain_lowrank_linear), strict=True
    ):
        testing.assert_within_budget(ours, true, plain, torch.float32)


@pytest.mark.parametrize("needed", ["x", "down", "up", "bias"])
def test_gradient_of_one_argument_alone(implementation, needed):
    arguments = testing.sample_inputs(LINEAR)[0].arguments()
    arguments[needed].requires_grad_()
    ops.lowrank_linear(**arguments).sum().backward()
    expected = dict(arguments) | {needed: arguments[needed].detach().clone().requires_grad_()}
    testing.plain_lowrank_linear(**expected).sum().backward()
    torch.testing.assert_close(arguments[needed].grad, expected[needed].grad)


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_and_gradgradcheck(implementation, bias):
    x, down, up, b = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5), (2, 5), (4, 2), (4,))
    )
    arguments = (x, down, up, b) if bias else (x, down, up)
    assert torch.autograd.gradcheck(ops.lowrank_linear, arguments)
    assert torch.autograd.gradgradcheck(ops.lowrank_linear, arguments)


@pytest.mark.parametrize(("op", "sample"), cases())
def test_opcheck(implementation, op, sample):
    arguments = sample.arguments()
    torch.library.opcheck(overload(op), tuple(arguments.values()))
    if op == LINEAR:
        torch.library.opcheck(overload(op), tuple(t if t is None else t.requires_grad_() for t in arguments.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=identify)
def test_compiles_into_one_graph(implementation, dtype):
    torch._dynamo.reset()
    sample = next(s for s in testing.sample_inputs(LINEAR) if s.name == "leading-dims")
    arguments = sample.arguments(dtype)

    def model(x, down, up, bias):
        gram = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64)
        ops.gram_accumulate_(gram, x)
        return torch.relu(ops.lowrank_linear(x * 2, down, up, bias)), gram

    expected, expected_gram = model(**arguments)
    actual, actual_gram = torch.compile(model, fullgraph=True)(**arguments)
    assert torch.equal(actual, expected)
    assert torch.equal(actual_gram, expected_gram)


def test_compiles_with_gradients(implementation):
    torch._dynamo.reset()
    sample = next(s for s in testing.sample_inputs(LINEAR) if s.name == "leading-dims")
    eager, compiled = ({n: t.requires_grad_() for n, t in sample.arguments().items()} for _ in range(2))
    ops.lowrank_linear(**eager).square().sum().backward()
    torch.compile(ops.lowrank_linear, fullgraph=True)(**compiled).square().sum().backward()
    for name in eager:
        torch.testing.assert_close(compiled[name].grad, eager[name].grad)


def test_exports(implementation):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = torch.nn.Parameter(torch.randn(2, 6)), torch.nn.Parameter(torch.randn(4, 2))

        def forward(self, x):
            return ops.lowrank_linear(x, self.down, self.up)

    layer, x = Layer(), torch.randn(3, 6)
    program = torch.export.export(layer, (x,))
    assert any("lowrank_linear" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(x), layer(x))


@pytest.mark.parametrize("region", [torch.bfloat16, torch.float16], ids=identify)
def test_autocast_casts_as_for_a_linear_layer(implementation, region):
    skip_what_the_interpreter_cannot_do(implementation, region)
    arguments = {n: t.requires_grad_() for n, t in testing.sample_inputs(LINEAR)[0].arguments().items()}
    with torch.autocast("cpu", region):
        output = ops.lowrank_linear(**arguments)
    assert output.dtype == region
    assert torch.equal(output, ops.lowrank_linear(**{n: t.to(region) for n, t in arguments.items()}))
    output.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in arguments.values())


def test_autocast_leaves_fp64_and_statistics_alone(implementation):
    wide = {n: t.double() for n, t in testing.sample_inputs(LINEAR)[0].arguments().items()}
    gram, x = torch.zeros(6, 6, dtype=torch.float64), torch.randn(9, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.lowrank_linear(**wide).dtype == torch.float64
        ops.gram_accumulate_(gram, x)
    torch.testing.assert_close(gram, x.double().mT @ x.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=identify)
@pytest.mark.parametrize("k", [5, 33, 65])
def test_gram_is_symmetric_and_positive_semidefinite(implementation, dtype, k):
    gram = torch.zeros(k, k, dtype=torch.float64)
    ops.gram_accumulate_(gram, torch.randn(k // 2 + 1, k).to(dtype))
    assert torch.equal(gram, gram.mT)
    assert torch.linalg.eigvalsh(gram).min() >= -1e-6 * gram.trace()


def test_gram_of_many_calls_equals_that_of_one(implementation):
    x = torch.randint(-8, 9, (57, 21)).float()
    weight, whole, parts = (
        torch.ones(57),
        torch.zeros(21, 21, dtype=torch.float64),
        torch.zeros(21, 21, dtype=torch.float64),
    )
    total, sums = torch.zeros(21, dtype=torch.float64), torch.zeros(21, dtype=torch.float64)
    ops.gram_accumulate_(whole, x, weight, total)
    for chunk in x.split(10):
        ops.gram_accumulate_(parts, chunk, None, sums)
    assert torch.equal(whole, parts)
    assert torch.equal(total, sums)


def test_gram_of_ones_counts_the_rows(implementation):
    gram = torch.zeros(40, 40, dtype=torch.float64)
    for _ in range(3):
        ops.gram_accumulate_(gram, torch.ones(1000, 40))
    assert torch.equal(gram, torch.full_like(gram, 3000))


def test_gram_takes_negative_weights(implementation):
    gram, x = torch.zeros(7, 7, dtype=torch.float64), torch.randn(12, 7)
    ops.gram_accumulate_(gram, x, torch.ones(12))
    ops.gram_accumulate_(gram, x, -torch.ones(12))
    assert gram.abs().max() < 1e-5


@pytest.mark.parametrize("op", [LINEAR, GRAM])
def test_results_do_not_depend_on_the_number_of_threads(implementation, op):
    sample = testing.sample_inputs(op, real_sizes=implementation != "triton")[0]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(next(iter(testing.run(getattr(ops, op), sample.arguments()))))
    finally:
        torch.set_num_threads(threads)
    if implementation != "reference":
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


def linear_arguments(**changed):
    made = {"x": torch.ones(3, 5), "down": torch.ones(2, 5), "up": torch.ones(4, 2), "bias": torch.ones(4)} | changed
    return tuple(made.values())


def gram_arguments(**changed):
    made = {
        "gram": torch.zeros(5, 5, dtype=torch.float64),
        "x": torch.ones(3, 5),
        "row_weight": torch.ones(3),
        "column_sum": torch.zeros(5, dtype=torch.float64),
    }
    return tuple((made | changed).values())


BAD_CALLS = [
    (LINEAR, {"x": torch.tensor(1.0)}, r"x must have shape \[\.\.\., K\].* but it was \[\]"),
    (LINEAR, {"x": torch.ones(3, 5, dtype=torch.int64)}, r"x must have one of the dtypes .* but it was (int64|Long)"),
    (LINEAR, {"x": torch.ones(3, 0), "down": torch.ones(2, 0)}, r"x must have at least one"),
    (LINEAR, {"down": torch.ones(2, 6)}, r"down must have shape \[R, K\] with K = 5 .*but it was \[2, 6\]"),
    (LINEAR, {"down": torch.ones(5)}, r"down must have shape \[R, K\] with K = 5 .*but it was \[5\]"),
    (LINEAR, {"down": torch.ones(0, 5), "up": torch.ones(4, 0)}, r"down must have at least one"),
    (LINEAR, {"down": torch.ones(2, 5).half()}, r"down must have dtype float32 .*but it was float16"),
    (LINEAR, {"up": torch.ones(4, 3)}, r"up must have shape \[N, R\] with R = 2 .*but it was \[4, 3\]"),
    (LINEAR, {"up": torch.ones(0, 2)}, r"up must have at least one"),
    (LINEAR, {"up": torch.ones(4, 2).double()}, r"up must have dtype float32 .*but it was float64"),
    (LINEAR, {"bias": torch.ones(3)}, r"bias must have shape \[N\] with N = 4 .*but it was \[3\]"),
    (LINEAR, {"bias": torch.ones(4).bfloat16()}, r"bias must have dtype float32 .*but it was bfloat16"),
    (LINEAR, {"bias": torch.ones(4, device="meta")}, r"bias must be on cpu .*but it was on meta"),
    (GRAM, {"gram": torch.zeros(5, 5).half()}, r"gram must have one of the dtypes .*but it was float16"),
    (GRAM, {"gram": torch.zeros(5, 6)}, r"gram must have shape \[K, K\] or \[B, K, K\], but it was \[5, 6\]"),
    (GRAM, {"gram": torch.zeros(5, 10)[:, ::2]}, r"gram must be contiguous"),
    (GRAM, {"x": torch.ones(3, 4)}, r"x must have shape \[\.\.\., K\] with K = 5 .*but it was \[3, 4\]"),
    (GRAM, {"x": torch.ones(3, 5, dtype=torch.int32)}, r"x must have one of the dtypes .*but it was int32"),
    (GRAM, {"gram": torch.zeros(2, 5, 5)}, r"x must have shape \[B, M, K\] with B = 2 and K = 5 .*but it was \[3, 5\]"),
    (GRAM, {"row_weight": torch.ones(4)}, r"row_weight must have shape \[3\] .*but it was \[4\]"),
    (GRAM, {"row_weight": torch.ones(3, dtype=torch.int64)}, r"row_weight must have one of the dtypes .*int64"),
    (GRAM, {"column_sum": torch.zeros(4, dtype=torch.float64)}, r"column_sum must have shape \[5\].*but it was \[4\]"),
    (GRAM, {"column_sum": torch.zeros(5)}, r"column_sum must have dtype float64 .*but it was float32"),
    (GRAM, {"column_sum": torch.zeros(10, dtype=torch.float64)[::2]}, r"column_sum must be contiguous"),
]


@pytest.mark.parametrize(("op", "changed", "message"), BAD_CALLS)
def test_bad_arguments_are_named(implementation, op, changed, message):
    arguments = linear_arguments(**changed) if op == LINEAR else gram_arguments(**changed)
    with pytest.raises(RuntimeError, match=f"{op}: {message}"):
        getattr(ops, op)(*arguments)


@pytest.mark.parametrize(("op", "changed", "message"), BAD_CALLS)
def test_bad_arguments_are_named_while_tracing(op, changed, message):
    arguments = linear_arguments(**changed) if op == LINEAR else gram_arguments(**changed)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(tensor) if tensor.device.type == "cpu" else tensor for tensor in arguments]
        with pytest.raises(RuntimeError, match=f"{op}: {message}"):
            overload(op)(*fakes)


def test_flops_are_counted():
    x, down, up = torch.ones(3, 7, 10), torch.ones(4, 10), torch.ones(6, 4)
    with FlopCounterMode(display=False) as counter:
        ops.lowrank_linear(x, down, up)
    assert counter.get_total_flops() == 2 * 21 * 4 * (10 + 6)
    with FlopCounterMode(display=False) as counter:
        ops.gram_accumulate_(torch.zeros(10, 10), x)
    assert counter.get_total_flops() == 21 * 10 * 11


def test_every_operator_is_complete():
    for op in SCHEMAS:
        assert callable(getattr(ops, op))
        assert callable(getattr(reference, op))
        assert testing.sample_inputs(op)
        assert testing.sample_inputs(op, real_sizes=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.parametrize(("op", "sample"), cases() + cases(real_sizes=True))
@pytest.mark.parametrize("name", ["triton", "reference"])
def test_value_on_a_gpu(name, op, sample, dtype):
    arguments = {n: None if t is None else t.cuda() for n, t in sample.arguments(dtype).items()}
    with backend.use(name):
        check_value(op, arguments)
