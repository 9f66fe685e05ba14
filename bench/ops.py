"""The registry of what is timed: the operators on the shapes of real vision transformers.

A case is a description; its tensors are made when they are asked for. Alphabet: ``M`` rows (tokens), ``K`` in
features, ``N`` out features, ``R`` rank, ``Q`` residual rank, ``B`` batch, ``b`` the side of a block.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mixrank_kernels.testing import packed_bits

WIDTHS = {"vit-ti": 192, "vit-s": 384, "swin-b stage 3": 512, "vit-b": 768, "vit-l, swin-b stage 4": 1024}
LAYERS = {"qkv": (1, 3), "proj": (1, 1), "fc1": (1, 4), "fc2": (4, 1)}
"""In and out features of a transformer's linear layers, in widths."""
TOKENS = 197
ROWS = (1, 32, TOKENS, 8 * TOKENS)
KEEPS = (0.4, 0.6)
RESIDUALS = ("branch", "blocks 32", "blocks 16")
RESIDUAL_RANK = 16
BLOCK_SHARE = 0.05
GRAM_WIDTHS = (192, 384, 768, 1024, 3072)
HEADS, HEAD_WIDTH = 12, 64
DTYPES = (torch.float32, torch.bfloat16)
DENSITIES, SPARSE_RANK = (0.25, 0.4), 40
"""What sparse weights store, and the rank of the factors beside them."""
INDEX = torch.int16
"""What an index of pivots is stored in."""
INT8 = ("int8_linear", "int8_lowrank_linear")


@dataclass(frozen=True)
class Case:
    """One operator on one shape and dtype.

    Attributes:
        op: name of the operator.
        layer: the layer of which model has this shape.
        dtype: dtype of the operands.
        m, k, n: rows, in features, out features; ``n`` is 0 for the Gram matrix of one input.
        rank: rank of the factors, 0 where there are none.
        keep: the share of the dense parameters that the factors have, 0 where there are none.
        residual: one of ``RESIDUALS``, or empty.
        batch: number of Gram matrices, 0 for one that is not batched.
        master: dtype of the Gram matrix, which a linear operator does not have.
        dynamic: whether an operator of 8-bit weights quantises its rows too.
        density: the share of the entries that a sparse weight stores, 0 where the weight is not sparse.
    """

    op: str
    layer: str
    dtype: torch.dtype
    m: int
    k: int
    n: int = 0
    rank: int = 0
    keep: float = 0.0
    residual: str = ""
    batch: int = 0
    master: torch.dtype = torch.float64
    dynamic: bool = True
    density: float = 0.0

    @property
    def dtype_name(self) -> str:
        return _dtype_name(self.dtype)

    @property
    def name(self) -> str:
        """What tells this case from the others of its operator and dtype."""
        sizes = {"B": self.batch, "M": self.m, "K": self.k, "N": self.n, "R": self.rank}
        parts = [self.layer, *(f"{letter}={size}" for letter, size in sizes.items() if size)]
        master = "" if self.master == torch.float64 else f"{_dtype_name(self.master)} master"
        rows = "" if self.dynamic else "weight-only"
        stored = f"density {self.density}" if self.density else ""
        return " ".join([*parts, *filter(None, (self.residual, master, rows, stored))])

    @property
    def arithmetic(self) -> str:
        """What the products are of: the ceiling that they have."""
        return "int8" if self.op in INT8 and self.dynamic else self.dtype_name

    @property
    def blocks(self) -> tuple[int, int]:
        """Side and number of the stored blocks of a block-sparse residual; zeros for any other case."""
        if not self.residual.startswith("blocks"):
            return 0, 0
        side = int(self.residual.split()[1])
        return side, max(1, round(BLOCK_SHARE * (self.n // side) * (self.k // side)))

    @property
    def stored(self) -> int:
        """The number of entries that a sparse weight stores; 0 for any other case."""
        return round(self.density * self.k * self.n)

    @property
    def flops(self) -> int:
        """Operations that have to be done: of a Gram matrix one triangle with its diagonal."""
        if self.op == "gram_accumulate_":
            return max(1, self.batch) * self.m * self.k * (self.k + 1)
        if self.op in ("cross_gram_accumulate_", "int8_linear"):
            return 2 * self.m * self.k * self.n
        return 2 * self.m * self.weights

    @property
    def weights(self) -> int:
        """Numbers that a linear layer multiplies with each row."""
        if self.op == "pivoted_linear":
            return self.rank * (self.k + self.n - self.rank)
        side, count = self.blocks
        rank = self.rank + (RESIDUAL_RANK if self.residual == "branch" else 0)
        return rank * (self.k + self.n) + count * side * side + self.stored

    @property
    def equivalent_flops(self) -> int:
        """Operations that a full product does: 2 M K K for a Gram matrix, else :attr:`flops`."""
        if self.op == "gram_accumulate_":
            return 2 * max(1, self.batch) * self.m * self.k * self.k
        return self.flops

    @property
    def bytes(self) -> int:
        """Bytes that have to be read and written once: operands in their dtype, Gram matrices in theirs, both ways."""
        size, both_ways = self.dtype.itemsize, 2 * self.master.itemsize
        if self.op == "gram_accumulate_":
            return max(1, self.batch) * (size * self.m * self.k + both_ways * self.k * self.k)
        if self.op == "cross_gram_accumulate_":
            return size * self.m * (self.k + self.n) + both_ways * self.k * self.n
        if self.op in INT8:  # codes of one byte, and a scale in fp32 for each row of a weight
            codes = self.rank * (self.k + self.n) if self.rank else self.k * self.n
            return codes + 4 * (self.rank + self.n) + size * (self.n + self.m * (self.k + self.n))
        index = INDEX.itemsize * self.n if self.op == "pivoted_linear" else 0
        mask = self.n * -(-self.k // 8) if self.density else 0
        return size * (self.weights + self.n + self.m * (self.k + self.n)) + index + mask

    @torch.inference_mode(False)
    def arguments(self, device: str | torch.device = "cpu") -> dict[str, Tensor | bool | None]:
        """Make the operator's arguments by name, with the same values each time on one kind of device.

        They are never tensors of inference mode, whose changes cannot be seen and which a layer would not pack.
        """
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator, device=device) * scale).to(self.dtype)

        if self.op == "gram_accumulate_":
            lead = (self.batch,) if self.batch else ()
            gram = torch.zeros(*lead, self.k, self.k, dtype=self.master, device=device)
            return {"gram": gram, "x": normal(*lead, self.m, self.k), "row_weight": None, "column_sum": None}
        if self.op == "cross_gram_accumulate_":
            cross = torch.zeros(self.k, self.n, dtype=self.master, device=device)
            return {"cross": cross, "x": normal(self.m, self.k), "z": normal(self.m, self.n)}
        if self.op == "pivoted_linear":
            places = torch.randperm(self.n, generator=generator, device=device).split([self.rank, self.n - self.rank])
            return {
                "x": normal(self.m, self.k),
                "down": normal(self.rank, self.k, scale=self.k**-0.5),
                "coefficients": normal(self.n - self.rank, self.rank, scale=self.rank**-0.5),
                "index": torch.cat([part.sort().values for part in places]).to(INDEX),
                "bias": normal(self.n),
            }
        if self.op in INT8:
            return self._int8_arguments(normal)
        if self.density:
            places = torch.randperm(self.n * self.k, generator=generator, device=device)[: self.stored]
            stored = torch.zeros(self.n * self.k, dtype=torch.bool, device=device).index_fill_(0, places, True)
            return {
                "x": normal(self.m, self.k),
                "mask": packed_bits(stored.reshape(self.n, self.k)),
                "values": normal(self.stored, scale=(2 * self.density * self.k) ** -0.5),
                "down": normal(self.rank, self.k, scale=self.k**-0.5) if self.rank else None,
                "up": normal(self.n, self.rank, scale=(2 * self.rank) ** -0.5) if self.rank else None,
                "bias": normal(self.n),
            }
        made = {
            "x": normal(self.m, self.k),
            "down": normal(self.rank, self.k, scale=self.k**-0.5),
            "up": normal(self.n, self.rank, scale=self.rank**-0.5),
            "bias": normal(self.n),
        }
        if self.residual == "branch":
            made["residual_down"] = normal(RESIDUAL_RANK, self.k, scale=self.k**-0.5)
            made["residual_up"] = normal(self.n, RESIDUAL_RANK, scale=RESIDUAL_RANK**-0.5)
        elif self.residual:
            side, count = self.blocks
            number = (self.n // side) * (self.k // side)
            places = torch.randperm(number, generator=generator, device=device)[:count].sort().values
            counts = torch.bincount(places // (self.k // side), minlength=self.n // side)
            made["crow"] = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            made["col"] = places % (self.k // side)
            made["values"] = normal(count, side, side, scale=self.k**-0.5)
        return made

    def _int8_arguments(self, normal: Callable[..., Tensor]) -> dict[str, Tensor | bool | None]:
        def codes(rows: int, cols: int) -> tuple[Tensor, Tensor]:
            weight = normal(rows, cols, scale=cols**-0.5).float()
            scale = weight.abs().amax(1) / 127
            return (weight / scale[:, None]).round().to(torch.int8), scale

        made: dict[str, Tensor | bool | None] = {"x": normal(self.m, self.k)}
        if self.rank:
            made["down"], made["down_scale"] = codes(self.rank, self.k)
            made["up"], made["up_scale"] = codes(self.n, self.rank)
        else:
            made["weight"], made["scale"] = codes(self.n, self.k)
        return made | {"bias": normal(self.n), "dynamic": self.dynamic}

    def to_json(self) -> dict[str, object]:
        """The description as a part of a row of results."""
        return dataclasses.asdict(self) | {
            "dtype": self.dtype_name,
            "master": _dtype_name(self.master),
            "case": self.name,
            "arithmetic": self.arithmetic,
            "flops": self.flops,
            "equivalent_flops": self.equivalent_flops,
            "bytes": self.bytes,
        }


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rank_of(keep: float, k: int, n: int) -> int:
    """The rank, a multiple of 8, at which the factors have the share ``keep`` of the dense parameters."""
    return max(8, round(keep * k * n / (k + n) / 8) * 8)


def pivoted_rank_of(keep: float, k: int, n: int) -> int:
    """The rank, a multiple of 8, at which the pivoted form has the share ``keep`` of the dense parameters."""
    both = k + n
    return max(8, round((both - math.sqrt(both * both - 4 * keep * k * n)) / 2 / 8) * 8)


def cases() -> Iterator[Case]:
    """Every case of the suite."""
    for dtype in DTYPES:
        for model, layer, m, keep in itertools.product(WIDTHS, LAYERS, ROWS, KEEPS):
            yield linear(model, layer, m, keep, dtype)
        for model, layer, m in itertools.product(("vit-ti", "vit-s", "vit-b"), ("proj", "fc1"), (1, *ROWS[2:])):
            for residual in RESIDUALS if model == "vit-b" else RESIDUALS[:2]:
                yield linear(model, layer, m, KEEPS[0], dtype, residual)
        for layer, m in itertools.product(LAYERS, ROWS):
            yield pivoted("vit-b", layer, m, KEEPS[1], dtype)
        for layer, m, density in itertools.product(LAYERS, ROWS, DENSITIES):
            yield sparse("vit-b", layer, m, density, dtype)
        for k, m in itertools.product(GRAM_WIDTHS, (ROWS[-1], 8 * ROWS[-1])):
            yield Case("gram_accumulate_", f"width {k}", dtype, m, k)
        yield Case("gram_accumulate_", "heads of vit-b", dtype, ROWS[-1], HEAD_WIDTH, batch=HEADS)
        for model, layer in (("vit-s", "proj"), ("vit-b", "proj"), ("vit-b", "fc1")):
            k, n = _features(model, layer)
            yield Case("cross_gram_accumulate_", f"{model} {layer}", dtype, ROWS[-1], k, n)
    for layer, m, dynamic in itertools.product(LAYERS, ROWS, (True, False)):
        yield int8("vit-b", layer, m, KEEPS[0], dynamic)
        yield int8("vit-b", layer, m, 0.0, dynamic)


def quick_cases() -> Iterator[Case]:
    """A few cases of every operator, for a look in a few minutes."""
    for dtype in DTYPES:
        for m in ROWS:
            yield linear("vit-b", "fc1", m, KEEPS[0], dtype)
        for m in (1, TOKENS):
            yield linear("vit-ti", "proj", m, KEEPS[0], dtype)
        for residual in RESIDUALS[:2]:
            yield linear("vit-b", "proj", TOKENS, KEEPS[0], dtype, residual)
        yield pivoted("vit-b", "proj", TOKENS, KEEPS[1], dtype)
        yield sparse("vit-b", "proj", TOKENS, DENSITIES[0], dtype)
        for k in (192, 768):
            yield Case("gram_accumulate_", f"width {k}", dtype, ROWS[-1], k)
        yield Case("cross_gram_accumulate_", "vit-s proj", dtype, ROWS[-1], *_features("vit-s", "proj"))
    for m, keep in itertools.product((1, TOKENS), (KEEPS[0], 0.0)):
        yield int8("vit-b", "fc1", m, keep, True)


def _features(model: str, layer: str) -> tuple[int, int]:
    return tuple(WIDTHS[model] * widths for widths in LAYERS[layer])


def linear(model: str, layer: str, m: int, keep: float, dtype: torch.dtype, residual: str = "") -> Case:
    """The case of one linear layer, of the operator that serves it."""
    k, n = _features(model, layer)
    op = "lowrank_residual_linear" if residual else "lowrank_linear"
    return Case(op, f"{model} {layer}", dtype, m, k, n, rank_of(keep, k, n), keep, residual)


def pivoted(model: str, layer: str, m: int, keep: float, dtype: torch.dtype) -> Case:
    """The case of one linear layer in the pivoted form."""
    k, n = _features(model, layer)
    return Case("pivoted_linear", f"{model} {layer}", dtype, m, k, n, pivoted_rank_of(keep, k, n), keep)


def sparse(model: str, layer: str, m: int, density: float, dtype: torch.dtype) -> Case:
    """The case of one linear layer of a sparse weight and factors."""
    k, n = _features(model, layer)
    return Case("sparse_linear", f"{model} {layer}", dtype, m, k, n, SPARSE_RANK, density=density)


def int8(model: str, layer: str, m: int, keep: float, dynamic: bool) -> Case:
    """The case of one layer of 8-bit weights and fp32 rows: factors, or for ``keep`` 0 one weight."""
    k, n = _features(model, layer)
    op, rank = ("int8_lowrank_linear", rank_of(keep, k, n)) if keep else ("int8_linear", 0)
    return Case(op, f"{model} {layer}", torch.float32, m, k, n, rank, keep, dynamic=dynamic)
