"""The sample inputs of every operator: small shapes around tile boundaries, and layers of real vision transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor

from mixrank_kernels._schema import Argument, tensor_of

# What stays as it is made in every dtype of the operands, unless they are fp64.
_MASTERS = ("gram", "cross", "column_sum", "row_weight", "scale", "down_scale", "up_scale")


@dataclass(frozen=True)
class Sample:
    """Named arguments of one operator call. ``arguments()`` makes them anew, with the same values each time."""

    op: str
    name: str
    make: Callable[[torch.Generator], dict[str, Argument]]

    def arguments(self, dtype: torch.dtype = torch.float32) -> dict[str, Argument]:
        made = self.make(torch.Generator().manual_seed(0))
        kept = () if dtype == torch.float64 else _MASTERS
        return {
            name: _recast(value, dtype) if _is_floating(value) and name not in kept else value
            for name, value in made.items()
        }

    def __str__(self) -> str:
        return self.name


def _is_floating(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.is_floating_point()


def _recast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in another dtype with the very same strides and storage offset."""
    storage = tensor._base if tensor._base is not None else tensor
    return storage.to(dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def _linear(
    name: str, rows: tuple[int, ...], k: int, n: int, r: int, bias: bool = True, layout: Callable = lambda t: t
) -> Sample:
    def make(generator: torch.Generator) -> dict[str, Argument]:
        x = layout(_normal(generator, *rows, k))
        down, up = _normal(generator, r, k) / k**0.5, _normal(generator, n, r) / r**0.5
        return {"x": x, "down": down, "up": up, "bias": _normal(generator, n) if bias else None}

    return Sample("lowrank_linear", name, make)


def _pivoted(
    name: str,
    rows: tuple[int, ...],
    k: int,
    n: int,
    r: int,
    bias: bool = True,
    index: torch.dtype = torch.int64,
    pivots: str = "anywhere",
    layout: Callable = lambda t: t,
) -> Sample:
    """Pivots ``"anywhere"``, or the ``"first"`` or ``"last"`` rows of the weight."""

    def make(generator: torch.Generator) -> dict[str, Argument]:
        places = torch.randperm(n, generator=generator) if pivots == "anywhere" else torch.arange(n)
        if pivots == "last":
            places = places.roll(r)
        return {
            "x": layout(_normal(generator, *rows, k)),
            "down": _normal(generator, r, k) / k**0.5,
            "coefficients": _normal(generator, n - r, r) / r**0.5,
            "index": torch.cat([places[:r].sort().values, places[r:].sort().values]).to(index),
            "bias": _normal(generator, n) if bias else None,
        }

    return Sample("pivoted_linear", name, make)


def _residual(
    name: str,
    rows: tuple[int, ...],
    k: int,
    n: int,
    r: int,
    q: int = 0,
    b: int = 0,
    nnz: int = 0,
    bias: bool = True,
    index: torch.dtype = torch.int64,
    duplicates: bool = False,
    layout: Callable = lambda t: t,
) -> Sample:
    """A residual of rank ``q`` (0: none) and of ``nnz`` blocks of size ``b`` (0: no block-sparse part at all)."""

    def make(generator: torch.Generator) -> dict[str, Argument]:
        made = _linear("", rows, k, n, r, bias, layout).make(generator)
        made |= dict.fromkeys(("residual_down", "residual_up", "crow", "col", "values"))
        if q:
            made["residual_down"] = _normal(generator, q, k) / k**0.5
            made["residual_up"] = _normal(generator, n, q) / q**0.5
        if b:
            crow, col = _pattern(generator, n // b, k // b, nnz, duplicates)
            made |= {"crow": crow.to(index), "col": col.to(index), "values": _normal(generator, nnz, b, b) / k**0.5}
        return made

    return Sample("lowrank_residual_linear", name, make)


def _pattern(generator: torch.Generator, rows: int, columns: int, nnz: int, duplicates: bool) -> tuple[Tensor, Tensor]:
    """Places of ``nnz`` blocks as crow and col, in no order within a row; ``duplicates`` lets places repeat."""
    if duplicates:
        places = torch.randint(rows * columns, (nnz,), generator=generator)
    else:
        places = torch.randperm(rows * columns, generator=generator)[:nnz]
    row, order = torch.sort(places // columns, stable=True)
    return torch.searchsorted(row, torch.arange(rows + 1)), places[order] % columns


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
    def make(generator: torch.Generator) -> dict[str, Argument]:
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


def _cross(
    name: str,
    rows: tuple[int, ...],
    k: int,
    n: int,
    master: torch.dtype = torch.float64,
    layout: Callable = lambda t: t,
) -> Sample:
    def make(generator: torch.Generator) -> dict[str, Argument]:
        return {
            "cross": _normal(generator, k, n).to(master),
            "x": layout(_normal(generator, *rows, k) + 0.25),
            "z": layout(_normal(generator, *rows, n) - 0.25),
        }

    return Sample("cross_gram_accumulate_", name, make)


def _codes(generator: torch.Generator, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """Codes of all values that 8 bits have, and scales that make their products of the size of x."""
    codes = torch.randint(-128, 128, (rows, cols), generator=generator, dtype=torch.int8)
    return codes, (torch.rand(rows, generator=generator) + 0.5) / (64 * cols**0.5)


def _int8(
    name: str,
    rows: tuple[int, ...],
    k: int,
    n: int,
    r: int = 0,
    bias: bool = True,
    dynamic: bool = True,
    pivoted: bool = False,
    layout: Callable = lambda t: t,
) -> Sample:
    """One weight, or two factors where there is a rank ``r``."""

    def make(generator: torch.Generator) -> dict[str, Argument]:
        # Not about zero, so that the zero points of rows differ.
        x = _normal(generator, *rows, k) + torch.randn(*rows, 1, generator=generator)
        made: dict[str, Argument] = {"x": layout(x)}
        if r:
            made["down"], made["down_scale"] = _codes(generator, r, k)
            made["up"], made["up_scale"] = _codes(generator, n - r if pivoted else n, r)
        else:
            made["weight"], made["scale"] = _codes(generator, n, k)
        made |= {"bias": _normal(generator, n) if bias else None, "dynamic": dynamic}
        if r:
            made["index"] = torch.randperm(n, generator=generator) if pivoted else None
        return made

    return Sample("int8_lowrank_linear" if r else "int8_linear", name, make)


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
    def make(generator: torch.Generator) -> dict[str, Argument]:
        made = sample.make(generator)
        factors = ("down", "up", "residual_down", "residual_up", "coefficients")
        return {n: transposed(tensor_of(made, n)) if n in factors else t for n, t in made.items()}

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
_PIVOTED_SMALL = (
    _pivoted("tiny", (3,), 5, 4, 2),
    _pivoted("ones", (1,), 1, 1, 1),
    _pivoted("prime", (63,), 127, 61, 5),
    _pivoted("vector", (), 33, 17, 9),
    _pivoted("no-bias", (7,), 24, 40, 8, bias=False, index=torch.int32),
    _pivoted("empty", (0,), 16, 8, 4),
    _pivoted("every-row", (30,), 64, 40, 40, index=torch.int16),
    _pivoted("all-but-one", (30,), 64, 40, 39),
    _pivoted("leading-dims", (2, 3, 5), 20, 24, 6, index=torch.int16),
    _pivoted("first-rows", (33,), 65, 133, 57, pivots="first"),
    _pivoted("last-rows", (33,), 65, 133, 57, pivots="last"),
    _pivoted("more-than-a-piece", (30,), 8, 460, 421),
    _pivoted("exactly-a-piece", (30,), 8, 460, 384),
    _pivoted("below-tile", (31,), 63, 46, 15),
    _pivoted("on-tile", (32,), 64, 48, 16),
    _pivoted("above-tile", (33,), 65, 50, 17),
    _pivoted("every-other-row", (10,), 32, 24, 8, layout=every_other_row),
    _pivoted("transposed", (10,), 32, 24, 8, layout=transposed),
    _pivoted("slice-of-wider", (10,), 32, 24, 8, layout=slice_of_wider),
    _transposed_weights(_pivoted("", (10,), 32, 24, 8)),
)
_PIVOTED_REAL = (
    _pivoted("vit-ti-qkv", (197,), 192, 576, 104),
    _pivoted("vit-b-proj", (197,), 768, 768, 280, index=torch.int16),
    _pivoted("vit-b-fc1", (2, 197), 768, 3072, 368, index=torch.int16),
    _pivoted("vit-b-fc2", (197,), 3072, 768, 400),
    _pivoted("vit-b-fc2-one-token", (1,), 3072, 768, 400),
    _pivoted("swin-t-reduction", (49,), 384, 192, 64, bias=False),
)
_RESIDUAL_SMALL = (
    _residual("neither", (7,), 24, 40, 8),
    _residual("branch-tiny", (3,), 5, 4, 2, q=1),
    _residual("branch-ones", (1,), 1, 1, 1, q=1),
    _residual("branch-prime", (63,), 127, 61, 5, q=3),
    _residual("branch-vector", (), 33, 17, 9, q=2),
    _residual("branch-no-bias", (7,), 24, 40, 8, q=5, bias=False),
    _residual("branch-empty", (0,), 16, 8, 4, q=4),
    _residual("branch-leading-dims", (2, 3, 5), 20, 24, 6, q=7),
    _residual("branch-above-tile", (33,), 65, 33, 17, q=33),
    _residual("branch-slice-of-wider", (10,), 33, 16, 8, q=4, layout=slice_of_wider),
    _residual("blocks-16", (7,), 48, 64, 5, b=16, nnz=5),
    _residual("blocks-32", (9,), 64, 96, 7, b=32, nnz=4),
    _residual("blocks-int32", (9,), 64, 96, 7, b=32, nnz=4, index=torch.int32),
    _residual("blocks-all", (33,), 64, 48, 3, b=16, nnz=12),
    _residual("blocks-none", (5,), 32, 64, 3, b=32, nnz=0),
    _residual("blocks-repeated", (5,), 32, 48, 3, b=16, nnz=11, duplicates=True, index=torch.int32),
    _residual("blocks-one-row", (1,), 64, 32, 4, b=16, nnz=3),
    _residual("blocks-vector", (), 32, 64, 4, b=32, nnz=2),
    _residual("blocks-no-bias", (31,), 96, 64, 9, b=32, nnz=3, bias=False),
    _residual("both-16", (13,), 64, 48, 7, q=3, b=16, nnz=6),
    _residual("both-32", (65,), 96, 128, 15, q=5, b=32, nnz=7, index=torch.int32),
    _residual("both-empty", (0,), 32, 16, 4, q=1, b=16, nnz=1),
    _residual("both-leading-dims", (2, 3, 5), 32, 48, 6, q=2, b=16, nnz=4),
    _residual("both-every-other-row", (10,), 32, 16, 8, q=3, b=16, nnz=2, layout=every_other_row),
    _residual("both-transposed", (10,), 32, 64, 8, q=3, b=32, nnz=2, layout=transposed),
    _residual("both-slice-of-wider", (10,), 32, 64, 8, q=3, b=16, nnz=4, layout=slice_of_wider),
    _transposed_weights(_residual("", (10,), 32, 16, 8, q=3, b=16, nnz=2)),
)
_RESIDUAL_REAL = (
    _residual("vit-b-proj-branch", (197,), 768, 768, 120, q=32),
    _residual("vit-b-proj-blocks-16", (197,), 768, 768, 120, b=16, nnz=230),
    _residual("vit-b-proj-blocks-32", (2, 197), 768, 768, 120, b=32, nnz=58, index=torch.int32),
    _residual("vit-b-proj-both", (197,), 768, 768, 120, q=17, b=32, nnz=58),
    _residual("vit-b-fc1-both", (197,), 768, 3072, 256, q=48, b=32, nnz=115),
    _residual("vit-b-fc2-one-token", (1,), 3072, 768, 256, q=48, b=16, nnz=460),
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
_CROSS_SMALL = (
    _cross("tiny", (3,), 5, 4),
    _cross("one", (1,), 1, 1),
    _cross("vector", (), 9, 7),
    _cross("prime", (127,), 61, 37),
    _cross("empty", (0,), 16, 8),
    _cross("wide", (40,), 5, 65),
    _cross("tall", (40,), 65, 5),
    _cross("fp32-master", (40,), 24, 17, master=torch.float32),
    _cross("leading-dims", (2, 3, 5), 20, 12),
    _cross("below-tile", (31,), 63, 31),
    _cross("on-tile", (32,), 64, 32),
    _cross("above-tile", (33,), 65, 33),
    _cross("every-other-row", (20,), 24, 16, layout=every_other_row),
    _cross("transposed", (20,), 24, 16, layout=transposed),
    _cross("slice-of-wider", (20,), 24, 16, layout=slice_of_wider),
)
_CROSS_REAL = (
    _cross("vit-ti", (4, 197), 192, 192),
    _cross("vit-b", (8, 197), 768, 768),
    _cross("vit-b-fc1-long", (3000,), 768, 384),
)
_INT8_SHAPES = (
    ("tiny", (3,), 5, 4, 2),
    ("ones", (1,), 1, 2, 1),
    ("prime", (63,), 127, 61, 5),
    ("vector", (), 33, 17, 9),
    ("no-bias", (7,), 24, 40, 8),
    ("empty", (0,), 16, 8, 4),
    ("leading-dims", (2, 3, 5), 20, 24, 6),
    ("below-tile", (31,), 63, 31, 15),
    ("on-tile", (32,), 64, 32, 16),
    ("above-tile", (33,), 65, 33, 17),
    ("many-terms", (13,), 1030, 35, 18),
    ("every-other-row", (10,), 32, 16, 8),
    ("transposed", (10,), 32, 16, 8),
    ("slice-of-wider", (10,), 32, 16, 8),
)
# Those that are made of each kind of layer.
_INT8_VARIED = ("tiny", "prime", "vector", "empty", "above-tile", "many-terms")
_LAYOUTS = {"every-other-row": every_other_row, "transposed": transposed, "slice-of-wider": slice_of_wider}


def _int8_small(lowrank: bool) -> tuple[Sample, ...]:
    made = []
    for pivoted in (False, True)[: 1 + lowrank]:
        for dynamic in (True, False):
            for name, rows, k, n, r in _INT8_SHAPES:
                kind = ("-pivoted" if pivoted else "") + ("" if dynamic else "-weight-only")
                if not kind or name in _INT8_VARIED:
                    layout = _LAYOUTS.get(name, lambda t: t)
                    made.append(
                        _int8(name + kind, rows, k, n, r * lowrank, name != "no-bias", dynamic, pivoted, layout)
                    )
    return tuple(made)


_INT8_REAL = tuple(
    _int8(name + ("" if dynamic else "-weight-only"), rows, k, n, dynamic=dynamic)
    for dynamic in (True, False)
    for name, rows, k, n in (
        ("vit-b-qkv", (197,), 768, 2304),
        ("vit-b-fc2", (2, 197), 3072, 768),
        ("vit-b-fc2-one-token", (1,), 3072, 768),
        ("vit-b-classifier", (8,), 768, 1000),
    )
)
_INT8_LOWRANK_REAL = tuple(
    _int8(name + kind, rows, k, n, r, dynamic=dynamic, pivoted=kind == "-pivoted")
    for kind, dynamic in (("", True), ("-weight-only", False), ("-pivoted", True))
    for name, rows, k, n, r in (
        ("vit-b-qkv", (197,), 768, 2304, 232),
        ("vit-b-fc1", (2, 197), 768, 3072, 248),
        ("vit-b-fc2", (197,), 3072, 768, 248),
        ("vit-b-proj-one-token", (1,), 768, 768, 152),
    )
)
_SAMPLES = {
    ("int8_linear", False): _int8_small(lowrank=False),
    ("int8_linear", True): _INT8_REAL,
    ("int8_lowrank_linear", False): _int8_small(lowrank=True),
    ("int8_lowrank_linear", True): _INT8_LOWRANK_REAL,
    ("lowrank_linear", False): _LINEAR_SMALL,
    ("lowrank_linear", True): _LINEAR_REAL,
    ("lowrank_residual_linear", False): _RESIDUAL_SMALL,
    ("lowrank_residual_linear", True): _RESIDUAL_REAL,
    ("pivoted_linear", False): _PIVOTED_SMALL,
    ("pivoted_linear", True): _PIVOTED_REAL,
    ("gram_accumulate_", False): _GRAM_SMALL,
    ("gram_accumulate_", True): _GRAM_REAL,
    ("cross_gram_accumulate_", False): _CROSS_SMALL,
    ("cross_gram_accumulate_", True): _CROSS_REAL,
}


def sample_inputs(op: str, *, real_sizes: bool = False) -> tuple[Sample, ...]:
    """The samples of the operator ``op``: small shapes around tile boundaries, or layers of real ViTs."""
    return _SAMPLES[op, real_sizes]
