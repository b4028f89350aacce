"""The exception for errors that a user can fix."""

import errno

LONGEST = 2000  # characters of a message; its start says where, its end what was expected
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of an OSError when a disk or quota is full


class UserError(Exception):
    """Bad input: a file, a value or an argument that a person can fix.

    The message is one line that says where, what is wrong and what was expected; the commands print it
    to stderr and exit with code 2, without a traceback.
    """

    def __str__(self) -> str:
        # Names from files may contain characters that control a terminal.
        text = super().__str__()
        if len(text) > LONGEST:  # for example, a picture's bytes in place of a file name
            text = f"{text[: LONGEST // 2]}...{text[-LONGEST // 2 :]}"
        return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def one_line(error: object) -> str:
    """Return an exception's message on one line."""
    return " ".join(str(error).split())


def shortened(value: object) -> str:
    """Return a value as text that is short enough for a message."""
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
