"""One way to serve a case, as it is timed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Variant:
    """One way to serve a case.

    Attributes:
        call: what is timed.
        answer: how its first result becomes a comparable tensor.
        within: what the call is made in, which takes no part in its time.
    """

    call: Callable[[], Tensor | None]
    answer: Callable[[Tensor], Tensor] = lambda result: result
    within: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext

    def __call__(self) -> Tensor | None:
        with self.within():
            return self.call()
