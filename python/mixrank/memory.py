"""Memory that this process has freed, back to the system."""

from __future__ import annotations

import ctypes
import sys


def trim() -> None:
    """Give the pages of freed tensors back where the C library is glibc; elsewhere nothing happens.

    glibc raises the size above which a request gets memory of its own to that of what was freed, up to 32 MiB. The
    activations of a pass are smaller, so they come from its heap and leave it full of holes, which count as resident
    and which the larger tensors of the next step do not fit into.
    """
    if sys.platform.startswith("linux") and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
