"""Delimited text files (CSV, TSV, `;`, `|`) as batches of raw values, with every line accounted for.

A file is cut into records here, and only whole, well-formed ones are handed to Arrow's parser. A quote that opens a
value and is not closed where a value can end would otherwise swallow all rows up to the next quote without a sign: the
line on which it opens is rejected instead, and reading goes on at the next line.

How values are quoted is found by reading the whole file once, unless the user says it.
"""

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from gavamoe.data.readers.batches import BATCH_ROWS, MAX_RECORD_BYTES, Rejection, shorten
from gavamoe.data.readers.sources import SourceOptions, open_source, read_head
from gavamoe.errors import InputError

DELIMITERS = (",", "\t", ";", "|")
MAX_HEADER_BYTES = 2**20
_BLOCK_BYTES = 4 * 2**20
_QUOTE, _LINE_FEED = b'"'[0], b"\n"[0]
_STRAY_RETURN = "\u2028".encode()
"""What a carriage return that ends no line becomes: a line separator, so that the text keeps its break."""
_RUNS_ON = "a quoted value goes on after its closing quote"
_NEVER_CLOSES = "a quote that never closes"
_HIDES_ROWS = "a quoted value holds what looks like whole rows"
_LESS_BROKEN = 10
"""How many times fewer lines another way of quoting must reject to be taken instead of the standard one."""


class Dialect(NamedTuple):
    """How a delimited file is written."""

    delimiter: str
    quoted: bool
    """Whether a quote at the start of a value opens a quoted one, in which two quotes stand for one."""
    escape: str | None
    """Character that takes the meaning from the one after it; None: there is none."""
    returns: bool
    """Whether lines end in carriage returns alone."""


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
        head = _unified(head, returns)
        match = _pattern(self.dialect).match(head)
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
        self, records: "_Records", columns: Sequence[int], blank_rows: bool
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
            data, misshapen = _well_shaped(records, self.dialect, len(self.header))
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

    def _records(self, dialect: Dialect, blank_rows: bool) -> Iterator["_Records"]:
        """Cut the file into records, a block at a time, without the header."""
        # prose has commas: without a number in its place a line that looks like a row says nothing
        telling = self._number is not None or dialect.delimiter != ","
        on = self._options.quoting == "auto" and telling and len(self.header) > 1
        watch = _Suspicion(dialect.delimiter.encode(), len(self.header) - 1, self._number, on)
        with open_source(self.source, self._options.encoding) as file:
            file.read(len(self._preamble))
            yield from _cut(file, dialect, watch, blank_rows)

    _number: int | None = None


def _check_escape(escape: str | None) -> None:
    if escape is not None and (len(escape) != 1 or not "!" <= escape <= "~" or escape == '"'):
        raise InputError(f"escape: {escape!r} is not a single character such as \\")


class _Records(NamedTuple):
    data: bytes
    """Whole, well-formed records."""
    numbers: np.ndarray
    """Their row numbers: int64."""
    broken: list[Rejection]
    """Lines before the next block that are no records."""


class _Suspicion(NamedTuple):
    """When a quoted value with line ends is taken for rows that a stray quote has joined."""

    delimiter: bytes
    inner: int
    """Delimiters of a row."""
    number: int | None
    """Position of a column of numbers."""
    on: bool

    def joined(self, record: bytes) -> bool:
        """Whether each line of a record, read on its own, would be a row."""
        if not self.on or b"\n" not in record:
            return False
        lines = [line.split(self.delimiter) for line in record.split(b"\n")]
        if any(len(values) != self.inner + 1 for values in lines):
            return False
        return self.number is None or all(_is_number(values[self.number]) for values in lines)


def _well_shaped(records: "_Records", dialect: Dialect, values: int) -> tuple[bytes, list[Rejection]]:
    """The records of that many values, and the others."""
    record = _pattern(dialect)
    value, _, delimiter = _value_patterns(dialect)
    ended = re.compile(rb"(?:%b)%b" % (value, delimiter), re.DOTALL)
    good: list[bytes] = []
    misshapen: list[Rejection] = []
    at = 0
    for number in records.numbers.tolist():
        match = record.match(records.data, at)
        while match is not None and match[0] == b"\n" and values > 1:  # a blank line, which is no row
            match = record.match(records.data, match.end())
        if match is None:
            break
        at = match.end()
        count = len(ended.findall(match[0])) + 1
        if count == values:
            good.append(match[0])
        else:
            reason = f"{count} values instead of {values}"
            misshapen.append(Rejection(number, reason, shorten(match[0][:300].decode("utf-8", "replace"))))
    return b"".join(good), misshapen


def _is_number(value: bytes) -> bool:
    try:
        float(value.strip(b'" '))
    except ValueError:
        return False
    return True


def _cut(file: BinaryIO, dialect: Dialect, watch: _Suspicion, blank_rows: bool) -> Iterator[_Records]:
    row, rest, more, headed = 0, b"", True, False
    patterns = _pattern(dialect), _open_pattern(dialect)
    while more:
        chunk = file.read(_BLOCK_BYTES)
        more = bool(chunk)
        data = rest + chunk
        if more and data.endswith(b"\r"):  # the line feed may be in the next block
            data, held = data[:-1], b"\r"
        else:
            held = b""
        data = _unified(data, dialect.returns)
        if dialect.escape is not None:
            data = _without_nulls(data, dialect)
        fast = _cut_fast(data, dialect, watch, more, blank_rows)
        if fast is None:
            good, broken, used = _cut_slowly(data, patterns, watch, more, blank_rows)
        else:
            good, broken, used = fast
        rest = data[used:] + held
        if not headed and (len(good) or len(broken)):
            headed = True
            first = min([at for at, _ in broken[:1]] + good[:1, 0].tolist())
            if len(good) and good[0, 0] == first:
                good = good[1:]
            else:
                broken = broken[1:]
        numbers, lines = _numbered(good, broken, row)
        row += len(good) + len(broken)
        rejected = [
            Rejection(number, reason, shorten(_line(data, at).decode("utf-8", "replace")))
            for number, (at, reason) in zip(lines, broken, strict=True)
        ]
        if len(good) or rejected:
            yield _Records(_joined(data, good), numbers, rejected)


def _numbered(good: np.ndarray, broken: list[tuple[int, str]], row: int) -> tuple[np.ndarray, list[int]]:
    """Row numbers of the good records and of the broken lines, which stand between each other."""
    if not broken:
        return np.arange(row + 1, row + 1 + len(good), dtype=np.int64), []
    places = np.array([at for at, _ in broken])
    before = np.searchsorted(places, good[:, 0]) if len(good) else np.empty(0, dtype=np.int64)
    numbers = row + 1 + np.arange(len(good)) + before
    lines = row + 1 + np.arange(len(broken)) + np.searchsorted(good[:, 0], places)
    return numbers.astype(np.int64), lines.tolist()


def _joined(data: bytes, good: np.ndarray) -> bytes:
    """The bytes of the good records, in as few pieces as there are gaps between them."""
    if not len(good):
        return b""
    gaps = np.flatnonzero(good[1:, 0] != good[:-1, 1])
    starts = good[np.append(0, gaps + 1), 0].tolist()
    ends = good[np.append(gaps, len(good) - 1), 1].tolist()
    return b"".join(_ended(data[start:end]) for start, end in zip(starts, ends, strict=True))


def _ended(piece: bytes) -> bytes:
    return piece if piece.endswith(b"\n") else piece + b"\n"


_Cut = tuple[np.ndarray, list[tuple[int, str]], int]
"""Start and end of each good record, int64 (R, 2); start and reason of each broken line; bytes used."""


def _cut_fast(data: bytes, dialect: Dialect, watch: _Suspicion, more: bool, blank_rows: bool) -> _Cut | None:
    """Cut at all line ends outside of quotes; None where a quote stands in no usual place and all must be looked at."""
    if dialect.escape is not None and (dialect.escape.encode() in data):
        return None
    if not data:
        return np.empty((0, 2), dtype=np.int64), [], 0
    raw = np.frombuffer(data, dtype=np.uint8)
    feeds = np.flatnonzero(raw == _LINE_FEED)
    quotes = np.flatnonzero(raw == _QUOTE) if dialect.quoted else np.empty(0, dtype=np.int64)
    inside = np.searchsorted(quotes, feeds) % 2 == 1
    ends = feeds[~inside] + 1
    if not more and (not len(ends) or ends[-1] < len(data)):
        if len(quotes) % 2:
            return None
        ends = np.append(ends, len(data))
    if not len(ends):
        return None if len(data) > MAX_RECORD_BYTES else (np.empty((0, 2), dtype=np.int64), [], 0)
    quotes = quotes[quotes < ends[-1]]
    if len(quotes):
        usual = np.zeros(256, dtype=bool)
        usual[[_QUOTE, _LINE_FEED, ord(dialect.delimiter)]] = True
        padded = np.concatenate([[_LINE_FEED], raw, [_LINE_FEED]])
        # an even quote opens a value or is the second of a pair, an odd one closes it or is the first of a pair
        if not (usual[padded[quotes[::2]]].all() and usual[padded[quotes[1::2] + 2]].all()):
            return None
        if watch.on and inside.any() and _may_hide_rows(raw, feeds, inside, watch):
            return None
    bounds = np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1)
    if not blank_rows:
        bounds = bounds[(bounds[:, 1] - bounds[:, 0] > 1) | (raw[bounds[:, 0]] != _LINE_FEED)]
    return bounds, [], int(ends[-1])


def _may_hide_rows(raw: np.ndarray, feeds: np.ndarray, inside: np.ndarray, watch: _Suspicion) -> bool:
    """Whether the lines on both sides of a line end inside quotes have as many delimiters as a row."""
    delimiters = np.flatnonzero(raw == watch.delimiter[0])
    counts = np.diff(np.searchsorted(delimiters, feeds), prepend=0, append=len(delimiters))
    full = counts >= watch.inner
    return bool((inside & full[:-1] & full[1:]).any())


def _cut_slowly(
    data: bytes, patterns: tuple[re.Pattern[bytes], re.Pattern[bytes]], watch: _Suspicion, more: bool, blank_rows: bool
) -> _Cut:
    """Cut record by record."""
    record, unclosed = patterns
    good: list[tuple[int, int]] = []
    broken: list[tuple[int, str]] = []
    at, size = 0, len(data)
    while at < size:
        if data[at] == _LINE_FEED and not blank_rows:
            at += 1
            continue
        match = record.match(data, at)
        if match is not None and match.end() == size and more and data[-1] != _LINE_FEED:
            if size - at <= MAX_RECORD_BYTES:
                break
            reason = f"a row over {MAX_RECORD_BYTES} bytes"
        elif match is not None and not watch.joined(match[0].removesuffix(b"\n")):
            good.append((at, match.end()))
            at = match.end()
            continue
        elif match is not None:
            reason = _HIDES_ROWS
        elif unclosed.match(data, at) is None:
            reason = _RUNS_ON
        elif more and size - at <= MAX_RECORD_BYTES:
            break
        else:
            reason = _NEVER_CLOSES
        end = data.find(b"\n", at)
        if end < 0 and more and size - at <= MAX_RECORD_BYTES:
            break
        broken.append((at, reason))
        at = size if end < 0 else end + 1
    return np.array(good, dtype=np.int64).reshape(-1, 2), broken, at


def _value_patterns(dialect: Dialect) -> tuple[bytes, bytes, bytes]:
    """Regular expressions of a whole value, of the start of a quoted one, and of a delimiter."""
    delimiter = re.escape(dialect.delimiter.encode())
    if dialect.escape is None:
        plain = rb"[^%b\n]*+" % delimiter
        opened = rb'"[^"]*+(?:""[^"]*+)*+'
    else:
        escape = re.escape(dialect.escape.encode())
        plain = rb"(?:[^%b\n%b]|%b.)*+" % (delimiter, escape, escape)
        opened = rb'"[^"%b]*+(?:(?:""|%b.)[^"%b]*+)*+' % (escape, escape, escape)
    if not dialect.quoted:
        return plain, rb"(?!)", delimiter
    return rb'(?:%b"(?=[%b\n]|\Z)|(?!")%b)' % (opened, delimiter, plain), opened, delimiter


def _pattern(dialect: Dialect) -> re.Pattern[bytes]:
    """A whole record with its line end."""
    value, _, delimiter = _value_patterns(dialect)
    return re.compile(rb"%b(?:%b%b)*+(?:\n|\Z)" % (value, delimiter, value), re.DOTALL)


def _open_pattern(dialect: Dialect) -> re.Pattern[bytes]:
    """A record whose last value has not been closed when the bytes end."""
    value, opened, delimiter = _value_patterns(dialect)
    return re.compile(rb"(?:%b%b)*+%b\Z" % (value, delimiter, opened), re.DOTALL)


def _unified(data: bytes, returns: bool) -> bytes:
    """All line ends as line feeds."""
    if b"\r" not in data:
        return data
    data = data.replace(b"\r\n", b"\n")
    return data.replace(b"\r", b"\n" if returns else _STRAY_RETURN)


def _without_nulls(data: bytes, dialect: Dialect) -> bytes:
    r"""Without the values \N, by which databases that write escapes mean that there is none."""
    delimiter, escape = re.escape(dialect.delimiter.encode()), re.escape((dialect.escape or "").encode())
    return re.sub(rb"((?:\A|[%b\n]))%bN(?=[%b\n]|\Z)" % (delimiter, escape, delimiter), rb"\1", data)


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


def _line(data: bytes, at: int) -> bytes:
    return data[at : at + 200].partition(b"\n")[0]
