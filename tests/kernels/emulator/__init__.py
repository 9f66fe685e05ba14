"""Builds kernels for the emulator of the GPU's instructions (see emulator.h): C++ without CUDA, called by ctypes."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[3]
SOURCES = Path(__file__).parent
FLAGS = ["-O2", "-march=native", "-std=c++20", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
RUNTIME = [SOURCES / name for name in ("launches.cpp", "machine.cpp", "copies.cpp", "matrix.cpp")]


def build(sources: Sequence[Path], name: str) -> ctypes.CDLL:
    """The library of ``sources`` and the emulator, from ``build/emulator``; compiled when a source has changed.

    Its C functions return a message (``const char*``, null when all is well), which ``call`` raises.
    """
    library = ROOT / "build" / "emulator" / f"{name}.so"
    inputs = [*sources, *SOURCES.glob("*"), *(ROOT / "csrc" / "cuda").glob("*"), *(ROOT / "csrc" / "cpu").glob("*.h")]
    newest = max(path.stat().st_mtime_ns for path in inputs if path.is_file())
    if not library.is_file() or library.stat().st_mtime_ns != newest:
        compile_library([*sources, *RUNTIME], library, newest)
    return ctypes.CDLL(str(library))


def compile_library(sources: Sequence[Path], library: Path, time: int) -> None:
    """Compile ``sources``. The library gets ``time`` (ns), that of its newest input: a later change of one shows."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        raise RuntimeError("the emulator needs a C++ compiler, but there is no c++ on the PATH")
    library.parent.mkdir(parents=True, exist_ok=True)
    # Under a name of its own until it is whole, so that tests that run at the same time may build it too.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        whole = Path(folder) / library.name
        include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'kernels'}"]
        done = subprocess.run(
            [*compiler.split(), *FLAGS, *include, *map(str, sources), "-o", str(whole)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{library.stem} does not compile for the emulator:\n{done.stderr}")
        os.utime(whole, ns=(time, time))
        os.replace(whole, library)


def call(function, *arguments) -> None:
    """Call a C function of a library; what it reports is raised."""
    function.restype = ctypes.c_char_p
    message = function(*arguments)
    if message is not None:
        raise RuntimeError(message.decode())
