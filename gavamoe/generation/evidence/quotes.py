"""Training explanations that are most like what is asked for, which prompts may quote (`stage2.prompt.quotes`).

Likeness: the cosine between sets of features, each feature weighted by its idf; among equals the rating closest to the
asked one, then a row of the same user or item, then the first in file order. Where no row shares a feature: rows of the
item, then of the user, by rating.

Leave one out: a training row never quotes itself, nor any row of its own pair, so that no prompt ever holds its answer.

Shapes: N training rows, C candidates.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gavamoe.data.catalog import check_parquet, read_table
from gavamoe.data.dataset import Dataset

QUOTES_FILE = "quotes.parquet"
_SCHEMA = pa.schema(
    [
        ("user", pa.int32()),
        ("item", pa.int32()),
        ("rating", pa.float32()),
        ("features", pa.list_(pa.string())),
        ("text", pa.string()),
    ]
)
_SAME = 1e-9
"""Norms below this are none."""


class FeatureIndex:
    """Cosines between sets of features, each feature weighted by its idf: ln(N / rows that have it) + 1."""

    def __init__(self, features: Sequence[Sequence[str] | None]) -> None:
        sets = [frozenset(word.casefold() for word in words or ()) for words in features]
        self._sets = sets
        postings: dict[str, list[int]] = {}
        for row, words in enumerate(sets):
            for word in sorted(words):
                postings.setdefault(word, []).append(row)
        self._postings = {word: np.array(rows, dtype=np.int64) for word, rows in postings.items()}
        self._weight = {word: np.log(len(sets) / len(rows)) + 1.0 for word, rows in postings.items()}
        self._norm = np.array([self._norm_of(words) for words in sets])
        self._dot = np.zeros(len(sets))

    def similar(self, features: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Rows (C,) that share a feature, ascending, and their cosines (C,)."""
        words = sorted({word.casefold() for word in features} & self._postings.keys())
        if not words:
            return np.zeros(0, np.int64), np.zeros(0)
        for word in words:
            self._dot[self._postings[word]] += self._weight[word] ** 2
        rows = np.unique(np.concatenate([self._postings[word] for word in words]))
        cosine = self._dot[rows] / (self._norm[rows] * self._norm_of(words))
        self._dot[rows] = 0.0
        return rows, cosine

    def similarity(self, features: Sequence[str], rows: np.ndarray) -> np.ndarray:
        """Cosines (C,) of the given rows; 0 where nothing is shared."""
        words = {word.casefold() for word in features}
        norm = self._norm_of(words) or 1.0
        dots = [sum(self._weight[word] ** 2 for word in self._sets[row] & words) for row in rows.tolist()]
        return np.array(dots, dtype=np.float64) / (np.maximum(self._norm[rows], _SAME) * norm)

    def _norm_of(self, words: frozenset[str] | set[str] | list[str]) -> float:
        return float(np.sqrt(sum(self._weight.get(word, 0.0) ** 2 for word in sorted(words))))


def ranked(
    rows_C: np.ndarray, cosine_C: np.ndarray, distance_C: np.ndarray | None, related_C: np.ndarray
) -> np.ndarray:
    """Candidates in their order, the likest first.

    Args:
        rows_C: row numbers.
        distance_C: between ratings; None: no rating is asked for. NaN counts as farthest.
        related_C: bool, whether the row is of the same user or item.
    """
    # Cosines that differ in the last bits alone are equal, and ratings decide.
    keys = [rows_C, ~related_C]
    if distance_C is not None:
        keys.append(np.nan_to_num(distance_C, nan=np.inf).round(6))
    order: np.ndarray = np.lexsort([*keys, -cosine_C.round(9)])
    return rows_C[order]


class Quotes:
    """The training rows that have a text.

    Args:
        table: user, item, rating, features, text.
    """

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self._texts: list[str] = table["text"].to_pylist()
        self._users, self._items = table["user"].to_numpy(), table["item"].to_numpy()
        self._ratings = table["rating"].to_numpy().astype(np.float64)
        self._index = FeatureIndex(table["features"].to_pylist())

    def __len__(self) -> int:
        return len(self._texts)

    @classmethod
    def read(cls, data: Dataset) -> Self:
        """A dataset's training rows that have a text."""
        table = data.table("train", _SCHEMA.names)
        spoken = [row for row, text in enumerate(table["text"].to_pylist()) if text and text.strip()]
        return cls(table.take(spoken).cast(_SCHEMA))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing or damaged.
        """
        check_parquet(folder / QUOTES_FILE, _SCHEMA)
        return cls(read_table(folder / QUOTES_FILE, _SCHEMA))

    def save(self, folder: Path) -> None:
        """Write the rows as one Parquet file."""
        pq.write_table(self._table, folder / QUOTES_FILE, compression="zstd")

    def nearest(
        self, user: int, item: int, rating: float | None, features: Sequence[str], count: int
    ) -> tuple[str, ...]:
        """At most `count` different texts for a pair, the likest first.

        Args:
            user, item: any numbers; those never seen have no rows.
            rating: None or NaN: none is asked for.
        """
        rows, cosine = self._index.similar(features)
        kept = (self._users[rows] != user) | (self._items[rows] != item)
        rows, cosine = rows[kept], cosine[kept]
        if not len(rows):
            of_item = (self._users != user) & (self._items == item)
            of_user = (self._users == user) & (self._items != item)
            rows = np.flatnonzero(of_item if of_item.any() else of_user)
            cosine = np.zeros(len(rows))
        asked = rating is not None and rating == rating
        distance = np.abs(self._ratings[rows] - float(rating or 0)) if asked else None
        related = (self._users[rows] == user) | (self._items[rows] == item)
        found: dict[str, None] = {}
        for row in ranked(rows, cosine, distance, related).tolist():
            found.setdefault(self._texts[row])
            if len(found) == count:
                break
        return tuple(found)
