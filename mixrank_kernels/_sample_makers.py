"""What makes the sample inputs of every operator from shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor

from mixrank_kernels._schema import Argument, tensor_of
from mixrank_kernels.reference import packed_bits

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


def linear(
    name: str, rows: tuple[int, ...], k: int, n: int, r: int, bias: bool = True, layout: Callable = lambda t: t
) -> Sample:
    def make(generator: torch.Generator) -> dict[str, Argument]:
        x = layout(_normal(generator, *rows, k))
        down, up = _normal(generator, r, k) / k**0.5, _normal(generator, n, r) / r**0.5
        return {"x": x, "down": down, "up": up, "bias": _normal(generator, n) if bias else None}

    return Sample("lowrank_linear", name, make)


def pivoted_linear(
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


def sparse_linear(
    name: str,
    rows: tuple[int, ...],
    k: int,
    n: int,
    density: float,
    r: int = 0,
    bias: bool = True,
    layout: Callable = lambda t: t,
) -> Sample:
    """A share ``density`` of the entries at random places, and factors of rank ``r`` (0: none)."""

    def make(generator: torch.Generator) -> dict[str, Argument]:
        stored = torch.rand(n, k, generator=generator) < density
        made: dict[str, Argument] = {
            "x": layout(_normal(generator, *rows, k)),
            "mask": packed_bits(stored),
            "values": _normal(generator, int(stored.sum())) / (max(density, 1 / k) * k) ** 0.5,
            "down": _normal(generator, r, k) / k**0.5 if r else None,
            "up": _normal(generator, n, r) / r**0.5 if r else None,
        }
        return made | {"bias": _normal(generator, n) if bias else None}

    return Sample("sparse_linear", name, make)


def residual_linear(
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
        made = linear("", rows, k, n, r, bias, layout).make(generator)
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


def gram(
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


def cross_gram(
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


def int8(
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


def int8_sparse(sample: Sample) -> Sample:
    """The layer of a sample of ``sparse_linear`` with codes for its weights."""

    def make(generator: torch.Generator) -> dict[str, Argument]:
        made = sample.make(generator)
        (n, _), nnz = tensor_of(made, "mask").shape, tensor_of(made, "values").shape[0]
        codes, _ = _codes(generator, 1, nnz)
        _, scale = _codes(generator, n, max(1, nnz // n))
        made |= {"values": codes[0], "scale": scale, "down_scale": None, "up_scale": None}
        for name in ("down", "up"):
            if made[name] is not None:
                made[name], made[f"{name}_scale"] = _codes(generator, *tensor_of(made, name).shape)
        order = ("x", "mask", "values", "scale", "down", "down_scale", "up", "up_scale", "bias")
        return {name: made[name] for name in order}

    return Sample("int8_sparse_linear", sample.name, make)


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


def transposed_weights(sample: Sample) -> Sample:
    def make(generator: torch.Generator) -> dict[str, Argument]:
        made = sample.make(generator)
        factors = ("down", "up", "residual_down", "residual_up", "coefficients")
        return {n: transposed(tensor_of(made, n)) if n in factors else t for n, t in made.items()}

    return Sample(sample.op, "transposed-weights", make)
