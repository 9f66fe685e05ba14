"""Loading of the compiled extensions: absent is fine, present but broken is an error that says what to do."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType

import torch

from mixrank_kernels._version import __version__

EXTENSION = "mixrank_kernels._C"
CUDA_EXTENSION = "mixrank_kernels._cuda"
REBUILD = "pip install --no-build-isolation --no-deps --force-reinstall -e . (in a checkout of mixrank-kernels)"


def load_extension() -> ModuleType | None:
    """Import the extension of the CPU kernels, or return None where it was never built.

    Raises:
        ImportError: the extension is there but does not load, or was built from another version of the
            package; the message ends with the command that rebuilds it.
    """
    return _load(EXTENSION, lambda module: module.build_info()["version"])


def load_cuda_extension() -> ModuleType | None:
    """Import the extension of the CUDA kernels, or return None where it was never built or torch has no CUDA.

    Raises:
        ImportError: as for :func:`load_extension`.
    """
    if torch.version.cuda is None:
        return None
    return _load(CUDA_EXTENSION, lambda module: module.version)


def _load(name: str, version: Callable[[ModuleType], str]) -> ModuleType | None:
    spec = importlib.util.find_spec(name)
    if spec is None:
        return None
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{name} ({spec.origin}) is present but does not load: {error}; rebuild it against the installed "
            f"torch with: {REBUILD}"
        ) from error
    built = version(module)
    if built != __version__:
        raise ImportError(
            f"{name} ({spec.origin}) was built from version {built} but the package is {__version__}; rebuild it "
            f"with: {REBUILD}"
        )
    return module
