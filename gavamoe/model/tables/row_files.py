"""Rows in safetensors files, written block by block and read memory-mapped: neither needs them in memory at once.

A table is a folder of files NAME-00000-of-00003.safetensors, each a range of consecutive rows: tensor `weight`, float32
(rows, E); its metadata say which table and dataset they belong to and where the range begins.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from gavamoe.artifacts.files import write_file
from gavamoe.errors import InputError, one_line

FOLDER = "tables"
"""Where an artifact has its tables' files."""
FILE_BYTES = 2**31
"""Bytes of a file of a table, at most."""
_WEIGHT = "weight"
_FLOAT = np.dtype("<f4")
_MAX_HEADER_BYTES = 2**24


class Rows(NamedTuple):
    """Rows to be written: their shape, and their values some rows at a time, in order."""

    shape: tuple[int, ...]
    blocks: Iterable[np.ndarray]


class RowFile(NamedTuple):
    """An opened file."""

    metadata: dict[str, str]
    tensors: dict[str, np.ndarray]
    """Memory-mapped float32 arrays, read-only."""


def write_rows(path: Path, tensors: Mapping[str, Rows], metadata: Mapping[str, str]) -> None:
    """Write float32 tensors of which one block is in memory at a time, whole or not at all."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, rows in tensors.items():
        start, end = end, end + _FLOAT.itemsize * int(np.prod(rows.shape))
        header[name] = {"dtype": "F32", "shape": list(rows.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # safetensors wants the data aligned
    with write_file(path) as aside, aside.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, rows in tensors.items():
            written = 0
            for block in rows.blocks:
                file.write(np.ascontiguousarray(block, dtype=_FLOAT).data)
                written += len(block)
            if written != rows.shape[0]:
                raise ValueError(f"{path}: {written} of the {rows.shape[0]} rows of {name}")


def open_rows(path: Path) -> RowFile:
    """Map a file that `write_rows` wrote.

    Raises:
        InputError: no such file, or one that is damaged or holds anything but float32 tensors.
    """
    try:
        with safe_open(path, framework="np") as checked:  # refuses headers that do not fit the file
            metadata = dict(checked.metadata() or {})
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, _MAX_HEADER_BYTES)))
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: can't be read ({one_line(error)})") from error
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] != "F32":
            raise InputError(f"{path}: {name} is of type {entry['dtype']}, not F32")
        shape, offset = tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
        empty = 0 in shape  # which can't be mapped
        tensors[name] = np.zeros(shape, _FLOAT) if empty else np.memmap(path, _FLOAT, "r", offset, shape)
    return RowFile(metadata, tensors)


def write_table(
    folder: Path, name: str, shape: tuple[int, int], blocks: Iterable[np.ndarray], dataset: str, file_bytes: int
) -> None:
    """Write a table's rows, the unknown one's last, into files of at most `file_bytes` each.

    Args:
        blocks: all rows in order, some at a time.
        dataset: fingerprint of the dataset whose ids the rows are of.
    """
    rows, size = shape
    each = max(1, file_bytes // (_FLOAT.itemsize * size))
    count, source = -(-rows // each), _Stream(blocks)
    (folder / FOLDER).mkdir(exist_ok=True)
    for number in range(count):
        first = number * each
        inside = min(each, rows - first)
        metadata = {"table": name, "dataset": dataset, "first_row": str(first), "rows": str(rows)}
        path = folder / FOLDER / f"{name}-{number:05d}-of-{count:05d}.safetensors"
        write_rows(path, {_WEIGHT: Rows((inside, size), source.take(inside))}, metadata)


def open_table(folder: Path, name: str, rows: int, size: int) -> list[np.ndarray]:
    """The mapped files of a table, in the order of their rows.

    Raises:
        InputError: files are missing or damaged, or belong to another table or to different datasets.
    """
    paths = table_files(folder, name)
    if not paths:
        raise InputError(f"{Path(folder) / FOLDER}: has no files of {name}; the artifact is not whole")
    parts, expected, dataset = [], 0, None
    for path in paths:
        metadata, tensors = open_rows(path)
        dataset = metadata.get("dataset") if dataset is None else dataset
        if metadata.get("dataset") != dataset:
            raise InputError(f"{path}: holds rows of another dataset than {paths[0].name}; they don't belong together")
        part = tensors.get(_WEIGHT)
        if part is None or metadata.get("table") != name or part.shape[1:] != (size,):
            raise InputError(f"{path}: does not hold rows of {name} with {size} numbers each")
        if metadata.get("first_row") != str(expected) or metadata.get("rows") != str(rows):
            raise InputError(
                f"{path}: begins at row {metadata.get('first_row')} of {metadata.get('rows')}, not at row {expected} of"
                f" {rows}; files are missing, or of another dataset"
            )
        parts.append(part)
        expected += len(part)
    if expected != rows:
        raise InputError(f"{paths[-1]}: ends at row {expected} of {rows}; files are missing")
    return parts


def table_files(folder: Path, name: str) -> list[Path]:
    """The files of a table in an artifact, in order."""
    pattern = re.compile(rf"{re.escape(name)}-\d{{5}}-of-\d{{5}}\.safetensors")
    return sorted(path for path in (Path(folder) / FOLDER).glob(f"{name}-*") if pattern.fullmatch(path.name))


class _Stream:
    """Blocks of any sizes, taken by numbers of rows."""

    def __init__(self, blocks: Iterable[np.ndarray]) -> None:
        self._blocks = iter(blocks)
        self._left: np.ndarray | None = None

    def take(self, rows: int) -> Iterator[np.ndarray]:
        """The next rows, in parts."""
        while rows:
            block = next(self._blocks) if self._left is None else self._left
            part, rest = block[:rows], block[rows:]
            self._left = rest if len(rest) else None
            rows -= len(part)
            yield part
