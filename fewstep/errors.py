"""An error that is the user's to mend: its message says what is wrong, where, and what to do."""

from __future__ import annotations


class UserError(ValueError):
    """Raised on purpose, with a message for the user; the command line prints it as one line, without a traceback.

    Any other ValueError is a fault of ours and keeps its traceback.
    """


def printable(text: str) -> str:
    """The text without characters that command a terminal: a name of a file may hold some."""
    return "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)
