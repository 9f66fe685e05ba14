"""Files that are either whole or absent: checked before the long work, written beside their place and then renamed."""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

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


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write contiguous tensors on the CPU that share no memory as safetensors, or leave what was there untouched."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            mode = os.fstat(file.fileno()).st_mode
        save_file(dict(tensors), temporary, metadata=metadata)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)  # safetensors makes its file anew, closed to everyone else
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def check_same_run(path: Path, known: dict, key: dict) -> None:
    """Raise InputError unless ``known``, the key in the state at ``path``, has every entry of ``key``."""
    other = next((name for name in key if known.get(name) != key[name]), None)
    if other is not None:
        was, now = known.get(other), key[other]
        raise InputError(f"{path} is the state of another run: its {other} was {was!r}, now it is {now!r}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
