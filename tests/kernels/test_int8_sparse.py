"""What int8_sparse_linear has for itself; what it shares with the other layers of 8 bits is tested with these."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixrank_kernels import backend, ops, packing, reference, testing

from .test_guard_bands import allocations  # noqa: F401  (a fixture)
from .test_int8 import SPARSE, pack
from .test_int8_calls import assert_refused


def made(rows: int = 30, k: int = 127, n: int = 61, r: int = 5, density: float = 0.3) -> dict[str, Tensor | None]:
    stored = torch.rand(n, k) < density
    codes = lambda *shape: torch.randint(-128, 128, shape, dtype=torch.int8)  # noqa: E731
    arguments = {"x": torch.randn(rows, k), "mask": testing.packed_bits(stored), "values": codes(int(stored.sum()))}
    arguments["scale"] = torch.rand(n) / 100
    if r:
        arguments |= {"down": codes(r, k), "down_scale": torch.rand(r) / 100}
        arguments |= {"up": codes(n, r), "up_scale": torch.rand(n) / 100}
    return arguments | {"bias": torch.randn(n)}


def floating(arguments: dict) -> dict[str, Tensor | None]:
    """The weights that the codes stand for, rounded to fp32, as arguments of sparse_linear."""
    mask, scale = arguments["mask"], arguments["scale"]
    row = reference.unpacked_bits(mask, 8 * mask.shape[1]).nonzero()[:, 0]
    weights = {"mask": mask, "values": arguments["values"].float() * scale[row]}
    for name in ("down", "up"):
        if arguments.get(name) is not None:
            weights[name] = arguments[name].float() * arguments[f"{name}_scale"][:, None]
    return {"x": arguments["x"], "bias": arguments["bias"]} | weights


@pytest.mark.parametrize("rows", [1, 5, 64, 200])
@pytest.mark.parametrize("r", [0, 5])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.operators(SPARSE)
def test_it_is_sparse_linear_of_what_the_codes_stand_for(implementation, op, threads, r, rows):
    arguments, before = made(rows, r=r, density=0.1), torch.get_num_threads()
    expected = floating(arguments)
    try:
        torch.set_num_threads(threads)
        # of few entries a token is not multiplied along the rows where the weights are packed
        packed = packing.packed_sparse(*(expected.get(name) for name in ("mask", "values", "down", "up")))
        assert torch.equal(ops.int8_sparse_linear(**arguments), ops.sparse_linear(**expected, packed=packed))
    finally:
        torch.set_num_threads(before)


@pytest.mark.operators(SPARSE, without=("reference",))
def test_what_is_not_finite_reaches_the_outputs_alone_that_have_an_entry_for_it(implementation, op):
    arguments = made(r=0)
    arguments["x"][3, 7] = torch.inf
    stored = reference.unpacked_bits(arguments["mask"], 127)[:, 7]
    actual = ops.int8_sparse_linear(**arguments)
    assert torch.equal(~actual[3].isfinite(), stored), "a code of zero gives NaN, no entry gives nothing"
    assert actual[torch.arange(30) != 3].isfinite().all()


@pytest.mark.parametrize("offset", range(1, 8))
@pytest.mark.operators(SPARSE, without=("reference",))
def test_operands_at_any_offset_of_a_poisoned_buffer(implementation, op, offset):
    arguments = made()

    def shifted(value: Tensor) -> Tensor:
        buffer = value.new_full((offset + value.numel() + 64,), torch.nan if value.is_floating_point() else 77)
        return buffer[offset : offset + value.numel()].view(value.shape).copy_(value)

    expected = ops.int8_sparse_linear(**arguments)
    moved = {name: shifted(value) for name, value in arguments.items()}
    assert torch.equal(ops.int8_sparse_linear(**moved), expected)
    assert torch.equal(ops.int8_sparse_linear(**moved, packed=shifted(pack(arguments))), expected)


def test_every_weight_is_watched():
    arguments = made()
    for name in set(arguments) - {"x", "bias"}:
        before = pack(arguments)
        assert pack(arguments) is before
        arguments[name].copy_(arguments[name].clone())
        assert pack(arguments) is not before, name
    before = ops.int8_sparse_linear(**arguments)
    for name in set(arguments) - {"x", "bias", "mask"}:
        packed = pack(arguments)
        halved = arguments[name] * 0.5 if arguments[name].is_floating_point() else arguments[name].flip(0)
        arguments[name].data.copy_(halved)
        after = ops.int8_sparse_linear(**arguments, packed=packed)
        assert torch.equal(after, ops.int8_sparse_linear(**arguments)), f"{name}: a write that torch does not count"
        assert not torch.equal(after, before)
        before = after


@pytest.mark.parametrize("isa", backend.isas())
def test_packed_codes_of_others_are_refused(isa):
    arguments = made()
    with backend.use(f"cpu-{isa}"):
        right = pack(arguments).clone()
        other = (
            r"packed must be made from these weights, but it was made for a mask of \[61, 16\], R = 5 and \d+ values"
        )
        fp32 = floating(arguments)
        of_floats = packing.packed_sparse(fp32["mask"], fp32["values"], fp32["down"], fp32["up"])
        for packed, message in (
            (pack(made(density=0.2)), other),
            (of_floats, other),
            (right[:-64], "packed must be whole, but it was cut"),
            (right[:8], "packed must come from mixrank_kernels.packing, but it has another content"),
        ):
            with pytest.raises(RuntimeError, match=message):
                ops.int8_sparse_linear(**arguments, packed=packed)
        with pytest.raises(RuntimeError, match=other):
            ops.sparse_linear(**fp32, packed=right)
        for x in (arguments["x"].bfloat16(), arguments["x"].half()):
            given = arguments | {"x": x, "bias": None}
            assert torch.equal(ops.int8_sparse_linear(**given, packed=right), ops.int8_sparse_linear(**given))


@pytest.mark.usefixtures("implementation")
@pytest.mark.operators(SPARSE, without=("reference",))
def test_nothing_outside_the_output_is_written(implementation, op, allocations):  # noqa: F811
    for offset in (0, 1, 3, 7):
        for m, k, n, r in ((1, 5, 3, 2), (13, 33, 31, 0), (65, 129, 130, 33), (3, 300, 97, 16)):
            arguments = made(m, k, n, r)
            allocations.offset, allocations.poison, allocations.made = offset, -0.0, []
            output = ops.int8_sparse_linear(**arguments)
            assert [one.tensor.data_ptr() for one in allocations.made] == [output.data_ptr()]
            assert output.isfinite().all(), "an entry of the output was not written"
            allocations.made[0].assert_untouched()


def good_arguments() -> dict[str, Tensor]:
    ones = lambda *shape: torch.ones(*shape, dtype=torch.int8)  # noqa: E731
    arguments = {"x": torch.ones(3, 13), "values": ones(4), "scale": torch.ones(4), "bias": torch.ones(4)}
    arguments["mask"] = torch.tensor([[3, 16], [0, 1], [0, 0], [0, 0]], dtype=torch.uint8)
    return arguments | {"down": ones(2, 13), "down_scale": torch.ones(2), "up": ones(4, 2), "up_scale": torch.ones(4)}


def int8(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.int8)


TOGETHER = "down, down_scale, up, up_scale must be given together or not at all, but "
BAD_CALLS = [
    ({"x": torch.tensor(1.0)}, r"x must have shape \[\.\.\., K\].* but it was \[\]"),
    ({"x": torch.ones(3, 13).double()}, "x must have one of the dtypes float32, bfloat16, float16, .*float64"),
    ({"x": torch.ones(3, 13).long()}, "x must have one of the dtypes .*but it was int64"),
    ({"x": torch.ones(3, 0)}, "x must have at least one feature"),
    ({"mask": torch.ones(4, 3).byte()}, r"mask must have shape \[N, ceil\(K / 8\)\] with K = 13 .*but it was \[4, 3\]"),
    ({"mask": torch.ones(0, 2).byte()}, r"mask must have at least one row \(out features N\), but it had none"),
    ({"mask": torch.ones(4, 2).bool()}, "mask must have dtype uint8, but it was bool"),
    ({"mask": torch.ones(4, 4).byte()[:, ::2]}, r"mask must be contiguous, but its strides were \[4, 2\]"),
    ({"mask": torch.ones(4, 2, device="meta").byte()}, "mask must be on cpu as x is, but it was on meta"),
    ({"values": int8(2, 2)}, r"values must have shape \[nnz\], but it was \[2, 2\]"),
    ({"values": torch.ones(4)}, "values must have dtype int8, but it was float32"),
    ({"values": int8(8)[::2]}, r"values must be contiguous, but its strides were \[2\]"),
    ({"values": int8(4).to("meta")}, "values must be on cpu as x is, but it was on meta"),
    ({"scale": torch.ones(3)}, r"scale must have shape \[N\] with N = 4 \(the rows of mask\), but it was \[3\]"),
    ({"scale": torch.ones(4).half()}, "scale must have dtype float32, but it was float16"),
    ({"scale": torch.ones(8)[::2]}, r"scale must be contiguous, but its strides were \[2\]"),
    ({"down": None}, TOGETHER + "down was missing"),
    ({"down_scale": None, "up_scale": None}, TOGETHER + "down_scale, up_scale was missing"),
    ({"down": int8(2, 12)}, r"down must have shape \[R, K\] with K = 13 .*but it was \[2, 12\]"),
    ({"down": int8(0, 13), "up": int8(4, 0)}, r"down must have at least one row \(the rank R\), but it had none"),
    ({"down": torch.ones(2, 13)}, "down must have dtype int8, but it was float32"),
    ({"down": int8(13, 2).mT}, r"down must be contiguous, but its strides were \[1, 2\]"),
    ({"down_scale": torch.ones(3)}, r"down_scale must have shape \[R\] with R = 2 \(the rows of down\), .*\[3\]"),
    ({"down_scale": torch.ones(2).double()}, "down_scale must have dtype float32, but it was float64"),
    (
        {"up": int8(4, 3)},
        r"up must have shape \[N, R\] with N = 4 .* and R = 2 .*but it was \[4, 3\]",
    ),
    ({"up": torch.ones(4, 2)}, "up must have dtype int8, but it was float32"),
    ({"up_scale": torch.ones(2)}, r"up_scale must have shape \[N\] with N = 4 \(the rows of up\), but it was \[2\]"),
    ({"up_scale": torch.ones(4, device="meta")}, "up_scale must be on cpu as x is, but it was on meta"),
    ({"bias": torch.ones(3)}, r"bias must have shape \[N\] with N = 4 \(the rows of mask\), but it was \[3\]"),
    ({"bias": torch.ones(4).bfloat16()}, "bias must have dtype float32 as x has, but it was bfloat16"),
    ({"packed": torch.zeros(8)}, "packed must have dtype uint8, but it was float32"),
    ({"packed": torch.zeros(2, 4).byte()}, r"packed must have shape \[bytes\], but it was \[2, 4\]"),
]


@pytest.mark.parametrize(("changed", "message"), BAD_CALLS)
def test_bad_arguments_are_named(changed, message):
    assert_refused(SPARSE, good_arguments() | changed, message)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mask": torch.tensor([[3, 16], [0, 1], [0, 32], [0, 0]], dtype=torch.uint8)}, "mask must have no bit set"),
        ({"values": int8(5)}, r"values must have shape \[nnz\] with nnz = 4 \(the bits of mask\), but it was \[5\]"),
    ],
)
@pytest.mark.operators(SPARSE)
def test_a_mask_that_does_not_fit_is_refused(implementation, op, changed, message):
    with pytest.raises(RuntimeError, match=f"^{SPARSE}: {message}"):
        ops.int8_sparse_linear(**good_arguments() | changed)
