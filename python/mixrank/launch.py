"""How this process was started; without PyTorch, so that ``mixrank --help`` does not wait for it."""

from __future__ import annotations

import os


def started_processes() -> int:
    """How many ``torchrun`` started, this one included."""
    return int(os.environ.get("WORLD_SIZE", "1"))
