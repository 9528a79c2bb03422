"""A file of texts and their features between two passes over them."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

FEATURE_LISTS = pa.list_(pa.string())
_SCHEMA = pa.schema([("text", pa.string()), ("features", FEATURE_LISTS)])


class TextSpool:
    """Takes batches of rows with `add`; `read` gives them back in order, as often as it is called."""

    def __init__(self, path: Path) -> None:
        self._path = path
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        self._writer = pa.ipc.new_stream(str(path), _SCHEMA, options=options)

    def add(self, text: pa.Array, features: pa.Array) -> None:
        """Append R rows: `text` string (R,), `features` list<string> (R,)."""
        self._writer.write_batch(pa.record_batch([text, features], schema=_SCHEMA))

    def read(self) -> Iterator[tuple[pa.Array, pa.Array]]:
        """Text and features of the rows, batch by batch; no more can be added."""
        self.close()
        with pa.OSFile(str(self._path)) as file, pa.ipc.open_stream(file) as reader:
            for batch in reader:
                yield batch["text"], batch["features"]

    def close(self) -> None:
        """End the file; it can be read and removed."""
        self._writer.close()

    def remove(self) -> None:
        """Delete the file."""
        self.close()
        self._path.unlink()
