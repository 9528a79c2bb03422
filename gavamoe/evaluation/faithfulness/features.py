"""Which features texts name, and whether they are the pair's own: precision, recall, item hallucination.

Inputs: texts, and a dataset whose features come from its extractor (docs/data.md) or the synthetic generator.
"""

from collections.abc import Sequence

import numpy as np

from gavamoe.data.dataset import Dataset
from gavamoe.evaluation.metrics.registry import FeatureMatcher


def feature_set(dataset: Dataset) -> set[str]:
    """All features of the dataset, whatever the split."""
    return {
        feature
        for split in dataset.meta.rows
        for batch in dataset.batches(split, ["features"])
        for feature in batch["features"].flatten().to_pylist()
    }


class Mentions:
    """Reads features from texts, and knows those of each item."""

    def __init__(self, dataset: Dataset, features: set[str]) -> None:
        """`features`: the dataset's `feature_set`.

        An item has the features of its training rows; in synthetic data, where features are planted, of all rows.
        """
        self._matcher = FeatureMatcher(features)
        self._of_item: dict[int, set[int]] = {}
        for split in ("train",) if dataset.truth() is None else tuple(dataset.meta.rows):
            for batch in dataset.batches(split, ["item", "features"]):
                for item, named in zip(batch["item"].to_pylist(), batch["features"].to_pylist(), strict=True):
                    self._of_item.setdefault(item, set()).update(self._matcher.ids(named or ()))

    def precision(self, texts: Sequence[str], wanted: Sequence[frozenset[int]]) -> np.ndarray:
        """Share of a text's features that are wanted: (N,) 0 to 1, NaN for a text that names none."""
        return _shares([self._matcher.find(text) for text in texts], wanted)

    def recall(self, texts: Sequence[str], wanted: Sequence[frozenset[int]]) -> np.ndarray:
        """Share of the wanted features that a text names: (N,) 0 to 1, NaN where none is wanted."""
        return _shares(wanted, [self._matcher.find(text) for text in texts])

    def wanted(self, features: Sequence[Sequence[str]], references: Sequence[str]) -> list[frozenset[int]]:
        """A row's features and those that its reference names: none of them is wrong to name."""
        return [
            self._matcher.ids(row) | self._matcher.find(text) for row, text in zip(features, references, strict=True)
        ]

    def hallucinated(self, texts: Sequence[str], items: np.ndarray, features: Sequence[Sequence[str]]) -> np.ndarray:
        """Whether a text names a feature that only other items have: (N,) 1 or 0, NaN for items without a known one.

        The row's own features are right as well.
        """
        values = np.full(len(texts), np.nan)
        for row, (text, item) in enumerate(zip(texts, items.tolist(), strict=True)):
            of_item = self._of_item.get(item)
            if of_item is not None:
                values[row] = bool(self._matcher.find(text) - of_item - self._matcher.ids(features[row]))
        return values


def _shares(features: Sequence[frozenset[int]], others: Sequence[frozenset[int]]) -> np.ndarray:
    """Share of each row's features that are among the row's others: (N,), NaN for a row without features."""
    return np.array([len(a & b) / len(a) if a else np.nan for a, b in zip(features, others, strict=True)])
