"""Read time series from files: SageMaker's JSON Lines and Parquet, and common CSV tables.

Each reader returns a `Series`. Steps that a table leaves out are filled with missing values, and a warning is issued;
any other mistake raises UserError.

T times.
"""

import csv
import math
import os
import re
import textwrap
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from reprlib import repr as shorten
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from dlref.data.files import is_line, visible_entries
from dlref.data.series import Series, to_series
from dlref.runtime.calendar import Frequency, parse_date, parse_start, show
from dlref.runtime.errors import UserError
from dlref.runtime.lines import numbered, parse_object
from dlref.runtime.series import OF_GLUONTS, Record, parse_record, to_float32

MAX_GAP = 100_000  # steps in a row: a mistyped year must not allocate a missing value for each step before it
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
MISSING = {"", "NaN", "nan", "NA"}  # as spreadsheets, pandas, numpy and R write them
JSON_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
FIELDS = ["start", "target", "cat", "dynamic_feat", "feat_static_real"]
ROWS_AT_ONCE = 16  # of Parquet: a row is a whole series


# SageMaker's JSON Lines and Parquet


def read_json_lines(path: str | Path, frequency: Frequency) -> Series:
    """Read series in the format of SageMaker's DeepAR: a JSON object on a line, or a row of Parquet, for each series.

    The fields are `start`, "YYYY-MM-DD HH:MM:SS" or a date; `target`, numbers, with null and "NaN" for missing values;
    and, if every record has them, `cat`, one integer or several, and `dynamic_feat`, a list of numbers for each
    feature. GluonTS's `feat_static_real`, numbers that do not change over time, is read, too; GluonTS's names for the
    other fields are refused. Other fields are ignored.

    Args:
        path: a .json, .jsonl, .json.gz, .jsonl.gz or .parquet file, or a folder of such files and of folders. Hidden
            files and _SUCCESS are left out.
        frequency: the frequency of all series.
    """
    records = []
    for file in _files(str(path)):
        before = len(records)
        entries = _read_parquet(file) if file.lower().endswith(".parquet") else _read_objects(file)
        records += (parse_record(entry, where, frequency) for where, entry in entries)
        if len(records) == before:
            raise UserError(f"{file}: no records; expected at least one")
    return _to_series(path, records)


def _files(path: str) -> Iterator[str]:
    if os.path.isdir(path):
        for entry in visible_entries(path):
            if not is_line(entry.name):
                raise UserError(f"{path}: file {shorten(entry.name)}; expected a name of one line")
            if entry.name != "_SUCCESS":
                yield from _files(entry.path)
    elif path.lower().endswith((*JSON_SUFFIXES, ".parquet")):
        yield path
    else:
        raise UserError(f"{path}: not a folder and no known extension; expected {', '.join(JSON_SUFFIXES)} or .parquet")


def _read_objects(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in numbered(path, "series"):
        if line := line.strip():
            where = f"{path}:{number}"
            yield where, parse_object(line, where)


def _read_parquet(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=[*FIELDS, *OF_GLUONTS]):
                if "start" in batch.schema.names:
                    batch = batch.set_column(batch.schema.get_field_index("start"), "start", _as_text(batch["start"]))
                for entry in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", entry
    except UserError as error:
        raise UserError(f"{path}:{number + 1}: {error}") from None
    except Exception as error:  # pyarrow raises many kinds of exceptions for a damaged file
        wrong = textwrap.shorten(str(error), 120) if os.path.isfile(path) else "no such file"
        raise UserError(f"{path}: {wrong}; expected a Parquet file") from None


def _as_text(times):  # from and to a pyarrow Array
    """Convert dates and timestamps to text as in JSON; other types stay unchanged, and `parse_date` checks them."""
    import pyarrow as pa

    if pa.types.is_timestamp(times.type) and times.type.tz is not None:
        raise UserError(f"start: time zone {shorten(times.type.tz)}; expected none")
    return times.cast(pa.string()) if pa.types.is_temporal(times.type) else times


# Tables


class Points(NamedTuple):
    """Rows of a table: the line number of each, its time in seconds since 1970, its value or values."""

    lines: array
    times: array
    values: array | list[np.ndarray]


def read_wide(path: str | Path, start: str, frequency: Frequency) -> Series:
    """Read a comma-separated matrix without dates or header: a row for each time, a column for each series.

    Args:
        path: a text file, gzipped if its name ends in .gz.
        start: the time of the first row.
        frequency: the time from row to row.
    """
    first = parse_start(start, "start", frequency)
    rows = []
    for line, cells in _read_rows(path):
        _check_width(cells, len(rows[0]) if rows else len(cells), f"{path}:{line}")
        rows.append(_parse_cells(cells, f"{path}:{line}", lambda i: f"column {i + 1}"))
    columns = np.array(rows, np.float32).T
    if len(columns) > 1 and np.isnan(columns[0, 0]) and _counts(columns[0, 1:]) and _counts(columns[1:, 0]):
        raise UserError(f"{path}: pandas' numbers of rows and columns; expected values, as with header and index False")
    return _to_series(path, [Record(f"column {i}", first, values) for i, values in enumerate(columns, start=1)])


def _counts(values: np.ndarray) -> bool:
    return np.array_equal(values, np.arange(len(values)))


def read_dated(path: str | Path, frequency: Frequency) -> Series:
    """Read a CSV file with a header: a row for each time, its date first, and a column for each series.

    Rows must be in order. Times without a row have missing values.

    Args:
        path: a text file, gzipped if its name ends in .gz.
        frequency: the time from one point to the next.
    """
    (date, *names), table = _read_table(path)
    if not names or re.match("[0-9]{4}-", date):
        raise UserError(f"{path}:1: {shorten([date, *names])}; expected a header: a date and a name for each series")
    points = Points(array("q"), array("q"), [])
    for line, cells in table:
        _check_width(cells, 1 + len(names), f"{path}:{line}")
        points.lines.append(line)
        points.times.append(parse_date(cells[0], f"{path}:{line}: {date}"))
        points.values.append(_parse_cells(cells[1:], f"{path}:{line}", names.__getitem__))
    if not points.lines:
        return _to_series(path, [])
    start, values, filled = _fill(points, frequency, path, date)
    _warn_of_gaps(path, filled * len(names))
    return _to_series(path, [Record(name, start, column) for name, column in zip(names, values.T, strict=True)])


def read_rows(path: str | Path, start: str, frequency: Frequency) -> Series:
    """Read a CSV file with a header, like M4's: a row for each series, its id first and then its values.

    Empty cells at the end of a row are dropped.

    Args:
        path: a text file, gzipped if its name ends in .gz.
        start: the time of each series' first value.
        frequency: the time from value to value.
    """
    first = parse_start(start, "start", frequency)
    (item_id, *columns), table = _read_table(path)
    found, records = {}, []
    for line, (name, *cells) in table:
        where = f"{path}:{line}"
        if found.setdefault(_check_name(name, f"{where}: {item_id}"), line) != line:
            raise UserError(f"{where}: {item_id}: {name} again; expected it once, as in line {found[name]}")
        while cells and not cells[-1]:
            cells.pop()
        if len(cells) > len(columns):
            raise UserError(f"{where}: {len(cells)} values; expected at most {len(columns)}, as in the header")
        records.append(Record(name, first, _parse_cells(cells, where, columns.__getitem__)))
    return _to_series(path, records)


def read_long(
    path: str | Path,
    frequency: Frequency,
    item_id: str = "item_id",
    timestamp: str = "timestamp",
    target: str = "target",
) -> Series:
    """Read a CSV file with a header: a row for each value. Columns that no argument names are ignored.

    The rows of a series must be in order; rows of other series may lie between them. Times without a row have missing
    values.

    Args:
        path: a text file, gzipped if its name ends in .gz.
        frequency: the time from one point to the next.
        item_id: the column with the id of the row's series.
        timestamp: the column with its time.
        target: the column with its value.
    """
    header, table = _read_table(path)
    for option, name in (("item_id", item_id), ("timestamp", timestamp), ("target", target)):
        if name not in header:
            raise UserError(
                f"{path}:1: columns {shorten(header)}; expected {shorten(name)} among them, or data.init_args.{option}"
            )
    columns = [header.index(name) for name in (item_id, timestamp, target)]
    groups: dict[str, Points] = {}
    for line, cells in table:
        where = f"{path}:{line}"
        _check_width(cells, len(header), where)
        name, time, value = (cells[column] for column in columns)
        if name not in groups:
            groups[_check_name(name, f"{where}: {item_id}")] = Points(array("q"), array("q"), array("f"))
        points = groups[name]
        points.lines.append(line)
        points.times.append(parse_date(time, f"{where}: {timestamp}"))
        points.values.append(_parse_cells([value], where, lambda _: target)[0])
    records, missing = [], 0
    for name, points in groups.items():
        start, values, filled = _fill(points, frequency, path, timestamp)
        records.append(Record(name, start, values))
        missing += filled
    _warn_of_gaps(path, missing)
    return _to_series(path, records)


def _read_table(path: str | Path) -> tuple[list[str], Iterator[tuple[int, list[str]]]]:
    """Read the header of a CSV file; return its names and the rows below."""
    rows = _read_rows(path)
    line, names = next(rows, (1, None))
    if names is None:
        raise UserError(f"{path}: no lines; expected a header")
    names[0] = names[0] or "column 1"  # pandas may leave it empty
    found = {}
    for i, name in enumerate(names, start=1):
        where = f"{path}:{line}: column {i}"
        if found.setdefault(_check_name(name, where), i) != i:
            raise UserError(f"{where}: {name} again, as in column {found[name]}; expected unique names")
    return names, rows


def _read_rows(path: str | Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a CSV file, each with the number of its last line."""
    lines = (f"{line}\n" for _, line in numbered(path, "a table"))  # a quoted cell may span several
    reader = csv.reader(lines, strict=True, skipinitialspace=True)
    blank = None
    try:
        for cells in reader:
            if cells and blank is not None:  # harmless at the end, but here it may be a time without a value
                raise UserError(f"{path}:{blank}: blank line; expected cells separated by commas")
            if cells:
                yield reader.line_num, [cell.strip() for cell in cells]
            elif blank is None:
                blank = reader.line_num
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: {error}; expected cells separated by commas") from None


def _check_width(cells: list[str], count: int, where: str) -> None:
    if len(cells) != count:
        raise UserError(f"{where}: {len(cells)} cells; expected {count}, as in the first row")


def _check_name(name: str, where: str) -> str:
    if not is_line(name):
        raise UserError(f"{where}: {shorten(name)}; expected a name")
    return name


def _parse_cells(cells: list[str], where: str, field: Callable[[int], str]) -> np.ndarray:
    return to_float32([_parse_cell(cell) for cell in cells], where, field)


def _parse_cell(cell: str) -> float | str:
    if cell in MISSING:
        return math.nan
    # float alone accepts "1_000", "inf" and the digits of every script.
    return float(cell) if NUMBER.fullmatch(cell) else cell


def _fill(points: Points, frequency: Frequency, path: str | Path, field: str) -> tuple[np.datetime64, np.ndarray, int]:
    """Fill times without a row with missing values; return first time, values (T, ...) and number of times filled."""
    times = np.array(points.times, "datetime64[s]")
    steps, whole = frequency.steps(times)
    gaps = np.diff(steps, prepend=-1)
    bad = ~whole | (gaps <= 0) | (gaps > MAX_GAP)
    if bad.any():
        i = int(np.argmax(bad))
        found = f"{path}:{points.lines[i]}: {field}: {show(times[i])}"
        if not whole[i]:
            raise UserError(f"{found}; {frequency.expected(times[0])}")
        before = show(times[i - 1])
        if gaps[i] <= 0:
            raise UserError(f"{found} after {before}; expected rows in order, each time once")
        raise UserError(f"{found}, {gaps[i]} steps after {before}; expected at most {MAX_GAP}")
    rows = np.array(points.values, np.float32)
    values = np.full((steps[-1] + 1, *rows.shape[1:]), np.nan, np.float32)
    values[steps] = rows
    return times[0], values, len(values) - len(rows)


def _warn_of_gaps(path: str | Path, points: int) -> None:
    if points:
        rank_zero_warn(f"{path}: {points} points have no row and count as missing")


# Common to all


def _to_series(path: str | Path, records: list[Record]) -> Series:
    if not records:
        raise UserError(f"{path}: no series; expected at least one")
    first = records[0]
    for record in records:
        counts = [("cat", len(record.cat), len(first.cat))]
        counts += [("dynamic_feat", record.dynamic.shape[1], first.dynamic.shape[1])]
        counts += [("feat_static_real", len(record.static), len(first.static))]
        for field, count, expected in counts:
            if count != expected:
                raise UserError(f"{record.name}: {field}: {count} of them; expected {expected}, as {first.name} has")
    return to_series(records)
