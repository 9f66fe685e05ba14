"""Files that are either whole or absent: checked before the long work, written beside their place and then renamed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from mixrank.errors import InputError


def check_writable(path: Path, option: str) -> None:
    """Raise InputError unless a file can be created at ``path``; ``option`` is what the user calls it.

    The permission bits are not asked, since they say little to root or on a read-only mount: a nameless file
    is created in the folder and vanishes.
    """
    folder = path.parent
    if path.is_dir():
        raise InputError(f"{option} {path} is a folder, but it must name a file")
    if not folder.is_dir():
        raise InputError(f"{option} {path} cannot be written: the folder {folder} does not exist")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{option} {path} cannot be written: {error.strerror or error}") from None


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, or leave what was there before untouched."""
    path = Path(path)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = file.name
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
