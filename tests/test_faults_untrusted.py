"""Malicious files, each given to a command; see `tests/faults/untrusted.py`."""

import pytest

from tests.faults.untrusted import ATTACKS, attacked, make_base, missed


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Train the run that the attacks poison."""
    return make_base(tmp_path_factory.mktemp("untrusted") / "base")


@pytest.mark.parametrize("name", ATTACKS)
def test_no_attack_succeeds(name, base, tmp_path):
    assert attacked(ATTACKS[name], tmp_path / "place", base).problems == []


def test_violations_made_on_purpose_are_detected(tmp_path):
    assert missed(tmp_path) == []


def test_there_are_at_least_50_attacks():
    assert len(ATTACKS) >= 50
