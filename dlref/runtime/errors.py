"""The one exception for what a user can mend."""

import errno

LONGEST = 2000  # letters of a message, whose ends say where and what was expected
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of an OSError where there is no more room


class UserError(Exception):
    """Bad input: a file, a value or an argument that a person can mend.

    The message is one line that says where, what is wrong and what was expected; the commands print it
    to stderr and exit with code 2, without a traceback.
    """

    def __str__(self) -> str:
        # Names from files may hold what moves a terminal's cursor.
        text = super().__str__()
        if len(text) > LONGEST:  # a picture as text is where a file's name was to be
            text = f"{text[: LONGEST // 2]}...{text[-LONGEST // 2 :]}"
        return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def one_line(error: object) -> str:
    """An exception's message on one line."""
    return " ".join(str(error).split())


def shortened(value: object) -> str:
    """A value as text, no longer than fits into a message."""
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
