"""Sample inputs and the error budget, for tests and benchmarks of the operators and of whatever is built on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mixrank_kernels import reference

# Rounding of a half-precision result is common to every implementation, so a floor of whole ulps would hide real
# errors there; in the wide dtypes a few ulps cover another order of summation.
_FLOOR_ULPS = {torch.float64: 4.0, torch.float32: 4.0, torch.bfloat16: 1 / 16, torch.float16: 1 / 16}


@dataclass(frozen=True)
class Sample:
    """Named arguments of one operator call. ``arguments()`` makes them anew, with the same values each time."""

    op: str
    name: str
    make: Callable[[torch.Generator], dict[str, Tensor | None]]

    def arguments(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor | None]:
        made = self.make(torch.Generator().manual_seed(0))
        master = torch.float64 if dtype == torch.float64 else None
        return {
            name: tensor
            if tensor is None or (name in ("gram", "column_sum", "row_weight") and master is None)
            else _recast(tensor, dtype)
            for name, tensor in made.items()
        }

    def __str__(self) -> str:
        return self.name


def _recast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in another dtype with the very same strides and storage offset."""
    storage = tensor._base if tensor._base is not None else tensor
    return storage.to(dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def _linear(
    name: str, rows: tuple[int, ...], k: int, n: int, r: int, bias: bool = True, layout: Callable = lambda t: t
) -> Sample:
    def make(generator: torch.Generator) -> dict[str, Tensor | None]:
        x = layout(_normal(generator, *rows, k))
        down, up = _normal(generator, r, k) / k**0.5, _normal(generator, n, r) / r**0.5
        return {"x": x, "down": down, "up": up, "bias": _normal(generator, n) if bias else None}

    return Sample("lowrank_linear", name, make)


def _gram(
    name: str,
    rows: tuple[int, ...],
    k: int,
    weighted: bool = False,
    summed: bool = False,
    batched: bool = False,
    master: torch.dtype = torch.float64,
    layout: Callable = lambda t: t,
) -> Sample:
    def make(generator: torch.Generator) -> dict[str, Tensor | None]:
        x = layout(_normal(generator, *rows, k) + 0.25)
        lead = x.shape[:1] if batched else ()
        start = _normal(generator, *lead, k, k).to(master)
        return {
            "gram": start + start.mT,
            "x": x,
            "row_weight": torch.rand(x.shape[:-1], generator=generator) + 0.5 if weighted else None,
            "column_sum": _normal(generator, *lead, k).to(master) if summed else None,
        }

    return Sample("gram_accumulate_", name, make)


def every_other_row(x: Tensor) -> Tensor:
    """The same values as ``x`` as every second row of a taller buffer."""
    buffer = x.new_full((2 * x.shape[0], *x.shape[1:]), float("nan"))
    buffer[::2] = x
    return buffer[::2]


def transposed(x: Tensor) -> Tensor:
    """The same values as ``x``, stored column by column."""
    return x.mT.contiguous().mT


def slice_of_wider(x: Tensor) -> Tensor:
    """The same values as ``x`` inside a wider buffer, one element off its start, NaN around."""
    buffer = x.new_full((*x.shape[:-1], x.shape[-1] + 6), float("nan"))
    buffer[..., 1 : 1 + x.shape[-1]] = x
    return buffer[..., 1 : 1 + x.shape[-1]]


def _transposed_weights(sample: Sample) -> Sample:
    def make(generator: torch.Generator) -> dict[str, Tensor | None]:
        made = sample.make(generator)
        return {n: transposed(t) if n in ("down", "up") else t for n, t in made.items()}

    return Sample(sample.op, "transposed-weights", make)


_LINEAR_SMALL = (
    _linear("tiny", (3,), 5, 4, 2),
    _linear("ones", (1,), 1, 1, 1),
    _linear("prime", (63,), 127, 61, 5),
    _linear("vector", (), 33, 17, 9),
    _linear("no-bias", (7,), 24, 40, 8, bias=False),
    _linear("empty", (0,), 16, 8, 4),
    _linear("full-rank", (9,), 12, 12, 12),
    _linear("leading-dims", (2, 3, 5), 20, 24, 6),
    _linear("below-tile", (31,), 63, 31, 15),
    _linear("on-tile", (32,), 64, 32, 16),
    _linear("above-tile", (33,), 65, 33, 17),
    _linear("every-other-row", (10,), 32, 16, 8, layout=every_other_row),
    _linear("transposed", (10,), 32, 16, 8, layout=transposed),
    _linear("slice-of-wider", (10,), 32, 16, 8, layout=slice_of_wider),
    _transposed_weights(_linear("", (10,), 32, 16, 8)),
)
_LINEAR_REAL = (
    _linear("vit-ti-qkv", (197,), 192, 576, 56),
    _linear("vit-b-proj", (197,), 768, 768, 152),
    _linear("vit-b-fc1", (2, 197), 768, 3072, 304),
    _linear("vit-b-fc2", (197,), 3072, 768, 304),
    _linear("vit-b-fc2-one-token", (1,), 3072, 768, 304),
    _linear("swin-t-reduction", (49,), 384, 192, 64, bias=False),
)
_GRAM_SMALL = (
    _gram("tiny", (3,), 5),
    _gram("one", (1,), 1),
    _gram("vector", (), 9),
    _gram("prime", (127,), 61, weighted=True, summed=True),
    _gram("empty", (0,), 16, summed=True),
    _gram("weighted", (40,), 24, weighted=True),
    _gram("summed", (40,), 24, summed=True),
    _gram("fp32-master", (40,), 24, summed=True, master=torch.float32),
    _gram("leading-dims", (2, 3, 5), 20, weighted=True, summed=True),
    _gram("batched", (3, 17), 20, weighted=True, summed=True, batched=True),
    _gram("batched-plain", (2, 33), 33, batched=True),
    _gram("below-tile", (31,), 63),
    _gram("on-tile", (32,), 64, summed=True),
    _gram("above-tile", (33,), 65),
    _gram("every-other-row", (20,), 24, summed=True, layout=every_other_row),
    _gram("transposed", (20,), 24, weighted=True, layout=transposed),
    _gram("slice-of-wider", (20,), 24, layout=slice_of_wider),
)
_GRAM_REAL = (
    _gram("vit-ti", (4, 197), 192, summed=True),
    _gram("vit-b", (8, 197), 768, weighted=True, summed=True),
    _gram("vit-b-long", (5000,), 768),
)
_SAMPLES = {
    ("lowrank_linear", False): _LINEAR_SMALL,
    ("lowrank_linear", True): _LINEAR_REAL,
    ("gram_accumulate_", False): _GRAM_SMALL,
    ("gram_accumulate_", True): _GRAM_REAL,
}


def sample_inputs(op: str, *, real_sizes: bool = False) -> tuple[Sample, ...]:
    """The samples of the operator ``op``: small shapes around tile boundaries, or layers of real ViTs."""
    return _SAMPLES[op, real_sizes]


def plain_lowrank_linear(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None = None) -> Tensor:
    """What a user writes without this package: two linear layers in the dtype of the operands."""
    return F.linear(F.linear(x, down), up, bias)


def plain_gram_accumulate_(
    gram: Tensor, x: Tensor, row_weight: Tensor | None = None, column_sum: Tensor | None = None
) -> None:
    """What a user writes without this package: one product in fp32 (fp64 for fp64 x), added to the master."""
    wide = x.to(reference.accumulation_dtype(x.dtype))
    wide = wide if gram.dim() == 3 else wide.reshape(-1, x.shape[-1])
    weighted = wide if row_weight is None else wide * row_weight.to(wide.dtype).reshape(*wide.shape[:-1], 1)
    gram += weighted.mT @ wide
    if column_sum is not None:
        column_sum += weighted.sum(-2)


def plain(op: str) -> Callable:
    """The yardstick of the error budget for the operator ``op``: plain PyTorch in the dtype of its operands."""
    return {"lowrank_linear": plain_lowrank_linear, "gram_accumulate_": plain_gram_accumulate_}[op]


def run(function: Callable, arguments: dict[str, Tensor | None]) -> Iterator[Tensor]:
    """Call an operator on copies of what it changes, and yield its results: the output, or what it changed."""
    if "gram" not in arguments:
        yield function(**arguments)
        return
    copied = dict(arguments)
    for name in ("gram", "column_sum"):
        copied[name] = None if arguments[name] is None else arguments[name].clone()
    function(**copied)
    yield copied["gram"]
    if copied["column_sum"] is not None:
        yield copied["column_sum"]


def exact(arguments: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The same (already rounded) values in fp64."""
    return {name: None if tensor is None else tensor.double() for name, tensor in arguments.items()}


def assert_within_budget(
    actual: Tensor,
    reference64: Tensor,
    yardstick: Tensor,
    operand_dtype: torch.dtype,
    *,
    max_factor: float = 2.0,
    rms_factor: float = 1.0,
) -> None:
    """Fail where ``actual`` is less accurate than plain PyTorch on the same operands, both against fp64.

    The largest error may be ``max_factor`` times that of ``yardstick``, the root mean square error ``rms_factor``
    times, each plus a floor of a few units in the last place of ``operand_dtype``.

    Raises:
        AssertionError: the budget is exceeded, or shape, dtype or finiteness differ; the message has the numbers.
    """
    assert actual.shape == reference64.shape, f"shape {tuple(actual.shape)} instead of {tuple(reference64.shape)}"
    assert actual.dtype == yardstick.dtype, f"dtype {actual.dtype} instead of {yardstick.dtype}"
    if actual.numel() == 0:
        return
    assert actual.isfinite().all(), "the result has NaN or infinite entries"
    floor = _FLOOR_ULPS[operand_dtype] * torch.finfo(operand_dtype).eps
    error, base = (actual.double() - reference64), (yardstick.double() - reference64)
    largest, allowed = error.abs().max(), max_factor * base.abs().max() + floor * reference64.abs().max()
    assert largest <= allowed, f"largest error {largest:.3e}, allowed {allowed:.3e}"
    rms = error.square().mean().sqrt()
    allowed = rms_factor * base.square().mean().sqrt() + floor * reference64.square().mean().sqrt()
    assert rms <= allowed, f"root mean square error {rms:.3e}, allowed {allowed:.3e}"
