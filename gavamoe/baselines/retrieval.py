"""Systems that copy: each answers a request with a training explanation, and knows nothing but the training split.

constant: the most frequent one. user, item, features: the nearest one among the user's, the item's, or all training
rows. They stand where a trained explainer stands, so the same evaluation scores them.

Nearest: the highest cosine between idf-weighted feature sets; among equals the rating closest to the asked one; among
those a row of the same user or item; then the first in file order. What a request does not give (rating, features) is
filled in as for trained systems: from the bias model, and with the features that a review of the pair names most
probably (`pair_features`).

Shapes: N training rows, F distinct features, C candidate rows.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from gavamoe.config.schema import GenerationConfig, PromptConfig
from gavamoe.data.dataset import Dataset
from gavamoe.evaluation.reference_scores import BiasModel, most_frequent_text
from gavamoe.generation.evidence.pair_features import PairFeatures
from gavamoe.generation.evidence.quotes import FeatureIndex, ranked
from gavamoe.generation.generator import Explanation
from gavamoe.generation.request import ExplanationRequest
from gavamoe.stage2.tokenized_rows import usual_features

Source = Literal["constant", "user", "item", "features"]
_PROGRESS_EVERY = 256


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
        self._index = FeatureIndex(table["features"].to_pylist())
        self._of_user = _Grouped(self._pairs.user, self._spoken)
        self._of_item = _Grouped(self._pairs.item, self._spoken)
        self._features = PairFeatures.read(dataset)
        self._guessed = usual_features(dataset, PromptConfig().max_features)
        self._bias = BiasModel.fit(self._pairs, self.catalog.n_users, self.catalog.n_items)

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
        predicted = float(self._bias.predict(np.array([request.user]), np.array([request.item]))[0])
        rating = request.rating if request.rating is not None or self._implicit else predicted
        features = request.features
        if features is None:
            features = self._features.rank(request.user, request.item, [1.0], self._guessed)
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
        distance = None if rating is None else np.abs(self._pairs.rating[rows] - rating)
        related = (self._pairs.user[rows] == user) | (self._pairs.item[rows] == item)
        return int(ranked(rows, similar, distance, related)[0])


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
