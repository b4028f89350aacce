"""Files that somebody else made to do harm, each through a command; see `tests/faults/untrusted.py`."""

import pytest

from tests.faults.untrusted import ATTACKS, attacked, make_base, missed


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A run to poison."""
    return make_base(tmp_path_factory.mktemp("untrusted") / "base")


@pytest.mark.parametrize("name", ATTACKS)
def test_nothing_gets_through(name, base, tmp_path):
    assert attacked(ATTACKS[name], tmp_path / "place", base).problems == []


def test_what_is_done_on_purpose_is_noticed(tmp_path):
    assert missed(tmp_path) == []


def test_there_are_as_many_as_were_promised():
    assert len(ATTACKS) >= 50
