"""The compiled extension itself: what it was built from, the choice of instruction set, and exactness on each of them.

Values, gradients, opcheck and compilation of the operators are tested over all implementations in test_ops.py.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import mixrank_kernels  # noqa: F401  (defines the schemas, which the extension needs first)
from mixrank_kernels import _C, reference

BEST_FIRST = ["avx512bf16", "avx512vnni", "avx512", "avx2", "portable"]
NEEDS = {
    "avx512bf16": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16"},
    "avx512vnni": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx2": {"avx2", "fma", "f16c"},
    "portable": set(),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(params=_C.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa("auto")


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def integers(*shape: int, high: int, dtype: torch.dtype) -> Tensor:
    return torch.randint(-high, high + 1, shape).to(dtype)


def layouts(matrix: Tensor) -> dict[str, Tensor]:
    """The same [rows, cols] matrix under every layout; NaN guards whatever does not belong to it."""
    rows, cols = matrix.shape
    wide = torch.full((2 * rows + 2, cols + 3), float("nan"), dtype=matrix.dtype)
    every_other_row = wide[1::2][:rows, 1 : 1 + cols]
    sparse = torch.full((rows, 2 * cols + 1), float("nan"), dtype=matrix.dtype)
    every_other_column = sparse[:, 1::2]
    for view in (every_other_row, every_other_column):
        view.copy_(matrix)
    return {
        "contiguous": matrix,
        "transposed": matrix.T.contiguous().T,
        "every other row, one element off": every_other_row,
        "every other column": every_other_column,
    }


def test_build_info_names_what_was_built() -> None:
    info = _C.build_info()
    assert info["version"] == importlib.metadata.version("mixrank-kernels")
    assert info["torch"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert info["compiler"].startswith(("gcc", "clang"))
    assert info["cpp_standard"] >= 201703
    assert info["cuda"] == (info["cuda_version"] is not None)
    assert info["isas"] == [name for name in BEST_FIRST if name in info["isas"]]
    assert "portable" in info["isas"]


def test_supported_isas_follow_the_cpu_features_best_first() -> None:
    features = {name for name, present in _C.cpu_features().items() if present}
    assert set(_C.cpu_features()) == set().union(*NEEDS.values())
    assert _C.supported_isas() == [name for name in _C.build_info()["isas"] if features >= NEEDS[name]]


def test_cpu_features_agree_with_the_kernel() -> None:
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            flags = next(set(line.split()) for line in cpuinfo if line.startswith("flags"))
    except (OSError, StopIteration):
        pytest.skip("needs /proc/cpuinfo with a line of flags")
    assert {name: name in flags for name in _C.cpu_features()} == _C.cpu_features()


def test_set_isa_takes_every_supported_name_and_auto() -> None:
    try:
        for name in _C.supported_isas():
            _C.set_isa(name)
            assert _C.get_isa() == name
    finally:
        _C.set_isa("auto")
    assert _C.get_isa() == _C.supported_isas()[0]


@pytest.mark.parametrize("name", ["", "AVX2", "sse9"])
def test_set_isa_refuses_other_names_and_keeps_the_choice(name: str) -> None:
    before = _C.get_isa()
    with pytest.raises(ValueError, match=f"must be one of 'auto'.*'portable'.* but it was '{name}'"):
        _C.set_isa(name)
    assert _C.get_isa() == before


def test_choose_names_the_kernel(isa: str, dtype: torch.dtype) -> None:
    for op in ("lowrank_linear", "sparse_linear", "gram_accumulate_"):
        assert _C.choose(op, str(dtype).removeprefix("torch.")).startswith(f"{isa}: ")


def test_choose_names_what_multiplies_codes(isa: str) -> None:
    product = {"portable": "plain C++", "avx2": "vpmaddwd", "avx512": "vpmaddwd"}.get(isa, "vpdpbusd")
    for op in ("int8_linear", "int8_lowrank_linear"):
        assert product in _C.choose(op, "bfloat16")


@pytest.mark.parametrize(
    ("op", "name"), [("linear", "float32"), ("lowrank_linear", "int8"), ("int8_linear", "float64")]
)
def test_choose_refuses_what_has_no_kernel(op: str, name: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        _C.choose(op, name)


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm from binutils")
def test_extension_uses_only_the_stable_abi_of_torch() -> None:
    listing = subprocess.run(["nm", "-DC", _C.__file__], capture_output=True, text=True, check=True).stdout
    undefined = [line for line in listing.splitlines() if " U " in line]
    assert undefined
    assert [line for line in undefined if "at::" in line or "c10::" in line] == []


# M, K, N, R: tiny; primes; around the register tiles (12 x 32, 6 x 16, 6 x 8) and the blocks of 64 terms, and both
# sides of the switch from dot products to packed weights (24 rows).
LOWRANK_SHAPES = [
    (1, 1, 1, 1),
    (3, 5, 2, 7),
    (24, 257, 33, 65),
    (25, 64, 32, 16),
    (29, 257, 65, 300),
    (37, 513, 31, 97),
]


@pytest.mark.parametrize("shape", LOWRANK_SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_lowrank_linear_is_exact_on_integers_in_every_layout(isa: str, dtype: torch.dtype, shape: tuple) -> None:
    torch.manual_seed(0)
    M, K, N, R = shape
    x, bias = integers(M, K, high=4, dtype=dtype), integers(N, high=4, dtype=dtype)
    down, up = integers(R, K, high=1, dtype=dtype), integers(N, R, high=1, dtype=dtype)
    exact = reference.lowrank_linear(x.double(), down.double(), up.double(), bias.double()).to(dtype)
    views = [layouts(operand) for operand in (x, down, up)]
    for name in views[0]:
        for operand in range(3):
            chosen = [view[name if i == operand else "contiguous"] for i, view in enumerate(views)]
            actual = torch.ops.mixrank_kernels.lowrank_linear(*chosen, bias)
            assert torch.equal(actual, exact), f"operand {operand} is {name}"


GRAM_SHAPES = [(1, 1), (5, 12), (7, 33), (255, 31), (513, 97), (2049, 40), (4200, 65)]


@pytest.mark.parametrize("gram_dtype", [torch.float64, torch.float32], ids=["gram64", "gram32"])
@pytest.mark.parametrize("shape", GRAM_SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_gram_is_exact_on_integers_and_touches_nothing_else(
    isa: str, dtype: torch.dtype, gram_dtype: torch.dtype, shape: tuple
) -> None:
    torch.manual_seed(0)
    M, K = shape
    x, weight = integers(M, K, high=4, dtype=dtype), integers(M, high=2, dtype=dtype)
    # The middle one of three matrices: its neighbours are the guard bands of a contiguous accumulator.
    before = torch.randint(-9, 10, (3, K, K)).to(gram_dtype)
    sums_before = torch.randint(-9, 10, (3, K)).to(gram_dtype)
    for row_weight in (None, weight):
        expected, expected_sums = before.clone(), sums_before.clone()
        reference.gram_accumulate_(expected[1], x, row_weight, expected_sums[1])
        for name, view in layouts(x).items():
            gram, sums = before.clone(), sums_before.clone()
            torch.ops.mixrank_kernels.gram_accumulate_(gram[1], view, row_weight, sums[1])
            assert torch.equal(gram, expected), name
            assert torch.equal(sums, expected_sums), name


@pytest.mark.parametrize("shape", [(1, 70), (11, 70), (12, 70), (49, 70), (197, 70), (300, 1024)], ids=str)
def test_where_the_rows_of_x_lie_changes_no_bit(isa: str, dtype: torch.dtype, shape: tuple) -> None:
    """Rows are read where they are, or copied first: those at odd addresses, and many that lie 4 KiB apart."""
    torch.manual_seed(0)
    M, K = shape
    x, down, up = (torch.randn(size).to(dtype) for size in ((M, K), (24, K), (90, 24)))
    expected = torch.ops.mixrank_kernels.lowrank_linear(x, down, up)
    page = -(-K * dtype.itemsize // 4096) * 4096 // dtype.itemsize
    for offset, stride in ((1, K), (0, K + 2), (1, K + 3), (0, page), (1, page)):
        buffer = x.new_full((offset + M * stride + K,), float("nan"))
        view = buffer.as_strided((M, K), (stride, 1), offset).copy_(x)
        actual = torch.ops.mixrank_kernels.lowrank_linear(view, down, up)
        assert torch.equal(actual, expected), f"offset {offset}, stride {stride}"


SHAPES_BY_ROWS = [(5, 300, 97, 40), (49, 100, 200, 24), (100, 100, 200, 70), (197, 384, 384, 150)]


@pytest.mark.parametrize("shape", SHAPES_BY_ROWS, ids=lambda shape: f"{shape[0]} rows")
def test_results_do_not_depend_on_the_number_of_threads(isa: str, dtype: torch.dtype, shape: tuple) -> None:
    torch.manual_seed(0)
    M, K, N, R = shape
    x, down, up = (torch.randn(size).to(dtype) for size in ((M, K), (R, K), (N, R)))
    threads = torch.get_num_threads()
    results = []
    try:
        # 24 threads are more than there are row blocks, so the columns are divided instead.
        for count in (1, 2, 3, 24):
            torch.set_num_threads(count)
            gram, sums = torch.zeros(K, K, dtype=torch.float64), torch.zeros(K, dtype=torch.float64)
            y = torch.ops.mixrank_kernels.lowrank_linear(x, down, up)
            torch.ops.mixrank_kernels.gram_accumulate_(gram, x, None, sums)
            results.append((y, gram, sums))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_rounding_is_to_nearest_even_and_keeps_nan_infinity_and_subnormals(isa: str) -> None:
    one = torch.ones(1, 1)
    for dtype in (torch.bfloat16, torch.float16):
        eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
        # Each value is the sum of two that dtype holds; the first three are halfway cases: down, up, and to infinity.
        pairs = [
            (1.0, eps / 2),
            (1 + eps, eps / 2),
            (torch.finfo(dtype).max, torch.finfo(dtype).max * eps / 4),
            (float("nan"), 0.0),
            (float("inf"), 1.0),
            (-float("inf"), 1.0),
            (tiny, tiny * eps) if dtype == torch.float16 else (1.0, 0.0),
            (-0.75, eps / 8),
        ]
        x = torch.tensor(pairs).to(dtype)
        expected = x.float().sum(1, keepdim=True).to(dtype)
        for rows in (1, 5):  # 8 rows are served by dot products, 40 by packed weights
            for columns in (1, 40):  # the remainder of a vector, and whole ones
                down, up = one.expand(1, 2).to(dtype), one.expand(columns, 1).to(dtype)
                y = torch.ops.mixrank_kernels.lowrank_linear(x.repeat(rows, 1), down, up)
                wanted = expected.repeat(rows, columns)
                torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True)


def test_memory_shared_with_an_accumulator_is_refused() -> None:
    buffer = torch.zeros(40)
    gram, x = buffer[:16].view(4, 4), buffer[8:28].view(5, 4)
    call = torch.ops.mixrank_kernels.gram_accumulate_
    with pytest.raises(RuntimeError, match="gram_accumulate_: gram must not share memory with x"):
        call(gram, x)
    with pytest.raises(RuntimeError, match="column_sum must not share memory with gram"):
        call(gram, x.clone(), None, buffer[12:16])
    with pytest.raises(RuntimeError, match="gram must not share memory with row_weight"):
        call(gram, x.clone(), buffer[10:15])
    assert torch.equal(buffer, torch.zeros(40))


def test_too_large_an_output_is_refused() -> None:
    one = torch.ones(1, 1)
    x, up = one.expand(2**40, 1), one.expand(2**40, 1)
    with pytest.raises(RuntimeError, match="lowrank_linear: the output must have fewer than"):
        torch.ops.mixrank_kernels.lowrank_linear(x, one, up)
