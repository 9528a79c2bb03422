"""Delimited text files (CSV, TSV, `;`, `|`) as batches of raw values, with every line accounted for.

Only whole, well-formed records (`records`) are handed to Arrow's parser, which would take a stray quote for the start
of a value and swallow all rows up to the next one without a sign. How values are quoted is found by reading the whole
file once, unless the user says it.
"""

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from gavamoe.data.readers.batches import BATCH_ROWS, Rejection, shorten
from gavamoe.data.readers.records import Dialect, Records, Suspicion, cut_records, record_pattern, unified, well_shaped
from gavamoe.data.readers.sources import SourceOptions, open_source, read_head
from gavamoe.errors import InputError

DELIMITERS = (",", "\t", ";", "|")
MAX_HEADER_BYTES = 2**20
_LESS_BROKEN = 10
"""How many times fewer lines another way of quoting must reject to be taken instead of the standard one."""


class Block(NamedTuple):
    """Consecutive rows of a delimited file."""

    rows: np.ndarray
    """Row numbers, from 1, without the header and blank lines: int64 (R,)."""
    table: pa.RecordBatch
    """The columns asked for, binary (R,), null where empty; named by their positions in the header."""
    broken: list[Rejection]
    """Rows before the next block that could not be read."""


class DelimitedFile:
    """A delimited file, its header read and its dialect known."""

    def __init__(self, source: Path, options: SourceOptions) -> None:
        """
        Raises:
            InputError: the file is missing, empty or damaged, or an option is not valid.
        """
        self.source = source
        self._options = options
        self._number: int | None = None
        _check_escape(options.escape)
        head = read_head(source, MAX_HEADER_BYTES, options.encoding)
        self._preamble = _excel_preamble(head)
        head = head[len(self._preamble) :]
        delimiter = chr(self._preamble[4]) if self._preamble else _sniff(head)
        if options.escape == delimiter:
            raise InputError(f"escape: {options.escape!r} is the delimiter of {source}")
        feed, carriage = head.find(b"\n"), head.find(b"\r")
        returns = carriage >= 0 and (feed < 0 or carriage < feed - 1)
        self.dialect = Dialect(delimiter, options.quoting != "none", options.escape, returns)
        head = unified(head, returns)
        match = record_pattern(self.dialect).match(head)
        line = match[0] if match else head.partition(b"\n")[0]
        self.header = _split(line.decode("utf-8", "replace").rstrip("\n"), self.dialect)

    def settle_dialect(self, number: int | None = None) -> str:
        """Find how values are quoted, where the user didn't say it.

        Args:
            number: position of a column of numbers, by which rows hidden in a quoted value are told from prose.

        Returns:
            What to tell the user about the file; empty when it is written as the standard says.
        """
        self._number = number
        if self._options.quoting != "auto" or self._options.escape is not None:
            return ""
        standard = self._rejects(self.dialect)
        if not standard:
            return ""
        escaped, bare = self.dialect._replace(escape="\\"), self.dialect._replace(quoted=False)
        if _LESS_BROKEN * self._rejects(escaped) < standard:
            self.dialect = escaped
            return f"read with \\ as escape character, since {standard} rows are broken without it"
        if _LESS_BROKEN * self._unlike_bare(bare) < standard:
            self.dialect = bare
            return f"read without quoting, as --quoting none does, since {standard} rows are broken with it"
        return f"{standard} lines have stray quotes and were rejected; if no value is quoted, say --quoting none"

    def blocks(self, columns: Sequence[int], *, blank_rows: bool = False) -> Iterator[Block]:
        """Read the columns at these positions of the header.

        Args:
            blank_rows: blank lines are rows of one empty value, as in a file of one column of texts.
        """
        start = 1
        for records in self._records(self.dialect, blank_rows):
            table, misshapen = self._parse(records, columns, blank_rows)
            lost = len(records.numbers) - len(table) - len(misshapen)
            if lost:
                raise InputError(f"{self.source}: {lost} rows after row {start} cannot be told apart; check its quotes")
            bad = {rejection.row for rejection in misshapen}
            rows = np.array([row for row in records.numbers.tolist() if row not in bad] if bad else records.numbers)
            broken = sorted(misshapen + records.broken, key=lambda rejection: rejection.row)
            for at in range(0, max(len(table), 1), BATCH_ROWS):
                part = slice(at, at + BATCH_ROWS)
                last = at + BATCH_ROWS >= len(table)
                end = np.inf if last else rows[part][-1]
                now, broken = [one for one in broken if one.row <= end], [one for one in broken if one.row > end]
                yield Block(rows[part].astype(np.int64), table.slice(at, BATCH_ROWS), now)
            start += len(records.numbers) + len(records.broken)

    def _parse(
        self, records: Records, columns: Sequence[int], blank_rows: bool
    ) -> tuple[pa.RecordBatch, list[Rejection]]:
        """The values of well-shaped records, and the rows with too few or too many values."""
        misshapen: list[Rejection] = []

        def keep(row: pa_csv.InvalidRow) -> str:
            reason = f"{row.actual_columns} values instead of {row.expected_columns}"
            misshapen.append(Rejection(int(records.numbers[row.number - 1]), reason, shorten(row.text)))
            return "skip"

        try:
            return self._parse_bytes(records.data, columns, keep, blank_rows), misshapen
        except pa.ArrowInvalid:  # a misshapen row that is not UTF-8, which Arrow can't hand on
            data, misshapen = well_shaped(records, self.dialect, len(self.header))
            return self._parse_bytes(data, columns, keep, blank_rows), misshapen

    def _parse_bytes(
        self, data: bytes, columns: Sequence[int], keep: Callable[[pa_csv.InvalidRow], str], blank_rows: bool
    ) -> pa.RecordBatch:
        names = [str(position) for position in range(len(self.header))]
        wanted = [names[position] for position in dict.fromkeys(columns)]
        empty = pa.record_batch({name: pa.array([], pa.binary()) for name in wanted})
        if not data:
            return empty

        dialect = self.dialect
        table = pa_csv.read_csv(
            pa.BufferReader(data),
            # one block on one thread, or rows of the wrong shape come without their numbers
            read_options=pa_csv.ReadOptions(column_names=names, block_size=len(data) + 1, use_threads=False),
            parse_options=pa_csv.ParseOptions(
                delimiter=dialect.delimiter,
                quote_char='"' if dialect.quoted else False,
                escape_char=dialect.escape or False,
                newlines_in_values=dialect.quoted or dialect.escape is not None,
                ignore_empty_lines=not blank_rows,
                invalid_row_handler=keep,
            ),
            convert_options=pa_csv.ConvertOptions(
                include_columns=wanted,
                column_types={name: pa.binary() for name in wanted},
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
        return table.combine_chunks().to_batches()[0] if len(table) else empty

    def _rejects(self, dialect: Dialect) -> int:
        return sum(len(records.broken) for records in self._records(dialect, False))

    def _unlike_bare(self, dialect: Dialect) -> int:
        """Lines that speak against a file without quoting: wrong numbers of delimiters, values wholly in quotes."""
        wanted, delimiter = len(self.header) - 1, dialect.delimiter.encode()
        edge = re.escape(delimiter)
        whole = re.compile(rb'(?:\A|%b)"[^"]*"(?:%b|\Z)' % (edge, edge))
        return sum(
            line.count(delimiter) != wanted or whole.search(line) is not None
            for records in self._records(dialect, False)
            for line in records.data.split(b"\n")
            if line
        )

    def _records(self, dialect: Dialect, blank_rows: bool) -> Iterator[Records]:
        """Cut the file into records, a block at a time, without the header."""
        # prose has commas: without a number in its place a line that looks like a row says nothing
        telling = self._number is not None or dialect.delimiter != ","
        on = self._options.quoting == "auto" and telling and len(self.header) > 1
        watch = Suspicion(dialect.delimiter.encode(), len(self.header) - 1, self._number, on)
        with open_source(self.source, self._options.encoding) as file:
            file.read(len(self._preamble))
            yield from cut_records(file, dialect, watch, blank_rows)


def _check_escape(escape: str | None) -> None:
    if escape is not None and (len(escape) != 1 or not "!" <= escape <= "~" or escape == '"'):
        raise InputError(f"escape: {escape!r} is not a single character such as \\")


def _excel_preamble(head: bytes) -> bytes:
    """The line `sep=;` with which Excel names its delimiter, or nothing."""
    match = re.match(rb"sep=([^\w\s\"]|\t)\r?\n|sep=([^\w\s\"]|\t)\r", head)
    return match[0] if match else b""


def _sniff(head: bytes) -> str:
    line = re.split(rb"[\r\n]", head, maxsplit=1)[0].decode("utf-8", "replace")
    return max(DELIMITERS, key=line.count)


def _split(line: str, dialect: Dialect) -> list[str]:
    if not dialect.quoted:
        return line.split(dialect.delimiter)
    try:
        return next(csv.reader([line], delimiter=dialect.delimiter, escapechar=dialect.escape), [])
    except csv.Error:  # a header of one value too long for a name
        return line.split(dialect.delimiter)
