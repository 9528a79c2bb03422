"""Tables of texts from files: plain text (a line a row), JSON, CSV and the like, Parquet; also compressed.

Rows must pair up with those of another file, so a row that can't be read is an error here, not a rejection.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gavamoe.data.readers.batches import Rejection
from gavamoe.data.readers.delimited import DelimitedFile
from gavamoe.data.readers.json_lines import read_values
from gavamoe.data.readers.sources import SourceOptions, content_name, open_source, plain_suffix
from gavamoe.errors import InputError, listed, one_line

Columns = dict[str, list[Any]]
"""Values by column. Plain texts, and JSON strings, are one column named "" (it has no name)."""

MAX_TEXT_BYTES = 2**31


def read_columns(path: Path) -> Columns:
    """All columns of a table file, or the lines of a text file.

    Raises:
        InputError: the file is missing, empty, or not what its ending says; a row of it can't be read.
    """
    path = Path(path)
    reader = _READERS.get(plain_suffix(content_name(path)), _read_text)
    columns = reader(path)
    if not any(columns.values()):
        raise InputError(f"{path}: no rows")
    return columns


def _read_text(path: Path) -> Columns:
    with open_source(path) as file:
        data = file.read(MAX_TEXT_BYTES + 1)
    if len(data) > MAX_TEXT_BYTES:
        raise InputError(f"{path}: more than the {MAX_TEXT_BYTES} bytes that a text file may have")
    text = _decoded(path, data)
    # Only line feeds end a row: a text may hold carriage returns and other Unicode line separators.
    return {"": [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]}


def _decoded(path: Path, data: bytes, row: str = "") -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}{row}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def _read_json(path: Path) -> Columns:
    values = list(_readable(path))
    if all(value is None or isinstance(value, str) for value in values):
        return {"": values}
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise InputError(f"{path}, row {number}: expected an object with fields, found {type(value).__name__}")
    names = dict.fromkeys(name for value in values for name in value)
    return {name: [value.get(name) for value in values] for name in names}


def _readable(path: Path) -> Iterator[Any]:
    for number, _, value in read_values(path):
        if isinstance(value, Rejection):
            raise InputError(f"{path}, line {number}: {value.reason}")
        yield value


def _read_csv(path: Path) -> Columns:
    file = DelimitedFile(path, SourceOptions())
    names = file.header
    if len(set(names)) < len(names):
        raise InputError(f"{path}: two columns of one name in {listed(names)}")
    file.settle_dialect()
    columns: Columns = {name: [] for name in names}
    # in a file of one column an empty line is an empty text
    for block in file.blocks(range(len(names)), blank_rows=len(names) == 1):
        if block.broken:
            raise InputError(f"{path}, row {block.broken[0].row}: {block.broken[0].reason}")
        for name, column in zip(names, block.table.columns, strict=True):
            columns[name] += _strings(path, column, int(block.rows[0]) if len(block.rows) else 0, name)
    return columns


def _strings(path: Path, column: pa.Array, first: int, name: str) -> list[str]:
    try:
        return [value or "" for value in column.cast(pa.string()).to_pylist()]
    except pa.ArrowInvalid:
        values = column.to_pylist()
        return [_decoded(path, value or b"", f", row {first + at}, {name}") for at, value in enumerate(values)]


def _read_parquet(path: Path) -> Columns:
    try:
        return {str(name): column for name, column in pq.read_table(path).to_pydict().items()}
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable Parquet file ({one_line(error)})") from error


_READERS: dict[str, Callable[[Path], Columns]] = {
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
