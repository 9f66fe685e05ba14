"""Checks of what is in the operators' tensors and of where they lie, which need real memory and not only shapes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from mixrank_kernels._schema import Argument, tensor_of
from mixrank_kernels.reference import unpacked_bits

# What an operator changes, beside each argument that must lie apart from it.
APART = {
    "gram_accumulate_": (
        ("gram", "x"),
        ("gram", "row_weight"),
        ("column_sum", "x"),
        ("column_sum", "gram"),
        ("column_sum", "row_weight"),
    ),
    "cross_gram_accumulate_": (("cross", "x"), ("cross", "z")),
}


def memory_and_contents(op: str, arguments: Mapping[str, Argument]) -> None:
    """The checks that need real memory and not only shapes: what fakes cannot be asked.

    Raises:
        RuntimeError: an accumulator shares memory with another argument, or crow and col, index, or mask are not valid.
    """
    if op == "lowrank_residual_linear" and arguments["values"] is not None:
        x, crow, col, values = (tensor_of(arguments, name) for name in ("x", "crow", "col", "values"))
        _indices(op, crow, col, x.shape[-1] // values.shape[-1])
    if op == "pivoted_linear":
        index, rank = tensor_of(arguments, "index"), tensor_of(arguments, "down").shape[0]
        _once((index,), rank, lambda: _read_pivots(op, index, rank))
    if op in ("sparse_linear", "int8_sparse_linear"):
        mask, columns = tensor_of(arguments, "mask"), tensor_of(arguments, "x").shape[-1]
        nnz = tensor_of(arguments, "values").shape[0]
        _once((mask,), (columns, nnz), lambda: _read_mask(op, mask, columns, nnz))
    if op == "int8_lowrank_linear" and arguments["index"] is not None:
        _permutation(op, tensor_of(arguments, "index"))
    for name, other in APART.get(op, ()):
        if arguments[name] is not None and arguments[other] is not None:
            _apart(op, name, tensor_of(arguments, name), other, tensor_of(arguments, other))


def _apart(op: str, name: str, changed: Tensor, other_name: str, other: Tensor) -> None:
    (begin, end), (other_begin, other_end) = _touched(changed), _touched(other)
    torch._check(
        end <= other_begin or other_end <= begin,
        lambda: f"{op}: {name} must not share memory with {other_name}, but they overlap",
    )


def _permutation(op: str, index: Tensor) -> None:
    n = index.shape[0]
    first = torch.full((n,), n, dtype=torch.int64, device=index.device)
    inside = (index >= 0) & (index < n)
    first.scatter_reduce_(0, index.clamp(0, n - 1), torch.arange(n, device=index.device), "amin")
    wrong = (~inside | (first[index.clamp(0, n - 1)] != torch.arange(n, device=index.device))).nonzero()
    torch._check(
        len(wrong) == 0,
        lambda: (
            f"{op}: index must hold every number from 0 to {n - 1} once, but entry {int(wrong[0])} was "
            f"{int(index[wrong[0]])}"
        ),
    )


def _touched(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first byte that the tensor may touch and of the one past the last."""
    if tensor.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


# What indices were when they were last found valid. Reading them from a CUDA device waits for it, which no call should
# do twice, and none can while a graph is captured.
_valid_indices = WeakIdKeyDictionary()


def _indices(op: str, crow: Tensor, col: Tensor, columns: int) -> None:
    """Check the contents of ``crow`` and ``col``, once as long as neither is written to."""
    _once((crow, col), columns, lambda: _read_indices(op, crow, col, columns))


def _once(indices: tuple[Tensor, ...], limit: int | tuple[int, ...], read: Callable[[], None]) -> None:
    """Call ``read``, which raises where the indices are not valid for ``limit``, once after each write to them."""
    if any(tensor.is_inference() for tensor in indices):  # they do not count writes
        read()
        return
    known = _valid_indices.get(indices[0])
    state = (limit, *(tensor._version for tensor in indices))
    same = (
        known is not None
        and known[0] == state
        and all(reference() is tensor for reference, tensor in zip(known[1], indices[1:], strict=True))
    )
    if not same:
        read()
        _valid_indices[indices[0]] = (state, [weakref.ref(tensor) for tensor in indices[1:]])


def _read_pivots(op: str, index: Tensor, rank: int) -> None:
    entries = index.tolist()
    pivot, other = 0, rank
    for n in range(len(entries)):
        is_pivot = pivot < rank and entries[pivot] == n
        if not is_pivot and not (other < len(entries) and entries[other] == n):
            raise RuntimeError(
                f"{op}: index must hold 0 to {len(entries) - 1} once each, rising in its first {rank} entries (the "
                f"rows of down) and in the others, but {n} was missing or out of order"
            )
        pivot, other = pivot + is_pivot, other + (not is_pivot)


def _read_mask(op: str, mask: Tensor, columns: int, nnz: int) -> None:
    bits = unpacked_bits(mask, 8 * mask.shape[1])
    beyond = bits[:, columns:].any(1).nonzero()
    torch._check(
        len(beyond) == 0,
        lambda: f"{op}: mask must have no bit set beyond K = {columns}, but row {int(beyond[0])} had one",
    )
    stored = int(bits.sum())
    torch._check(
        stored == nnz,
        lambda: f"{op}: values must have shape [nnz] with nnz = {stored} (the bits of mask), but it was [{nnz}]",
    )


def _read_indices(op: str, crow: Tensor, col: Tensor, columns: int) -> None:
    first, last, nnz = int(crow[0]), int(crow[-1]), col.shape[0]
    torch._check(first == 0, lambda: f"{op}: crow must begin with 0, but it began with {first}")
    torch._check(
        last == nnz, lambda: f"{op}: crow must end with {nnz} (the blocks of values), but it ended with {last}"
    )
    falls = (crow.diff() < 0).nonzero()
    torch._check(len(falls) == 0, lambda: f"{op}: crow must never fall, but it fell after entry {int(falls[0])}")
    outside = col[(col < 0) | (col >= columns)]
    torch._check(
        len(outside) == 0,
        lambda: f"{op}: col must be at least 0 and less than {columns} (K / b), but it was {int(outside[0])}",
    )
