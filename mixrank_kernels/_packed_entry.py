"""What was packed for some weights, as long as it still is theirs."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from mixrank_kernels import _register


class Entry:
    """Packed factors, and the weights as they were when they were packed.

    It keeps the memory that was packed alive, so that no other memory can take its address unnoticed: a weight that is
    given new memory frees the old one at the next call of :func:`mixrank_kernels.packing.packed`.
    """

    __slots__ = ("memory", "packed", "references", "states")

    packed: Tensor

    def __init__(self, weights: tuple[Tensor, ...], forget: Callable[[weakref.ref], None]) -> None:
        self.references = [weakref.ref(weight, forget) for weight in weights]
        self.memory = [weight.untyped_storage() for weight in weights]
        self.states = [_state(weight) for weight in weights]

    def is_of(self, weights: tuple[Tensor, ...]) -> bool:
        """Whether these are the weights that were packed, with the same memory, not written to since."""
        if len(weights) != len(self.references):
            return False
        for weight, reference, state in zip(weights, self.references, self.states, strict=True):
            if reference() is not weight or _state(weight) != state:
                return False
        return True


class PackedCache:
    """What is packed, by the identity of the first weight, for codes with the kind of arithmetic.

    Attributes:
        entries: what there is.
        enabled: whether anything is packed from now on.
    """

    def __init__(self) -> None:
        self.entries: dict[int | tuple[int, bool], Entry] = {}
        self.enabled = True

    def packed(
        self, key: int | tuple[int, bool], given: tuple[Tensor, ...], make: Callable[[], Tensor]
    ) -> Tensor | None:
        """What was packed for the weights ``given`` if they have not changed since, else what ``make`` gives now."""
        entry = self.entries.get(key)
        return entry.packed if entry is not None and entry.is_of(given) else self.pack(key, given, make)

    def pack(self, key: int | tuple[int, bool], given: tuple[Tensor, ...], make: Callable[[], Tensor]) -> Tensor | None:
        """Pack anew; None where that would be of no use."""
        self.entries.pop(key, None)
        if not self.enabled or _register.extension is None or not all(is_plain(weight) for weight in given):
            return None

        def forget(reference: weakref.ref) -> None:
            # Another thread may have put a newer entry in the place of the one that this reference belongs to.
            entry = self.entries.get(key)
            if entry is not None and any(reference is one for one in entry.references):
                self.entries.pop(key, None)

        # Made before the weights are read, so that a write from another thread meanwhile shows at the next call.
        entry = Entry(given, forget)
        with torch.no_grad():
            entry.packed = make()
        self.entries[key] = entry
        return entry.packed


def _state(weight: Tensor) -> tuple:
    # Assigning to weight.data can change any of these alone, and the version counts none of that.
    return weight._version, weight.data_ptr(), weight.dtype, weight.shape, weight.stride()


def is_plain(weight: Tensor) -> bool:
    """Whether it has memory of its own on the CPU, of which every write is counted."""
    return (
        type(weight) in (Tensor, torch.nn.Parameter)
        and weight.device.type == "cpu"
        and not weight.is_inference()
        and not torch._C._functorch.is_functorch_wrapped_tensor(weight)
    )
