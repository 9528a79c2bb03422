"""Writing a dataset folder from coded rows in bounded memory: splits, index maps, usual features, fingerprint.

Rows arrive with users and items as codes (positions in a list of raw ids); the arrays of codes are held
in memory (a few bytes a row), texts and features only a batch at a time.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gavamoe.artifacts.files import sha256, write_json
from gavamoe.data.catalog import ITEMS_SCHEMA, MAX_USUAL_FEATURES, USERS_SCHEMA
from gavamoe.data.dataset import (
    DATA_FILES,
    MAX_SCALE_VALUES,
    ROW_GROUP_ROWS,
    ROWS_SCHEMA,
    SCHEMA_VERSION,
    SPLITS,
    DatasetMeta,
    fingerprint,
)
from gavamoe.errors import InputError

LEFT_OUT = -1
"""Split code of a row that is in no split."""


class Rows(NamedTuple):
    """All rows of a source, without their texts and features."""

    users: Sequence[str]
    """Raw ids by user code."""
    items: Sequence[str]
    """Raw ids by item code."""
    titles: Sequence[str | None]
    """Titles by item code; None where there is none."""
    user: np.ndarray
    """User codes: int32 (N,)."""
    item: np.ndarray
    """Item codes: int32 (N,)."""
    rating: np.ndarray
    """Ratings, NaN where there is none: float32 (N,)."""
    split: np.ndarray
    """Positions in SPLITS, or LEFT_OUT: int8 (N,)."""


class DatasetWriter:
    """Writes one dataset into an existing, empty folder: `write` for every batch of rows in order, then `finish`.

    A context manager: leaving it closes the files.
    """

    def __init__(self, folder: Path, rows: Rows) -> None:
        """Check that every split has a row and open the split files.

        Raises:
            InputError: a split would be empty.
        """
        counts = np.bincount(rows.split[rows.split >= 0], minlength=len(SPLITS))
        for split, count in zip(SPLITS, counts.tolist(), strict=True):
            if count == 0:
                raise InputError(f"{int(counts.sum())} usable rows leave the {split} split empty; give more rows")
        self._folder = folder
        self._rows = rows
        self._row_counts = dict(zip(SPLITS, counts.tolist(), strict=True))
        self._users = _IndexMap.of(rows.user, rows.split, len(rows.users))
        self._items = _IndexMap.of(rows.item, rows.split, len(rows.items))
        self._user_tally = _FeatureTally()
        self._item_tally = _FeatureTally()
        self._features = StringEncoder()
        self._start = 0
        self._writers = [pq.ParquetWriter(folder / f"{split}.parquet", ROWS_SCHEMA) for split in SPLITS]

    def write(self, text: pa.Array, features: pa.Array) -> None:
        """Write the next R rows: `text` string (R,), `features` list<string> (R,)."""
        rows, span = self._rows, slice(self._start, self._start + len(text))
        self._start += len(text)
        user, item = self._users.index_of[rows.user[span]], self._items.index_of[rows.item[span]]
        rating, split = rows.rating[span], rows.split[span]
        batch = pa.table(
            [
                pa.array(user),
                pa.array(item),
                pa.array(rating, mask=np.isnan(rating)),
                text,
                features.cast(ROWS_SCHEMA.field("features").type),
            ],
            schema=ROWS_SCHEMA,
        )
        for code, writer in enumerate(self._writers):
            taken = np.flatnonzero(split == code)
            if len(taken) == len(batch):
                writer.write_table(batch, row_group_size=ROW_GROUP_ROWS)
            elif len(taken):
                writer.write_table(batch.take(pa.array(taken)), row_group_size=ROW_GROUP_ROWS)
        self._tally(user, item, features, split == 0)

    def finish(
        self,
        *,
        source: str,
        format: str,
        text_mode: str,
        seed: int,
        split: str,
        sentence: str | None = None,
        preparation: dict[str, int],
        bounds: tuple[float, float] | None = None,
    ) -> DatasetMeta:
        """Write users, items and meta.json once all rows are written.

        Args:
            sentence: which sentence of a review was chosen, if one was.
            bounds: the ends of the rating scale where they are known; otherwise the observed ones.
        """
        if self._start != len(self._rows.split):
            raise ValueError(f"{self._start} rows written of {len(self._rows.split)}")
        for writer in self._writers:
            writer.close()
        self._write_catalog()
        hashes = {name: sha256(self._folder / name) for name in DATA_FILES}
        kept = self._rows.rating[self._rows.split >= 0]
        values, extent = rating_scale(np.unique(kept[~np.isnan(kept)]), bounds)
        meta = DatasetMeta(
            schema_version=SCHEMA_VERSION,
            source=source,
            format=format,
            text_mode=text_mode,
            sentence=sentence,
            seed=seed,
            split=split,
            users=self._users.size,
            items=self._items.size,
            known_users=self._users.known,
            known_items=self._items.known,
            rows=self._row_counts,
            implicit=extent is None,
            rating_values=values,
            rating_range=extent,
            preparation=preparation,
            files=hashes,
            fingerprint=fingerprint(hashes),
        )
        write_json(self._folder / "meta.json", meta.model_dump(mode="json"))
        return meta

    @property
    def user_index(self) -> np.ndarray:
        """int32 (user codes,): each code's index, -1 for a user without any row."""
        return self._users.index_of

    def __enter__(self) -> "DatasetWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        for writer in self._writers:
            writer.close()

    def _tally(self, user: np.ndarray, item: np.ndarray, features: pa.Array, training: np.ndarray) -> None:
        lengths = np.diff(features.offsets.to_numpy())
        row = np.repeat(np.arange(len(user)), lengths)
        codes = self._features.encode(features.flatten())
        counted = training[row]
        self._user_tally.add(user[row[counted]], codes[counted])
        self._item_tally.add(item[row[counted]], codes[counted])

    def _write_catalog(self) -> None:
        words, rows = pa.array(self._features.values, pa.string()), self._rows
        for name, schema, ids, index_map, tally in (
            ("users", USERS_SCHEMA, rows.users, self._users, self._user_tally),
            ("items", ITEMS_SCHEMA, rows.items, self._items, self._item_tally),
        ):
            columns = {
                "index": pa.array(np.arange(index_map.size, dtype=np.int32)),
                "id": pa.array([ids[code] for code in index_map.codes], pa.string()),
                "count": pa.array(index_map.training_rows),
                "features": tally.most_used(index_map.size, words, MAX_USUAL_FEATURES),
            }
            if name == "items":
                columns["title"] = pa.array([rows.titles[code] for code in index_map.codes], pa.string())
            table = pa.table([columns[field.name] for field in schema], schema=schema)
            pq.write_table(table, self._folder / f"{name}.parquet", row_group_size=ROW_GROUP_ROWS)


class StringEncoder:
    """Strings to codes 0, 1, 2, ... in order of first appearance."""

    def __init__(self) -> None:
        self._code: dict[str, int] = {}

    def encode(self, strings: pa.Array) -> np.ndarray:
        """int32 codes of a string array without nulls; one dictionary look-up per distinct string."""
        return self.merge(strings.dictionary_encode())

    def merge(self, strings: pa.DictionaryArray) -> np.ndarray:
        """The same of strings that were encoded elsewhere, by a dictionary in order of first appearance."""
        code = self._code
        of_distinct = [code.setdefault(value, len(code)) for value in strings.dictionary.to_pylist()]
        return np.asarray(of_distinct, dtype=np.int32)[strings.indices.to_numpy()]

    @property
    def values(self) -> list[str]:
        """The strings by code."""
        return list(self._code)

    @property
    def codes(self) -> Mapping[str, int]:
        """The code of each string."""
        return self._code

    def __len__(self) -> int:
        return len(self._code)


def rating_scale(
    observed: np.ndarray, bounds: tuple[float, float] | None
) -> tuple[tuple[float, ...] | None, tuple[float, float] | None]:
    """(finite scale or None, range or None) of the distinct ratings `observed`, sorted.

    A finite scale is an even grid of at most MAX_SCALE_VALUES values from end to end, on which every
    observed rating lies: values that happen not to occur (a 2 among 1, 3, 4, 5) are part of it.
    """
    if len(observed) == 0:
        return None, None
    ends = bounds or (float(observed[0]), float(observed[-1]))
    values = np.unique(np.concatenate([observed.astype(float), ends]))
    if len(values) == 1:
        return (float(values[0]),), ends
    step = float(np.diff(values).min())
    if bounds is not None:  # 3 and 5 on a scale of 1 to 5 are whole stars, not steps of two
        step = min(step, 1.0)
    size = (values[-1] - values[0]) / step
    on_grid = np.abs((values - values[0]) / step - np.round((values - values[0]) / step)).max() < 1e-4
    if size + 1 > MAX_SCALE_VALUES + 1e-4 or not on_grid:
        return None, ends
    grid = np.linspace(values[0], values[-1], round(size) + 1)
    return tuple(float(value) for value in np.round(grid, 6)), ends


class _IndexMap(NamedTuple):
    """Map of codes to indices: those with training rows first, then the others, each in order of first appearance."""

    index_of: np.ndarray
    """Index of each code, -1 for one without a row in any split: int32."""
    codes: list[int]
    """Code of each index."""
    known: int
    """Number of indices with training rows."""
    training_rows: np.ndarray
    """Number of training rows of each index: int32."""

    @property
    def size(self) -> int:
        return len(self.codes)

    @classmethod
    def of(cls, code_N: np.ndarray, split_N: np.ndarray, n_codes: int) -> "_IndexMap":
        training = np.bincount(code_N[split_N == 0], minlength=n_codes)
        present = np.bincount(code_N[split_N >= 0], minlength=n_codes) > 0
        known, unknown = np.flatnonzero(training), np.flatnonzero(present & (training == 0))
        codes = np.concatenate([known, unknown])
        index = np.full(n_codes, -1, dtype=np.int32)
        index[codes] = np.arange(len(codes), dtype=np.int32)
        return cls(index, codes.tolist(), len(known), training[codes].astype(np.int32))


class _FeatureTally:
    """Counts of the occurrences of each entity (user or item index) with each feature code."""

    def __init__(self) -> None:
        self._keys: list[np.ndarray] = []

    def add(self, entity: np.ndarray, feature: np.ndarray) -> None:
        self._keys.append(entity.astype(np.int64) << 32 | feature)

    def most_used(self, n_entities: int, words: pa.Array, limit: int) -> pa.Array:
        """list<string> (n_entities,): the `limit` most used features of each, ties by first appearance."""
        keys, counts = np.unique(_concatenate(self._keys), return_counts=True)
        entity, feature = keys >> 32, keys & 0xFFFFFFFF
        order = np.lexsort((feature, -counts, entity))
        entity, feature = entity[order], feature[order]
        rank = np.arange(len(entity)) - np.searchsorted(entity, entity)
        entity, feature = entity[rank < limit], feature[rank < limit]
        offsets = np.searchsorted(entity, np.arange(n_entities + 1)).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), words.take(pa.array(feature)))


def _concatenate(parts: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])
