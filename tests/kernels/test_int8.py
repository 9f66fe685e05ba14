"""Layers of 8-bit weights on every implementation that has them: codes, exact sums, and what surrounds them.

The reference defines the numbers. With quantised rows and no bias every implementation gives its very bits, as sums of
codes are exact and what follows is two products of fp32 numbers.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mixrank_kernels
from mixrank_kernels import backend, ops, packing, reference, testing
from mixrank_kernels._schema import INT8_SCHEMAS
from mixrank_kernels.flops import FlopCounterMode

DENSE, LOWRANK, SPARSE = "int8_linear", "int8_lowrank_linear", "int8_sparse_linear"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DYNAMIC = pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "weight-only"])
EXTENSION = pytest.mark.parametrize("isa", backend.isas())


def identify(value: object) -> str:
    return str(value).removeprefix("torch.")


def named(op: str, name: str, dtype: torch.dtype = torch.float32) -> dict:
    return next(sample for sample in testing.sample_inputs(op) if sample.name == name).arguments(dtype)


def pack(arguments: dict) -> Tensor | None:
    if "mask" in arguments:
        return packing.packed_int8_sparse(**{n: t for n, t in arguments.items() if n not in ("x", "bias")})
    first, second = arguments.get("weight", arguments.get("down")), arguments.get("up")
    return packing.packed_int8(first, second, dynamic=arguments["dynamic"])


def check_value(op: str, arguments: dict) -> None:
    actual = getattr(ops, op)(**arguments)
    expected = getattr(reference, op)(**arguments)
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(getattr(ops, op)(**arguments, packed=pack(arguments)), actual), "packing changed a bit"
    if arguments.get("dynamic"):
        bare = arguments | {"bias": None}
        assert torch.equal(getattr(ops, op)(**bare), getattr(reference, op)(**bare))
        # A bias is added with one rounding in place of two.
        largest = expected.float().abs().amax() if expected.numel() else 0
        assert (actual.float() - expected.float()).abs().sum() <= torch.finfo(
            actual.dtype
        ).eps * largest * actual.numel()
    else:
        exact = testing.plain(op)(**testing.exact(arguments))
        testing.assert_within_budget(actual, exact, testing.plain(op)(**arguments), arguments["x"].dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.operators(*INT8_SCHEMAS)
def test_value_on_small_shapes(implementation, op, sample, dtype):
    check_value(op, sample.arguments(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.operators(*INT8_SCHEMAS, real_sizes=True, without=("cpu-portable",))
def test_value_on_layers_of_real_models(implementation, op, sample, dtype):
    check_value(op, sample.arguments(dtype))


def test_codes_of_rows_are_those_of_the_definition():
    x = torch.tensor([[-1.0, 0.0, 1.55, 4.1], [2.0, 4.0, 5.1, 1.0], [-2.55, -1.0, -0.5, -0.015]])
    codes, scale = reference.quantise_rows(x)
    assert scale[:, 0].tolist() == pytest.approx([5.1 / 255, 5.1 / 255, 2.55 / 255])
    # From 0 to 255 with zero points 50, 0 and 255; 77.5 goes to the even neighbour where its product is exact.
    assert (codes[0] + 50).tolist() == [0.0, 50.0, pytest.approx(127.5, abs=0.5), 255.0]
    assert codes[1].tolist() == [100.0, 200.0, 255.0, 50.0]
    assert (codes[2] + 255).tolist() == [0.0, 155.0, 205.0, pytest.approx(253.5, abs=0.5)]
    halves = torch.tensor([[0.0, 0.5, 1.5, 2.5, 255.0]])
    assert reference.quantise_rows(halves)[0][0].tolist() == [0.0, 0.0, 2.0, 2.0, 255.0]


@pytest.mark.operators(DENSE, LOWRANK)
def test_the_codes_on_every_implementation_are_those_of_the_reference(implementation, op):
    """A weight that is the identity shows the codes of x themselves, halves to the even neighbour among them."""
    k = 37
    x = torch.cat(
        [torch.randn(50, k) * 10 ** torch.linspace(-25, 25, 50)[:, None], torch.rand(4, k), -torch.rand(4, k)]
    )
    x = torch.cat([x, torch.arange(k)[None] / 2 * torch.ones(1, k), torch.full((1, k), 3.0)])
    x[-2, 0] = 255.0
    eye, ones = torch.eye(k, dtype=torch.int8), torch.ones(k)
    if op == DENSE:
        arguments = {"weight": eye, "scale": ones}
    else:
        arguments = {"down": eye, "down_scale": ones, "up": eye, "up_scale": ones}
    codes, scale = reference.quantise_rows(x)
    expected = codes * scale
    if op == LOWRANK:
        codes, scale = reference.quantise_rows(expected)
        expected = codes * scale
    assert torch.equal(getattr(ops, op)(x, **arguments), expected)


@pytest.mark.operators(DENSE)
def test_sums_do_not_saturate(implementation, op):
    """The largest sums that 65536 terms can have; and pairs of products that leave 16 bits."""
    k = 65536
    x = torch.ones(2, k)
    x[1] = -1
    for code in (-128, 127):
        weight = torch.full((3, k), code, dtype=torch.int8)
        y = ops.int8_linear(x, weight, torch.ones(3))
        expected = torch.tensor([255.0 * code * k]) * (torch.tensor([1.0]) / 255)
        assert torch.equal(y[0], expected.expand(3))
        assert torch.equal(y[1], -expected.expand(3))


@DYNAMIC
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.operators(DENSE, LOWRANK)
def test_non_finite_inputs_reach_their_own_row_alone(implementation, op, value, dynamic):
    arguments = named(op, "prime") | {"dynamic": dynamic}
    clean = getattr(ops, op)(**arguments)
    others = torch.arange(len(clean)) != 3
    for column in (0, 126):
        x = arguments["x"].clone()
        x[3, column] = value
        actual = getattr(ops, op)(**arguments | {"x": x})
        assert torch.equal(actual[others], clean[others])
        assert not actual[3].isfinite().all()
        if dynamic:
            assert actual[3].isnan().all()


@pytest.mark.operators(DENSE, LOWRANK)
def test_rows_of_tiny_or_huge_numbers(implementation, op):
    arguments = named(op, "prime")
    x = arguments["x"].clone()
    x[0], x[1], x[2, 0], x[2, 1] = 0, 2.0**-110, 3e38, -3e38
    y = getattr(ops, op)(**arguments | {"x": x})
    assert torch.equal(y[:2], arguments["bias"].expand(2, -1))
    assert y[2].isnan().all(), "its span is beyond fp32"
    assert y[3:].isfinite().all()


@pytest.mark.parametrize("offset", range(1, 8))
@pytest.mark.operators(DENSE, LOWRANK)
def test_operands_at_any_offset_of_a_poisoned_buffer(implementation, op, offset):
    arguments = named(op, "prime")

    def shifted(value):
        if not isinstance(value, Tensor):
            return value
        poison = float("nan") if value.is_floating_point() else 77
        buffer = value.new_full((offset + value.numel() + 64,), poison)
        return buffer[offset : offset + value.numel()].view(value.shape).copy_(value)

    expected = getattr(ops, op)(**arguments)
    moved = {name: shifted(value) for name, value in arguments.items()}
    assert torch.equal(getattr(ops, op)(**moved), expected)
    if pack(arguments) is not None:
        assert torch.equal(getattr(ops, op)(**moved, packed=shifted(pack(arguments))), expected)


@DYNAMIC
@pytest.mark.operators(DENSE, LOWRANK, without=("reference",))
def test_results_do_not_depend_on_the_number_of_threads(implementation, op, dynamic):
    threads, sample = torch.get_num_threads(), named(op, "prime") | {"dynamic": dynamic}
    for rows in (1, 13, 40, 200):
        arguments = sample | {"x": torch.randn(rows, 127)}
        results = []
        try:
            for count in (1, 2, 3, 24):
                torch.set_num_threads(count)
                results.append(getattr(ops, op)(**arguments))
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(result, results[0]) for result in results)


@EXTENSION
def test_packed_codes_of_other_weights_are_refused_or_not_used(isa):
    arguments = named(LOWRANK, "prime")
    with backend.use(f"cpu-{isa}"):
        expected, packed = ops.int8_lowrank_linear(**arguments), pack(arguments)
        assert packing.packed_int8(arguments["down"], arguments["up"], dynamic=True) is packed
        for other in (
            {"dynamic": False},
            {"up": arguments["up"][:-1].clone(), "bias": None, "up_scale": torch.ones(60)},
        ):
            with pytest.raises(RuntimeError, match="packed must be made from these weights"):
                ops.int8_lowrank_linear(**arguments | other, packed=packed)
        with pytest.raises(RuntimeError, match="packed must be whole, but it was cut"):
            ops.int8_lowrank_linear(**arguments, packed=packed[:-64])
        with pytest.raises(RuntimeError, match=r"packed must come from mixrank_kernels\.packing"):
            ops.int8_lowrank_linear(**arguments, packed=packed[:10])
        # A write that torch does not count: the codes themselves are used.
        arguments["up"].data.mul_(-1)
        assert torch.equal(
            ops.int8_lowrank_linear(**arguments | {"bias": None}, packed=packed),
            reference.int8_lowrank_linear(**arguments | {"bias": None}),
        )
        # One that it counts: they are packed anew.
        arguments["up"].mul_(-1)
        assert packing.packed_int8(arguments["down"], arguments["up"], dynamic=True) is not packed
        assert torch.equal(ops.int8_lowrank_linear(**arguments, packed=pack(arguments)), expected)


def test_packing_takes_the_bytes_of_the_codes():
    arguments = next(s for s in testing.sample_inputs(LOWRANK, real_sizes=True) if s.name == "vit-b-fc1").arguments()
    codes = arguments["down"].nbytes + arguments["up"].nbytes
    assert codes < pack(arguments).nbytes < 1.1 * codes


def test_who_serves_the_operators_is_explained():
    for op in INT8_SCHEMAS:
        assert {f"cpu-{isa}" for isa in backend.isas()} | {"cpu", "reference"} == set(backend.available("cpu", op))
        arguments = named(op, "prime")
        found = backend.explain(op, *arguments.values())
        assert found.chosen == f"cpu-{backend.isas()[0]}"
        assert f"it has no kernel for {op}" in found.refused["triton"]
        assert f"it has no kernel for {op}" in found.refused["composite"]
        assert backend.available("cuda", op)[0] == "reference"
        assert getattr(mixrank_kernels, op) is getattr(ops, op)


def test_flops_are_counted():
    def counted(function, *args) -> int:
        with FlopCounterMode(display=False) as counter:
            function(*args)
        return counter.get_total_flops()

    dense, lowrank, sparse = named(DENSE, "leading-dims"), named(LOWRANK, "prime-pivoted"), named(SPARSE, "prime")
    assert counted(ops.int8_linear, *dense.values()) == 2 * 30 * 20 * 24
    assert counted(ops.int8_lowrank_linear, *lowrank.values()) == 2 * 63 * 5 * (127 + 56)
    assert counted(ops.int8_sparse_linear, *sparse.values()) == 2 * 63 * (len(sparse["values"]) + 5 * (127 + 61))
