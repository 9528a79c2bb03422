"""JSON sources: one object a line, or one array of objects, plain or gzip, read a bounded piece at a time."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from gavamoe.data.readers.batches import MAX_RECORD_BYTES, Numbered, Rejection, open_source, shorten
from gavamoe.errors import InputError

_CHUNK_BYTES = 2**20
_BOM = b"\xef\xbb\xbf"


def read_objects(path: Path) -> Iterator[Numbered]:
    """Number and yield the objects of a JSON file; a value that is not an object comes as a `Rejection`.

    Raises:
        InputError: the file is missing, empty, damaged, or an array that is not valid JSON.
    """
    with open_source(path) as file:
        # Both kinds of open_source, plain and gzip, have peek; their common type BinaryIO does not declare it.
        if file.peek(len(_BOM))[: len(_BOM)] == _BOM:  # type: ignore[attr-defined]
            file.read(len(_BOM))
        head = file.peek(64).lstrip()  # type: ignore[attr-defined]
        yield from _array(path, file) if head[:1] == b"[" else _lines(file)


def _lines(file: BinaryIO) -> Iterator[Numbered]:
    number = 0
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
        yield _numbered(number, size, value)


def _numbered(number: int, size: int, value: Any) -> Numbered:
    if isinstance(value, dict):
        return number, size, value
    return number, size, Rejection(number, "not a JSON object", shorten(value))


def _array(path: Path, file: BinaryIO) -> Iterator[Numbered]:
    decode = json.JSONDecoder().raw_decode
    chunks = _chunks(path, file)
    buffer, position, number, more = next(chunks).lstrip()[1:], 0, 0, True
    while True:
        position = _skip(buffer, position)
        if buffer[position : position + 1] == "]":
            return
        try:
            value, end = decode(buffer, position)
            complete = end < len(buffer) or not more  # otherwise the buffer may end inside the value
        except RecursionError:
            raise InputError(f"{path}: element {number + 1} of the array is nested too deeply") from None
        except ValueError:
            complete = False
        if complete:
            number += 1
            yield _numbered(number, end - position, value)
            position = end
        elif more and len(buffer) - position <= MAX_RECORD_BYTES:
            chunk = next(chunks, "")
            more = bool(chunk)
            buffer, position = buffer[position:] + chunk, 0
        else:
            raise InputError(f"{path}: element {number + 1} of the JSON array is not valid JSON or is cut off")


def _skip(buffer: str, position: int) -> int:
    while position < len(buffer) and buffer[position] in " \t\r\n,":
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
        raise InputError(f"{path}: the JSON array is not valid UTF-8 ({error.reason})") from error
