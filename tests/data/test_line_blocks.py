"""Lines cut into blocks that others parse: nothing is lost, numbers are those of the lines, blocks are bounded."""

import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gavamoe.data.readers import batches, line_blocks
from gavamoe.data.readers.batches import Rejection, UnreadBatch
from gavamoe.data.readers.json_lines import json_batches, read_objects
from gavamoe.data.readers.line_blocks import LineBlock

FIELDS = {"user": ("user",), "item": ("item",)}


def cut(data: bytes, rows: int, size: int, read: int = 7, longest: int = 10**6) -> list[LineBlock]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "BATCH_ROWS", rows)
        patch.setattr(batches, "BATCH_BYTES", size)
        patch.setattr(line_blocks, "_READ_BYTES", read)
        return list(line_blocks.line_blocks(io.BytesIO(data), longest))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.binary(max_size=9).map(lambda line: line.replace(b"\n", b"")), max_size=30),
    st.sampled_from([b"\n", b"\r\n"]),
    st.booleans(),
    st.integers(1, 8),
    st.integers(1, 40),
    st.integers(1, 50),
)
def test_blocks_are_the_file_in_whole_lines(
    lines: list[bytes], end: bytes, ended: bool, rows: int, size: int, read: int
) -> None:
    data = end.join(lines) + end * ended
    blocks = cut(data, rows, size, read)
    assert b"".join(block.data for block in blocks) == data
    whole = data.splitlines(keepends=True) if b"\r" not in data.replace(b"\r\n", b"") else None
    first = 1
    for block in blocks:
        mine = block.data.split(b"\n")
        count = len(mine) - (mine[-1] == b"")
        assert block.first == first
        first += count
        assert count <= rows
        assert len(block.data) - len(mine[-1] or mine[-2]) - 2 < size, "the last line is the one that reaches the size"
        full = [block.first + at for at, line in enumerate(mine) if line.strip()]
        assert block.last_full == (full[-1] if full else 0)
    assert all(block.data.endswith(b"\n") for block in blocks[:-1])
    assert whole is None or first - 1 <= len(data.split(b"\n"))


def test_what_is_too_much_of_a_line_is_not_kept() -> None:
    blocks = cut(b"ab\n" + b"x" * 5000 + b"\ncd\n" + b"y" * 5000, 100, 10**6, read=64, longest=100)
    assert [block.data for block in blocks] == [b"ab\n" + b"x" * 101 + b"\ncd\n" + b"y" * 101]


def lines_of_objects() -> list[bytes]:
    lines = [json.dumps({"user": f"u{n}", "item": f"i{n}", "text": "é" * (n % 5)}).encode() for n in range(40)]
    lines[17], lines[23], lines[31] = b"{broken", b"", b'{"user": "\xff"}'
    return lines


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [b"", b"\n", b"\n\n  \n\n\n"])
def test_numbers_of_rows_are_those_of_the_whole_file(
    end: bytes, last: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "r.jsonl").write_bytes(end.join(lines_of_objects()) + last)
    whole = list(read_objects(tmp_path / "r.jsonl"))
    monkeypatch.setattr(batches, "BATCH_ROWS", 6)
    blocks = list(json_batches(tmp_path / "r.jsonl", FIELDS))
    assert len(blocks) == 7 + (last.count(b"\n") > 2), "of blank lines alone, the last"
    read = [block.read() for block in blocks if isinstance(block, UnreadBatch)]
    assert len(read) == len(blocks)
    broken = [rejection for batch in read for rejection in batch.broken]
    assert broken == [record for _, _, record in whole if isinstance(record, Rejection)]
    assert [rejection.row for rejection in broken] == [18, 32]
    assert [row for batch in read for row in batch.row.tolist()] == [
        number for number, _, record in whole if not isinstance(record, Rejection)
    ]
    assert max(block.last_row for block in blocks) == 40
    moved = blocks[4].after(1000).read()
    assert moved.row.tolist() == [1000 + row for row in read[4].row.tolist()]
