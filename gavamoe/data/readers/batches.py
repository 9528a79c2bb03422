"""Raw review records as readers hand them on: batches of columns by field, rows that could not be read, bounded reads.

A reader turns a source into `RawBatch`es, or into `UnreadBatch`es that another process may read, and rejects only rows
that can't be read at all; what a good row is, `data.validation` decides.
"""

import math
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gavamoe.errors import InputError, listed, nearest, printable

FIELDS = ("user", "item", "rating", "text", "title", "features", "time")
REQUIRED = ("user", "item")
BATCH_ROWS = 32_768
BATCH_BYTES = 32 * 2**20
MAX_RECORD_BYTES = 16 * 2**20
MAX_SHOWN_CHARS = 300


class Rejection(NamedTuple):
    """A rejected row of a source."""

    row: int
    """Number of the row, from 1: a line of a text file, a record of any other."""
    reason: str
    """Reason of the rejection."""
    raw: str
    """The row, shortened to MAX_SHOWN_CHARS."""


class RawBatch(NamedTuple):
    """A batch of consecutive rows of a source."""

    row: np.ndarray
    """Row numbers in the source, ascending: int64 (R,)."""
    columns: dict[str, pa.Array]
    """Columns by field, each (R,): user, item, text, title string; rating double or string; features list<string> or
    string; time double, timestamp or string. A field that the source lacks is absent, a missing value is null."""
    show: Callable[[int], str]
    """Returns one of the R rows as text, shortened."""
    broken: list[Rejection]
    """Rows among these that could not be read."""
    notes: tuple[str, ...] = ()
    """What the user should know about how the source was read."""

    def after(self, rows: int) -> "RawBatch":
        """The batch as it stands behind so many rows."""
        broken = [rejection._replace(row=rejection.row + rows) for rejection in self.broken]
        return self._replace(row=self.row + rows, broken=broken)

    @property
    def last_row(self) -> int:
        """The last row number; 0 where there are no rows."""
        return max([0, *(rejection.row for rejection in self.broken), *self.row[-1:].tolist()])


@dataclass(frozen=True)
class UnreadBatch:
    """A batch of consecutive rows of a source, still to be read; it can be sent to another process, which reads it."""

    make: Callable[[], RawBatch]
    """Reads the rows: a partial of a module-level function. Raises InputError."""
    last_row: int
    """Number of the last row."""
    before: int = 0
    """Rows of earlier sources."""
    glance: Callable[[], Set[str] | None] | None = None
    """Says without reading all rows which fields they have; None where only reading them tells. Raises as `make`."""

    def read(self) -> RawBatch:
        """The rows; raises as the reader does."""
        batch = self.make()
        return batch.after(self.before) if self.before else batch

    def after(self, rows: int) -> "UnreadBatch":
        """The batch as it stands behind so many rows."""
        return replace(self, before=self.before + rows, last_row=self.last_row + rows)


AnyBatch = RawBatch | UnreadBatch
Numbered = tuple[int, int, "dict[str, Any] | Rejection"]
"""Row number, size in bytes, and the record or why there is none."""


def batch_records(
    source: Path,
    records: Iterable[Numbered],
    fields: Mapping[str, Sequence[str]],
    named: frozenset[str] = frozenset(),
) -> Iterator[RawBatch]:
    """Gather records into batches.

    Args:
        fields: the keys under which each field may stand in a record; the first that is there wins.
        named: fields whose keys the user named, which must therefore be there, as required ones must.

    Raises:
        InputError: none of the first batch's records has a required field, or one that the user named.
    """
    good: list[dict[str, Any]] = []
    rows: list[int] = []
    broken: list[Rejection] = []
    size = 0
    needed: Set[str] = named | set(REQUIRED)
    for row, row_bytes, record in records:
        if isinstance(record, Rejection):
            broken.append(record)
        else:
            good.append(record)
            rows.append(row)
        size += row_bytes
        if len(good) + len(broken) >= BATCH_ROWS or size >= BATCH_BYTES:
            yield record_batch(source, good, rows, broken, fields, needed)
            needed = needed if not good else frozenset()
            good, rows, broken, size = [], [], [], 0
    if good or broken:
        yield record_batch(source, good, rows, broken, fields, needed)


def record_batch(
    source: Path,
    good: list[dict[str, Any]],
    rows: list[int],
    broken: list[Rejection],
    fields: Mapping[str, Sequence[str]],
    needed: Set[str],
) -> RawBatch:
    """A batch of the `good` records, whose numbers are `rows`; InputError where none of them has a `needed` field."""
    columns = {}
    for field, keys in fields.items():
        present = [key for key in keys if any(key in record for record in good)]
        if present:
            columns[field] = _COLUMNS[field](_values(good, present))
        elif good and field in needed:
            raise missing_column(source, field, keys, list(good[0]))
        elif field in REQUIRED:
            columns[field] = pa.nulls(len(good), pa.string())
    return RawBatch(np.asarray(rows, dtype=np.int64), columns, lambda index: shorten(good[index]), broken)


def _values(records: list[dict[str, Any]], keys: list[str]) -> list[Any]:
    if len(keys) == 1:
        key = keys[0]
        return [record.get(key) for record in records]
    return [next((record[key] for key in keys if record.get(key) is not None), None) for record in records]


def missing_column(source: Path, field: str, wanted: Sequence[str], available: Sequence[str]) -> InputError:
    """The error for a source without any column of a field."""
    # a name that the user gave may be misspelled; a field's own name is not a guess at a column
    close = nearest(wanted[0], available) if wanted[0] != field else None
    hint = f" (nearest: {listed([close])})" if close else ""
    return InputError(
        f"{source}: no column {' or '.join(repr(name) for name in wanted)} for the {field}{hint}; "
        f"it has {listed(available) or 'none'}; name one with --column {field}=NAME (format table)"
    )


def as_strings(values: list[Any]) -> pa.Array:
    """string (R,): text as it is, numbers in digits, anything else null."""
    if all(value is None or type(value) is str for value in values):
        try:
            return pa.array(values, pa.string())
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell and UTF-8 cannot
            pass
    return pa.array([_string(value) for value in values], pa.string())


def _string(value: Any) -> str | None:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, bool):
        return None
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value == int(value) else str(value)
    if isinstance(value, int) and abs(value) < 10**100:
        return str(value)
    return None


def as_ratings(values: list[Any]) -> pa.Array:
    """double (R,) where all values are numbers or missing, else string (R,) with "?" for what is neither."""
    if all(value is None or type(value) in (int, float) for value in values):
        try:
            return pa.array(values, pa.float64())
        except (OverflowError, pa.ArrowException):  # an integer beyond a double
            pass
    return pa.array([None if value is None else _rating_text(value) for value in values], pa.string())


def _rating_text(value: Any) -> str:
    text = str(value) if isinstance(value, float) else _string(value)
    return "?" if text is None else text


def as_features(values: list[Any]) -> pa.Array:
    """list<string> (R,) where all values are lists, else string (R,) in which lists are joined by commas."""
    if all(value is None or isinstance(value, (list, tuple)) for value in values):
        return pa.array(
            [None if value is None else [_string(word) for word in value] for value in values], pa.list_(pa.string())
        )
    return as_strings(
        [",".join(filter(None, map(_string, value))) if isinstance(value, (list, tuple)) else value for value in values]
    )


def as_times(values: list[Any]) -> pa.Array:
    """double (R,) where all values are numbers or missing, else string (R,) of times, which validation reads."""
    if all(value is None or type(value) in (int, float) for value in values):
        try:
            return pa.array(values, pa.float64())
        except (OverflowError, pa.ArrowException):
            pass
    return as_strings(values)


def parse_numbers(values: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Numbers, double (R,), null where a string is not a finite decimal number; and bool (R,), true for such
    strings."""
    if not pa.types.is_string(values.type):
        number = values.cast(pa.float64())
        bad = pc.fill_null(pc.invert(pc.is_finite(number)), False)
    else:
        text = pc.utf8_trim_whitespace(values)
        good = pc.match_substring_regex(text, r"^[+-]?(\d{1,30}\.?\d{0,30}|\.\d{1,30})([eE][+-]?\d{1,2})?$")
        bad = pc.fill_null(pc.invert(good), False)
        number = pc.if_else(bad, None, text).cast(pa.float64())
    return pc.if_else(bad, None, number), bad


_COLUMNS: dict[str, Callable[[list[Any]], pa.Array]] = {
    "user": as_strings,
    "item": as_strings,
    "rating": as_ratings,
    "text": as_strings,
    "title": as_strings,
    "features": as_features,
    "time": as_times,
}

_SHORT = reprlib.Repr()
_SHORT.maxdict, _SHORT.maxlist, _SHORT.maxtuple = 12, 4, 4
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def shorten(value: object) -> str:
    """A value as text of at most MAX_SHOWN_CHARS, printable, one line."""
    text = value if isinstance(value, str) else _SHORT.repr(value)
    cut = text[:MAX_SHOWN_CHARS].encode("utf-8", "replace").decode("utf-8")
    return printable(cut)
