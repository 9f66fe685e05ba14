"""Memory of this process: the most that was resident, and keeping what is freed."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_megabytes() -> float | None:
    """Return the most memory that was resident since the start of the program or the last reset; None outside Linux.

    Not ``getrusage``: a new program takes over the peak of the process that started it.
    """
    found = re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE) if _STATUS.is_file() else None
    return int(found[1]) / 1024 if found else None


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next request, here and for good; elsewhere nothing happens.

    Else it gives a large output back to the system whenever that lies at the end of its heap, and the next call, of
    whichever variant, takes hundreds of page faults that have nothing to do with it.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(trim_threshold, 1 << 30)
        libc.mallopt(mmap_threshold, 1 << 30)


def reset_peak() -> None:
    """Let the peak begin at what is resident now; outside Linux nothing happens."""
    if _RESET.exists():
        _RESET.write_text("5")
