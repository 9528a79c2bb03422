"""The split into training, validation and test rows: drawn by a ratio, or given by index files; repeated pairs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gavamoe.data.dataset import SPLITS
from gavamoe.data.writer import LEFT_OUT
from gavamoe.errors import InputError

INDEX_FILES = {"train": ("train.index",), "valid": ("validation.index", "valid.index"), "test": ("test.index",)}
MAX_INDEX_BYTES = 2**30


def check_ratio(ratio: Sequence[float]) -> None:
    """Raise InputError unless `ratio` is three positive numbers."""
    if len(ratio) != len(SPLITS) or not all(0 < share < 1e9 for share in ratio):
        raise InputError(f"split: {':'.join(map(str, ratio))} is not three positive numbers such as 8:1:1")


def draw_splits(count: int, ratio: Sequence[float], seed: int | Sequence[int]) -> np.ndarray:
    """int8 (count,): positions in SPLITS, shuffled, sizes exact to rounding; no split is empty where 3 rows are."""
    ends = np.round(np.cumsum(ratio) / np.sum(ratio) * count).astype(int)
    ends = np.clip(ends, [1, 2, 3], [count - 2, count - 1, count]) if count >= len(SPLITS) else ends
    split = np.repeat(np.arange(len(SPLITS), dtype=np.int8), np.diff(ends, prepend=0))
    return np.random.default_rng(seed).permutation(split)


def repeated_pairs(user: np.ndarray, item: np.ndarray, time: np.ndarray, has_text: np.ndarray) -> np.ndarray:
    """bool (N,): rows whose (user, item) pair has a later row, by `time` (NaN: earliest), then by place; a row with a
    text is later than any without."""
    # Stable, so ties keep their place.
    order = np.lexsort((np.nan_to_num(time, nan=-np.inf), has_text, item, user))
    same = (np.diff(user[order]) == 0) & (np.diff(item[order]) == 0)
    repeated = np.zeros(len(user), dtype=bool)
    repeated[order[:-1][same]] = True
    return repeated


def given_splits(folder: Path, row: np.ndarray, rows_read: int) -> np.ndarray:
    """int8 (N,): splits by the index files of `folder`, LEFT_OUT for rows that none names.

    An index file holds positions in the source, from 0, separated by blanks or line ends.

    Args:
        row: int64 (N,): row number of each kept row, from 1.
        rows_read: rows of the source.

    Raises:
        InputError: a file is missing, holds anything but whole numbers, points past the end, or overlaps with another.
    """
    split = np.full(rows_read, LEFT_OUT, dtype=np.int8)
    paths = [_index_path(Path(folder), name) for name in SPLITS]
    for code, path in enumerate(paths):
        positions = _read_index(path, rows_read)
        ordered = np.sort(positions)
        twice = ordered[:-1][np.diff(ordered) == 0]
        if len(twice):
            raise InputError(f"{path}: names row {twice[0]} twice")
        taken = positions[split[positions] != LEFT_OUT]
        if len(taken):
            other = paths[split[taken[0]]]
            raise InputError(f"{path}: names row {taken[0]}, which {other.name} names too; splits must not overlap")
        split[positions] = code
    return split[row - 1]


def _index_path(folder: Path, split: str) -> Path:
    for name in INDEX_FILES[split]:
        if (folder / name).is_file():
            return folder / name
    raise InputError(f"{folder / INDEX_FILES[split][0]}: no such index file for the {split} split")


def _read_index(path: Path, rows_read: int) -> np.ndarray:
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise InputError(f"{path}: more than the {MAX_INDEX_BYTES} bytes that an index file may have")
    words = path.read_text(encoding="utf-8", errors="replace").split()
    for number, word in enumerate(words, start=1):
        if not (word.isascii() and word.isdigit() and len(word) <= 18 and int(word) < rows_read):
            raise InputError(
                f"{path}: entry {number} is {word[:40]!r}, but the source has the rows 0..{rows_read - 1} only"
            )
    return np.array(words, dtype=np.int64)
