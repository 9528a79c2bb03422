"""Profiles of users and items for XRec's prompts: the features that their training rows have most often.

XRec has GPT-3.5 write profiles from reviews and descriptions; a template around counted features is ours. A training
row's prompt leaves out the row's own features, for they are what its explanation speaks of: otherwise profiles would
hold the answer in training and not after it.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

from gavamoe.data.catalog import read_table
from gavamoe.data.dataset import Dataset

USERS_FILE, ITEMS_FILE = "user_profiles.parquet", "item_profiles.parquet"
_SCHEMA = pa.schema([("index", pa.int32()), ("feature", pa.string()), ("count", pa.int32())])


class FeatureCounts:
    """In how many training rows each user, or each item, has each feature."""

    def __init__(self, counts: dict[tuple[int, str], int]) -> None:
        """Args: counts: by index and feature."""
        ordered = sorted((index, -count, feature) for (index, feature), count in counts.items())
        self._ranked = {
            index: [(feature, -negative) for _, negative, feature in own]
            for index, own in groupby(ordered, key=lambda entry: entry[0])
        }

    @classmethod
    def of(cls, indices: Iterable[int], features: Iterable[Sequence[str] | None]) -> Self:
        """Count rows, given by column; a feature that a row names twice counts once."""
        counts: Counter[tuple[int, str]] = Counter()
        for index, words in zip(indices, features, strict=True):
            counts.update((index, word) for word in set(words or ()))
        return cls(counts)

    def most_frequent(self, index: int, most: int, without: Collection[str] = ()) -> list[str]:
        """At most `most` features of a user or item, the most frequent first, ties by name.

        Args:
            index: one that had no training row has no features.
            without: features of a row that does not count.
        """
        own = set(without)
        # One row takes at most 1 off a count: behind these none can come to the front.
        candidates = self._ranked.get(index, [])[: most + len(own)]
        counted = [(feature, count - (feature in own)) for feature, count in candidates]
        ranked = sorted((-count, feature) for feature, count in counted if count > 0)
        return [feature for _, feature in ranked[:most]]

    def save(self, path: Path) -> None:
        """Write Parquet: index, feature, count."""
        rows = [(index, feature, count) for index, own in self._ranked.items() for feature, count in own]
        columns = [pa.array([row[at] for row in rows], field.type) for at, field in enumerate(_SCHEMA)]
        pq.write_table(pa.table(columns, schema=_SCHEMA), path, compression="zstd")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            InputError: missing or damaged.
        """
        table = read_table(path, _SCHEMA)
        index, feature, count = (table[name].to_pylist() for name in _SCHEMA.names)
        return cls(dict(zip(zip(index, feature, strict=True), count, strict=True)))


@dataclass(frozen=True)
class Profiles:
    """Features of every user and every item that has a training row, with their counts."""

    users: FeatureCounts
    items: FeatureCounts

    @classmethod
    def read(cls, data: Dataset) -> Self:
        """Count a dataset's training rows, those without a text too."""
        table = data.table("train", ["user", "item", "features"])
        features = table["features"].to_pylist()
        return cls(*(FeatureCounts.of(table[name].to_pylist(), features) for name in ("user", "item")))

    def save(self, folder: Path) -> None:
        """Write an artifact's two files."""
        self.users.save(folder / USERS_FILE)
        self.items.save(folder / ITEMS_FILE)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read them; raises InputError where one is missing or damaged."""
        return cls(FeatureCounts.load(folder / USERS_FILE), FeatureCounts.load(folder / ITEMS_FILE))
