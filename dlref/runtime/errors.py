"""The one exception for what a user can mend."""


class UserError(Exception):
    """Bad input: a file, a value or an argument that a person can mend.

    The message is one line that says where, what is wrong and what was expected; the commands print it
    to stderr and exit with code 2, without a traceback.
    """
