"""Statistics of a dataset: the paper's Table 1 and more, read in one pass over the splits."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from gavamoe.data.dataset import SPLITS, Dataset


class Description(BaseModel):
    """Statistics of a dataset, over all splits unless stated otherwise."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    users: int
    """Number of users."""
    items: int
    """Number of items."""
    records: int
    """Number of records."""
    features: int
    """Number of distinct features."""
    records_by_split: dict[str, int]
    """Number of records of each split."""
    density: float
    """Records as a share of all user-item pairs."""
    implicit: bool
    """Whether the data have no ratings."""
    mean_rating: float | None
    """Mean rating; None for implicit data."""
    ratings: dict[str, int]
    """Number of records by rating: by value for a finite scale, in ten even ranges for a continuous one."""
    records_per_user: float
    """Mean number of records of a user, over the users that occur."""
    records_per_item: float
    """Mean number of records of an item, over the items that occur."""
    unknown_users: int
    """Number of users without a training record, who are served as the unknown user."""
    unknown_items: int
    """Number of items without a training record, which are served as the unknown item."""
    unknown_records: dict[str, int]
    """Number of validation and of test records whose user or item has no training record."""
    titles: int
    """Number of items with a title."""
    words_per_text: float
    """Mean number of words of a text."""
    longest_text: int
    """Number of words of the longest text."""
    empty_texts: int
    """Number of records with an empty text."""
    features_per_record: float
    """Mean number of features of a record."""
    records_without_feature: int
    """Number of records without any feature."""

    def rows(self) -> list[tuple[str, str]]:
        """(name, value) pairs for display, Table 1's first."""
        shown = [
            ("users", f"{self.users:,}"),
            ("items", f"{self.items:,}"),
            ("records", f"{self.records:,}"),
            ("features", f"{self.features:,}"),
            ("records by split", ", ".join(f"{name} {count:,}" for name, count in self.records_by_split.items())),
            ("density", f"{self.density:.3%}"),
            ("records per user", f"{self.records_per_user:.1f}"),
            ("records per item", f"{self.records_per_item:.1f}"),
            ("unknown users (no training record)", f"{self.unknown_users:,}"),
            ("unknown items", f"{self.unknown_items:,}"),
            ("records with either", ", ".join(f"{name} {count:,}" for name, count in self.unknown_records.items())),
            ("items with a title", f"{self.titles:,}"),
            (
                "words per text",
                f"{self.words_per_text:.1f} (longest {self.longest_text:,}, empty {self.empty_texts:,})",
            ),
            ("features per record", f"{self.features_per_record:.2f} ({self.records_without_feature:,} without)"),
        ]
        if self.implicit:
            return [*shown, ("ratings", "none: implicit feedback")]
        parts = (f"{name}: {count:,} ({count / max(self.records, 1):.0%})" for name, count in self.ratings.items())
        return [*shown, ("mean rating", f"{self.mean_rating:.3f}"), ("ratings", ", ".join(parts))]


def describe(dataset: Dataset) -> Description:
    """Describe an opened dataset; texts are read a batch at a time."""
    catalog = dataset.catalog
    pairs = {split: dataset.arrays(split) for split in SPLITS}
    rating = np.concatenate([pairs[split].rating for split in SPLITS])
    rating = rating[~np.isnan(rating)]
    records = sum(dataset.size(split) for split in SPLITS)
    texts = _Texts()
    for split in SPLITS:
        for batch in dataset.batches(split, ["text", "features"]):
            texts.add(batch["text"], batch["features"])
    unknown = {
        split: int(
            np.count_nonzero((pairs[split].user >= catalog.known_users) | (pairs[split].item >= catalog.known_items))
        )
        for split in SPLITS[1:]
    }
    return Description(
        users=catalog.n_users,
        items=catalog.n_items,
        records=records,
        features=len(texts.features),
        records_by_split={split: dataset.size(split) for split in SPLITS},
        density=records / (catalog.n_users * catalog.n_items),
        implicit=dataset.implicit,
        mean_rating=float(rating.mean(dtype=np.float64)) if len(rating) else None,
        ratings=_histogram(rating, dataset.rating_values),
        records_per_user=records / catalog.n_users,
        records_per_item=records / catalog.n_items,
        unknown_users=catalog.n_users - catalog.known_users,
        unknown_items=catalog.n_items - catalog.known_items,
        unknown_records=unknown,
        titles=sum(catalog.item_title(index) is not None for index in range(catalog.n_items)),
        words_per_text=texts.words / records,
        longest_text=texts.longest,
        empty_texts=texts.empty,
        features_per_record=texts.named / records,
        records_without_feature=texts.bare,
    )


class _Texts:
    """Running counts over texts and their features."""

    def __init__(self) -> None:
        self.words = self.longest = self.empty = self.named = self.bare = 0
        self.features: set[str] = set()

    def add(self, text: pa.Array, features: pa.Array) -> None:
        words = pc.list_value_length(pc.utf8_split_whitespace(pc.utf8_trim_whitespace(text))).to_numpy()
        blank = pc.equal(text, "").to_numpy(zero_copy_only=False)
        words = np.where(blank, 0, words)  # an empty text splits into one empty word
        self.words += int(words.sum())
        self.longest = max(self.longest, int(words.max(initial=0)))
        self.empty += int(blank.sum())
        lengths = pc.list_value_length(features).to_numpy()
        self.named += int(lengths.sum())
        self.bare += int(np.count_nonzero(lengths == 0))
        self.features.update(pc.unique(pc.list_flatten(features)).to_pylist())


def _histogram(rating: np.ndarray, values: tuple[float, ...] | None) -> dict[str, int]:
    """Counts by rating value, or by range where the scale is not finite; empty without ratings."""
    if len(rating) == 0:
        return {}
    if values is not None:
        nearest = np.abs(rating[:, None] - np.asarray(values)).argmin(axis=1)
        counts = np.bincount(nearest, minlength=len(values))
        return {f"{value:g}": int(count) for value, count in zip(values, counts, strict=True)}
    counts, edges = np.histogram(rating, bins=10)
    return {f"{low:g}..{high:g}": int(count) for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)}
