"""Which features to name for a pair whose features nobody gave: what reviews of this item by this user would name.

Reviews name features in proportion to a mixture of four rates, with n the features counted in training rows:

    p(f | u, i) ~ l_i n_if / n_i  +  (1 - l_i) p_f  +  OWN l_u n_uf / n_u  +  (p_cf - p_f)
    l_i = n_i / (n_i + ITEM),   l_u = n_u / (n_u + USER)

the item's own, everybody's as far as the item is little known, the user's, and what the user's cluster names more often
than all do; of a stranger, the features that its history's texts hold, and its clusters by their probabilities. The
three numbers were chosen together on the validation rows of three real review sets (docs/stage2.md).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import scipy.sparse  # type: ignore[import-untyped]  # comes with scikit-learn, without stubs

from gavamoe.artifacts.files import write_file
from gavamoe.data.catalog import Catalog, read_table
from gavamoe.data.dataset import Dataset
from gavamoe.errors import InputError
from gavamoe.stage1.user_words import words_in

FEATURES_FILE = "pair_features.parquet"
ITEM, USER, OWN = 30.0, 10.0, 0.4
_MOST_WORDS = 5
"""Longest feature, in words, that is looked for in a stranger's texts."""
_CLUSTER_PRIOR = 300.0
"""Features at the rate of the whole that each cluster has beside its users' own."""
_KINDS = ("user", "item", "cluster")
_SCHEMA = pa.schema([("of", pa.string()), ("index", pa.int32()), ("feature", pa.string()), ("count", pa.int32())])


@dataclass(frozen=True)
class PairFeatures:
    """How often each user, item and cluster had each of F features in training rows."""

    names: tuple[str, ...]
    """The F features, the most frequent first."""
    user_UF: scipy.sparse.csr_matrix
    """float64 (U, F), known users."""
    item_IF: scipy.sparse.csr_matrix
    """float64 (I, F), known items."""
    cluster_KF: scipy.sparse.csr_matrix
    """float64 (K, F)."""

    @classmethod
    def read(cls, dataset: Dataset, home_U: np.ndarray | None = None, clusters: int = 1) -> "PairFeatures":
        """Count a dataset's training rows, a batch at a time; `home_U`: cluster of each known user (U,); None: one
        cluster has all, which then says nothing of its own."""
        totals: Counter[str] = Counter()
        for _, _, features in _named(dataset):
            totals.update(features)
        names = sorted(totals, key=lambda name: (-totals[name], name))
        place = {name: index for index, name in enumerate(names)}
        catalog = dataset.catalog
        home_U = np.zeros(catalog.known_users, dtype=np.int64) if home_U is None else home_U
        sizes = {"user": catalog.known_users, "item": catalog.known_items, "cluster": clusters}
        counts = {kind: scipy.sparse.csr_matrix((size, len(names))) for kind, size in sizes.items()}
        for user_N, item_N, features in _named(dataset):
            feature_N = np.fromiter((place[name] for name in features), np.int64, len(features))
            for kind, index_N in (("user", user_N), ("item", item_N), ("cluster", home_U[user_N])):
                ones = np.ones(len(features))
                counts[kind] += scipy.sparse.csr_matrix((ones, (index_N, feature_N)), shape=counts[kind].shape)
        return cls(tuple(names), counts["user"], counts["item"], counts["cluster"])

    def save(self, folder: Path) -> None:
        """Write an artifact's file."""
        names, tables = np.array(self.names, dtype=object), []
        for kind, counts in zip(_KINDS, (self.user_UF, self.item_IF, self.cluster_KF), strict=True):
            entries = counts.tocoo()
            columns = [[kind] * entries.nnz, entries.row, names[entries.col], entries.data.astype(np.int32)]
            tables.append(
                pa.table([pa.array(c, f.type) for c, f in zip(columns, _SCHEMA, strict=True)], schema=_SCHEMA)
            )
        with write_file(Path(folder) / FEATURES_FILE) as path:
            pq.write_table(pa.concat_tables(tables), path, compression="zstd")

    @classmethod
    def load(cls, folder: Path, catalog: Catalog, clusters: int) -> "PairFeatures | None":
        """Read an artifact's; None for one of a version that kept none.

        Raises:
            InputError: the file is damaged, or of another catalog or number of clusters.
        """
        path = Path(folder) / FEATURES_FILE
        if not path.is_file():
            return None
        table = read_table(path, _SCHEMA)
        sizes = {"user": catalog.known_users, "item": catalog.known_items, "cluster": clusters}
        feature_N, index_N = table["feature"].combine_chunks().dictionary_encode(), table["index"].to_numpy()
        count_N, of_N = table["count"].to_numpy(), np.array(table["of"].to_pylist(), dtype=object)
        limit_N = np.array([sizes.get(kind, 0) for kind in of_N])
        if table.num_rows and (index_N.min() < 0 or (index_N >= limit_N).any() or count_N.min() < 1):
            raise InputError(f"{path}: counts features of users, items or clusters that this artifact lacks")
        names, place_N = feature_N.dictionary.to_pylist(), feature_N.indices.to_numpy()
        totals_F = np.bincount(place_N[of_N == "item"], count_N[of_N == "item"], len(names))
        order = sorted(range(len(names)), key=lambda at: (-totals_F[at], names[at]))
        rank_F = np.argsort(order)
        matrices = []
        for kind in _KINDS:
            own = of_N == kind
            where = (index_N[own], rank_F[place_N[own]])
            shape = (sizes[kind], len(names))
            matrices.append(scipy.sparse.csr_matrix((count_N[own].astype(np.float64), where), shape=shape))
        return cls(tuple(names[at] for at in order), *matrices)

    def rank(self, user: int, item: int, q_K: Sequence[float], k: int, texts: Sequence[str] = ()) -> tuple[str, ...]:
        """The `k` features that a review of this pair names most probably, the likeliest first; fewer if there are not
        as many, and none where neither item nor user has any.

        Args:
            user, item: indices; at or above the known counts they are unknown.
            q_K: probabilities of the user's clusters.
            texts: what a stranger wrote.
        """
        item_F, own_F = _row(self.item_IF, item), _row(self.user_UF, user) + self._in_texts(texts)
        if not item_F.any() and not own_F.any():
            return ()
        score_F = np.asarray(q_K) @ self._cluster_rates_KF  # everybody's, and what the cluster names more often
        share = item_F.sum() / (item_F.sum() + ITEM)
        score_F = score_F + share * (item_F / max(item_F.sum(), 1.0) - self._everybody_F)
        score_F = score_F + OWN * own_F / (own_F.sum() + USER)
        if k < len(score_F):  # sort no more than those that may be among them
            least = np.partition(score_F, -k)[-k]
            best = np.flatnonzero(score_F >= least)
        else:
            best = np.arange(len(score_F))
        return tuple(self.names[at] for at in best[np.argsort(-score_F[best], kind="stable")][:k])

    @cached_property
    def _everybody_F(self) -> np.ndarray:
        counts_F = np.asarray(self.item_IF.sum(axis=0)).ravel() + 0.5
        return np.asarray(counts_F / counts_F.sum())

    @cached_property
    def _cluster_rates_KF(self) -> np.ndarray:
        counts_KF = self.cluster_KF.toarray()
        return np.asarray(
            (counts_KF + _CLUSTER_PRIOR * self._everybody_F) / (counts_KF.sum(axis=1, keepdims=True) + _CLUSTER_PRIOR)
        )

    def _in_texts(self, texts: Sequence[str]) -> np.ndarray:
        """How many of some texts hold each feature, as words: (F,)."""
        found_F = np.zeros(len(self.names))
        for text in texts:
            words = words_in(text)
            phrases = {" ".join(words[at : at + n]) for n in range(1, self._longest + 1) for at in range(len(words))}
            found_F[[self._place[phrase] for phrase in phrases if phrase in self._place]] += 1
        return found_F

    @cached_property
    def _place(self) -> dict[str, int]:
        return {" ".join(words_in(name)): index for index, name in enumerate(self.names)}

    @cached_property
    def _longest(self) -> int:
        return min(max((len(words_in(name)) for name in self.names), default=1), _MOST_WORDS)


def _row(counts: scipy.sparse.csr_matrix, index: int) -> np.ndarray:
    """A row of a sparse matrix, zeros for an index that it lacks."""
    row = np.zeros(counts.shape[1])
    if 0 <= index < counts.shape[0]:
        start, end = counts.indptr[index : index + 2]
        row[counts.indices[start:end]] = counts.data[start:end]
    return row


def _named(dataset: Dataset) -> Iterator[tuple[np.ndarray, np.ndarray, list[str]]]:
    """User and item of each feature of the training rows, and the feature, a batch of rows at a time."""
    for batch in dataset.batches("train", ["user", "item", "features"]):
        features = batch["features"]
        rows = pc.list_parent_indices(features).to_numpy()
        yield batch["user"].to_numpy()[rows], batch["item"].to_numpy()[rows], pc.list_flatten(features).to_pylist()
