"""How a refusal reads: a UserError of one line, with what was expected."""

import pytest

from dlref.runtime.errors import UserError


def one_line(error: UserError) -> str:
    """The message of a proper one."""
    message = str(error)
    assert len(message.splitlines()) == 1, message
    assert "; expected " in message, message
    return message


def error_of(function, *arguments, **options) -> str:
    """The message of the UserError that the call must raise."""
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    return one_line(caught.value)


def answer_or_none(function, *arguments, **options):
    """The call's answer, or None where it raises a proper UserError; any other exception escapes."""
    try:
        return function(*arguments, **options)
    except UserError as error:
        one_line(error)
        return None
