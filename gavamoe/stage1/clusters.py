"""What each cluster is, in words and numbers: the one description, for `gavamoe route`, the service and the report.

It is made from the routes of the training pairs, the clusters' words and the catalog alone, which a stage-2 artifact
holds, so that nobody needs the dataset.
"""

from collections.abc import Callable

import numpy as np
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from gavamoe.data.catalog import Catalog
from gavamoe.stage1.routes import TrainingPairs
from gavamoe.stage1.user_words import ClusterWords

_PRIOR_COUNT = 10.0
"""Occurrences, at the rate of the whole, added to each value's count, so that rare values don't lead the lists."""


_SWEEPS = 10
_ERRORS = 2.0
"""Standard errors by which a feature's ratings have to differ to be liked or disliked."""


class ClusterTrait(BaseModel):
    """An item or a feature that sets a cluster apart."""

    model_config = ConfigDict(frozen=True)
    name: str
    value: float
    """Lift: its share of the cluster's pairs over its share of all pairs. For `liked` and `disliked`: how far the
    cluster's mean predicted rating of items with this feature is from that of all clusters, beside the cluster's own
    level, in rating units."""


class Cluster(BaseModel):
    """One cluster of the training pairs."""

    model_config = ConfigDict(frozen=True)
    cluster: int
    pairs: int
    share: float
    """Share of all training pairs."""
    users: int
    """Known users whose mean responsibility is highest here."""
    mean_predicted_rating: float | None
    """None for a cluster without pairs."""
    words: list[ClusterTrait]
    """Words and punctuation marks that its users write, by lift; empty without texts."""
    features: list[ClusterTrait]
    """The usual features of its items, by lift."""
    items: list[ClusterTrait]
    """Its items, by lift."""
    liked: list[ClusterTrait]
    """Features whose items are predicted to be rated higher here than elsewhere; empty for implicit data."""
    disliked: list[ClusterTrait]
    typical_users: list[str]
    """Raw ids, those with the highest mean responsibility first."""

    @staticmethod
    def labels() -> tuple[str, ...]:
        """Column titles of `row`, without the first, the cluster's number."""
        return (
            "pairs",
            "users",
            "mean predicted rating",
            "words (lift)",
            "features (lift)",
            "items (lift)",
            "liked",
            "disliked",
            "users such as",
        )

    def row(self) -> tuple[str, ...]:
        """A table row for people."""
        rating = self.mean_predicted_rating
        return (
            str(self.cluster),
            f"{self.pairs:,} ({self.share:.1%})",
            f"{self.users:,}",
            "" if rating is None else f"{rating:.2f}",
            ", ".join(f"{trait.name} {trait.value:.2f}" for trait in self.words),
            ", ".join(f"{trait.name} {trait.value:.2f}" for trait in self.features),
            ", ".join(f"{trait.name} {trait.value:.2f}" for trait in self.items),
            ", ".join(f"{trait.name} {trait.value:+.2f}" for trait in self.liked),
            ", ".join(f"{trait.name} {trait.value:+.2f}" for trait in self.disliked),
            ", ".join(self.typical_users),
        )


def describe_clusters(
    pairs: TrainingPairs, catalog: Catalog, words: ClusterWords | None, *, implicit: bool, top: int = 5
) -> list[Cluster]:
    """Describe every cluster of the training pairs by its `top` features, items and users, and twice as many words.

    Args:
        words: the clusters' words, None where an artifact has none.
        implicit: the data have no ratings, so that nothing is liked or disliked.
    """
    names, count_KV, rating_KV = _features(pairs, catalog)
    share_K = pairs.counts_K() / max(len(pairs.cluster), 1)
    feature_lift_KV = _lift(count_KV, share_K)
    item_lift_KI = _lift(pairs.items_of_clusters(catalog.n_items), share_K)
    gap_KV = _rating_gaps(count_KV, rating_KV, float(pairs.rating.std()) if len(pairs.rating) else 0.0)
    home_U = pairs.user_means_UK.argmax(axis=1)
    described = []
    for cluster in range(pairs.clusters):
        inside = pairs.cluster == cluster
        described.append(
            Cluster(
                cluster=cluster,
                pairs=int(inside.sum()),
                share=float(share_K[cluster]),
                users=int((home_U == cluster).sum()),
                mean_predicted_rating=float(pairs.rating[inside].mean()) if inside.any() else None,
                words=_words(words, cluster, 2 * top),
                features=_leading(feature_lift_KV[cluster], names.__getitem__, top, above=1.0),
                items=_leading(item_lift_KI[cluster], lambda item: _title(catalog, item), top, above=1.0),
                liked=[] if implicit else _leading(gap_KV[cluster], names.__getitem__, top, above=0.0),
                disliked=[] if implicit else _trailing(gap_KV[cluster], names.__getitem__, top),
                typical_users=_typical_users(pairs, catalog, home_U, cluster, top),
            )
        )
    return described


def _words(words: ClusterWords | None, cluster: int, top: int) -> list[ClusterTrait]:
    if words is None:
        return []
    return _leading(words.lift_KV[cluster], words.vocabulary.__getitem__, top, above=1.0)


def _title(catalog: Catalog, item: int) -> str:
    return catalog.item_title(item) or catalog.item_id(item)


def _features(pairs: TrainingPairs, catalog: Catalog) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Distinct usual features of items; by cluster, how many pairs have an item with them, and the sum of those pairs'
    predicted ratings: (K, V) each."""
    features = catalog.item_features()
    encoded = pc.dictionary_encode(features.flatten())
    feature, item = encoded.indices.to_numpy(), pc.list_parent_indices(features).to_numpy()
    names = encoded.dictionary.to_pylist()
    per_item = (pairs.items_of_clusters(len(features)), pairs.items_of_clusters(len(features), weighted=True))
    count_KV, rating_KV = (
        np.stack([np.bincount(feature, weights=value_I[item], minlength=len(names)) for value_I in value_KI])
        for value_KI in per_item
    )
    return names, count_KV, rating_KV


def _lift(count_KV: np.ndarray, share_K: np.ndarray) -> np.ndarray:
    """Smoothed lift of every value in every cluster, (K, V)."""
    expected_KV = count_KV.sum(axis=0) * share_K[:, None]
    return np.asarray((count_KV + _PRIOR_COUNT) / (expected_KV + _PRIOR_COUNT))


def _rating_gaps(count_KV: np.ndarray, rating_KV: np.ndarray, spread: float) -> np.ndarray:
    """Mean rating of every feature in every cluster less its mean over all and the cluster's own level, shrunk to 0
    where rare, and 0 where chance explains it: (K, V).

    Args:
        spread: standard deviation of the ratings.
    """
    level_K = np.zeros(len(count_KV))
    for _ in range(_SWEEPS):  # means and levels are fitted together: clusters have their features in unlike numbers
        mean_V = (rating_KV - count_KV * level_K[:, None]).sum(axis=0) / np.maximum(count_KV.sum(axis=0), 1)
        level_K = (rating_KV - count_KV * mean_V).sum(axis=1) / np.maximum(count_KV.sum(axis=1), 1)
    gap_KV = (rating_KV - count_KV * (mean_V + level_K[:, None])) / (count_KV + _PRIOR_COUNT)
    return np.where(np.abs(gap_KV) > _ERRORS * spread / np.sqrt(count_KV + _PRIOR_COUNT), gap_KV, 0.0)


def _leading(score_V: np.ndarray, name: Callable[[int], str], top: int, above: float) -> list[ClusterTrait]:
    """The values with the highest scores, those above a bound only."""
    order = np.argsort(-score_V, kind="stable")[:top]
    return [ClusterTrait(name=name(int(v)), value=float(score_V[v])) for v in order if score_V[v] > above]


def _trailing(score_V: np.ndarray, name: Callable[[int], str], top: int) -> list[ClusterTrait]:
    """The values with the lowest scores, those below 0 only."""
    return [trait.model_copy(update={"value": -trait.value}) for trait in _leading(-score_V, name, top, above=0.0)]


def _typical_users(pairs: TrainingPairs, catalog: Catalog, home_U: np.ndarray, cluster: int, top: int) -> list[str]:
    at_home = np.flatnonzero(home_U == cluster)
    order = at_home[np.argsort(-pairs.user_means_UK[at_home, cluster], kind="stable")[:top]]
    return [catalog.user_id(int(user)) for user in order]
