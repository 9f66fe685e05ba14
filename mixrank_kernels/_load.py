"""Loading of the compiled extension: absent is fine, present but broken is an error that says what to do."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from mixrank_kernels._version import __version__

EXTENSION = "mixrank_kernels._C"
REBUILD = "pip install --no-build-isolation --no-deps --force-reinstall -e . (in a checkout of mixrank-kernels)"


def load_extension() -> ModuleType | None:
    """Import the extension, or return None where it was never built.

    Raises:
        ImportError: the extension is there but does not load, or was built from another version of the
            package; the message ends with the command that rebuilds it.
    """
    spec = importlib.util.find_spec(EXTENSION)
    if spec is None:
        return None
    try:
        module = importlib.import_module(EXTENSION)
    except ImportError as error:
        raise ImportError(
            f"{EXTENSION} ({spec.origin}) is present but does not load: {error}; rebuild it against the installed "
            f"torch with: {REBUILD}"
        ) from error
    built = module.build_info()["version"]
    if built != __version__:
        raise ImportError(
            f"{EXTENSION} ({spec.origin}) was built from version {built} but the package is {__version__}; rebuild it "
            f"with: {REBUILD}"
        )
    return module
