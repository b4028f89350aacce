"""Malformed inputs through whole commands, and readers against arbitrary bytes: a part of both.

Of the corpus (`python -m tests.faults.bad_input`, all of it in about 4 minutes) every eighth case of each source that
needs no bundle but one made by hand, and of the readers (`python -m tests.faults.fuzz`) 50 files each.
"""

import pytest

from tests.faults import bad_input, fuzz

pytestmark = [pytest.mark.usefixtures("unchecked"), pytest.mark.filterwarnings("default")]


def some_cases():
    """Every eighth of each source, from its first."""
    cases = bad_input.every_case()
    for family, sources in bad_input.SOURCES.items():
        for name, source in sources.items():
            if source.needs != "bundle":
                yield from [case for case in cases if (case.family, case.source) == (family, name)][::8]


@pytest.fixture(scope="module")
def larder(tmp_path_factory):
    return bad_input.Larder(tmp_path_factory.mktemp("larder"))


@pytest.mark.parametrize("case", list(some_cases()), ids=str)
def test_malformed_input_ends_in_one_line_and_leaves_nothing(larder, case):
    assert bad_input.faults(case, larder.outcome(case.family, case.source, case.breaker)) == {}


def test_a_case_fails_where_nothing_is_broken(larder):
    case = next(case for case in bad_input.every_case() if case.source == "make tokens")
    outcome = larder.outcome(case.family, case.source, bad_input.nothing)
    assert set(bad_input.faults(case, outcome)) == set(bad_input.CHECKS)


READERS = {f"{family}: {reader.name}": reader for family, known in fuzz.READERS.items() for reader in known}


@pytest.mark.parametrize("name", READERS)
def test_a_reader_returns_or_refuses_in_one_line_that_names_a_file(name):
    ends, finding = fuzz.fuzz(READERS[name], examples=50)
    assert not finding
    assert ends["refused"] > 0
