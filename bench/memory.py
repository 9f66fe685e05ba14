"""The highest resident memory of this process, of nothing before it and nothing beside it."""

from __future__ import annotations

import re
from pathlib import Path

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_megabytes() -> float | None:
    """Return the most memory that was resident since the start of the program or the last reset; None outside Linux.

    Not ``getrusage``: a new program takes over the peak of the process that started it.
    """
    found = re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE) if _STATUS.is_file() else None
    return int(found[1]) / 1024 if found else None


def reset_peak() -> None:
    """Let the peak begin at what is resident now; outside Linux nothing happens."""
    if _RESET.exists():
        _RESET.write_text("5")
