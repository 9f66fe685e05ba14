"""Every operator on every implementation that has it: gradients, opcheck, torch.compile, export and autocast."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixrank_kernels import backend, ops, reference, testing
from mixrank_kernels._schema import SCHEMAS, overload

LINEAR, RESIDUAL, PIVOTED = "lowrank_linear", "lowrank_residual_linear", "pivoted_linear"
SPARSE = "sparse_linear"
GRAM, CROSS = "gram_accumulate_", "cross_gram_accumulate_"
# For each operator one sample that has every argument, of few entries.
FULL = dict.fromkeys((LINEAR, PIVOTED, SPARSE, GRAM, CROSS), "leading-dims") | {RESIDUAL: "both-leading-dims"}


def identify(value: object) -> str:
    return str(value).removeprefix("torch.")


def full_arguments(op: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return next(s for s in testing.sample_inputs(op) if s.name == FULL[op]).arguments(dtype)


def floating(arguments: dict[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: t for name, t in arguments.items() if t is not None and t.is_floating_point()}


def with_gradients(arguments: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return arguments | {name: t.detach().clone().requires_grad_() for name, t in floating(arguments).items()}


@pytest.mark.operators(LINEAR, RESIDUAL, PIVOTED, SPARSE)
def test_gradients(implementation, op, sample):
    def gradients(function, dtype=torch.float32):
        # From one set of rounded values, whatever the dtype that the gradients are computed in.
        arguments = sample.arguments()
        arguments = with_gradients(arguments | {name: t.to(dtype) for name, t in floating(arguments).items()})
        output = function(**arguments)
        torch.manual_seed(1)
        output.backward(torch.randn(output.shape).to(dtype))
        return [t.grad for t in floating(arguments).values()]

    exact = gradients(testing.plain(op), torch.float64)
    for ours, true, plain in zip(gradients(getattr(ops, op)), exact, gradients(testing.plain(op)), strict=True):
        testing.assert_within_budget(ours, true, plain, torch.float32)


@pytest.mark.operators(LINEAR, RESIDUAL, PIVOTED, SPARSE)
def test_gradient_of_one_argument_alone(implementation, op):
    for needed, tensor in floating(full_arguments(op)).items():
        ours, plain = ({**full_arguments(op), needed: tensor.clone().requires_grad_()} for _ in range(2))
        getattr(ops, op)(**ours).sum().backward()
        testing.plain(op)(**plain).sum().backward()
        torch.testing.assert_close(ours[needed].grad, plain[needed].grad, msg=lambda text, n=needed: f"{n}: {text}")


GRADCHECKED = (
    *("tiny", "ones", "no-bias", "branch-tiny", "branch-no-bias", "blocks-repeated", "blocks-none", "both-16"),
    *("nothing-stored", "factors-alone"),
)


@pytest.mark.operators(LINEAR, RESIDUAL, PIVOTED, SPARSE)
def test_gradcheck_and_gradgradcheck(implementation, op):
    on_triton = implementation == "triton"
    for sample in testing.sample_inputs(op):
        if sample.name in GRADCHECKED:
            arguments = with_gradients(sample.arguments(torch.float64))
            names = list(arguments)

            def function(*tensors: Tensor | None, names: list[str] = names) -> Tensor:
                return getattr(ops, op)(**dict(zip(names, tensors, strict=True)))

            # The full Jacobian of a large sample takes minutes; the fast mode compares random projections of it.
            # Triton's interpreter is a thousand times slower than what it stands for.
            fast = sum(tensor.numel() for tensor in floating(arguments).values()) > (20 if on_triton else 100)
            assert torch.autograd.gradcheck(function, tuple(arguments.values()), fast_mode=fast), sample
            assert torch.autograd.gradgradcheck(function, tuple(arguments.values()), fast_mode=fast), sample


@pytest.mark.operators
def test_opcheck(implementation, op, sample):
    arguments = sample.arguments()
    torch.library.opcheck(overload(op), tuple(arguments.values()))
    if op in (LINEAR, RESIDUAL, PIVOTED, SPARSE):
        torch.library.opcheck(overload(op), tuple(with_gradients(arguments).values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=identify)
@pytest.mark.operators
def test_compiles_into_one_graph(implementation, op, dtype):
    torch._dynamo.reset()
    arguments = full_arguments(op, dtype)
    changed = [name for name in ("gram", "cross", "column_sum") if name in arguments]

    def model(arguments):
        arguments = {name: t.clone() if name in changed else t for name, t in arguments.items()}
        output = getattr(ops, op)(**arguments | {"x": arguments["x"] * 2})
        return [torch.relu(t) for t in ([arguments[name] for name in changed] if changed else [output])]

    expected = model(arguments)
    for ours, theirs in zip(torch.compile(model, fullgraph=True)(arguments), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.operators(LINEAR, RESIDUAL, PIVOTED, SPARSE)
def test_compiles_with_gradients(implementation, op):
    torch._dynamo.reset()
    eager, compiled = (with_gradients(full_arguments(op)) for _ in range(2))
    getattr(ops, op)(**eager).square().sum().backward()
    torch.compile(getattr(ops, op), fullgraph=True)(**compiled).square().sum().backward()
    for name in floating(eager):
        ours, theirs = compiled[name].grad, eager[name].grad
        # Sums in another order differ by roundings of their largest terms.
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 * theirs.abs().max().item())


@pytest.mark.operators
def test_exports(implementation, op):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, tensor in full_arguments(op).items():
                if name not in ("x", "z"):
                    self.register_buffer(name, tensor)

        def forward(self, **inputs):
            output = getattr(ops, op)(**inputs, **dict(self.named_buffers()))
            return next(self.buffers()) * 1 if output is None else output

    layer = Layer()
    inputs = {name: tensor for name, tensor in full_arguments(op).items() if name in ("x", "z")}
    program = torch.export.export(layer, (), inputs)
    assert any(op in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(**inputs), Layer()(**inputs))


@pytest.mark.parametrize("region", [torch.bfloat16, torch.float16], ids=identify)
@pytest.mark.operators(LINEAR, RESIDUAL, PIVOTED, SPARSE)
def test_autocast_casts_as_for_a_linear_layer(implementation, op, region, computes):
    computes(implementation, region)
    arguments = with_gradients(full_arguments(op))
    with torch.autocast("cpu", region):
        output = getattr(ops, op)(**arguments)
    assert output.dtype == region
    cast = arguments | {name: tensor.to(region) for name, tensor in floating(arguments).items()}
    assert torch.equal(output, getattr(ops, op)(**cast))
    output.sum().backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in floating(arguments).values())


@pytest.mark.operators(LINEAR, RESIDUAL, PIVOTED, SPARSE)
def test_autocast_leaves_fp64_alone(implementation, op):
    with torch.autocast("cpu", torch.bfloat16):
        assert getattr(ops, op)(**full_arguments(op, torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("master", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.operators(GRAM, CROSS)
def test_autocast_leaves_statistics_alone(implementation, op, master):
    arguments = full_arguments(op)
    for name in ("gram", "cross", "column_sum"):
        if arguments.get(name) is not None:
            arguments[name] = arguments[name].to(master)
    expected = list(testing.run(getattr(ops, op), arguments))
    with torch.autocast("cpu", torch.bfloat16):
        actual = list(testing.run(getattr(ops, op), arguments))
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


@pytest.mark.parametrize("op", [LINEAR, RESIDUAL, PIVOTED, SPARSE])
def test_autocast_drops_the_packing_of_what_it_casts(monkeypatch, op):
    seen = []
    original = getattr(reference, op)

    def spy(*arguments):
        seen.append(arguments[-1])
        return original(*arguments)

    monkeypatch.setattr(reference, op, spy)
    packed = torch.zeros(3, dtype=torch.uint8)
    with backend.use("reference"):
        getattr(ops, op)(**full_arguments(op), packed=packed)
        with torch.autocast("cpu", torch.bfloat16):
            getattr(ops, op)(**full_arguments(op, torch.bfloat16), packed=packed)
            getattr(ops, op)(**full_arguments(op), packed=packed)
    assert [given is not None for given in seen] == [True, True, False]


@pytest.mark.parametrize("op", [LINEAR, RESIDUAL, PIVOTED, SPARSE])
def test_implementations_without_a_use_for_the_packing_ignore_it(op):
    arguments, packed = full_arguments(op), torch.zeros(3, dtype=torch.uint8)
    for name in ("reference", "triton"):
        if name in backend.available("cpu", op):
            with backend.use(name):
                plain = getattr(ops, op)(**arguments)
                given = with_gradients(arguments)
                output = getattr(ops, op)(**given, packed=packed)
                output.sum().backward()
            assert torch.equal(output, plain)
            assert all(tensor.grad is not None for tensor in floating(given).values())


@pytest.mark.parametrize("op", SCHEMAS)
def test_fakes_make_what_the_operator_makes(op):
    given = full_arguments(op)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(tensor) for name, tensor in given.items()}
        output = getattr(ops, op)(**fakes)
    if op in (LINEAR, RESIDUAL, PIVOTED, SPARSE):
        real = getattr(ops, op)(**full_arguments(op))
        assert (output.shape, output.dtype, output.stride()) == (real.shape, real.dtype, real.stride())
    else:
        assert output is None


def test_a_sparse_weight_is_expanded_inside_a_graph():
    stored = torch.rand(29, 37) < 0.4
    weight = torch.where(stored, torch.randn(29, 37), 0)
    arguments = testing.packed_bits(stored), weight[stored], 37
    assert torch.equal(reference.expanded(*arguments), weight)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(reference.expanded, fullgraph=True, dynamic=True)(*arguments), weight)
