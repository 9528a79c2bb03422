"""Training explanations as evidence for a user and an item: the node retriever of G-Refer, on feature sets.

For a pair: explanations of the same item by the users most like its user, and explanations by the same user of the
items most like its item. Likeness is the cosine between idf-weighted sets of the features that a user's, or an item's,
training rows speak of, as in `retrieval`; equals stand in file order.

Leave one out: of a pair that was trained on, the row itself is never evidence, nor are its features part of what its
user and item are known for; no pair is ever shown an explanation of that same pair, in training or later.

Shapes: N training rows, F distinct features, C candidate rows.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gavamoe.data.catalog import check_parquet, read_table
from gavamoe.data.dataset import Dataset

EVIDENCE_FILE = "evidence.parquet"
_SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("user", pa.int32()),
        ("item", pa.int32()),
        ("text", pa.string()),
        ("features", pa.list_(pa.string())),
    ]
)
_DIGITS = 9
"""Decimals of a likeness that count: sums in another order differ in the last bits."""


class Evidence:
    """The training rows that have a text.

    Args:
        table: row (number in the training split, ascending), user, item, text, features.
    """

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self.texts: list[str] = table["text"].to_pylist()
        """The explanation of each row of the table, (N,)."""
        self._rows, self._users, self._items = (table[name].to_numpy() for name in ("row", "user", "item"))
        sets = [sorted({word.casefold() for word in words or ()}) for words in table["features"].to_pylist()]
        numbers = {word: number for number, word in enumerate(sorted({word for words in sets for word in words}))}
        self._features = [np.array([numbers[word] for word in words], dtype=np.int64) for words in sets]
        self._of_users = _FeatureSets(self._users, self._features, len(numbers))
        self._of_items = _FeatureSets(self._items, self._features, len(numbers))
        self._by_user, self._by_item = _Grouped(self._users), _Grouped(self._items)

    @classmethod
    def of_training(cls, data: Dataset, rows: np.ndarray) -> "Evidence":
        """The given rows (ascending) of the training split, all with a text."""
        table = data.table("train", ["user", "item", "text", "features"]).take(rows)
        return cls(table.add_column(0, "row", pa.array(rows, pa.int64())))

    @classmethod
    def load(cls, folder: Path) -> "Evidence":
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing or damaged.
        """
        check_parquet(folder / EVIDENCE_FILE, _SCHEMA)
        return cls(read_table(folder / EVIDENCE_FILE, _SCHEMA))

    def save(self, folder: Path) -> None:
        """Write the rows as one Parquet file."""
        pq.write_table(self._table.cast(_SCHEMA), folder / EVIDENCE_FILE, compression="zstd")

    def nearest(
        self, user: int, item: int, count: int, least: float = 0.0, row: int | None = None
    ) -> tuple[list[int], list[int]]:
        """Evidence for a pair, the likest first.

        Args:
            user, item: any numbers; those never seen have no rows.
            count: explanations of each kind at most.
            least: smallest likeness of what is taken.
            row: the pair's own row number in the training split, if it is one.

        Returns:
            Places in `texts`: of the item by others, of others by the user.
        """
        own = np.zeros(0, np.int64)
        if row is not None and (place := int(np.searchsorted(self._rows, row))) < len(self._rows):
            own = self._features[place] if self._rows[place] == row else own
        of_item, of_user = self._by_item[item], self._by_user[user]
        of_item, of_user = of_item[self._users[of_item] != user], of_user[self._items[of_user] != item]
        likest = []
        for sets, owner, others, places in (
            (self._of_users, user, self._users[of_item], of_item),
            (self._of_items, item, self._items[of_user], of_user),
        ):
            like_C = sets.likeness(sets.features(owner, own), others).round(_DIGITS)
            order_C = np.argsort(-like_C, kind="stable")
            likest.append(places[order_C[like_C[order_C] >= least][:count]].tolist())
        return likest[0], likest[1]


class _Grouped:
    """Rows by user or by item, each group in file order."""

    def __init__(self, owners_N: np.ndarray) -> None:
        self._places = np.argsort(owners_N, kind="stable")
        self._owners = owners_N[self._places]

    def __getitem__(self, owner: int) -> np.ndarray:
        low, high = np.searchsorted(self._owners, [owner, owner + 1])
        places: np.ndarray = self._places[low:high]
        return places


class _FeatureSets:
    """What each user, or each item, is known for: the features of its rows, and in how many rows each is.

    Args:
        owners_N: the user, or the item, of each row.
        features: numbers of each row's distinct features.
        known: F.
    """

    def __init__(self, owners_N: np.ndarray, features: Sequence[np.ndarray], known: int) -> None:
        count = int(owners_N.max(initial=-1)) + 1
        lengths_N = np.array([len(each) for each in features], dtype=np.int64)
        flat = np.concatenate([np.zeros(0, np.int64), *features])
        keys, self._times = np.unique(
            np.repeat(owners_N.astype(np.int64), lengths_N) * known + flat, return_counts=True
        )
        owners, self._features = np.divmod(keys, max(known, 1))
        self._offsets = np.searchsorted(owners, np.arange(count + 1))
        frequency_F = np.bincount(self._features, minlength=known)
        sets = max(len(np.unique(owners_N)), 1)
        self._squared_F = (np.log(sets / np.maximum(frequency_F, 1)) + 1.0) ** 2
        self._norms = np.sqrt(np.bincount(owners, self._squared_F[self._features], minlength=count))

    def features(self, owner: int, without: np.ndarray) -> np.ndarray:
        """Features of a user or item, but for those that come from one row alone, whose features are given."""
        if not 0 <= owner < len(self._norms):
            return np.zeros(0, np.int64)
        part = slice(self._offsets[owner], self._offsets[owner + 1])
        kept: np.ndarray = self._features[part][self._times[part] > np.isin(self._features[part], without)]
        return kept

    def likeness(self, features: np.ndarray, owners_C: np.ndarray) -> np.ndarray:
        """Cosines (C,) between a set of features and those of users or items; 0 where nothing is shared."""
        marked_F = np.zeros(len(self._squared_F))
        marked_F[features] = self._squared_F[features]
        starts_C, lengths_C = self._offsets[owners_C], self._offsets[owners_C + 1] - self._offsets[owners_C]
        ends_C = np.cumsum(lengths_C)
        places = np.repeat(starts_C - (ends_C - lengths_C), lengths_C) + np.arange(lengths_C.sum())
        candidates = np.repeat(np.arange(len(owners_C)), lengths_C)
        shared_C = np.bincount(candidates, marked_F[self._features[places]], minlength=len(owners_C))
        product_C = self._norms[owners_C] * np.sqrt(marked_F.sum())
        return np.divide(shared_C, product_C, out=np.zeros(len(owners_C)), where=product_C > 0)
