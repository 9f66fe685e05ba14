"""What the tests of the emulator share: its small kernels, and the orders that each is run in."""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_float, c_int64, c_uint64

import numpy as np
import pytest

from . import SOURCES, build, call

BOX = 64  # rows and columns
NONE = 0  # the kernel without a fault
SEEDS = range(6)
ORDERS = [(late, seed) for late in (False, True) for seed in SEEDS]


def load():
    """Calls one of primitives*.cpp: arrays by their address, floats as fp32, bools as bool, other numbers as int64."""
    library = build(sorted(SOURCES.glob("primitives*.cpp")), "primitives")

    def run(name: str, *arguments, order=(False, 0)) -> None:
        late, seed = order
        call(getattr(library, name), *map(converted, arguments), c_bool(late), c_uint64(seed))

    run.library = library
    return run


def converted(value):
    if isinstance(value, np.ndarray):
        return ctypes.c_void_p(value.ctypes.data)
    kinds = {bool: c_bool, float: c_float}
    return kinds.get(type(value), c_int64)(value)


def aligned(shape: tuple[int, ...], dtype, fill) -> np.ndarray:
    """An array on a multiple of 128 bytes."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(size + 128, np.uint8)
    begin = -memory.ctypes.data % 128
    array = memory[begin : begin + size].view(dtype).reshape(shape)
    array[...] = fill
    return array


def unswizzled(stored: np.ndarray) -> np.ndarray:
    """The rows of a box [64, 64] of 16 bits from what lies in shared memory: unit u of row r is at u ^ (r % 8)."""
    units = stored.reshape(BOX, 8, 8)
    return np.stack([units[row, np.arange(8) ^ (row % 8)] for row in range(BOX)]).reshape(BOX, BOX)


def box_of(tensor: np.ndarray, x: int, y: int, z: int) -> np.ndarray:
    wide = np.zeros((5, 400, 400), tensor.dtype)
    batches, rows, cols = tensor.shape
    wide[1 : 1 + batches, 100 : 100 + rows, 100 : 100 + cols] = tensor
    return wide[1 + z, 100 + y : 164 + y, 100 + x : 164 + x]


def check_mistake(run, kernel: str, wrong: int, message: str, late: bool) -> None:
    """Assert that the mistake ``wrong`` of a kernel is reported as ``message``, and that without it the kernel runs."""
    memory = aligned((128,), np.uint8, 0)
    with pytest.raises(RuntimeError, match=message):
        run(kernel, wrong, memory, order=(late, 0))
    run(kernel, NONE, memory, order=(late, 0))
