"""Readers of time series, given valid, broken and arbitrary files."""

import gzip
import io
import json
import os
from datetime import date, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import answer_or_none, error_of, one_line

from dlref.data.series import Series, check, check_seen_in_training
from dlref.data.series_files import read_dated, read_json_lines, read_long, read_rows, read_wide
from dlref.runtime.calendar import Frequency
from dlref.runtime.errors import UserError

# tmp_path is one folder for all examples of a test: each example overwrites the same file.
shared_folder = [HealthCheck.function_scoped_fixture]
quick = settings(max_examples=60, deadline=None, suppress_health_check=shared_folder, database=None)

H = Frequency(1, "H")
DAY = "2020-01-31"  # a Friday and the last day of its month
NAN = float("nan")
READERS = {
    "json": read_json_lines,
    "wide": lambda path, frequency: read_wide(path, DAY, frequency),
    "dated": read_dated,
    "rows": lambda path, frequency: read_rows(path, DAY, frequency),
    "long": read_long,
}


def text(*rows: str) -> bytes:
    return "\n".join(rows).encode()


def lines(*records: dict) -> bytes:
    return text(*map(json.dumps, records))


def parquet(compression: str = "snappy", **columns) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, compression=compression)
    return file.getvalue()


def read(root: Path, kind: str, name: str, content: bytes, frequency: Frequency = H) -> Series:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(gzip.compress(content, 1) if name.endswith(".gz") else content)
    return READERS[kind](root / name, frequency)


def of(*records: dict, where: Path) -> Series:
    return read(where, "json", "of.json", lines(*({"start": DAY} | record for record in records)))


def well_formed_or_none(function, *arguments) -> Series | None:
    """Return the call's checked result, or None if it raises UserError."""
    series = answer_or_none(function, *arguments)
    if series is None:
        return None
    count = len(series.names)
    assert count > 0
    assert series.offsets.shape == series.dynamic_offsets.shape == (count + 1,)
    assert (series.offsets[-1], series.dynamic_offsets[-1]) == (len(series.target), len(series.dynamic))
    assert (np.diff(series.offsets) >= 0).all()
    assert (np.diff(series.dynamic_offsets) >= 0).all()
    assert series.start.shape == series.cat.shape[:1] == (count,)
    assert series.target.ndim == 1
    assert series.dynamic.ndim == 2
    assert not np.isinf(series.target).any()
    assert np.isfinite(series.dynamic).all()
    assert np.isfinite(series.static).all()
    assert series.static.shape[:1] == (count,)
    dtypes = ["float32", "int64", "datetime64[s]", "int64", "float32", "int64", "float32"]
    assert [str(values.dtype) for values in series if not isinstance(values, list)] == dtypes
    for ahead in (None, 2):
        try:
            check(series, ahead=ahead)
        except UserError as error:
            one_line(error)
    return series


def targets(series: Series) -> list[list[float]]:
    return [values.tolist() for values in np.split(series.target, series.offsets[1:-1])]


def same(found, expected) -> None:
    """Compare lists of numbers in float32; NaN is equal to NaN."""
    assert [len(values) for values in found] == [len(values) for values in expected]
    for values, others in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.float32(values), np.float32(others))


# Frequencies


@pytest.mark.parametrize("unit", ["min", "H", "D", "W", "M", "B"])
def test_frequency_parses_a_unit_with_or_without_a_count(unit):
    assert Frequency.parse(unit) == Frequency.parse(f"1{unit}") == Frequency(1, unit)
    assert str(Frequency.parse(f"15{unit}")) == f"15{unit}"


WRONG = [
    "",
    "0H",
    "-1H",
    "01H",
    "1.5H",
    "10000H",
    "1 H",
    "H\n",
    "h",
    "Min",
    "MIN",
    "T",
    "S",
    "Y",
    "2",
    "HH",
    "٣H",
    None,
]


@pytest.mark.parametrize("wrong", WRONG, ids=range(len(WRONG)))
def test_invalid_frequencies_are_refused(wrong):
    assert error_of(Frequency.parse, wrong) == (
        f"frequency: {wrong!r}; expected a whole number and min, H, D, W, M or B, such as 1H"
    )


STEPS = {  # times and the step of each, None if it is off the grid
    "15min": (["2019-12-31 23:45:00", "2020-01-01 00:15:00", "2020-01-01 00:20:00"], [0, 2, None]),
    "H": (["1750-01-01 00:30:00", "1750-01-02 00:30:00", "1750-01-02 01:00:00"], [0, 24, None]),
    "D": (["2020-02-28", "2020-03-01", "2020-03-01 01:00:00"], [0, 2, None]),
    "2W": (["2020-01-01", "2020-01-29", "2020-01-08"], [0, 2, None]),
    "M": (["1969-11-15", "1970-01-15", "1970-02-16"], [0, 2, None]),
    "3M": (["2020-01-01", "2020-04-01", "2021-01-01", "2020-03-01"], [0, 1, 4, None]),
    "1M": (["2020-01-31", "2020-02-29", "2021-04-30", "2021-02-27"], [0, 1, 15, None]),  # ends of months
    "B": (["2020-01-31 09:00:00", "2020-02-03 09:00:00", "2020-02-01 09:00:00", "2020-02-04"], [0, 1, None, None]),
    "5B": (["1969-12-29", "1970-01-05", "1970-01-06"], [0, 1, None]),
}


@pytest.mark.parametrize("frequency", STEPS)
def test_steps_count_whole_steps_and_mark_times_off_the_grid(frequency):
    times, expected = STEPS[frequency]
    steps, whole = Frequency.parse(frequency).steps(np.array(times, "datetime64[s]"))
    assert steps.dtype == np.int64
    assert [int(step) if on else None for step, on in zip(steps, whole, strict=True)] == expected


# Valid files

RECORDS = [
    {
        "start": "2020-01-31 05:00:00",
        "target": [1, None, 2.5, "NaN", NAN],
        "cat": [3, 0],
        "dynamic_feat": [[0] * 5] * 3,
    },
    {"start": DAY, "target": [-7e3], "cat": [0, 1], "dynamic_feat": [[1], [2], [3.5]], "item": "unknown"},
]


def check_records(series: Series, names: list[str]) -> None:
    same(targets(series), [[1, NAN, 2.5, NAN, NAN], [-7000]])
    assert series.offsets.tolist() == series.dynamic_offsets.tolist() == [0, 5, 6]
    assert series.start.tolist() == [datetime(2020, 1, 31, 5), datetime(2020, 1, 31)]
    assert series.cat.tolist() == [[3, 0], [0, 1]]
    assert series.dynamic.tolist() == [[0, 0, 0]] * 5 + [[1, 2, 3.5]]
    assert series.names == names


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "b/a.JSONL.gz"])
def test_json_lines_are_read_with_bom_blank_lines_and_gzip(tmp_path, name):
    first, second = map(json.dumps, RECORDS)
    content = b"\xef\xbb\xbf" + f"{first}\r\n \n{second}\n\n".encode()
    series = well_formed_or_none(read, tmp_path, "json", name, content)
    check_records(series, [f"{tmp_path / name}:1", f"{tmp_path / name}:3"])


STARTS = {
    "text": [record["start"] for record in RECORDS],
    "time of nanoseconds": pa.array([datetime(2020, 1, 31, 5), datetime(2020, 1, 31)], pa.timestamp("ns")),
    "time of milliseconds": pa.array([datetime(2020, 1, 31, 5), datetime(2020, 1, 31)], pa.timestamp("ms")),
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("compression", ["gzip", "snappy"])
def test_parquet_is_read_with_any_type_of_start_and_compression(tmp_path, start, compression):
    columns = {
        "item": ["a", "b"],
        "start": STARTS[start],
        "dynamic_feat": [record["dynamic_feat"] for record in RECORDS],
        "target": pa.array([[1, None, 2.5, NAN, NAN], [-7e3]], pa.list_(pa.float32())),
        "cat": pa.array([record["cat"] for record in RECORDS], pa.list_(pa.int8())),
    }
    series = well_formed_or_none(read, tmp_path, "json", "a.parquet", parquet(compression, **columns))
    check_records(series, [f"{tmp_path}/a.parquet:1", f"{tmp_path}/a.parquet:2"])


def test_a_fraction_of_a_second_in_parquet_is_refused_with_its_row(tmp_path):
    starts = [np.datetime64(time, "ms") for time in ("2024-01-01T00:00:00.000", "2024-01-02T00:00:00.500")]
    (tmp_path / "a.parquet").write_bytes(parquet(start=starts, target=[[1.0], [1.0]]))
    assert error_of(read_json_lines, tmp_path / "a.parquet", H).startswith(
        f"{tmp_path}/a.parquet:2: start: '2024-01-02 00:00:00.500'; expected YYYY-MM-DD"
    )


def test_parquet_of_many_rows_is_read_with_dates_and_scalar_cats(tmp_path):
    count = 50  # more rows than are read at once
    content = parquet(start=[date(1750, 1, 1)] * count, target=[[i] for i in range(count)], cat=list(range(count)))
    series = well_formed_or_none(read, tmp_path, "json", "a.parquet", content)
    assert series.target.tolist() == series.cat[:, 0].tolist() == list(range(count))
    assert set(series.start.tolist()) == {datetime(1750, 1, 1)}
    assert series.names[-1].endswith("a.parquet:50")


@pytest.mark.parametrize("name", ["feat_static_cat", "feat_dynamic_real"])
def test_gluonts_field_names_are_refused_in_parquet_too(tmp_path, name):
    content = parquet(start=[DAY], target=[[1.0]], **{name: [[1]]})
    (tmp_path / "a.parquet").write_bytes(content)
    assert error_of(read_json_lines, tmp_path / "a.parquet", H).startswith(f"{tmp_path}/a.parquet:1: {name}; expected")


def test_records_may_omit_cat_and_features(tmp_path):
    series = of({"target": [1, 2]}, {"target": [], "cat": [], "dynamic_feat": None}, where=tmp_path)
    assert (series.cat.shape, series.dynamic.shape) == ((2, 0), (0, 0))
    assert (series.offsets.tolist(), series.dynamic_offsets.tolist()) == ([0, 2, 2], [0, 0, 0])
    assert of({"target": [1], "cat": 4}, {"target": [2], "cat": [5]}, where=tmp_path).cat.tolist() == [[4], [5]]


def test_folders_are_read_recursively_without_hidden_files(tmp_path):
    record = {"start": DAY, "target": [1]}
    for i, name in enumerate(["z.json", "b/c/x.jsonl.gz", "b/a.json"]):
        read(tmp_path, "json", name, lines(record | {"target": [i]}))
    read(tmp_path, "json", "b/d.parquet", parquet(start=[DAY], target=[[3]]))
    for name in ("_SUCCESS", "b/_SUCCESS", ".hidden", "b/.a.json.crc", ".folder/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"?")
    series = well_formed_or_none(read_json_lines, tmp_path, H)
    assert series.target.tolist() == [2, 1, 3, 0]
    files = ["b/a.json", "b/c/x.jsonl.gz", "b/d.parquet", "z.json"]
    assert series.names == [f"{tmp_path}/{name}:1" for name in files]


@pytest.mark.parametrize("name", ["a.txt", "a.csv.gz"])
def test_wide_tables_are_read_with_missing_values(tmp_path, name):
    content = text("1,-2.5, 3e2\r", ' "4",nan,+.5', ",NA,7.", "", "")
    series = well_formed_or_none(read, tmp_path, "wide", name, content)
    same(targets(series), [[1, 4, NAN], [-2.5, NAN, NAN], [300, 0.5, 7]])
    assert series.names == ["column 1", "column 2", "column 3"]
    assert series.start.tolist() == [datetime(2020, 1, 31)] * 3


def test_a_wide_table_may_begin_as_pandas_numbers_of_columns_do(tmp_path):
    series = well_formed_or_none(read, tmp_path, "wide", "a.csv", text(",0", ",2", "5,4"))
    same(targets(series), [[NAN, NAN, 5], [0, 2, 4]])


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_dated_tables_are_read_and_missing_rows_are_counted(tmp_path, name):
    rows = ["2020-01-31 23:00:00,1,2", "2020-02-01 00:00:00,,4", "2020-02-01 03:00:00,5,6"]
    with pytest.warns(UserWarning, match=rf"{name}: 4 points have no row and count as missing$"):
        series = well_formed_or_none(read, tmp_path, "dated", name, text(',"OT, in °C",load', *rows, ""))
    same(targets(series), [[1, NAN, NAN, NAN, 5], [2, 4, NAN, NAN, 6]])
    assert series.names == ["OT, in °C", "load"]
    assert series.start.tolist() == [datetime(2020, 1, 31, 23)] * 2


@pytest.mark.parametrize(
    ("frequency", "dates", "expected"),
    [
        ("B", ["2020-01-31", "2020-02-03", "2020-02-05"], [1, 2, NAN, 3]),
        ("M", ["2020-01-31", "2020-02-29", "2020-04-30"], [1, 2, NAN, 3]),
        ("3M", ["2020-01-01", "2020-04-01", "2020-10-01"], [1, 2, NAN, 3]),
        ("W", ["2020-01-31", "2020-02-07", "2020-02-21"], [1, 2, NAN, 3]),
    ],
)
def test_dated_tables_follow_calendar_frequencies(tmp_path, frequency, dates, expected):
    content = text("date,x", *(f"{day},{i}" for i, day in enumerate(dates, start=1)))
    with pytest.warns(UserWarning, match="a.csv: 1 points have no row"):
        series = read(tmp_path, "dated", "a.csv", content, Frequency.parse(frequency))
    same(targets(series), [expected])


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_row_tables_are_read_with_missing_values(tmp_path, name):
    content = text('"V1","V2","V3","V4"', '"H1","605","","586"', '"H2","1"', '"H3","2","NA",""', "H4,,,")
    series = well_formed_or_none(read, tmp_path, "rows", name, content)
    same(targets(series), [[605, NAN, 586], [1], [2, NAN], []])
    assert series.names == ["H1", "H2", "H3", "H4"]
    assert series.start.tolist() == [datetime(2020, 1, 31)] * 4


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_long_tables_are_read_and_missing_rows_are_counted(tmp_path, name):
    rows = ["1,a,2020-01-31 01:00:00", "2,b,2020-01-31", "3,a,2020-01-31 02:00:00", ",b,2020-01-31 03:00:00"]
    with pytest.warns(UserWarning, match=rf"{name}: 2 points have no row and count as missing$"):
        series = well_formed_or_none(read, tmp_path, "long", name, text("target,item_id,timestamp", *rows))
    same(targets(series), [[1, 3], [2, NAN, NAN, NAN]])
    assert series.names == ["a", "b"]
    assert series.start.tolist() == [datetime(2020, 1, 31, 1), datetime(2020, 1, 31)]


def test_long_tables_may_name_their_columns_differently(tmp_path):
    (tmp_path / "a.csv").write_bytes(text("store,day,sales,price", f"x,{DAY},5,high"))
    series = read_long(tmp_path / "a.csv", H, item_id="store", timestamp="day", target="sales")
    assert (series.names, series.target.tolist()) == (["x"], [5])
    message = error_of(read_long, tmp_path / "a.csv", H, item_id="shop", timestamp="day", target="sales")
    expected = "expected 'shop' among them, or data.init_args.item_id"
    assert message.endswith(f"a.csv:1: columns ['store', 'day', 'sales', 'price']; {expected}")


# Broken files: reader, name, content, frequency, and the error message after the file's name


def record(**fields) -> bytes:
    return lines({"start": DAY, "target": [1]}, {"start": DAY, "target": [1, 2]} | fields)


DATES = "; expected YYYY-MM-DD or YYYY-MM-DD HH:MM:SS, without a time zone"
VALUE, FEATURE = "; expected a finite number of float32 or a missing value", "; expected a finite number of float32"
CATEGORY = "; expected a whole number from 0 to 999999"
COMMAS = "; expected cells separated by commas"
HEAD = "item_id,timestamp,target"
BROKEN_JSON = [
    (b"", ": no records; expected at least one"),
    (b"\n \r\n", ": no records; expected at least one"),
    (b"\xff", ":1: byte 0 is 0xff, not UTF-8; expected series in UTF-8"),
    (record() + b"\n\xc3(", ":3: byte 0 is 0xc3, not UTF-8"),
    (b"{", ":1: '{'; expected one JSON object"),
    (record() + b"\n[1]", ":3: '[1]'; expected one JSON object"),
    (record()[:-1], ':2: \'{"start": "2...rget": [1, 2]\'; expected one JSON object'),
    (record().replace(b"\n", b""), ":1: "),
    (json.dumps([{"start": DAY, "target": [1]}], indent=1).encode(), ":1: '['; expected one JSON object"),
    (b"[" * 100_000, "; expected one JSON object"),
    (b'{"target": ' + b"9" * 5000 + b"}", "; expected one JSON object"),
    (lines({"target": [1]}), ":1: start: None" + DATES),
    (record(start=1580428800), ":2: start: 1580428800" + DATES),
    (record(start=["2020-01-31"]), ":2: start: ['2020-01-31']" + DATES),
    (record(start=""), ":2: start: ''" + DATES),
    (record(start="2020-01-31T00"), ":2: start: '2020-01-31T00'" + DATES),
    (record(start="2020-01-31 00:00:00Z"), ":2: start: '2020-01-31 00:00:00Z'" + DATES),
    (record(start="2020-01-31 00:00:00+01:00"), ":2: start: '2020-01-31 00:00:00+01:00'" + DATES),
    (record(start="2020-01-31 00:00:00.5"), DATES),
    (record(start="2020-01-31 24:00:00"), ":2: start: '2020-01-31 24:00:00'" + DATES),
    (record(start="2020-02-30"), ":2: start: '2020-02-30'" + DATES),
    (record(start="0000-01-01"), DATES),
    (record(start="2020-W01-1"), DATES),
    (record(start="٢٠٢٠-01-01"), DATES),
    (record(start="2020-01-31\n"), ":2: start: '2020-01-31\\n'" + DATES),
    (lines({"start": DAY}), ":1: target: None; expected a list of numbers"),
    (record(target=3), ":2: target: 3; expected a list of numbers"),
    (record(target="1,2"), ":2: target: '1,2'; expected a list of numbers"),
    (record(target={"0": 1}), ":2: target: {'0': 1}; expected a list of numbers"),
    (record(target=[1, True]), ":2: target[1]: True" + VALUE),
    (record(target=[1, "2"]), ":2: target[1]: '2'" + VALUE),
    (record(target=["nan"]), ":2: target[0]: 'nan'" + VALUE),
    (record(target=[[1]]), ":2: target[0]: [1]" + VALUE),
    (record(target=[0, {}]), ":2: target[1]: {}" + VALUE),
    (record(target=[float("inf")]), ":2: target[0]: inf" + VALUE),
    (record(target=[float("-inf")]), ":2: target[0]: -inf" + VALUE),
    (record(target=[3.5e38]), ":2: target[0]: 3.5e+38" + VALUE),
    (record(target=[10**400]), ":2: target[0]: 1000" + "0" * 14 + "..." + "0" * 19 + VALUE),
    (b'{"start": "2020-01-31", "target": [0, 1e400]}', ":1: target[1]: inf" + VALUE),
    (record(cat=[0]), ":2: cat: 1 of them; expected 0, as {file}:1 has"),
    (record(cat=True), ":2: cat[0]: True" + CATEGORY),
    (record(cat=[0, -1]), ":2: cat[1]: -1" + CATEGORY),
    (record(cat=[1.0]), ":2: cat[0]: 1.0" + CATEGORY),
    (record(cat=["red"]), ":2: cat[0]: 'red'" + CATEGORY),
    (record(cat={}), ":2: cat[0]: {}" + CATEGORY),
    (record(cat=[10**6]), ":2: cat[0]: 1000000" + CATEGORY),
    (record(cat=[[0]]), ":2: cat[0]: [0]" + CATEGORY),
    (
        lines(*({"start": DAY, "target": [1], "cat": cat} for cat in ([1, 2], [1]))),
        ":2: cat: 1 of them; expected 2, as",
    ),
    (record(dynamic_feat=[[1, 2]]), ":2: dynamic_feat: 1 of them; expected 0, as {file}:1 has"),
    (record(dynamic_feat=[1, 2]), ":2: dynamic_feat: [1, 2]; expected a list of lists of numbers"),
    (record(dynamic_feat=0), ":2: dynamic_feat: 0; expected a list of lists of numbers"),
    (record(dynamic_feat=[[1, 2], [1]]), ":2: dynamic_feat[1]: 1 values; expected 2, as dynamic_feat[0] has"),
    (record(dynamic_feat=[[1, 2], [1, None]]), ":2: dynamic_feat[1][1]: None" + FEATURE),
    (record(dynamic_feat=[[1, "NaN"]]), ":2: dynamic_feat[0][1]: 'NaN'" + FEATURE),
    (record(dynamic_feat=[[NAN, 1]]), ":2: dynamic_feat[0][0]: nan" + FEATURE),
    (record(dynamic_feat=[[1, -float("inf")]]), ":2: dynamic_feat[0][1]: -inf" + FEATURE),
    (record(dynamic_feat=[[False, 1]]), ":2: dynamic_feat[0][0]: False" + FEATURE),
]
UTC = pa.array([datetime(2020, 1, 31)], pa.timestamp("s", "UTC"))
HALF = pa.array([datetime(2020, 1, 31, microsecond=5)], pa.timestamp("us"))
WHOLE = parquet(start=[DAY], target=[[1.0, 2.0]])
BROKEN_PARQUET = [
    (b"", "; expected a Parquet file"),
    (lines({"start": DAY, "target": [1]}), "; expected a Parquet file"),
    (WHOLE[:-9], "; expected a Parquet file"),
    (WHOLE[: len(WHOLE) // 2], "; expected a Parquet file"),
    (parquet(start=[], target=[]), ": no records; expected at least one"),
    (parquet(day=[DAY]), ":1: start: None" + DATES),
    (parquet(start=[DAY]), ":1: target: None; expected a list of numbers"),
    (parquet(target=[[1]]), ":1: start: None" + DATES),
    (parquet(start=[DAY, None], target=[[1], [1]]), ":2: start: None" + DATES),
    (parquet(start=UTC, target=[[1]]), ":1: start: time zone 'UTC'; expected none"),
    (parquet(start=HALF, target=[[1]]), ":1: start: '2020-01-31 00:00:00.000005'; expected YYYY-MM-DD"),
    (parquet(start=[1580428800], target=[[1]]), ":1: start: 1580428800" + DATES),
    (parquet(start=[b"2020-01-31"], target=[[1]]), ":1: start: b'2020-01-31'" + DATES),
    (parquet(start=[DAY, DAY], target=[[1], None]), ":2: target: None; expected a list of numbers"),
    (parquet(start=[DAY], target=[3]), ":1: target: 3; expected a list of numbers"),
    (parquet(start=[DAY], target=[[True]]), ":1: target[0]: True" + VALUE),
    (parquet(start=[DAY], target=[[3.0, float("inf")]]), ":1: target[1]: inf" + VALUE),
    (parquet(start=[DAY], target=[[1]], cat=[["a"]]), ":1: cat[0]: 'a'" + CATEGORY),
    (parquet(start=[DAY] * 2, target=[[1]] * 2, cat=[[1], None]), ":2: cat: 0 of them; expected 1, as {file}:1 has"),
    (parquet(start=[DAY], target=[[1]], dynamic_feat=[[[1, None]]]), ":1: dynamic_feat[0][1]: None" + FEATURE),
]
BROKEN_TABLES = [
    ("wide", text(""), "H", ": no series; expected at least one"),
    ("wide", text("1,2", "3"), "H", ":2: 1 cells; expected 2, as in the first row"),
    ("wide", text("1,2", "3,4,"), "H", ":2: 3 cells; expected 2, as in the first row"),
    ("wide", text("a,b", "1,2"), "H", ":1: column 1: 'a'" + VALUE),
    ("wide", text(",0,1", "0,3,4", "1,5,6"), "H", ": pandas' numbers of rows and columns; expected values, as with"),
    ("wide", text("1;2", "3;4"), "H", ":1: column 1: '1;2'" + VALUE),
    ("wide", text("1,2", "", "3,4"), "H", ":2: blank line" + COMMAS),
    ("wide", text("1,inf"), "H", ":1: column 2: 'inf'" + VALUE),
    ("wide", text("1,1e400"), "H", ":1: column 2: inf" + VALUE),
    ("wide", text("1,1_000"), "H", ":1: column 2: '1_000'" + VALUE),
    ("wide", text("1,٣"), "H", ":1: column 2: '٣'" + VALUE),
    ("wide", text("1,0x10"), "H", ":1: column 2: '0x10'" + VALUE),
    ("wide", b"1,2\n\xe9,3", "H", ":2: byte 0 is 0xe9, not UTF-8; expected a table in UTF-8"),
    ("wide", text('1,"2'), "H", ":1: unexpected end of data" + COMMAS),
    ("wide", text('1,"2"3'), "H", ":1: ',' expected after '\"'" + COMMAS),
    ("wide", b"1,2\r3,4", "H", ":1: new-line character seen in unquoted field"),
    ("wide", b"1," + b"2" * 200_000, "H", ":1: field larger than field limit (131072)" + COMMAS),
    ("dated", b"", "H", ": no lines; expected a header"),
    ("dated", text("date,x"), "H", ": no series; expected at least one"),
    ("dated", text("date", DAY), "H", ":1: ['date']; expected a header: a date and a name for each series"),
    ("dated", text(f"{DAY},1", "2020-02-01,2"), "D", ":1: ['2020-01-31', '1']; expected a header"),
    ("dated", text("date,x,x", f"{DAY},1,2"), "H", ":1: column 3: x again, as in column 2; expected unique names"),
    ("dated", text("date,,x", f"{DAY},1,2"), "H", ":1: column 2: ''; expected a name"),
    ("dated", text('date,"a\nb"', f"{DAY},1"), "H", ":2: column 2: 'a\\nb'; expected a name"),
    ("dated", text("date,x", f"{DAY}"), "H", ":2: 1 cells; expected 2, as in the first row"),
    ("dated", text("date,x", "31.01.2020,1"), "H", ":2: date: '31.01.2020'" + DATES),
    (
        "dated",
        text("date,x", f"{DAY},1", "2020-01-31 01:00:00+00:00,1"),
        "H",
        ":3: date: '2020-01-31 01:00:00+00:00'" + DATES,
    ),
    ("dated", text("date,x", f"{DAY},1", ",2"), "H", ":3: date: ''" + DATES),
    (
        "dated",
        text("date,x", f"{DAY},1", f"{DAY},2"),
        "H",
        f":3: date: {DAY} 00:00:00 after {DAY} 00:00:00; expected rows in",
    ),
    (
        "dated",
        text("date,x", f"{DAY},1", "2020-01-30,2"),
        "H",
        ":3: date: 2020-01-30 00:00:00 after 2020-01-31 00:00:00",
    ),
    (
        "dated",
        text("date,x", f"{DAY},1", "2020-01-31 00:30:00,2"),
        "H",
        ":3: date: 2020-01-31 00:30:00; expected whole steps of 1H from 2020-01-31 00:00:00",
    ),
    (
        "dated",
        text("date,x", f"{DAY},1", "2020-02-01,2"),
        "M",
        ":3: date: 2020-02-01 00:00:00; expected whole steps of 1M",
    ),
    (
        "dated",
        text("date,x", "2021-02-28,1", "2021-03-28,2", "2021-03-31,3"),
        "M",
        " after 2021-03-28 00:00:00; expected",
    ),
    (
        "dated",
        text("date,x", f"{DAY},1", "2020-02-01,2"),
        "B",
        ":3: date: 2020-02-01 00:00:00; expected whole steps of 1B over",
    ),
    (
        "dated",
        text("date,x", "2020-02-01,2"),
        "B",
        ":2: date: 2020-02-01 00:00:00; expected whole steps of 1B over business",
    ),
    (
        "dated",
        text("date,x", f"{DAY},1", "2920-01-31,2"),
        "D",
        ", 328718 steps after 2020-01-31 00:00:00; expected at most",
    ),
    ("dated", text("date,x", f"{DAY},ten"), "H", ":2: x: 'ten'" + VALUE),
    ("rows", b"\n\n", "H", ": no lines; expected a header"),
    ("rows", text("id,1,2"), "H", ": no series; expected at least one"),
    ("rows", text("id,1,2", "a,1,2,3"), "H", ":2: 3 values; expected at most 2, as in the header"),
    ("rows", text("id,1,2", "a,1", "a,2"), "H", ":3: id: a again; expected it once, as in line 2"),
    ("rows", text("id,1,2", ",1,2"), "H", ":2: id: ''; expected a name"),
    ("rows", text("id,1,2", '"a\u2028b",1,2'), "H", ":2: id: 'a\\u2028b'; expected a name"),
    ("rows", text("id,x1,x2", "a,1,-inf"), "H", ":2: x2: '-inf'" + VALUE),
    ("rows", text("a,5,5", "b,1,2"), "H", ":1: column 3: 5 again, as in column 2; expected unique names"),
    ("long", b"", "H", ": no lines; expected a header"),
    ("long", text(HEAD), "H", ": no series; expected at least one"),
    ("long", text("item_id,date,target"), "H", ":1: columns ['item_id', 'date', 'target']; expected 'timestamp' among"),
    ("long", text(HEAD, f"a,{DAY}"), "H", ":2: 2 cells; expected 3, as in the first row"),
    ("long", text(HEAD, f",{DAY},1"), "H", ":2: item_id: ''; expected a name"),
    ("long", text(HEAD, "a,now,1"), "H", ":2: timestamp: 'now'" + DATES),
    ("long", text(HEAD, f"a,{DAY},x"), "H", ":2: target: 'x'" + VALUE),
    ("long", text(HEAD, f"a,{DAY},1", f"b,{DAY},1", f"a,{DAY},2"), "H", f":4: timestamp: {DAY} 00:00:00 after {DAY}"),
]
BROKEN = [("json", "a.jsonl", content, "H", complaint) for content, complaint in BROKEN_JSON]
BROKEN += [("json", "a.parquet", content, "H", complaint) for content, complaint in BROKEN_PARQUET]
BROKEN += [(kind, "a.csv", *rest) for kind, *rest in BROKEN_TABLES]
BROKEN += [
    (
        "json",
        "a.json",
        lines({"start": "2020-02-01", "target": [1]}),
        "B",
        ":1: start: 2020-02-01 00:00:00 is a weekend;",
    ),
    ("json", "a.csv", record(), "H", ": not a folder and no known extension; expected .json, .jsonl, .json.gz"),
    ("json", "a.parquet.gz", record(), "H", ": not a folder and no known extension; expected .json, .jsonl, .json.gz"),
    ("json", "part-00000", record(), "H", ": not a folder and no known extension; expected .json"),
]


@pytest.mark.parametrize(("kind", "name", "content", "frequency", "complaint"), BROKEN, ids=range(len(BROKEN)))
def test_broken_files_are_refused_with_their_place(tmp_path, kind, name, content, frequency, complaint):
    message = error_of(read, tmp_path, kind, name, content, Frequency.parse(frequency))
    assert message.startswith(f"{tmp_path}/{name}:")
    assert complaint.replace("{file}", f"{tmp_path}/{name}") in message


@pytest.mark.parametrize("kind", READERS)
def test_broken_gzip_files_are_refused(tmp_path, kind):
    path = tmp_path / "a.json.gz"
    line = bytes(
        np.random.RandomState(0).randint(65, 91, 99).tolist()
    )  # a single line, so that nothing is read before the damage
    whole = gzip.compress(line, mtime=0)
    for content in (whole[:-9], whole[:3], b"no gzip", whole[:20] + b"\xff" * 20 + whole[40:], whole + b"?"):
        path.write_bytes(content)
        message = error_of(READERS[kind], path, H)
        assert message.startswith(f"{path}: unreadable (") or "not UTF-8" in message, content


@pytest.mark.parametrize("kind", READERS)
def test_a_missing_file_is_refused(tmp_path, kind):
    path = tmp_path / "none.json"
    assert error_of(READERS[kind], path, H).startswith(f"{path}: No such file or directory; expected ")


def test_a_missing_parquet_file_and_a_folder_given_as_a_table_are_refused(tmp_path):
    path = tmp_path / "none.parquet"
    assert error_of(read_json_lines, path, H) == f"{path}: no such file; expected a Parquet file"
    assert error_of(read_dated, tmp_path, H) == f"{tmp_path}: Is a directory; expected a table"


def test_folders_without_series_or_with_bad_files_are_refused(tmp_path):
    assert error_of(read_json_lines, tmp_path, H) == f"{tmp_path}: no series; expected at least one"
    read(tmp_path, "json", "a.json", lines({"start": DAY, "target": [1]}))
    for name, complaint in (("b.json", ": no records; expected at"), ("README", ": not a folder and no known ext")):
        (tmp_path / name).touch()
        assert error_of(read_json_lines, tmp_path, H).startswith(f"{tmp_path}/{name}{complaint}")
        (tmp_path / name).unlink()
    (tmp_path / "c\n.json").touch()
    assert error_of(read_json_lines, tmp_path, H) == f"{tmp_path}: file 'c\\n.json'; expected a name of one line"
    (tmp_path / "c\n.json").unlink()
    (tmp_path / "d").mkdir()
    (tmp_path / "d/e.json").write_bytes(lines({"start": DAY, "target": [1], "cat": 0}))
    message = error_of(read_json_lines, tmp_path, H)
    assert message == f"{tmp_path}/d/e.json:1: cat: 1 of them; expected 0, as {tmp_path}/a.json:1 has"


@pytest.mark.parametrize("kind", ["wide", "rows"])
def test_an_invalid_start_option_is_refused(tmp_path, kind):
    reader = read_wide if kind == "wide" else read_rows
    assert error_of(reader, tmp_path / "a.csv", "1750", H) == "start: '1750'" + DATES
    message = error_of(reader, tmp_path / "a.csv", "2020-02-01", Frequency(1, "B"))
    assert message == "start: 2020-02-01 00:00:00 is a weekend; expected a business day"


# SageMaker's rules

MANY = list(range(150))
RULES = [  # records, the arguments of check, and the error message after the file's name
    (
        [{"target": [0] * 149}, {"target": MANY}],
        {},
        ":1 to {file}:2: target: 299 values observed; expected 300 to train",
    ),
    ([{"target": [*MANY, None] * 2}, {"target": [None, "NaN"]}], {}, ":2: target: 2 values, all missing; expected at"),
    (
        [{"target": MANY * 2}, {"target": []}],
        {"ahead": 2},
        ":2: target: 0 values, all missing; expected at least one",
    ),
    ([{"target": [0] * 300}], {}, ":1: target: only zeros; expected other values to train from"),
    ([{"target": [0, None] * 300}], {}, ":1: target: only zeros"),
    (
        [{"target": MANY, "dynamic_feat": [MANY]}, {"target": MANY, "dynamic_feat": [MANY[:-1]]}],
        {},
        ":2: dynamic_feat: 149 values; expected 150, as many as target",
    ),
    (
        [{"target": MANY, "dynamic_feat": [MANY]}],
        {"ahead": 2},
        ":1: dynamic_feat: 150 values; expected 152, as many as target and 2 more",
    ),
    (
        [{"target": MANY * 2, "cat": [4, 2]}],
        {"cardinality": [5, 2]},
        ":1: cat[1]: 2; expected 0 to 1, as cardinality says",
    ),
]


@pytest.mark.parametrize(("records", "options", "complaint"), RULES, ids=range(len(RULES)))
def test_series_that_break_sagemakers_rules_are_refused(tmp_path, records, options, complaint):
    message = error_of(check, of(*records, where=tmp_path), **options)
    assert message.startswith(f"{tmp_path}/of.json:")
    assert complaint.replace("{file}", f"{tmp_path}/of.json") in message


def test_series_within_the_rules_pass_and_give_their_cardinality(tmp_path):
    train = of({"target": MANY, "cat": [3, 0]}, {"target": [*MANY, None], "cat": [0, 1]}, where=tmp_path)
    assert check(train) == check(train, "auto") == [4, 2]
    assert check(train, [4, 9]) == [4, 9]
    assert check(of({"target": MANY * 2}, where=tmp_path)) == []
    features = {"target": MANY * 2, "dynamic_feat": [MANY * 2, [0] * 300]}
    assert check(of(features, where=tmp_path)) == []
    features = {"target": [0], "dynamic_feat": [[1, 2, 3]]}
    assert check(of(features, where=tmp_path), ahead=2) == []  # few or zero values are allowed in series to predict


CARDINALITIES = [[4], [4, 2, 1], [], {}, "ignore", "42", 4]


@pytest.mark.parametrize("cardinality", CARDINALITIES, ids=range(len(CARDINALITIES)))
def test_a_cardinality_of_the_wrong_form_or_length_is_refused(tmp_path, cardinality):
    series = of({"target": MANY * 2, "cat": [3, 0]}, where=tmp_path)
    message = error_of(check, series, cardinality)
    assert message == f"cardinality: {cardinality!r}; expected auto or 2 numbers, one for each cat"


@pytest.mark.parametrize("size", [0, -1, True, 4.0, "4", None, 10**6 + 1])
def test_an_invalid_number_in_cardinality_is_refused(tmp_path, size):
    series = of({"target": MANY * 2, "cat": [3, 0]}, where=tmp_path)
    assert error_of(check, series, [4, size]) == f"cardinality[1]: {size!r}; expected 1 to 1000000"


def test_categories_unseen_in_training_and_other_feature_counts_are_refused(tmp_path):
    train = of({"target": MANY, "cat": [3, 0]}, {"target": MANY, "cat": [1, 2]}, where=tmp_path)
    check_seen_in_training(train, of({"target": [1], "cat": [3, 2]}, {"target": [1], "cat": [1, 0]}, where=tmp_path))
    other = of({"target": [1], "cat": [3, 2]}, {"target": [1], "cat": [2, 0]}, where=tmp_path)
    message = error_of(check_seen_in_training, train, other)
    assert message == f"{tmp_path}/of.json:2: cat[0]: 2; expected one seen in training, [1, 3]"
    message = error_of(check_seen_in_training, train, of({"target": [1]}, where=tmp_path))
    assert message == f"{tmp_path}/of.json:1: cat: 0 of them; expected 2, as in training"
    other = of({"target": [1], "cat": [3, 0], "dynamic_feat": [[1]]}, where=tmp_path)
    message = error_of(check_seen_in_training, train, other)
    assert message == f"{tmp_path}/of.json:1: dynamic_feat: 1 of them; expected 0, as in training"


# Arbitrary contents

ALPHABETS = {"json": '{}[]":,0e-. \n', "csv": f'0123456789,."-:NaN \n\r{chr(0)}é'}
frequencies = st.sampled_from(["min", "7H", "D", "2W", "M", "B"]).map(Frequency.parse)


@pytest.mark.filterwarnings("ignore:.* points have no row")
@pytest.mark.parametrize("kind", READERS)
@quick
@given(data=st.data(), frequency=frequencies)
def test_arbitrary_bytes_are_read_or_refused(tmp_path, kind, data, frequency):
    alphabet = ALPHABETS["json" if kind == "json" else "csv"]
    content = data.draw(st.binary() | st.text(alphabet).map(str.encode))
    head = {"dated": b"date,x,y\n", "rows": b"id,1,2,3\n", "long": HEAD.encode() + b"\n"}.get(kind, b"")
    name = data.draw(st.sampled_from(["a.json", "b.json.gz"]))
    well_formed_or_none(read, tmp_path, kind, name, data.draw(st.sampled_from([head, b""])) + content, frequency)
    (tmp_path / "c.json.gz").write_bytes(content)
    well_formed_or_none(READERS[kind], tmp_path / "c.json.gz", frequency)


numbers = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["NaN", "1"])
dates = st.sampled_from([DAY, "2020-01-31 05:00:00", "2020-02-01", "", "9999-12-31"]) | st.datetimes().map(str)
fields = st.fixed_dictionaries(
    {"start": dates, "target": st.lists(numbers) | numbers},
    optional={"cat": st.lists(numbers) | numbers, "dynamic_feat": st.lists(st.lists(numbers) | numbers) | numbers},
)


@quick
@given(records=st.lists(fields, max_size=3), frequency=frequencies)
def test_arbitrary_records_are_read_or_refused(tmp_path, records, frequency):
    well_formed_or_none(read, tmp_path, "json", "a.json", lines(*records), frequency)


rows = st.lists(st.tuples(st.sampled_from("ab"), dates, st.sampled_from(["1", "", "-2e3", "x", "NaN"])), max_size=5)


@pytest.mark.filterwarnings("ignore:.* points have no row")
@quick
@given(rows=rows, frequency=frequencies)
def test_arbitrary_rows_are_read_or_refused(tmp_path, rows, frequency):
    well_formed_or_none(read, tmp_path, "long", "a.csv", text(HEAD, *map(",".join, rows)), frequency)
    dated = [f"{day},{value}" for _, day, value in rows]
    well_formed_or_none(read, tmp_path, "dated", "a.csv", text("date,x", *dated), frequency)


PLAIN = {
    pa.float16(): 1.5,
    pa.float32(): float("inf"),
    pa.uint64(): 2**64 - 1,
    pa.bool_(): True,
    pa.string(): "2020-01-31",
    pa.binary(): b"2020-01-31",
    pa.decimal128(9, 2): 1,
    pa.date64(): date(2020, 1, 31),
    pa.timestamp("ns"): datetime(2020, 1, 31),
    pa.timestamp("us", "UTC"): datetime(2020, 1, 31),
    pa.timestamp("s"): 10**15,  # beyond Python's last year
    pa.duration("s"): 5,
    pa.null(): None,
}
values = st.sampled_from(list(PLAIN.items()))  # a type and a value of that type
values |= values.map(lambda pair: (pa.list_(pair[0]), [pair[1], None]))
values |= values.map(lambda pair: (pa.large_list(pair[0]), [pair[1]])) | values.map(
    lambda pair: (pa.struct({"a": pair[0]}), {"a": pair[1]})
)
columns = st.dictionaries(st.sampled_from(["start", "target", "cat", "dynamic_feat", "item"]), values, max_size=4)


@quick
@given(columns=columns, good=st.sets(st.sampled_from(["start", "target"])), count=st.integers(0, 3))
def test_arbitrary_parquet_columns_are_read_or_refused(tmp_path, columns, good, count):
    columns |= {name: {"start": (pa.string(), DAY), "target": (pa.list_(pa.int8()), [1])}[name] for name in good}
    table = {name: pa.array([value] * count, kind) for name, (kind, value) in columns.items()}
    well_formed_or_none(read, tmp_path, "json", "a.parquet", parquet(**table))


@pytest.mark.parametrize(
    "content", [WHOLE, parquet("gzip", start=HALF, target=[[1]], cat=[[1]])], ids=["whole", "half"]
)
@quick
@given(at=st.integers(0, 10_000), new=st.binary(max_size=2), cut=st.integers(0, 9))
def test_mutated_parquet_is_read_or_refused(tmp_path, content, at, new, cut):
    at %= len(content)
    well_formed_or_none(read, tmp_path, "json", "a.parquet", content[:at] + new + content[at + cut :])


# Real data

REAL = os.environ.get("DLREF_DATA")


@pytest.mark.skipif(not REAL, reason="needs DLREF_DATA, the folder of the real data sets")
def test_real_tables_have_their_known_sizes():
    root = Path(REAL)
    series = read_wide(root / "exchange_rate/exchange_rate.txt.gz", "1990-01-01", Frequency(1, "B"))
    assert np.diff(series.offsets).tolist() == [7588] * 8
    assert check(series) == []
    for name in ("ETTh1", "ETTh2"):
        series = read_dated(root / f"ett/{name}.csv.gz", H)
        assert np.diff(series.offsets).tolist() == [17420] * 7
    series = read_rows(root / "m4/Hourly-train.csv.gz", "1750-01-01", H)
    assert series.names == [f"H{i}" for i in range(1, 415)]
    assert set(np.diff(series.offsets)) == {700, 960}
    assert not np.isnan(series.target).any()
    assert len(read_rows(root / "m4/Hourly-test.csv.gz", "1750-01-01", H).target) == 414 * 48


@pytest.mark.parametrize(
    ("value", "kind"), [(np.inf, np.float64), (-np.inf, np.float64), (1e39, np.float64), (np.inf, np.float16)]
)
def test_a_value_of_a_series_made_elsewhere_that_is_infinite_in_float32_is_refused(tmp_path, value, kind):
    series = of({"target": MANY}, {"target": MANY}, where=tmp_path)
    series = series._replace(target=series.target.astype(kind))
    check(series)
    series.target[len(MANY) + 3] = value
    assert f"{series.names[1]}: target: {value}; expected finite numbers of float32" in error_of(check, series)


@pytest.mark.parametrize("value", [np.inf, np.nan])
@pytest.mark.parametrize(("field", "shown"), [("dynamic", "dynamic_feat"), ("static", "feat_static_real")])
def test_a_feature_without_a_value_of_a_series_made_elsewhere_is_refused(tmp_path, field, shown, value):
    series = of({"target": MANY * 2, "dynamic_feat": [MANY * 2], "feat_static_real": [1.0]}, where=tmp_path)
    for kind in (np.float32, np.float16):
        own = series._replace(**{field: getattr(series, field).astype(kind)})
        check(own)
        getattr(own, field)[-1] = value
        assert f"{shown}: {value} among the values" in error_of(check, own)
