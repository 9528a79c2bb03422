"""What a person at the page looks at: users and items by name, and what each cluster is about.

Shape letters: N training pairs, K clusters, I items, F distinct features.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gavamoe.data.catalog import ITEMS_SCHEMA, USERS_SCHEMA, Catalog, read_table
from gavamoe.serving.schema import CatalogEntry, CatalogResponse, ClusterInfo

TELLING_FEATURES = 6
_MIN_COUNT = 5
"""A feature that a cluster has seen less often says nothing about it."""


class Browser:
    """Search in a catalog's users and items; they stay in one Arrow table each."""

    def __init__(self, folder: Path, catalog: Catalog) -> None:
        self._known = {"users": catalog.known_users, "items": catalog.known_items}
        self._tables = {
            "users": read_table(folder / "users.parquet", USERS_SCHEMA),
            "items": read_table(folder / "items.parquet", ITEMS_SCHEMA),
        }

    @property
    def item_features(self) -> pa.ChunkedArray:
        """The features of every item, by index."""
        return self._tables["items"]["features"]

    def search(self, kind: str, query: str, limit: int) -> CatalogResponse:
        """Entries of "users" or "items" whose id or title contains `query`; those with most training rows first."""
        table = self._tables[kind]
        if query:
            matches = pc.match_substring(table["id"], query, ignore_case=True)
            if kind == "items":
                titles = pc.fill_null(pc.match_substring(table["title"], query, ignore_case=True), False)
                matches = pc.or_(matches, titles)
            table = table.filter(matches)
        first = table.take(pc.select_k_unstable(table, limit, [("count", "descending"), ("index", "ascending")]))
        return CatalogResponse(results=[self._entry(kind, row) for row in first.to_pylist()], total=table.num_rows)

    def _entry(self, kind: str, row: dict[str, Any]) -> CatalogEntry:
        return CatalogEntry(
            id=row["id"],
            title=row.get("title"),
            known=row["index"] < self._known[kind],
            count=row["count"],
            features=list(row["features"] or ()),
        )


@dataclass(frozen=True)
class TrainingRoutes:
    """Where stage 1 sent the training pairs; all arrays are (N,), ordered by user."""

    user: np.ndarray
    item: np.ndarray
    cluster: np.ndarray
    rating: np.ndarray
    """Predicted."""
    clusters: int

    @classmethod
    def read(cls, path: Path, clusters: int) -> "TrainingRoutes":
        """Read the training part of a routes file; an artifact without one has no training pairs."""
        columns = ["user", "item", "cluster", "predicted_rating"]
        table = pq.read_table(path, columns=columns, filters=[("split", "==", "train")])
        order = np.argsort(table["user"].to_numpy(), kind="stable")
        user, item, cluster, rating = (table[name].to_numpy()[order] for name in columns)
        return cls(user, item, cluster, rating, clusters)

    def items_of(self, user: int) -> np.ndarray:
        """Items of a user's training pairs."""
        low, high = np.searchsorted(self.user, [user, user + 1])
        return self.item[low:high]


def summarise_clusters(routes: TrainingRoutes, item_features: pa.ChunkedArray) -> list[ClusterInfo]:
    """Share, mean predicted rating and telling features of each cluster."""
    names, count_KF = _feature_counts(routes, item_features)
    total_F = count_KF.sum(axis=0)
    summaries = []
    for cluster in range(routes.clusters):
        rows = routes.cluster == cluster
        rating = float(routes.rating[rows].mean()) if rows.any() else None
        share = float(rows.mean()) if len(rows) else 0.0
        telling = _telling(count_KF[cluster], total_F)
        summaries.append(
            ClusterInfo(
                cluster=cluster, share=share, mean_predicted_rating=rating, features=[names[at] for at in telling]
            )
        )
    return summaries


def _feature_counts(routes: TrainingRoutes, item_features: pa.ChunkedArray) -> tuple[list[str], np.ndarray]:
    """Distinct features, and how many of each cluster's pairs have an item with them, (K, F)."""
    features = item_features.combine_chunks()
    encoded = pc.dictionary_encode(features.flatten())
    feature, item = encoded.indices.to_numpy(), pc.list_parent_indices(features).to_numpy()
    names = encoded.dictionary.to_pylist()
    count_KF = np.zeros((routes.clusters, len(names)))
    for cluster in range(routes.clusters):
        pairs_I = np.bincount(routes.item[routes.cluster == cluster], minlength=len(features))
        count_KF[cluster] = np.bincount(feature, weights=pairs_I[item], minlength=len(names))
    return names, count_KF


def _telling(count_F: np.ndarray, total_F: np.ndarray) -> np.ndarray:
    """Features with the largest part in the divergence of a cluster's features from all; only more frequent ones."""
    share_F = count_F / max(count_F.sum(), 1)
    usual_F = total_F / max(total_F.sum(), 1)
    more = (count_F >= _MIN_COUNT) & (share_F > 1.02 * usual_F)
    weight_F = np.where(more, share_F * np.log(np.divide(share_F, usual_F, out=np.ones_like(share_F), where=more)), 0.0)
    return np.argsort(-weight_F, kind="stable")[: min(TELLING_FEATURES, int(more.sum()))]
