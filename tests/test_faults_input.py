"""Malformed inputs to whole commands (`python -m tests.faults.bad_input`), and a sample of arbitrary bytes for readers.

Each reader gets 50 files (`python -m tests.faults.fuzz` makes more).
"""

import pytest

from tests.faults import bad_input, fuzz

pytestmark = [pytest.mark.usefixtures("unchecked"), pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def larder(tmp_path_factory):
    return bad_input.Larder(tmp_path_factory.mktemp("larder"))


@pytest.mark.parametrize("case", bad_input.every_case(), ids=str)
def test_malformed_input_is_refused_in_one_line_and_changes_no_files(larder, case):
    assert bad_input.faults(case, larder.outcome(case.family, case.source, case.breaker)) == {}


def test_a_case_fails_every_check_if_nothing_is_broken(larder):
    case = next(case for case in bad_input.every_case() if case.source == "make tokens")
    outcome = larder.outcome(case.family, case.source, bad_input.nothing)
    assert set(bad_input.faults(case, outcome)) == set(bad_input.CHECKS)


READERS = {f"{family}: {reader.name}": reader for family, known in fuzz.READERS.items() for reader in known}


@pytest.mark.parametrize("name", READERS)
def test_a_reader_returns_or_refuses_in_one_line_that_names_a_file(name):
    ends, finding = fuzz.fuzz(READERS[name], examples=50)
    assert not finding
    assert ends["refused"] > 0
