"""A stream of lines cut into blocks of whole lines, by counting line ends alone: others may parse them."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from gavamoe.data.readers import batches

_READ_BYTES = 4 * 2**20
_TAIL_BYTES = 2**12
_LINE_END = b"\n"


class LineBlock(NamedTuple):
    """Whole lines, the last of a file perhaps without its end."""

    first: int
    """Number of the first line, from 1."""
    last_full: int
    """Number of the last line that is not blank; 0 where all are."""
    data: bytes


def line_blocks(file: Any, longest: int) -> Iterator[LineBlock]:
    """Cut a binary stream into blocks of BATCH_ROWS lines, or fewer where they reach BATCH_BYTES.

    Args:
        longest: of a line with more bytes than that only so many and one are kept, so that it can be told.
    """
    pending, lines, first = bytearray(), 0, 1
    for data in _bounded(file, longest):
        pending += data
        lines += data.count(_LINE_END)
        while lines >= batches.BATCH_ROWS or (lines and len(pending) >= batches.BATCH_BYTES):
            ended, end = _cut(pending, lines)
            if not end:
                break
            yield _block(first, ended, bytes(memoryview(pending)[:end]))
            del pending[:end]
            first, lines = first + ended, lines - ended
    if pending:
        yield _block(first, lines, bytes(pending))


def _cut(pending: bytearray, lines: int) -> tuple[int, int]:
    """Lines and bytes of the next block; zeros while it is not whole."""
    end = 0
    if len(pending) >= batches.BATCH_BYTES:
        end = pending.find(_LINE_END, batches.BATCH_BYTES - 1) + 1
        lines = pending.count(_LINE_END, 0, end)
    if lines <= batches.BATCH_ROWS and end:
        return lines, end
    ends = np.flatnonzero(np.frombuffer(pending, dtype=np.uint8) == _LINE_END[0])
    if len(ends) < batches.BATCH_ROWS:
        return 0, 0
    return batches.BATCH_ROWS, int(ends[batches.BATCH_ROWS - 1]) + 1


def _block(first: int, ended: int, data: bytes) -> LineBlock:
    """The block of lines of which so many are ended."""
    tail = data[-_TAIL_BYTES:]
    full = len(tail.rstrip())
    if not full:
        tail, full = data, len(data.rstrip())
    return LineBlock(first, first + ended - tail.count(_LINE_END, full) if full else 0, data)


def _bounded(file: Any, longest: int) -> Iterator[bytes]:
    """What a stream holds, piece by piece, without what is too much of a line."""
    kept = 0
    """Bytes of the line at hand so far."""
    while data := file.read(_READ_BYTES):
        head = data.find(_LINE_END)
        head = len(data) if head < 0 else head
        room = max(longest + 1 - kept, 0)
        if head > room:
            data, head = data[:room] + data[head:], room
        last = data.rfind(_LINE_END)
        kept = kept + len(data) if last < 0 else len(data) - last - 1
        if data:
            yield data
