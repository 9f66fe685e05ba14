"""The one exception that is a message to the user."""

from __future__ import annotations


class InputError(ValueError):
    """Something from outside (an argument, a file, an image) cannot be used.

    The text is one sentence that names what was given and what is needed; the command line prints it
    without a traceback and exits with status 2.

    Example:
        >>> import mixrank
        >>> try:
        ...     mixrank.MixedRankLinear(8, 16, rank=9)
        ... except InputError as error:
        ...     print(error)
        rank must be from 1 to 8 for a layer of 8 inputs and 16 outputs, but it was 9
    """


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out; PyTorch tells it in words of the allocator of each device."""
    words = ("allocate memory", "out of memory", "bad_alloc")
    return isinstance(error, MemoryError) or any(each in str(error) for each in words)


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its type where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
