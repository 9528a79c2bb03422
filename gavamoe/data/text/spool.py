"""A file of texts and their features between two passes over them: blocks, which are packed where they are made."""

import struct
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

FEATURE_LISTS = pa.list_(pa.string())
SEQUENCE_LISTS = pa.list_(pa.uint64())
_SCHEMA = pa.schema([("text", pa.string()), ("features", FEATURE_LISTS), ("sequences", SEQUENCE_LISTS)])
_LENGTH = struct.Struct("<q")


def packed(text: pa.Array, features: pa.Array, sequences: pa.Array | None = None) -> pa.Buffer:
    """R rows as compressed bytes.

    Args:
        text: string (R,).
        features: list<string> (R,).
        sequences: list<uint64> (R,), see `text.repeats`; None: null in all rows.
    """
    sequences = pa.nulls(len(text), SEQUENCE_LISTS) if sequences is None else sequences
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.ipc.new_stream(sink, _SCHEMA, options=options) as stream:
        stream.write_batch(pa.record_batch([text, features, sequences], schema=_SCHEMA))
    return sink.getvalue()


def rows_of(block: pa.Buffer) -> int:
    """How many rows a packed block has."""
    options = pa.ipc.IpcReadOptions(included_fields=[_SCHEMA.get_field_index("sequences")])
    with pa.ipc.open_stream(block, options=options) as stream:
        return stream.read_next_batch().num_rows


def texts_of(block: pa.Buffer) -> tuple[pa.Array, pa.Array]:
    """Text and features of what `packed` returned."""
    text, features = _columns(block, ["text", "features"])
    return text, features


def sequences_of(block: pa.Buffer) -> pa.ListArray:
    """Its sequences."""
    [sequences] = _columns(block, ["sequences"])
    return sequences


def _columns(block: pa.Buffer, names: list[str]) -> list[pa.Array]:
    options = pa.ipc.IpcReadOptions(included_fields=[_SCHEMA.get_field_index(name) for name in names])
    with pa.ipc.open_stream(block, options=options) as stream:
        return stream.read_next_batch().columns


class TextSpool:
    """Takes packed blocks with `add`; `read` gives them back in order, as often as it is called."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "wb")  # noqa: SIM115 - closed by `close`

    def add(self, block: pa.Buffer) -> None:
        """Append a block."""
        self._file.write(_LENGTH.pack(len(block)))
        self._file.write(block)

    def read(self) -> Iterator[pa.Buffer]:
        """The blocks; no more can be added."""
        self.close()
        with open(self._path, "rb") as file:
            while length := file.read(_LENGTH.size):
                yield pa.py_buffer(file.read(*_LENGTH.unpack(length)))

    def close(self) -> None:
        """End the file; it can be read and removed."""
        self._file.close()

    def remove(self) -> None:
        """Delete the file."""
        self.close()
        self._path.unlink()
