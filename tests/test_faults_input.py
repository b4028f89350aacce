"""A sample of the malformed inputs to whole commands, and of the arbitrary bytes given to readers.

It has every eighth case of each source in the corpus (`python -m tests.faults.bad_input`, about 4 minutes for all),
except sources that need an exported bundle, and 50 files for each reader (`python -m tests.faults.fuzz`).
"""

import pytest

from tests.faults import bad_input, fuzz

pytestmark = [pytest.mark.usefixtures("unchecked"), pytest.mark.filterwarnings("default")]


def some_cases():
    """Yield every eighth case of each source, starting with the first."""
    cases = bad_input.every_case()
    for family, sources in bad_input.SOURCES.items():
        for name, source in sources.items():
            if source.needs != "bundle":
                yield from [case for case in cases if (case.family, case.source) == (family, name)][::8]


@pytest.fixture(scope="module")
def larder(tmp_path_factory):
    return bad_input.Larder(tmp_path_factory.mktemp("larder"))


@pytest.mark.parametrize("case", list(some_cases()), ids=str)
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
