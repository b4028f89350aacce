"""The one exception for what a user can mend."""

import errno

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of an OSError where there is no more room


class UserError(Exception):
    """Bad input: a file, a value or an argument that a person can mend.

    The message is one line that says where, what is wrong and what was expected; the commands print it
    to stderr and exit with code 2, without a traceback.
    """

    def __str__(self) -> str:
        # Names from files may hold what moves a terminal's cursor.
        return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in super().__str__())


def one_line(error: object) -> str:
    """An exception's message on one line."""
    return " ".join(str(error).split())


def shortened(value: object) -> str:
    """A value as text, no longer than fits into a message."""
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
