"""Tables: delimited files and Parquet files or folders, column by column; cut here, converted where they are read."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pa_dataset
import pyarrow.parquet as pq

from gavamoe.data.readers.batches import (
    BATCH_BYTES,
    BATCH_ROWS,
    FIELDS,
    REQUIRED,
    RawBatch,
    Rejection,
    UnreadBatch,
    missing_column,
    shorten,
)
from gavamoe.data.readers.delimited import DelimitedFile
from gavamoe.data.readers.sources import NO_COLUMN, SourceOptions, check_file
from gavamoe.errors import InputError


def pick_columns(source: Path, columns: Mapping[str, str], available: Sequence[str]) -> dict[str, str]:
    """Which column holds which field: the mapped one, else the one named like the field, whatever the case.

    Raises:
        InputError: a mapped column or a required field is not there, or two columns have a picked name.
    """
    counts = Counter(available)
    by_lower = {name.strip().lower(): name for name in reversed(available)}
    picked = {}
    for field in FIELDS:
        name = columns.get(field, field)
        if name == NO_COLUMN and field not in REQUIRED and name not in counts:
            continue
        if name not in counts and field not in columns:
            name = by_lower.get(field, field)
        if counts[name] > 1:
            raise InputError(f"{source}: {counts[name]} columns are named {name!r}; rename all but the {field}'s")
        if name in counts:
            picked[field] = name
        elif field in columns or field in REQUIRED:
            raise missing_column(source, field, [name], list(available))
    return picked


def read_csv(source: Path, options: SourceOptions) -> Iterator[UnreadBatch]:
    """Read a delimited file with a header (comma, tab, semicolon or bar; quoted values may hold line ends).

    Raises:
        InputError: the file is missing, empty or damaged, or a column is missing.
    """
    file = DelimitedFile(source, options)
    picked = pick_columns(source, options.columns, file.header)
    position = {field: file.header.index(name) for field, name in picked.items()}
    note = file.settle_dialect(position.get("rating"))
    notes = (note,) if note else ()
    for block in file.blocks(list(position.values())):
        names = {str(place): file.header[place] for place in position.values()}
        batch = block.table.rename_columns([names[name] for name in block.table.schema.names])
        yield _unread(source, batch, block.rows, picked, block.broken, notes)
        notes = ()


def read_parquet(source: Path, options: SourceOptions) -> Iterator[UnreadBatch]:
    """Read a Parquet file, or a folder of parts as Spark and Dask write them, in order of their names.

    Raises:
        InputError: a file is missing, empty or damaged, a column is missing or of a type that can't hold its field.
    """
    if not source.is_dir():
        check_file(source)
    start = 1
    try:
        parts = pa_dataset.dataset(source, format="parquet", partitioning="hive")
        fragments = sorted(parts.get_fragments(), key=lambda fragment: fragment.path)
        if not fragments:
            raise InputError(f"{source}: the folder holds no Parquet files")
        picked = pick_columns(source, options.columns, parts.schema.names)
        names = list(dict.fromkeys(picked.values()))
        for fragment in fragments:
            size = _batch_rows(fragment.metadata)
            for batch in fragment.to_batches(schema=parts.schema, columns=names, batch_size=size, batch_readahead=1):
                rows = np.arange(start, start + len(batch), dtype=np.int64)
                start += len(batch)
                yield _unread(source, batch, rows, picked)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{source}: not a readable Parquet file ({shorten(str(error))})") from error


def is_parquet_folder(source: Path) -> bool:
    """Whether a folder holds Parquet parts, also in folders of partitions."""
    return source.is_dir() and any(source.rglob("*.parquet"))


def _batch_rows(metadata: pq.FileMetaData) -> int:
    """Rows a batch may have so that it stays near BATCH_BYTES, by the file's average."""
    size = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
    return max(1, min(BATCH_ROWS, BATCH_BYTES * metadata.num_rows // max(size, 1)))


@dataclass(frozen=True)
class _Sendable:
    """Rows that go to another process without the rest of the table that they are a slice of."""

    batch: pa.RecordBatch

    def __reduce__(self) -> tuple[Callable[[pa.Buffer], "_Sendable"], tuple[pa.Buffer]]:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.batch.schema) as stream:
            stream.write_batch(self.batch)
        return _arrived, (sink.getvalue(),)


def _arrived(sent: pa.Buffer) -> _Sendable:
    with pa.ipc.open_stream(sent) as stream:
        return _Sendable(stream.read_next_batch())


def _unread(
    source: Path,
    batch: pa.RecordBatch,
    rows: np.ndarray,
    picked: Mapping[str, str],
    broken: Sequence[Rejection] = (),
    notes: tuple[str, ...] = (),
) -> UnreadBatch:
    last = max([0, *(rejection.row for rejection in broken), *rows[-1:].tolist()])
    read = partial(_table_batch, source, _Sendable(batch), rows, picked, list(broken), notes)
    return UnreadBatch(read, last, glance=partial(_fields, picked) if len(batch) else None)


def _fields(picked: Mapping[str, str]) -> Set[str]:
    return picked.keys()


def _table_batch(
    source: Path,
    sent: _Sendable,
    rows: np.ndarray,
    picked: Mapping[str, str],
    broken: list[Rejection],
    notes: tuple[str, ...],
) -> RawBatch:
    batch = sent.batch
    decoded = {name: _decoded(batch[name]) for name in dict.fromkeys(picked.values())}
    bad = np.zeros(len(batch), dtype=bool)
    for _, invalid in decoded.values():
        bad |= invalid
    if bad.any():
        raw = [batch[name] for name in decoded]
        broken = broken + [
            Rejection(int(rows[at]), "not valid UTF-8", _undecoded(raw, at)) for at in np.flatnonzero(bad).tolist()
        ]
        broken.sort(key=lambda rejection: rejection.row)
        good = pa.array(~bad)
        decoded = {name: (array.filter(good), invalid) for name, (array, invalid) in decoded.items()}
        rows = rows[~bad]
    shown = pa.RecordBatch.from_arrays([array for array, _ in decoded.values()], list(decoded))
    columns = {field: _as_field(source, name, decoded[name][0], field) for field, name in picked.items()}
    return RawBatch(rows, columns, lambda index: shorten(shown.slice(index, 1).to_pylist()[0]), broken, notes)


def _decoded(array: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """The column as plain Arrow (no dictionaries, bytes as string), and bool (R,), true for bytes that aren't UTF-8."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    invalid = np.zeros(len(array), dtype=bool)
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type) or pa.types.is_string_view(array.type):
        array = array.cast(pa.binary())  # Parquet files may call any bytes text
    if pa.types.is_binary(array.type) or pa.types.is_large_binary(array.type):
        try:
            array = array.cast(pa.string())
        except pa.ArrowInvalid:
            values = array.to_pylist()
            invalid = np.array([value is not None and not _is_utf8(value) for value in values])
            array = pa.array([None if bad else value for value, bad in zip(values, invalid, strict=True)], pa.binary())
            array = array.cast(pa.string())
    return array, invalid


def _undecoded(columns: list[pa.Array], row: int) -> str:
    """A row with bytes that are not UTF-8, as far as it can be shown."""
    cells = [column.slice(row, 1) for column in columns]
    values = [(cell.cast(pa.binary()) if pa.types.is_string(cell.type) else cell)[0].as_py() for cell in cells]
    texts = [value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value) for value in values]
    return shorten(", ".join(texts))


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _as_field(source: Path, name: str, array: pa.Array, field: str) -> pa.Array:
    """Bring a column to its field's type; InputError where it can't hold the field."""
    kind = array.type
    if pa.types.is_null(kind):
        return pa.nulls(len(array), pa.float64() if field in ("rating", "time") else pa.string())
    if pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind) or pa.types.is_list(kind):
        array = array.cast(pa.list_(kind.value_type))
    try:
        return _converted(source, name, array, field)
    except pa.ArrowException as error:
        raise _wrong_type(source, name, kind, field) from error


def _converted(source: Path, name: str, array: pa.Array, field: str) -> pa.Array:
    kind = array.type
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    if field == "time" and (pa.types.is_timestamp(kind) or pa.types.is_date(kind)):
        return array.cast(pa.timestamp("us"))
    if field == "time" and is_number:
        return array.cast(pa.float64())
    if pa.types.is_string(kind):
        return array
    if field == "rating" and is_number:
        return array.cast(pa.float64())
    if field in ("user", "item") and is_number:
        return _number_ids(array)
    if field == "features" and pa.types.is_list(kind) and not pa.types.is_nested(kind.value_type):
        return _checked_lists(source, name, array.cast(pa.list_(pa.string())))
    raise _wrong_type(source, name, kind, field)


def _wrong_type(source: Path, name: str, kind: pa.DataType, field: str) -> InputError:
    way_out = "" if field in REQUIRED else f"; change it, or leave it out with --column {field}={NO_COLUMN}"
    return InputError(f"{source}: column {name!r} is of type {kind}, which can't be the {field}{way_out}")


def _checked_lists(source: Path, name: str, array: pa.Array) -> pa.Array:
    try:
        array.validate(full=True)
    except pa.ArrowInvalid as error:
        raise InputError(f"{source}: column {name!r} holds text that is not valid UTF-8") from error
    return array


def _number_ids(array: pa.Array) -> pa.Array:
    """Numbers as ids: 12 and 12.0 (what a missing value makes of a column of whole numbers) are both "12"."""
    if pa.types.is_integer(array.type):
        return array.cast(pa.string())
    number = array.cast(pa.float64())
    whole = pc.fill_null(pc.and_(pc.equal(pc.floor(number), number), pc.less(pc.abs(number), 2.0**53)), False)
    digits = pc.if_else(whole, number, None).cast(pa.int64()).cast(pa.string())
    other = pc.if_else(pc.and_(pc.is_finite(number), pc.invert(whole)), number, None).cast(pa.string())
    return pc.coalesce(digits, other)
