"""Requests from a file: Parquet, JSON lines or CSV, by its name's end; one a row, in bounded memory.

Columns: user, item; and where they are there rating, features (a list, or words between commas), history (a list of
objects with item, rating, text as `explain --history` takes them, or that as JSON text). A value that is missing, null
or empty is not given: the rating is predicted, the features are the likely ones, as `gavamoe explain` has it.
"""

import csv
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError

from gavamoe.config.section import StrictNumbers
from gavamoe.data.bounds import MAX_FEATURE_CHARS, MAX_ID_CHARS
from gavamoe.data.catalog import Catalog
from gavamoe.errors import InputError, listed, one_line, shortened
from gavamoe.generation.request import ExplanationRequest
from gavamoe.stage1.strangers.history import MAX_HISTORY, Entry, HistoryEntry, printable

Form = Literal["parquet", "jsonl", "csv"]
Row = tuple[int, dict[str, Any]]
"""The number of a row, from 1 (of JSON lines and CSV the line on which it begins), and its values."""

_FORMS: dict[str, Form] = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv"}
_MAX_LINE = 1 << 20
_MAX_FEATURES = 100
_PARQUET_ROWS = 1024


def form_of(path: Path, what: str) -> Form:
    """The form that a file's name says.

    Raises:
        InputError: it says none.
    """
    form = _FORMS.get(path.suffix.lower())
    if form is None:
        raise InputError(f"{path}: {what} is Parquet, JSON lines or CSV, by its name: {', '.join(_FORMS)}")
    return form


def _as_id(value: Any) -> Any:
    """Ids that are whole numbers in a file are their digits, as `data prepare` reads them."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _none_if_empty(value: Any) -> Any:
    return None if value is None or (isinstance(value, str) and not value.strip()) else value


def _as_words(value: Any) -> Any:
    """Features between commas as a list."""
    if isinstance(value, str):
        return [word.strip() for word in value.split(",") if word.strip()] or None
    return value


def _as_entries(value: Any) -> Any:
    if not isinstance(value, str) or not value.strip():
        return value or []
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"is no JSON list ({one_line(error, 80)})") from error


Id = Annotated[str, BeforeValidator(_as_id), Field(min_length=1, max_length=MAX_ID_CHARS), AfterValidator(printable)]
Word = Annotated[str, Field(min_length=1, max_length=MAX_FEATURE_CHARS), AfterValidator(printable)]


class RequestRow(StrictNumbers):
    """One row of a request file."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)
    user: Id
    item: Id
    rating: Annotated[float | None, BeforeValidator(_none_if_empty)] = None
    features: Annotated[Annotated[list[Word], Field(max_length=_MAX_FEATURES)] | None, BeforeValidator(_as_words)] = (
        None
    )
    history: Annotated[Annotated[list[HistoryEntry], Field(max_length=MAX_HISTORY)], BeforeValidator(_as_entries)] = (
        Field(default_factory=list)
    )


@dataclass(frozen=True)
class RequestFile:
    """A file of requests, looked through from its first row to its last."""

    path: Path
    rows: int
    """How many there are."""

    @classmethod
    def open(cls, path: Path, check: Callable[[RequestRow], None]) -> "RequestFile":
        """Look through the whole file, so that a wrong row is known before the first text is written.

        Args:
            check: raises InputError for a row that the run can't serve.

        Raises:
            InputError: the file can't be read, has no rows, or a row is wrong: its number, field and value.
        """
        rows = 0
        for number, row in _parsed(path):
            try:
                check(row)
            except InputError as error:
                raise InputError(f"{path}: row {number}: {error}") from None
            rows += 1
        if not rows:
            raise InputError(f"{path}: has no rows; each is a request, with at least a user and an item")
        return cls(path, rows)

    def blocks(self, size: int, first: int = 0) -> Iterator[list[RequestRow]]:
        """The rows from block number `first` on, `size` at a time."""
        rows = itertools.islice((row for _, row in _parsed(self.path)), first * size, None)
        while block := list(itertools.islice(rows, size)):
            yield block


def as_request(
    row: RequestRow, catalog: Catalog, entries: Callable[[list[HistoryEntry]], tuple[Entry, ...]] | None
) -> ExplanationRequest:
    """A row by index.

    Args:
        entries: a history by index; None: the run serves none.

    Raises:
        InputError: a history that can't be served.
    """
    if row.history and entries is None:
        raise InputError("history: this system takes none; leave it out")
    features = None if row.features is None else tuple(row.features)
    user, item = catalog.user_or_unknown(row.user), catalog.item_or_unknown(row.item)
    history = entries(row.history) if row.history and entries is not None else ()
    return ExplanationRequest(user, item, row.rating, features, history)


def _parsed(path: Path) -> Iterator[tuple[int, RequestRow]]:
    for number, values in _raw(path):
        try:
            yield number, RequestRow.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "row"
            reason = "missing" if first["type"] == "missing" else first["msg"].removeprefix("Value error, ")
            shown = "" if first["type"] == "missing" else f" {shortened(first['input'])}"
            raise InputError(f"{path}: row {number}: {field}{shown}: {reason}") from None


def _raw(path: Path) -> Iterator[Row]:
    reader = {"parquet": _parquet, "jsonl": _json_lines, "csv": _csv}[form_of(path, "a file of requests")]
    try:
        yield from reader(path)
    except (OSError, pa.ArrowException, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error, 160)
        raise InputError(f"{path}: can't be read ({reason})") from error


def _parquet(path: Path) -> Iterator[Row]:
    with pq.ParquetFile(path) as file:
        columns = _columns(path, file.schema_arrow.names)
        number = itertools.count(1)
        for batch in file.iter_batches(_PARQUET_ROWS, columns=columns):
            yield from zip(number, batch.to_pylist(), strict=False)


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number in itertools.count(1):
            line = file.readline(_MAX_LINE + 1)
            if not line:
                return
            if len(line) > _MAX_LINE:
                raise InputError(f"{path}: row {number}: is longer than {_MAX_LINE >> 20} MiB")
            if not line.strip():
                continue
            try:
                values = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}: row {number}: is no JSON ({one_line(error, 80)})") from None
            if not isinstance(values, dict):
                raise InputError(f'{path}: row {number}: is no JSON object, such as {{"user": ..., "item": ...}}')
            yield number, values


def _csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(_bounded(path, file), strict=True)
        header = [name.strip() for name in next(lines, [])]
        _columns(path, header)
        begin = lines.line_num + 1
        for cells in lines:
            if cells and len(cells) != len(header):
                raise InputError(f"{path}: row {begin}: has {len(cells)} values, the header {len(header)}")
            if cells:
                yield begin, dict(zip(header, cells, strict=True))
            begin = lines.line_num + 1


def _bounded(path: Path, file: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        if len(line) > _MAX_LINE:
            raise InputError(f"{path}: row {number}: is longer than {_MAX_LINE >> 20} MiB")
        yield line


def _columns(path: Path, available: list[str]) -> list[str]:
    """The columns that are read.

    Raises:
        InputError: there is no user or no item.
    """
    for name in ("user", "item"):
        if available.count(name) != 1:
            raise InputError(f"{path}: needs one column {name}; it has {listed(available, most=10) or 'none'}")
    return [name for name in available if name in RequestRow.model_fields]
