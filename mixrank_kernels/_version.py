"""The version of the distribution, read from its metadata so that it is written once."""

from __future__ import annotations

from importlib.metadata import version

__version__ = version("mixrank-kernels")
