"""The one exception that is a message to the user."""

from __future__ import annotations


class InputError(ValueError):
    """Something from outside (an argument, a file, an image) cannot be used.

    The text is one sentence that names what was given and what is needed; the command line prints it
    without a traceback and exits with status 2.
    """


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out; PyTorch tells it in words of the allocator of each device."""
    words = ("allocate memory", "out of memory", "bad_alloc")
    return isinstance(error, MemoryError) or any(each in str(error) for each in words)
