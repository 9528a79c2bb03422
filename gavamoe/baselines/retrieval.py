"""Systems that copy: each answers a request with a training explanation, and knows nothing but the training split.

constant: the most frequent one. user, item, features: the nearest one among the user's, the item's, or all training
rows. They stand where a trained explainer stands, so the same evaluation scores them.

Nearest: the highest cosine between idf-weighted feature sets; among equals the rating closest to the asked one; among
those a row of the same user or item; then the first in file order. What a request does not give (rating, features) is
filled in as serving would: from the bias model, and with the item's usual features.

Shapes: N training rows, F distinct features, C candidate rows.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from gavamoe.config.schema import GenerationConfig
from gavamoe.data.dataset import Dataset
from gavamoe.evaluation.reference_scores import bias_model, most_frequent_text
from gavamoe.generation.generator import Explanation
from gavamoe.generation.request import ExplanationRequest

Source = Literal["constant", "user", "item", "features"]
USUAL_FEATURES = 2
_PROGRESS_EVERY = 256
_SAME = 1e-9
"""Cosines this close count as equal: sums in another order differ in the last bits."""


class Copier:
    """A writer of texts for `evaluate`, with the interface of `ExplanationGenerator`."""

    def __init__(self, dataset: Dataset, source: Source) -> None:
        self.source, self.catalog = source, dataset.catalog
        self.constant = most_frequent_text(dataset)
        self._implicit = dataset.implicit
        self._pairs = dataset.arrays("train")
        table = dataset.table("train", ["text", "features"])
        self._texts: list[str | None] = table["text"].to_pylist()
        self._spoken = np.array([bool(text and text.strip()) for text in self._texts], dtype=bool)
        self._index = _FeatureIndex(table["features"].to_pylist())
        self._of_user = _Grouped(self._pairs.user, self._spoken)
        self._of_item = _Grouped(self._pairs.item, self._spoken)
        self._bias = bias_model(self._pairs, self.catalog.n_users, self.catalog.n_items)

    def explain(
        self,
        requests: Sequence[ExplanationRequest],
        generation: GenerationConfig,
        seed: int = 0,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Explanation]:
        """One copied text per request, in their order; nothing is random."""
        del generation, seed
        answers = []
        for done, request in enumerate(requests, start=1):
            answers.append(self._explain(request))
            if on_progress and (done % _PROGRESS_EVERY == 0 or done == len(requests)):
                on_progress(done, len(requests))
        return answers

    def _explain(self, request: ExplanationRequest) -> Explanation:
        predicted = self._predict(request.user, request.item)
        rating = request.rating if request.rating is not None or self._implicit else predicted
        features = request.features
        if features is None:
            features = self.catalog.usual_features(request.user, request.item, USUAL_FEATURES)
        text = self.constant
        if self.source != "constant":
            row = self._nearest(request.user, request.item, rating, features)
            text = text if row is None else self._texts[row] or ""
        return Explanation(
            text=text,
            cluster=0,
            responsibilities=(1.0,),
            rating=rating,
            rating_given=request.rating is not None,
            predicted_rating=predicted,
            features=tuple(features),
            features_given=request.features is not None,
            user_known=0 <= request.user < self.catalog.known_users,
            item_known=0 <= request.item < self.catalog.known_items,
            new_tokens=0,
        )

    def _predict(self, user: int, item: int) -> float:
        mean, of_user, of_item = self._bias
        shift = of_user[user] if user < len(of_user) else 0.0
        return float(mean + shift + (of_item[item] if item < len(of_item) else 0.0))

    def _nearest(self, user: int, item: int, rating: float | None, features: Sequence[str]) -> int | None:
        """Row of the training split; None where there is no candidate: an unknown user or item, no shared feature."""
        if self.source == "features":
            rows, similar = self._index.similar(features)
            keep = self._spoken[rows]
            rows, similar = rows[keep], similar[keep]
        else:
            rows = self._of_user[user] if self.source == "user" else self._of_item[item]
            similar = self._index.similarity(features, rows)
        if not len(rows):
            return None
        rows = rows[similar >= similar.max() - _SAME]
        if rating is not None:
            distance = np.nan_to_num(np.abs(self._pairs.rating[rows] - rating), nan=np.inf)
            rows = rows[distance <= distance.min() + _SAME]
        related = (self._pairs.user[rows] == user) | (self._pairs.item[rows] == item)
        return int(rows[related.argmax()])


class _Grouped:
    """Rows by user or by item, those with a text only."""

    def __init__(self, owner: np.ndarray, keep: np.ndarray) -> None:
        rows = np.flatnonzero(keep)
        self._rows = rows[np.argsort(owner[rows], kind="stable")]
        self._owners = owner[self._rows]

    def __getitem__(self, owner: int) -> np.ndarray:
        low, high = np.searchsorted(self._owners, [owner, owner + 1])
        rows: np.ndarray = self._rows[low:high]
        return rows


class _FeatureIndex:
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
