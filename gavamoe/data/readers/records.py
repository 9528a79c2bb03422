"""Cutting delimited text into records, with every line accounted for: whole, or broken and why.

A quote that opens a value and is not closed where a value can end would swallow all rows up to the next quote. Here the
line on which it opens is a broken one, and reading goes on at the next line. Blocks in which all quotes stand in their
usual places, nearly all there are, are cut by a few passes over their bytes; the others record by record.
"""

import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from gavamoe.data.readers.batches import MAX_RECORD_BYTES, Rejection, shorten

_BLOCK_BYTES = 4 * 2**20
_QUOTE, _LINE_FEED = b'"'[0], b"\n"[0]
_STRAY_RETURN = "\u2028".encode()
"""What a carriage return that ends no line becomes: a line separator, so that the text keeps its break."""
_RUNS_ON = "a quoted value goes on after its closing quote"
_NEVER_CLOSES = "a quote that never closes"
_HIDES_ROWS = "a quoted value holds what looks like whole rows"


class Dialect(NamedTuple):
    """How a delimited file is written."""

    delimiter: str
    quoted: bool
    """Whether a quote at the start of a value opens a quoted one, in which two quotes stand for one."""
    escape: str | None
    """Character that takes the meaning from the one after it; None: there is none."""
    returns: bool
    """Whether lines end in carriage returns alone."""


class Records(NamedTuple):
    """Consecutive records of a file."""

    data: bytes
    """Whole, well-formed records."""
    numbers: np.ndarray
    """Their row numbers: int64."""
    broken: list[Rejection]
    """Lines before the next block that are no records."""


class Suspicion(NamedTuple):
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


def cut_records(file: BinaryIO, dialect: Dialect, watch: Suspicion, blank_rows: bool) -> Iterator[Records]:
    """Cut a file into records, a block at a time; the first one, the header, is left out.

    Args:
        blank_rows: blank lines are records of one empty value; else they are none.
    """
    row, rest, more, headed = 0, b"", True, False
    patterns = record_pattern(dialect), _open_pattern(dialect)
    while more:
        chunk = file.read(_BLOCK_BYTES)
        more = bool(chunk)
        data = rest + chunk
        if more and data.endswith(b"\r"):  # the line feed may be in the next block
            data, held = data[:-1], b"\r"
        else:
            held = b""
        data = unified(data, dialect.returns)
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
            yield Records(_joined(data, good), numbers, rejected)


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


def _cut_fast(data: bytes, dialect: Dialect, watch: Suspicion, more: bool, blank_rows: bool) -> _Cut | None:
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


def _may_hide_rows(raw: np.ndarray, feeds: np.ndarray, inside: np.ndarray, watch: Suspicion) -> bool:
    """Whether the lines on both sides of a line end inside quotes have as many delimiters as a row."""
    delimiters = np.flatnonzero(raw == watch.delimiter[0])
    counts = np.diff(np.searchsorted(delimiters, feeds), prepend=0, append=len(delimiters))
    full = counts >= watch.inner
    return bool((inside & full[:-1] & full[1:]).any())


def _cut_slowly(
    data: bytes, patterns: tuple[re.Pattern[bytes], re.Pattern[bytes]], watch: Suspicion, more: bool, blank_rows: bool
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


def record_pattern(dialect: Dialect) -> re.Pattern[bytes]:
    """A whole record with its line end."""
    value, _, delimiter = _value_patterns(dialect)
    return re.compile(rb"%b(?:%b%b)*+(?:\n|\Z)" % (value, delimiter, value), re.DOTALL)


def _open_pattern(dialect: Dialect) -> re.Pattern[bytes]:
    """A record whose last value has not been closed when the bytes end."""
    value, opened, delimiter = _value_patterns(dialect)
    return re.compile(rb"(?:%b%b)*+%b\Z" % (value, delimiter, opened), re.DOTALL)


def unified(data: bytes, returns: bool) -> bytes:
    """All line ends as line feeds."""
    if b"\r" not in data:
        return data
    data = data.replace(b"\r\n", b"\n")
    return data.replace(b"\r", b"\n" if returns else _STRAY_RETURN)


def _without_nulls(data: bytes, dialect: Dialect) -> bytes:
    r"""Without the values \N, by which databases that write escapes mean that there is none."""
    delimiter, escape = re.escape(dialect.delimiter.encode()), re.escape((dialect.escape or "").encode())
    return re.sub(rb"((?:\A|[%b\n]))%bN(?=[%b\n]|\Z)" % (delimiter, escape, delimiter), rb"\1", data)


def well_shaped(records: Records, dialect: Dialect, values: int) -> tuple[bytes, list[Rejection]]:
    """The records of that many values, and the others."""
    record = record_pattern(dialect)
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
        count = _values(match[0], ended)
        if count == values:
            good.append(match[0])
        else:
            reason = f"{count} values instead of {values}"
            misshapen.append(Rejection(number, reason, shorten(match[0][:300].decode("utf-8", "replace"))))
    return b"".join(good), misshapen


def _values(record: bytes, ended: re.Pattern[bytes]) -> int:
    """How many values a record has: those that `ended`, a value with its delimiter, matches one after the other, and
    the last. A search in place of matches would go on inside the last one, if that is quoted and holds delimiters."""
    count, at = 1, 0
    while (match := ended.match(record, at)) is not None:
        count, at = count + 1, match.end()
    return count


def _is_number(value: bytes) -> bool:
    try:
        float(value.strip(b'" '))
    except ValueError:
        return False
    return True


def _line(data: bytes, at: int) -> bytes:
    return data[at : at + 200].partition(b"\n")[0]
