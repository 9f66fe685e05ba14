"""Every operator on every implementation that has it: values, exactness, offsets, non-finite operands, threads, FLOPs.

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
LINEAR, RESIDUAL, PIVOTED = "lowrank_linear", "lowrank_residual_linear", "pivoted_linear"
SPARSE = "sparse_linear"
GRAM, CROSS = "gram_accumulate_", "cross_gram_accumulate_"
# For each operator one sample that has every argument and no size that is a multiple of a tile.
FULL = {LINEAR: "prime", RESIDUAL: "both-16", PIVOTED: "prime", SPARSE: "prime", GRAM: "prime", CROSS: "prime"}


def identify(value: object) -> str:
    return str(value).removeprefix("torch.")


def full_sample(op: str) -> testing.Sample:
    return next(sample for sample in testing.sample_inputs(op) if sample.name == FULL[op])


def check_value(op: str, arguments: dict) -> None:
    dtype = arguments["x"].dtype
    exact = list(testing.run(getattr(reference, op), testing.exact(arguments)))
    yardstick = testing.run(testing.plain(op), arguments)
    actual = testing.run(getattr(ops, op), arguments)
    for ours, true, plain in zip(actual, exact, yardstick, strict=True):
        testing.assert_within_budget(ours, true, plain, dtype)


def test_every_compiled_implementation_of_this_machine_is_tested():
    assert mixrank_kernels.HAS_EXTENSION, "build the extension first: make test does it"
    isas = {f"cpu-{isa}" for isa in backend.isas()}
    for op in (LINEAR, GRAM):
        assert isas | {"cpu", "triton", "composite", "reference"} == set(backend.available("cpu", op))
    for op in (PIVOTED, SPARSE):
        assert isas | {"cpu", "composite", "reference"} == set(backend.available("cpu", op))
    assert "portable" in backend.isas()


@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.operators
def test_value_on_small_shapes(implementation, op, sample, dtype, computes):
    computes(implementation, dtype)
    check_value(op, sample.arguments(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=identify)
@pytest.mark.operators(real_sizes=True, without=("triton",))
def test_value_on_layers_of_real_models(implementation, op, sample, dtype):
    check_value(op, sample.arguments(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.operators
def test_small_integers_are_exact(implementation, op, sample, dtype, computes):
    computes(implementation, dtype)
    arguments = sample.arguments(dtype)
    for tensor in arguments.values():
        if tensor is not None and tensor.is_floating_point():
            tensor.copy_(torch.randint(-2, 3, tensor.shape))
    # |hidden| stays below 2^8 and |y| below the dtype's last exact integer, so a few dense columns are enough.
    for name, kept in {
        "down": 8,
        "up": 4,
        "residual_down": 8,
        "residual_up": 2,
        "values": 4,
        "coefficients": 3,
    }.items():
        if arguments.get(name) is not None and arguments[name].dim() > 1:  # the values of a sparse weight are few
            arguments[name][..., kept:] = 0
    exact = testing.run(getattr(reference, op), testing.exact(arguments))
    for ours, true in zip(testing.run(getattr(ops, op), arguments), exact, strict=True):
        assert torch.equal(ours.double(), true)


@pytest.mark.parametrize("offset", range(8))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=identify)
@pytest.mark.operators
def test_operands_at_any_offset_of_a_poisoned_buffer(implementation, op, dtype, offset):
    """Every one-element shift of every operand, NaN around it: nothing outside is read into the result."""

    def shifted(tensor: torch.Tensor) -> torch.Tensor:
        poison = float("nan") if tensor.is_floating_point() else 0xFF if tensor.dtype == torch.uint8 else -1
        buffer = tensor.new_full((offset + tensor.numel() + 64,), poison)
        return buffer[offset : offset + tensor.numel()].view(tensor.shape).copy_(tensor)

    check_value(op, {name: shifted(tensor) for name, tensor in full_sample(op).arguments(dtype).items()})


def parts_that_leave_one(dtype: torch.dtype, large: float) -> dict[str, dict[str, torch.Tensor]]:
    """Residual layers of 16 x 16 that give 1 for an x of ``large``, 1, 0, ...: each adds large + 1 and takes large."""
    more, less, none = torch.zeros(3, 1, 16, dtype=dtype)
    more[0, :2], less[0, 0] = 1, 1
    up = torch.ones(16, 1, dtype=dtype)
    block = torch.zeros(1, 16, 16, dtype=dtype)
    block[0, :, 0] = -1
    places = {"crow": torch.tensor([0, 1]), "col": torch.tensor([0])}
    both = {"down": torch.cat([more, less]), "up": torch.cat([up, -up], 1)}
    return {
        "ranks": both,
        "bias": {"down": more, "up": up, "bias": torch.full((16,), -large, dtype=dtype)},
        "ranks-of-the-residual": {"down": none, "up": up} | {f"residual_{name}": both[name] for name in both},
        "factors-and-residual": {"down": more, "up": up, "residual_down": less, "residual_up": -up},
        "factors-and-blocks": {"down": more, "up": up, "values": block} | places,
        "residual-and-blocks": {"down": none, "up": up, "residual_down": more, "residual_up": up, "values": block}
        | places,
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=identify)
@pytest.mark.operators(LINEAR, RESIDUAL)
def test_nothing_is_rounded_before_the_end(implementation, op, dtype, computes):
    """``large + 1`` is no number of this dtype: a part that is rounded on the way gives 0 or 2 in place of 1.

    With vdpbf16ps the intermediates are rounded, once and to nearest even, and nothing else is. So they are by
    libraries, which a block-sparse residual does not go to.
    """
    computes(implementation, dtype)
    rounding = {"cpu-avx512bf16", "composite"} if dtype == torch.bfloat16 else set()
    large = 2 / torch.finfo(dtype).eps
    for name, arguments in parts_that_leave_one(dtype, large).items():
        if op == RESIDUAL or set(arguments) <= {"down", "up", "bias"}:
            for rows in (1, 40):
                x = torch.zeros(rows, 16, dtype=dtype)
                x[:, 0], x[:, 1] = large, 1
                y = getattr(ops, op)(x, **arguments)
                rounds = implementation in rounding and not (implementation == "composite" and "values" in arguments)
                expected = with_rounded_intermediates(x, **arguments) if rounds else torch.ones(rows, 16, dtype=dtype)
                assert torch.equal(y, expected), name


def with_rounded_intermediates(x, down, up, bias=None, residual_down=None, residual_up=None, values=None, **_places):
    """The residual layer of one block in fp64, but for intermediates in the dtype of ``x``."""
    wide = x.double()
    y = (wide @ down.double().mT).to(x.dtype).double() @ up.double().mT
    if bias is not None:
        y = y + bias.double()
    if residual_down is not None:
        y = y + (wide @ residual_down.double().mT).to(x.dtype).double() @ residual_up.double().mT
    if values is not None:
        y = y + wide @ values[0].double().mT
    return y.to(x.dtype)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=identify)
@pytest.mark.operators(PIVOTED)
def test_what_the_pivots_make_is_rounded_once(implementation, op, dtype, rows):
    """``large + 1`` is no number of this dtype: an intermediate that is rounded before its bias gives 0 or 2, not 1."""
    large = 2 / torch.finfo(dtype).eps
    x, down = torch.zeros(rows, 16, dtype=dtype), torch.zeros(9, 16, dtype=dtype)
    x[:, 0], x[:, 1], down[:, :2] = large, 1, 1
    index = torch.cat([torch.arange(1, 19, 2), torch.arange(0, 18, 2), torch.arange(18, 60)])
    bias = torch.full((60,), -large, dtype=dtype)
    y = ops.pivoted_linear(x, down, torch.eye(51, 9, dtype=dtype), index, bias)
    rounds = implementation == "composite" and dtype == torch.bfloat16
    assert rounds or torch.equal(y[:, index[:9]], torch.ones(rows, 9, dtype=dtype))
    exact = implementation not in ("composite", "cpu-avx512bf16") or dtype == torch.float16
    assert not exact or torch.equal(y[:, index[9:18]], torch.ones(rows, 9, dtype=dtype))
    assert torch.equal(y[:, 18:], bias[18:].expand(rows, -1))


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=identify)
@pytest.mark.operators(SPARSE, without=("composite",))
def test_a_sparse_weight_and_its_factors_are_rounded_together(implementation, op, dtype, rows):
    """``large + 1`` is no number of this dtype: a part that is rounded before another is added gives 0 or 2, not 1."""
    large = 2 / torch.finfo(dtype).eps
    x = torch.zeros(rows, 200, dtype=dtype)
    x[:, 0], x[:, 1], x[:, 199] = large, 1, -large
    # One of these is in another chunk of features: both in S, one in S and one in the factors, one in S and the bias.
    first, last = torch.zeros(20, 200, dtype=torch.bool), torch.zeros(20, 200, dtype=torch.bool)
    first[:, :2], last[:, 199] = True, True
    both, down = first | last, torch.zeros(1, 200, dtype=dtype)
    down[0, 199] = 1
    up, bias = torch.ones(20, 1, dtype=dtype), torch.full((20,), -large, dtype=dtype)
    for stored, rest in ((both, {}), (first, {"down": down, "up": up}), (first, {"bias": bias})):
        values = torch.ones(int(stored.sum()), dtype=dtype)
        y = ops.sparse_linear(x, testing.packed_bits(stored), values, **rest)
        assert torch.equal(y, torch.ones(rows, 20, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.operators(PIVOTED, SPARSE, without=("composite", "reference"))
def test_a_bias_of_any_stride_is_that_bias(implementation, op, dtype):
    arguments = full_sample(op).arguments(dtype)
    spread = arguments["bias"].repeat_interleave(2)[::2]
    assert torch.equal(getattr(ops, op)(**arguments | {"bias": spread}), getattr(ops, op)(**arguments))


NON_FINITE = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", NON_FINITE)
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.operators(LINEAR, RESIDUAL, PIVOTED)
def test_non_finite_inputs_reach_their_own_row_alone(implementation, op, dtype, value, computes):
    computes(implementation, dtype)
    arguments = full_sample(op).arguments(dtype)
    clean = getattr(ops, op)(**arguments)
    others = torch.arange(len(clean)) != 3
    # Where an infinity meets a zero of down it is NaN; where all it meets is up, it is infinite.
    for zeroed in ([], [1], [0, 1]):
        poisoned = arguments | {"x": arguments["x"].clone(), "down": arguments["down"].clone()}
        poisoned["x"][3, 2] = value
        poisoned["down"][zeroed, 2] = 0
        actual = getattr(ops, op)(**poisoned)
        exact = getattr(reference, op)(**testing.exact(poisoned))
        assert not actual[3].isfinite().any()
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(actual), kind(exact)), kind.__name__
        if not zeroed:
            assert torch.equal(actual[others], clean[others])


@pytest.mark.parametrize("value", NON_FINITE)
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.operators(SPARSE, without=("composite", "reference"))
def test_non_finite_inputs_reach_the_stored_entries_alone(implementation, op, dtype, value):
    sample = next(sample for sample in testing.sample_inputs(op) if sample.name == "no-factors")
    arguments = sample.arguments(dtype)
    poisoned = arguments | {"x": arguments["x"].clone()}
    poisoned["x"][3, 2] = value
    clean, actual = ops.sparse_linear(**arguments), ops.sparse_linear(**poisoned)
    reached = torch.zeros_like(clean, dtype=torch.bool)
    weight = reference.expanded(arguments["mask"], arguments["values"], arguments["x"].shape[-1])
    reached[3] = weight[:, 2] != 0
    assert 0 < reached.sum() < len(weight)
    expected = clean.masked_scatter(reached, (value * weight[:, 2])[reached[3]])
    assert torch.equal(actual.nan_to_num(1e3), expected.nan_to_num(1e3))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", NON_FINITE)
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.operators(GRAM, CROSS)
def test_non_finite_inputs_reach_their_own_feature_alone(implementation, op, dtype, value, computes):
    computes(implementation, dtype)
    master = {GRAM: "gram", CROSS: "cross"}[op]
    arguments = full_sample(op).arguments(dtype)
    arguments["x"][4, :3] = 0
    poisoned = arguments | {"x": arguments["x"].clone()}
    poisoned["x"][4, 7] = value
    clean, actual = (next(iter(testing.run(getattr(ops, op), given))) for given in (arguments, poisoned))
    others = torch.arange(arguments[master].shape[0]) != 7
    columns = others if op == GRAM else torch.ones(arguments[master].shape[1], dtype=torch.bool)
    assert not actual[7].isfinite().any()
    assert torch.equal(actual[others][:, columns], clean[others][:, columns])


@pytest.mark.operators(without=("reference",))
def test_results_do_not_depend_on_the_number_of_threads(implementation, op):
    sample = testing.sample_inputs(op, real_sizes=implementation != "triton")[0]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(next(iter(testing.run(getattr(ops, op), sample.arguments()))))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_flops_are_counted():
    x, down, up = torch.ones(3, 7, 32), torch.ones(4, 32), torch.ones(48, 4)
    residual = {
        "residual_down": torch.ones(2, 32),
        "residual_up": torch.ones(48, 2),
        "crow": torch.tensor([0, 1, 1, 3]),
        "col": torch.tensor([0, 1, 0]),
        "values": torch.ones(3, 16, 16),
    }

    def counted(function, *args, **kwargs) -> int:
        with FlopCounterMode(display=False) as counter:
            function(*args, **kwargs)
        return counter.get_total_flops()

    assert counted(ops.lowrank_linear, x, down, up) == 2 * 21 * 4 * (32 + 48)
    assert counted(ops.lowrank_residual_linear, x, down, up) == 2 * 21 * 4 * (32 + 48)
    both = 2 * 21 * (4 + 2) * (32 + 48) + 2 * 21 * 3 * 16 * 16
    assert counted(ops.lowrank_residual_linear, x, down, up, **residual) == both
    index = torch.cat([torch.arange(4), torch.arange(4, 48)])
    assert counted(ops.pivoted_linear, x, down, torch.ones(44, 4), index) == 2 * 21 * 4 * (32 + 48 - 4)
    mask = testing.packed_bits(torch.arange(48 * 32).reshape(48, 32) % 3 == 0)
    assert counted(ops.sparse_linear, x, mask, torch.ones(512)) == 2 * 21 * 512
    assert counted(ops.sparse_linear, x, mask, torch.ones(512), down, up) == 2 * 21 * (512 + 4 * (32 + 48))
    # The same work by name, past Python's wrapper with its positions.
    assert counted(overload(RESIDUAL), x, down, up, **residual) == both
    assert counted(ops.gram_accumulate_, torch.zeros(32, 32), x) == 21 * 32 * 33
    assert counted(ops.cross_gram_accumulate_, torch.zeros(32, 5), x, torch.ones(3, 7, 5)) == 2 * 21 * 32 * 5


def test_every_operator_is_complete():
    for op in SCHEMAS:
        assert getattr(mixrank_kernels, op) is getattr(ops, op)
        assert callable(getattr(reference, op))
        assert callable(testing.plain(op))
        assert testing.sample_inputs(op)
        assert testing.sample_inputs(op, real_sizes=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.parametrize("real_sizes", [False, True], ids=["small", "real"])
@pytest.mark.parametrize("op", SCHEMAS)
def test_value_on_a_gpu(op, real_sizes, dtype):
    for name in backend.available("cuda", op):
        for sample in testing.sample_inputs(op, real_sizes=real_sizes):
            arguments = {n: None if t is None else t.cuda() for n, t in sample.arguments(dtype).items()}
            with backend.use(name):
                check_value(op, arguments)
