"""Checks that a refusal is a UserError of one line that says what was expected."""

import pytest

from dlref.runtime.errors import UserError


def one_line(error: UserError) -> str:
    """Check that the message of an error is one line with an expectation, and return it."""
    message = str(error)
    assert len(message.splitlines()) == 1, message
    assert "; expected " in message, message
    return message


def error_of(function, *arguments, **options) -> str:
    """Return the message of the UserError that the call must raise."""
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    return one_line(caught.value)


def answer_or_none(function, *arguments, **options):
    """Return the call's result, or None if it raises a well-formed UserError; other exceptions propagate."""
    try:
        return function(*arguments, **options)
    except UserError as error:
        one_line(error)
        return None
