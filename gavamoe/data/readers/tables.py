"""CSV and Parquet sources, column by column."""

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from gavamoe.data.readers.batches import (
    BATCH_BYTES,
    BATCH_ROWS,
    FIELDS,
    REQUIRED,
    RawBatch,
    Rejection,
    as_times,
    check_file,
    missing_column,
    open_source,
    shorten,
)
from gavamoe.errors import InputError

_CSV_BLOCK_BYTES = 16 * 2**20
"""Bytes of a block of a CSV file, and so of its longest row."""
_DELIMITERS = (",", "\t", ";")
MAX_HEADER_BYTES = 2**20


def pick_columns(source: Path, columns: Mapping[str, str], available: list[str]) -> dict[str, str]:
    """Which column holds which field: the mapped one, else the one named like the field.

    Raises:
        InputError: a mapped column or a required field is not there.
    """
    picked = {}
    for field in FIELDS:
        name = columns.get(field, field)
        if name in available:
            picked[field] = name
        elif field in columns or field in REQUIRED:
            raise missing_column(source, field, [name], available)
    return picked


def read_csv(source: Path, columns: Mapping[str, str]) -> Iterator[RawBatch]:
    """Read a CSV file with a header (comma, semicolon or tab; gzip or plain; quoted values may hold line ends).

    Raises:
        InputError: the file is missing, empty or damaged, a column is missing, or a row never ends.
    """
    with open_source(source) as file:
        header = file.readline(MAX_HEADER_BYTES).decode("utf-8-sig", "replace")
    delimiter = max(_DELIMITERS, key=header.count)
    picked = pick_columns(source, columns, next(csv.reader([header], delimiter=delimiter), []))
    misshapen = _Misshapen()
    last = None
    with open_source(source) as file:
        counted = _QuoteCounter(file)
        try:
            for block in _open_csv(counted, delimiter, picked, misshapen):
                last = block.slice(len(block) - 1) if len(block) else last
                for start in range(0, len(block), BATCH_ROWS):
                    batch = block.slice(start, BATCH_ROWS)
                    rows, broken = misshapen.number(len(batch))
                    yield _table_batch(source, batch, rows, picked, broken)
        except pa.ArrowInvalid as error:
            raise InputError(
                f"{source}: not a readable CSV file ({shorten(str(error))}); "
                f"a quote that never closes, or a row over {_CSV_BLOCK_BYTES} bytes?"
            ) from error
    if counted.quotes % 2 and last is not None and _holds_line_end(last):
        raise InputError(f"{source}: the last quote of the file never closes and takes all lines after it as one value")
    if misshapen.pending:
        yield RawBatch(np.empty(0, dtype=np.int64), {}, str, misshapen.pending)


def _open_csv(
    file: "_QuoteCounter", delimiter: str, picked: Mapping[str, str], misshapen: "_Misshapen"
) -> pa_csv.CSVStreamingReader:
    return pa_csv.open_csv(
        file,
        # one thread, or rows of the wrong shape come without their numbers
        read_options=pa_csv.ReadOptions(block_size=_CSV_BLOCK_BYTES, use_threads=False),
        parse_options=pa_csv.ParseOptions(
            delimiter=delimiter, newlines_in_values=True, invalid_row_handler=misshapen.keep
        ),
        convert_options=pa_csv.ConvertOptions(
            include_columns=list(dict.fromkeys(picked.values())),
            column_types={name: pa.binary() for name in picked.values()},
            null_values=[""],
            strings_can_be_null=True,
        ),
    )


def _holds_line_end(row: pa.RecordBatch) -> bool:
    return any(b"\n" in (value or b"") for value in row.to_pylist()[0].values())


def read_parquet(source: Path, columns: Mapping[str, str]) -> Iterator[RawBatch]:
    """Read a Parquet file.

    Raises:
        InputError: the file is missing, empty or damaged, a column is missing or of a type that can't hold its field.
    """
    check_file(source)
    try:
        with pq.ParquetFile(source) as file:
            picked = pick_columns(source, columns, file.schema_arrow.names)
            names = list(dict.fromkeys(picked.values()))
            start = 1
            for batch in file.iter_batches(batch_size=_batch_rows(file.metadata), columns=names):
                rows = np.arange(start, start + len(batch), dtype=np.int64)
                start += len(batch)
                yield _table_batch(source, batch, rows, picked, [])
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{source}: not a readable Parquet file ({shorten(str(error))})") from error


class _QuoteCounter:
    """A file that counts the quotes read from it: an odd number may mean one that never closes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.quotes = 0

    @property
    def closed(self) -> bool:
        return self._file.closed

    def read(self, size: int = -1) -> bytes:
        """Read as from a file, and count the quotes."""
        data = self._file.read(size)
        self.quotes += data.count(b'"')
        return data


class _Misshapen:
    """Rows of a CSV file with too few or too many values; the parser leaves them out of its batches."""

    def __init__(self) -> None:
        self.pending: list[Rejection] = []
        self._last = 0

    def keep(self, row: pa_csv.InvalidRow) -> str:
        reason = f"{row.actual_columns} values instead of {row.expected_columns}"
        self.pending.append(Rejection(row.number - 1, reason, shorten(row.text)))  # the header is row 1 here
        return "skip"

    def number(self, count: int) -> tuple[np.ndarray, list[Rejection]]:
        """Row numbers of the next `count` good rows, and the misshapen rows before their end."""
        bad = [rejection.row for rejection in self.pending]
        rows = np.setdiff1d(np.arange(self._last + 1, self._last + count + len(bad) + 1), bad)[:count]
        self._last = int(rows[-1]) if count else self._last
        broken = [rejection for rejection in self.pending if rejection.row < self._last]
        self.pending = self.pending[len(broken) :]
        return rows, broken


def _batch_rows(metadata: pq.FileMetaData) -> int:
    """Rows a batch may have so that it stays near BATCH_BYTES, by the file's average."""
    size = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
    return max(1, min(BATCH_ROWS, BATCH_BYTES * metadata.num_rows // max(size, 1)))


def _table_batch(
    source: Path, batch: pa.RecordBatch, rows: np.ndarray, picked: Mapping[str, str], broken: list[Rejection]
) -> RawBatch:
    decoded = {name: _decoded(batch[name]) for name in set(picked.values())}
    bad = np.zeros(len(batch), dtype=bool)
    for _, invalid in decoded.values():
        bad |= invalid
    if bad.any():
        broken = broken + [Rejection(int(row), "not valid UTF-8", "") for row in rows[bad]]
        broken.sort(key=lambda rejection: rejection.row)
        good = pa.array(~bad)
        decoded = {name: (array.filter(good), invalid) for name, (array, invalid) in decoded.items()}
        rows = rows[~bad]
    shown = pa.RecordBatch.from_arrays([array for array, _ in decoded.values()], list(decoded))
    columns = {field: _as_field(source, name, decoded[name][0], field) for field, name in picked.items()}
    return RawBatch(rows, columns, lambda index: shorten(shown.slice(index, 1).to_pylist()[0]), broken)


def _decoded(array: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """The column as plain Arrow (no dictionaries, bytes as string), and bool (R,), true for bytes that aren't UTF-8."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    invalid = np.zeros(len(array), dtype=bool)
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type) or pa.types.is_string_view(array.type):
        array = array.cast(pa.binary())  # Parquet files may call any bytes text
    if pa.types.is_binary(array.type) or pa.types.is_large_binary(array.type):
        try:
            array = array.cast(pa.string())
        except pa.ArrowInvalid:
            values = array.to_pylist()
            invalid = np.array([value is not None and not _is_utf8(value) for value in values])
            array = pa.array([None if bad else value for value, bad in zip(values, invalid, strict=True)], pa.binary())
            array = array.cast(pa.string())
    return array, invalid


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _as_field(source: Path, name: str, array: pa.Array, field: str) -> pa.Array:
    """Bring a column to its field's type; InputError where it can't hold the field."""
    kind = array.type
    if pa.types.is_null(kind):
        return pa.nulls(len(array), pa.float64() if field in ("rating", "time") else pa.string())
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    if field == "time" and (is_number or pa.types.is_temporal(kind) or pa.types.is_string(kind)):
        return as_times(array)
    if pa.types.is_string(kind):
        return array
    if field == "rating" and is_number:
        return array.cast(pa.float64())
    if field in ("user", "item") and is_number:
        return _number_ids(array)
    if field == "features" and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return _checked_lists(source, name, array.cast(pa.list_(pa.string())))
    raise InputError(f"{source}: column {name!r} is of type {kind}, which can't be the {field}")


def _checked_lists(source: Path, name: str, array: pa.Array) -> pa.Array:
    try:
        array.validate(full=True)
    except pa.ArrowInvalid as error:
        raise InputError(f"{source}: column {name!r} holds text that is not valid UTF-8") from error
    return array


def _number_ids(array: pa.Array) -> pa.Array:
    """Numbers as ids: 12 and 12.0 (what a missing value makes of a column of whole numbers) are both "12"."""
    if pa.types.is_integer(array.type):
        return array.cast(pa.string())
    number = array.cast(pa.float64())
    whole = pc.fill_null(pc.and_(pc.equal(pc.floor(number), number), pc.less(pc.abs(number), 2.0**53)), False)
    digits = pc.if_else(whole, number, None).cast(pa.int64()).cast(pa.string())
    other = pc.if_else(pc.and_(pc.is_finite(number), pc.invert(whole)), number, None).cast(pa.string())
    return pc.coalesce(digits, other)
