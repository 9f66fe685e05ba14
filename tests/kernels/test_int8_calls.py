"""Layers of 8-bit weights under PyTorch's transforms, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixrank_kernels import _register, backend, ops, packing, testing
from mixrank_kernels._schema import INT8_SCHEMAS, overload

from .test_guard_bands import allocations  # noqa: F401  (a fixture)
from .test_int8 import DENSE, LOWRANK, SPARSE, pack

FULL = {DENSE: "leading-dims", LOWRANK: "prime-pivoted", SPARSE: "leading-dims"}


def full_arguments(op: str) -> dict:
    return next(s for s in testing.sample_inputs(op) if s.name == FULL[op]).arguments()


@pytest.mark.operators(*INT8_SCHEMAS)
def test_opcheck(implementation, op):
    for name in (FULL[op], "empty", "vector", "transposed"):
        sample = next(s for s in testing.sample_inputs(op) if s.name == name)
        torch.library.opcheck(overload(op), tuple(sample.arguments().values()))


@pytest.mark.operators(*INT8_SCHEMAS)
def test_compiles_into_one_graph(implementation, op):
    torch._dynamo.reset()
    arguments = full_arguments(op)

    def model(arguments):
        return torch.relu(getattr(ops, op)(**arguments | {"x": arguments["x"] * 2}))

    with torch.no_grad():
        assert torch.equal(torch.compile(model, fullgraph=True)(arguments), model(arguments))


@pytest.mark.operators(*INT8_SCHEMAS)
def test_exports(implementation, op):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rest = {}
            for name, value in full_arguments(op).items():
                if name != "x":
                    (self.register_buffer if isinstance(value, Tensor) else self.rest.__setitem__)(name, value)

        def forward(self, x):
            return getattr(ops, op)(x, **dict(self.named_buffers()), **self.rest)

    x = full_arguments(op)["x"]
    program = torch.export.export(Layer(), (x,))
    assert any(op in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(x), Layer()(x))


@pytest.mark.parametrize("region", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.operators(*INT8_SCHEMAS)
def test_autocast_casts_x_and_bias_alone_and_keeps_the_packing(implementation, op, region):
    arguments = full_arguments(op)
    with torch.autocast("cpu", region):
        output = getattr(ops, op)(**arguments, packed=pack(arguments))
    cast = arguments | {name: arguments[name].to(region) for name in ("x", "bias")}
    assert output.dtype == region
    assert torch.equal(output, getattr(ops, op)(**cast))


@pytest.mark.parametrize("op", INT8_SCHEMAS)
def test_fakes_make_what_the_operator_makes(op):
    arguments = full_arguments(op)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = {n: mode.from_tensor(v) if isinstance(v, Tensor) else v for n, v in arguments.items()}
        output = getattr(ops, op)(**fakes)
    real = getattr(ops, op)(**arguments)
    assert (output.shape, output.dtype, output.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.operators(*INT8_SCHEMAS)
def test_no_gradient_is_promised(implementation, op):
    arguments = full_arguments(op)
    for name in ("x", "bias"):
        given = arguments | {name: arguments[name].clone().requires_grad_()}
        for function in (getattr(ops, op), getattr(packing, op)):
            with pytest.raises(RuntimeError, match=f"{op}.*: {name} must not require a gradient.*inference_mode"):
                function(**given)
            with torch.no_grad():
                function(**given)
        with torch.inference_mode():
            getattr(ops, op)(**given)


@pytest.mark.skipif(not backend.isas(), reason="needs the extension")
@pytest.mark.parametrize("op", INT8_SCHEMAS)
def test_a_compiled_graph_packs_at_run_time(op, monkeypatch):
    torch._dynamo.reset()
    arguments = full_arguments(op)
    expected = getattr(ops, op)(**arguments)
    made = []
    original = packing._cache.pack
    monkeypatch.setattr(packing._cache, "pack", lambda *a: made.append(original(*a)) or made[-1])
    compiled = torch.compile(getattr(packing, op), fullgraph=True)
    with torch.no_grad():
        assert all(torch.equal(compiled(**arguments), expected) for _ in range(2))
    assert len(made) == 1, "the second call takes what the first one packed"
    assert made[0] is not None


@pytest.mark.usefixtures("implementation")
@pytest.mark.operators(DENSE, LOWRANK, without=("reference",))
def test_nothing_outside_the_output_is_written(implementation, op, allocations):  # noqa: F811
    sizes = ((1, 5, 3, 2), (13, 33, 31, 7), (25, 64, 65, 33), (3, 17, 97, 16))
    for offset in (0, 1, 3, 7):
        for m, k, n, r in sizes:
            for pivoted in (False, True)[: 1 + (op == LOWRANK)]:
                codes = lambda *shape: torch.randint(-128, 128, shape, dtype=torch.int8)  # noqa: E731
                if op == DENSE:
                    arguments = {"weight": codes(n, k), "scale": torch.rand(n)}
                else:
                    arguments = {"down": codes(r, k), "down_scale": torch.rand(r)}
                    arguments |= {"up": codes(n, r), "up_scale": torch.rand(n)}
                    arguments |= {"index": torch.randperm(n + r)} if pivoted else {}
                arguments["x"] = torch.randn(m, k)
                for dynamic in (True, False):
                    allocations.offset, allocations.poison, allocations.made = offset, -0.0, []
                    output = getattr(ops, op)(**arguments, dynamic=dynamic)
                    made = allocations.made
                    assert [one.tensor.data_ptr() for one in made] == [output.data_ptr()]
                    assert output.isfinite().all(), "an entry of the output was not written"
                    made[0].assert_untouched()


def good_arguments(op: str) -> dict:
    codes = {
        letter: torch.ones(*size, dtype=torch.int8) for letter, size in {"w": (4, 5), "d": (2, 5), "u": (4, 2)}.items()
    }
    shared = {"x": torch.ones(3, 5), "bias": torch.ones(4)}
    if op == DENSE:
        return shared | {"weight": codes["w"], "scale": torch.ones(4)}
    return shared | {"down": codes["d"], "down_scale": torch.ones(2), "up": codes["u"], "up_scale": torch.ones(4)}


def int8(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.int8)


def codes_calls(op: str, name: str, scale: str, letters: str, rows: int, cols: int) -> list[tuple]:
    shape = rf"{name} must have shape \[{letters[0]}, {letters[1]}\] with {letters[1]} = {cols} "
    return [
        (op, {name: int8(rows, cols + 1)}, shape + rf".*but it was \[{rows}, {cols + 1}\]"),
        (op, {name: int8(cols)}, shape),
        (op, {name: int8(0, cols)}, rf"{name} must have at least one row, but it had none"),
        (op, {name: torch.ones(rows, cols)}, rf"{name} must have dtype int8, but it was float32"),
        (op, {name: int8(cols, rows).mT}, rf"{name} must be contiguous, but its strides were \[1, {rows}\]"),
        (op, {name: int8(rows, cols).to("meta")}, rf"{name} must be on cpu as x is, but it was on meta"),
        (
            op,
            {scale: torch.ones(rows + 1)},
            rf"{scale} must have shape .* = {rows} \(the rows of {name}\), .*\[{rows + 1}\]",
        ),
        (op, {scale: torch.ones(rows).half()}, rf"{scale} must have dtype float32, but it was float16"),
        (op, {scale: torch.ones(2 * rows)[::2]}, rf"{scale} must be contiguous, but its strides were \[2\]"),
        (op, {scale: torch.ones(rows, device="meta")}, rf"{scale} must be on cpu as x is, but it was on meta"),
    ]


def shared_calls(op: str, first: str) -> list[tuple]:
    return [
        (op, {"x": torch.tensor(1.0)}, r"x must have shape \[\.\.\., K\].* but it was \[\]"),
        (op, {"x": torch.ones(3, 5).double()}, "x must have one of the dtypes float32, bfloat16, float16, .*float64"),
        (op, {"x": torch.ones(3, 5).long()}, "x must have one of the dtypes .*but it was int64"),
        (op, {"x": torch.ones(3, 0), first: int8(2, 0)}, "x must have at least one feature"),
        (
            op,
            {"x": torch.ones(1, 65537), first: int8(len(good_arguments(op)[first]), 65537)},
            f"{first} must have at most 65536 columns, but it had 65537",
        ),
        (op, {"bias": torch.ones(3)}, r"bias must have shape \[N\] with N = 4 .*but it was \[3\]"),
        (op, {"bias": torch.ones(4).bfloat16()}, "bias must have dtype float32 as x has, but it was bfloat16"),
        (op, {"bias": torch.ones(4, device="meta")}, "bias must be on cpu as x is, but it was on meta"),
        (op, {"packed": torch.zeros(8)}, "packed must have dtype uint8, but it was float32"),
        (op, {"packed": torch.zeros(2, 4).byte()}, r"packed must have shape \[bytes\], but it was \[2, 4\]"),
        (op, {"packed": torch.zeros(8).byte()[::2]}, r"packed must be contiguous, but its strides were \[2\]"),
        (op, {"packed": torch.zeros(8, device="meta").byte()}, "packed must be on cpu as x is, but it was on meta"),
    ]


BAD_CALLS = [
    *shared_calls(DENSE, "weight"),
    *codes_calls(DENSE, "weight", "scale", "NK", 4, 5),
    *shared_calls(LOWRANK, "down"),
    *codes_calls(LOWRANK, "down", "down_scale", "RK", 2, 5),
    *codes_calls(LOWRANK, "up", "up_scale", "NR", 4, 2),
    (LOWRANK, {"index": torch.arange(6)}, r"bias must have shape \[N\] with N = 6 \(the rows of down and of up\)"),
    (LOWRANK, {"bias": None, "index": torch.arange(5)}, r"index must have shape \[N\] with N = 6 .*but it was \[5\]"),
    (LOWRANK, {"bias": None, "index": torch.arange(6).int()}, "index must have dtype int64, but it was int32"),
    (LOWRANK, {"bias": None, "index": torch.arange(12)[::2]}, r"index must be contiguous, but its strides were \[2\]"),
    (LOWRANK, {"bias": None, "index": torch.arange(6).to("meta")}, "index must be on cpu as x is, but it was on meta"),
]


@pytest.mark.parametrize(("op", "changed", "message"), BAD_CALLS)
def test_bad_arguments_are_named(op, changed, message):
    assert_refused(op, good_arguments(op) | changed, message)


def assert_refused(op: str, arguments: dict, message: str) -> None:
    """By the best implementation, by the reference and while tracing, in the same words."""
    for name in (*backend.available("cpu", op)[:1], "reference"):
        with backend.use(name), pytest.raises(RuntimeError, match=f"^{op}: {message}"):
            getattr(ops, op)(**arguments)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {
            name: mode.from_tensor(value) if isinstance(value, Tensor) and value.device.type == "cpu" else value
            for name, value in arguments.items()
        }
        with pytest.raises(RuntimeError, match=f"{op}: {message}"):
            overload(op)(**fakes)


@pytest.mark.parametrize(
    ("index", "entry", "value"),
    [([0, 1, 2, 3, 4, 6], 5, 6), ([0, 1, -1, 3, 4, 5], 2, -1), ([5, 4, 3, 2, 1, 5], 5, 5), ([9, 0, 0, 1, 2, 3], 0, 9)],
)
@pytest.mark.operators(LOWRANK)
def test_an_index_that_is_no_permutation_is_refused(implementation, op, index, entry, value):
    arguments = good_arguments(op) | {"bias": None, "index": torch.tensor(index)}
    message = f"index must hold every number from 0 to 5 once, but entry {entry} was {value}$"
    with pytest.raises(RuntimeError, match=message):
        ops.int8_lowrank_linear(**arguments)


def test_arguments_that_are_left_out_have_their_defaults():
    arguments = tuple(good_arguments(DENSE)[name] for name in ("x", "weight", "scale"))
    assert _register.bind(DENSE, *arguments)[3:] == (None, True, None)
