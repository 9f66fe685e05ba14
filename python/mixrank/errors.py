"""The one exception that is a message to the user."""

from __future__ import annotations


class InputError(ValueError):
    """Something from outside (an argument, a file, an image) cannot be used.

    The text is one sentence that names what was given and what is needed; the command line prints it
    without a traceback and exits with status 2.
    """
