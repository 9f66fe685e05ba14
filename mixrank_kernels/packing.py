"""Factors packed once for the CPU kernels, kept as long as they do not change.

The kernels read weights in a layout of their own. Without packed factors a call makes that layout anew, which costs
5 to 20 % of its time at 200 rows and most of it at one. :func:`packed` makes it at the first call and gives the same tensor
from then on. What it gives is dropped when a factor is changed in place, gets other memory or is freed; it is no
parameter, in no state dict and never moves with a module.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from mixrank_kernels import _register


class _Entry:
    """Packed factors, and the weights as they were when they were packed.

    It keeps the memory that was packed alive, so that no other memory can take its address unnoticed: a weight that is
    given new memory frees the old one at the next call of :func:`packed`.
    """

    __slots__ = ("addresses", "memory", "packed", "references", "versions")

    def __init__(self, weights: tuple[Tensor, ...], forget: Callable, packed: Tensor) -> None:
        self.references = [weakref.ref(weight, forget) for weight in weights]
        self.memory = [weight.untyped_storage() for weight in weights]
        self.addresses = [weight.data_ptr() for weight in weights]
        self.versions = [weight._version for weight in weights]
        self.packed = packed

    def is_of(self, weights: tuple[Tensor, ...]) -> bool:
        """Whether these are the weights that were packed, with the same memory, not written to since."""
        if len(weights) != len(self.references):
            return False
        for weight, reference, address, version in zip(
            weights, self.references, self.addresses, self.versions, strict=True
        ):
            if reference() is not weight or weight._version != version or weight.data_ptr() != address:
                return False
        return True


_entries: dict[int, _Entry] = {}
_enabled = True


def packed(
    down: Tensor,
    up: Tensor,
    residual_down: Tensor | None = None,
    residual_up: Tensor | None = None,
    crow: Tensor | None = None,
    col: Tensor | None = None,
    values: Tensor | None = None,
) -> Tensor | None:
    """Return the factors in the layout of the CPU kernels, for the ``packed`` argument of the operators.

    Args:
        down, up, residual_down, residual_up, crow, col, values: the weights of the operator, as it takes them.

    Returns:
        An opaque uint8 tensor, the same one until a weight changes; it takes about the memory of the weights once
        more. None where it would be of no use: tensors that are not on the CPU, no extension, weights that need a
        gradient while gradients are recorded (they change at each step), weights made in inference mode (whose
        changes cannot be seen), or packing turned off by :func:`enable`.

    Raises:
        RuntimeError: the weights do not fit together; the message names the argument.

    Example:
        >>> import torch
        >>> from mixrank_kernels import ops
        >>> x, down, up = torch.ones(2, 8), torch.ones(3, 8), torch.ones(5, 3)
        >>> ops.lowrank_linear(x, down, up, packed=packed(down, up))[0, 0].item()
        24.0
    """
    weights = (down, up, residual_down, residual_up, crow, col, values)
    given = (down, up) if residual_down is values is None else tuple(w for w in weights if w is not None)
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in given):
        return None
    entry = _entries.get(id(down))
    if entry is not None and entry.is_of(given):
        return entry.packed
    return _pack(weights, given)


def enable(enabled: bool) -> None:
    """Turn packing on (as it is at the start) or off for the whole process; off also frees what is packed."""
    global _enabled
    _enabled = enabled
    clear()


def clear() -> None:
    """Free all packed factors; they are made anew when they are asked for."""
    _entries.clear()


def nbytes() -> int:
    """Bytes that all packed factors of this process take."""
    return sum(entry.packed.nbytes for entry in _entries.values())


def _pack(weights: tuple[Tensor | None, ...], given: tuple[Tensor, ...]) -> Tensor | None:
    key = id(weights[0])
    _entries.pop(key, None)
    if not _enabled or _register.extension is None:
        return None
    if any(weight.device.type != "cpu" or weight.is_inference() for weight in given):
        return None
    with torch.no_grad():
        made = torch.ops.mixrank_kernels._pack_factors(*weights)
    _entries[key] = _Entry(given, lambda _: _entries.pop(key, None), made)
    return made
