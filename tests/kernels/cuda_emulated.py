"""The launches of csrc/cuda on the emulator, called with tensors of the CPU: see cuda_emulated.cpp.

Every operand of a call is copied into a buffer of its own with NaN around it and between its rows. What the kernels
write has guard bands too, which must not change.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mixrank_kernels.cuda import Form

from . import emulator
from .test_guard_bands import Banded

NAN = float("nan")
BFLOAT16, FLOAT32_TWO, FLOAT32_THREE = range(3)
"""LinearOperand of launch_product.h."""
GRAM_BFLOAT16, GRAM_FLOAT16, GRAM_FLOAT32_TWO, GRAM_FLOAT32_THREE = range(4)
"""GramOperand of launch_gram.h."""


@dataclass(frozen=True)
class Order:
    """When asynchronous instructions take effect, and in which order blocks and threads run: see emulator.h."""

    late: bool
    seed: int


EAGER, LATE = Order(False, 0), Order(True, 1)
# Six seeds in a row have everything that depends on the seed in all combinations.
ORDERS = [Order(late, seed) for late in (False, True) for seed in range(6)]


@dataclass(frozen=True)
class Layout:
    """Where an operand lies: its first element from a multiple of 64 bytes on, and its row stride.

    ``step``: the row stride is the next multiple of it that leaves at least one element between rows; 0 for none.
    """

    offset: int
    step: int

    def place(self, rows: Tensor, around: float = NAN) -> tuple[Tensor, Banded]:
        """A copy of ``rows`` [..., M, K], and what is around it."""
        *outer, cols = rows.shape
        stride = cols if self.step == 0 else (cols // self.step + 1) * self.step
        banded = Banded((*outer, stride), rows.dtype, self.offset, around)
        view = banded.tensor[..., :cols]
        view.copy_(rows)
        return view, banded


DENSE = Layout(0, 0)
# By what the kernels may read at once: 16 bytes (of either size of element), 4 bytes, one element.
WHOLE, HALVES, PAIRS, SINGLE, UNEVEN = Layout(8, 8), Layout(4, 4), Layout(2, 2), Layout(1, 1), Layout(0, 3)
ALL_LAYOUTS = (WHOLE, PAIRS, SINGLE, HALVES, UNEVEN)
# Every operand where the copy engine reaches it, and each kind of access for each operand.
LAYOUTS = {"whole": (WHOLE,)} | {f"mixed{i}": ALL_LAYOUTS[i:] + ALL_LAYOUTS[:i] for i in range(len(ALL_LAYOUTS))}


ONE_LAUNCH, TWO_LAUNCHES = Form(1), Form(2)


class Kernels:
    """The library. ``launched`` are the kernels of the last call, in their order."""

    def __init__(self) -> None:
        self.library = emulator.build([Path(__file__).with_suffix(".cpp")], "cuda")
        self.library.linear_hidden_stride.restype = ctypes.c_int64

    def _names(self, function: str) -> list[str]:
        text = getattr(self.library, function)
        text.restype = ctypes.c_char_p
        return text().decode().replace("mixrank::", "").splitlines()

    @property
    def reachable(self) -> set[str]:
        """Every kernel that the launch code names."""
        return set(self._names("kernels_reachable"))

    @property
    def launched(self) -> list[str]:
        return self._names("kernels_launched")

    def numbers(self, name: str, count: int, *sizes: int | Sequence[int]) -> list[int]:
        """Call a function of schedule.h that fills ``count`` numbers."""
        out = (ctypes.c_int64 * count)()
        self.library[name](*map(_integers, sizes), out)
        return list(out)

    def linear(
        self,
        order: Order,
        architecture: int,
        operand: int,
        x: Tensor,  # [M, K]
        pairs: Sequence[tuple[Tensor, Tensor]],  # of [rank, K] and [N, rank], one or two
        bias: Tensor | None = None,  # [N]
        blocks: tuple[Tensor, Tensor, Tensor] | None = None,  # crow [N / b + 1], col [nnz], values [nnz, b, b]
        layouts: Sequence[Layout] = (DENSE,),
        form: Form = TWO_LAUNCHES,
    ) -> Tensor:  # [M, N]
        """The operands lie in memory as ``layouts`` say, in turns: x, down, up, residual_down, residual_up.

        A ``form`` that has no kernel for a call is passed over.
        """
        M, K = x.shape
        N = pairs[0][1].shape[0]
        ranks = [down.shape[0] for down, _ in pairs] + [0] * (2 - len(pairs))
        factors = [factor for pair in pairs for factor in pair]
        placed = [layouts[i % len(layouts)].place(one)[0] for i, one in enumerate([x, *factors])]
        strides = [one.stride(0) for one in placed] + [0] * (5 - len(placed))
        crow, col, values = [
            None if one is None else Layout(layouts[0].offset, 0).place(one, -1 if i < 2 else NAN)[0]
            for i, one in enumerate(blocks or [None] * 3)
        ]
        hidden = Banded((M, self.library.linear_hidden_stride(*map(ctypes.c_int64, ranks))), x.dtype, 0, -0.0)
        hidden.tensor.fill_(NAN)
        y = Banded((M, N), x.dtype, layouts[0].offset, -0.0)
        y.tensor.fill_(NAN)
        four = 4 * x.element_size()
        aligned = blocks is not None and all(one.data_ptr() % four == 0 for one in (placed[0], values))
        sizes = [architecture, order.late, order.seed, operand, M, K, N, strides[0], ranks[0], strides[1], strides[2]]
        sizes += [ranks[1], strides[3], strides[4], 0 if blocks is None else values.shape[-1]]
        sizes += [blocks is not None and crow.dtype == torch.int64, aligned and strides[0] % 4 == 0, *form]
        pointers = [*placed, *[None] * (5 - len(placed)), None if bias is None else layouts[-1].place(bias)[0]]
        self._call("linear_emulated", sizes, [*pointers, crow, col, values, hidden.tensor, y.tensor])
        hidden.assert_untouched()
        y.assert_untouched()
        return y.tensor

    def gram(
        self,
        order: Order,
        architecture: int,
        operand: int,
        gram: Tensor,  # [B, K, N], changed
        x: Tensor,  # [B, M, K]
        z: Tensor | None = None,  # [B, M, N]
        row_weight: Tensor | None = None,  # [B, M]
        column_sum: Tensor | None = None,  # [B, K], changed
        layouts: Sequence[Layout] = (DENSE,),
        round_splits: int = 0,
    ) -> list[int]:  # rows of a split, splits, splits of a round
        """``round_splits`` limits the splits of a round, as small scratch memory would; x and z lie as ``layouts``."""
        B, M, K = x.shape
        left = layouts[0].place(x)[0]
        right = left if z is None else layouts[-1].place(z)[0]
        sizes = [architecture, order.late, order.seed, operand, B, M, K, right.shape[2], *left.stride()[:2]]
        sizes += [*right.stride()[:2], z is not None, gram.dtype == torch.float64, round_splits, column_sum is not None]
        weight = None if row_weight is None else Layout(1, 0).place(row_weight)[0]
        operands = _addresses([None, left, right, weight])
        *plan, partials, partial_sums = self.numbers("gram_planned", 5, sizes, operands)
        changed = [None if one is None else Layout(1, 0).place(one, -0.0) for one in (gram, column_sum)]
        scratch = [Banded((count,), torch.float32, 0, -0.0) for count in (partials, partial_sums)]
        for one in scratch:
            one.tensor.fill_(NAN)
        pointers = [changed[0][0], left, right, weight]
        pointers += [None if column_sum is None else changed[1][0], *(one.tensor for one in scratch)]
        self._call("gram_emulated", sizes, pointers)
        for one in scratch:
            one.assert_untouched()
        for given, made in zip((gram, column_sum), changed, strict=True):
            if given is not None:
                given.copy_(made[0])
                made[1].assert_untouched()
        return plan

    def _call(self, name: str, sizes: Sequence[int], tensors: Sequence[Tensor | None]) -> None:
        emulator.call(self.library[name], _integers(sizes), _integers(_addresses(tensors)))


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if one is None or one.numel() == 0 else one.data_ptr() for one in tensors]


def _integers(values: int | Sequence[int]):
    if isinstance(values, int):
        return ctypes.c_int64(values)
    return (ctypes.c_int64 * len(values))(*map(int, values))


def integers(*shape: int, dtype: torch.dtype, bound: int = 1) -> Tensor:
    return torch.randint(-bound, bound + 1, shape).to(dtype)
