"""JSON sources: an object a line, objects laid out over several lines, an array of them, or an array in an object.

Read a bounded piece at a time, plain or compressed.
"""

import codecs
import io
import json
from collections.abc import Iterator, Mapping, Sequence, Set
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from gavamoe.data.readers.batches import (
    FIELDS,
    MAX_RECORD_BYTES,
    REQUIRED,
    AnyBatch,
    Numbered,
    RawBatch,
    Rejection,
    UnreadBatch,
    batch_records,
    missing_column,
    record_batch,
    shorten,
)
from gavamoe.data.readers.line_blocks import line_blocks
from gavamoe.data.readers.sources import open_source, read_head
from gavamoe.errors import InputError

_CHUNK_BYTES = 2**20
_HEAD_BYTES = 2**16
_LINES_TRIED = 5
_BLANKS = " \t\r\n"
_decode = json.JSONDecoder().raw_decode


def json_batches(
    path: Path,
    fields: Mapping[str, Sequence[str]],
    encoding: str | None = None,
    wanted: tuple[str, ...] = (),
    named: frozenset[str] = frozenset(),
) -> Iterator[AnyBatch]:
    """Batches of the objects of a JSON file. Where each line is one the batches are still to be parsed.

    Args:
        fields, named: as `batch_records` takes them.
        encoding, wanted: as `read_objects` takes them.

    Raises:
        InputError: the file is missing, empty, damaged, or holds no records.
    """
    if _records_start(path, encoding, wanted) is not None:
        yield from batch_records(path, read_objects(path, encoding, wanted), fields, named)
        return
    needed: Set[str] = named | set(REQUIRED)
    with open_source(path, encoding, wanted) as file:
        for block in line_blocks(file, MAX_RECORD_BYTES):
            read = partial(_parsed, path, fields, needed, pa.py_buffer(block.data), block.first)
            glance = partial(_fields_of, path, fields, needed, block.data) if block.first == 1 else None
            yield UnreadBatch(read, block.last_full, glance=glance)
            needed = frozenset()


def _parsed(
    path: Path, fields: Mapping[str, Sequence[str]], needed: Set[str], lines: pa.Buffer, first: int
) -> RawBatch:
    """The objects of whole lines, of which the first has the number `first`."""
    good: list[dict[str, Any]] = []
    rows: list[int] = []
    broken: list[Rejection] = []
    for number, _, value in _objects(_lines(io.BytesIO(lines), first - 1)):
        if isinstance(value, Rejection):
            broken.append(value)
        else:
            good.append(value)
            rows.append(number)
    return record_batch(path, good, rows, broken, fields, needed)


def _fields_of(path: Path, fields: Mapping[str, Sequence[str]], needed: Set[str], lines: bytes) -> Set[str] | None:
    """The fields that objects of the lines have; None where the first of them do not tell."""
    head = lines[:_HEAD_BYTES].rpartition(b"\n")[0]
    good = [value for _, _, value in _objects(_lines(io.BytesIO(head))) if isinstance(value, dict)]
    found: set[str] = set()
    for field, keys in fields.items():
        if any(key in record for record in good for key in keys):
            found.add(field)
        elif not good or any(_quoted(key, lines) for key in keys):
            return None
    for field in sorted(needed - found, key=FIELDS.index):
        raise missing_column(path, field, fields[field], list(good[0]))
    return found


def _quoted(key: str, lines: bytes) -> bool:
    """Whether a key may stand in JSON text, as itself or with escapes."""
    return any(json.dumps(key, ensure_ascii=ascii).encode() in lines for ascii in (False, True))


def read_objects(path: Path, encoding: str | None = None, wanted: tuple[str, ...] = ()) -> Iterator[Numbered]:
    """Number and yield the objects of a JSON file; a value that is not an object comes as a `Rejection`.

    Args:
        encoding: of the text; None: UTF-8, or UTF-16 with a byte-order mark.
        wanted: names of the files that are taken out of an archive of several.

    Raises:
        InputError: the file is missing, empty, damaged, or holds no records.
    """
    return _objects(read_values(path, encoding, wanted))


def _objects(values: Iterator[tuple[int, int, Any]]) -> Iterator[Numbered]:
    for number, size, value in values:
        if isinstance(value, dict | Rejection):
            yield number, size, value
        else:
            yield number, size, Rejection(number, "not a JSON object", shorten(value))


def read_values(
    path: Path, encoding: str | None = None, wanted: tuple[str, ...] = ()
) -> Iterator[tuple[int, int, Any]]:
    """Like `read_objects`, with values of any kind: number, size in bytes, and the value or a `Rejection`."""
    before = _records_start(path, encoding, wanted)
    with open_source(path, encoding, wanted) as file:
        if before is None:
            yield from _lines(file)
        elif before:
            yield from _array(path, _chunks(path, file), before)
        else:
            yield from _values(path, _chunks(path, file), "", "object {} of the file")


def _records_start(path: Path, encoding: str | None, wanted: tuple[str, ...]) -> str | None:
    """See `_before_records`."""
    head = read_head(path, _HEAD_BYTES, encoding, wanted).decode("utf-8", "replace").lstrip()
    return _before_records(path, head)


def _before_records(path: Path, head: str) -> str | None:
    """What stands before the first record where records are not a line each: "[", or `{"reviews": [`, or nothing
    where objects follow each other; None where a line is a record."""
    if not head.startswith("{"):
        return "[" if head.startswith("[") else None
    try:
        value, end = _decode(head)
    except (ValueError, RecursionError):  # cut off by the end of `head`, or not JSON at all
        lines = head.split("\n")[1:_LINES_TRIED]
        return None if any(_is_object(line) for line in lines) else _before_array(head)
    laid_out = "\n" in head[:end]
    if head[end:].strip():
        return "" if laid_out else None
    if len(value) > 1 and all(isinstance(column, dict) and "0" in column for column in value.values()):
        raise InputError(
            f"{path}: holds columns, not records; write it with pandas' to_json(FILE, orient='records', lines=True)"
        )
    if sum(map(_holds_records, value.values())) == 1:
        return _before_array(head)
    return "" if laid_out else None


def _holds_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _before_array(head: str) -> str | None:
    """The start of an object up to the first array of objects in it; None where there is none."""
    at = 1
    try:
        while True:
            _, at = _decode(head, _skip(head, at, _BLANKS + ","))
            at = _skip(head, at, _BLANKS + ":")
            if head[at : at + 1] == "[" and head[_skip(head, at + 1, _BLANKS) :][:1] == "{":
                return head[: at + 1]
            _, at = _decode(head, at)
    except (ValueError, RecursionError):
        return None


def _lines(file: BinaryIO, number: int = 0) -> Iterator[tuple[int, int, Any]]:
    """Like `read_values`, of a file with a value a line, behind so many other lines."""
    while line := file.readline(MAX_RECORD_BYTES + 1):
        number += 1
        size = len(line)
        if size > MAX_RECORD_BYTES:
            yield number, 0, Rejection(number, "line too long", shorten(line[:200].decode("utf-8", "replace")))
            while line and not line.endswith(b"\n"):
                line = file.readline(_CHUNK_BYTES)
            continue
        try:
            value = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            if line.strip():
                reason = "not valid UTF-8" if isinstance(error, UnicodeDecodeError) else "not valid JSON"
                yield number, size, Rejection(number, reason, shorten(line[:200].decode("utf-8", "replace")))
            continue
        yield number, size, value


def _array(path: Path, chunks: Iterator[str], before: str) -> Iterator[tuple[int, int, Any]]:
    """The values of an array that begins after `before`."""
    buffer = next(chunks).lstrip()
    while len(buffer) < len(before) and (chunk := next(chunks, "")):
        buffer += chunk
    yield from _values(path, chain([buffer[len(before) :]], chunks), "]", "element {} of the JSON array")


def _values(path: Path, chunks: Iterator[str], end_mark: str, called: str) -> Iterator[tuple[int, int, Any]]:
    """Values that follow each other up to `end_mark`, or up to the end of the file where it is empty."""
    buffer, position, number, more = "", 0, 0, True
    while True:
        position = _skip(buffer, position, _BLANKS + ",")
        if end_mark and buffer[position : position + 1] == end_mark:
            return
        if not end_mark and not more and position == len(buffer):
            return
        try:
            value, end = _decode(buffer, position)
            complete = end < len(buffer) or not more  # otherwise the buffer may end inside the value
        except RecursionError:
            raise InputError(f"{path}: {called.format(number + 1)} is nested too deeply") from None
        except ValueError:
            complete = False
        if complete:
            number += 1
            yield number, end - position, value
            position = end
        elif more and len(buffer) - position <= MAX_RECORD_BYTES:
            chunk = next(chunks, "")
            more = bool(chunk)
            buffer, position = buffer[position:] + chunk, 0
        else:
            raise InputError(f"{path}: {called.format(number + 1)} is not valid JSON or is cut off")


def _skip(buffer: str, position: int, blanks: str) -> int:
    while position < len(buffer) and buffer[position] in blanks:
        position += 1
    return position


def _chunks(path: Path, file: BinaryIO) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        while chunk := file.read(_CHUNK_BYTES):
            if text := decoder.decode(chunk):
                yield text
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: the JSON is not valid UTF-8 ({error.reason}); name its encoding with --encoding"
        ) from error
