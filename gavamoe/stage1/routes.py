"""Routing: the cluster of every pair (Eq. 8, 9), from the latent's mean and never a sample.

The same pair takes the same route in any batch, on any worker, on every call. `routes.parquet` holds one row
per pair: split, user, item, cluster, responsibilities, predicted_rating, in each split's own row order.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from gavamoe.artifacts.files import write_file
from gavamoe.data.dataset import SPLITS, Dataset
from gavamoe.errors import InputError, one_line
from gavamoe.stage1.vae_gmm import VaeGmm

ROUTES_FILE = "routes.parquet"
BATCH_SIZE = 8192

_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("user", pa.int32()),
        ("item", pa.int32()),
        ("cluster", pa.int16()),
        ("responsibilities", pa.list_(pa.float32())),
        ("predicted_rating", pa.float32()),
    ]
)


class Routes(NamedTuple):
    """Routes of N pairs over K clusters."""

    cluster: np.ndarray
    """The most likely cluster of each pair (Eq. 9): (N,) int16."""
    responsibilities: np.ndarray
    """Responsibilities of the clusters for each pair (Eq. 8): (N, K) float32, rows sum to 1."""
    rating: np.ndarray
    """Stage 1's expected rating of each pair, for implicit data the probability of interaction: (N,) float32."""


def route_pairs(
    model: VaeGmm, user: np.ndarray, item: np.ndarray, batch_size: int = BATCH_SIZE, device: str = "cpu"
) -> Routes:
    """Route pairs by index; an index at or above the known counts is an unknown id."""
    parts = list(_route_batches(model, user, item, batch_size, device))
    if not parts:
        empty = np.zeros(0, np.float32)
        return Routes(empty.astype(np.int16), np.zeros((0, model.config.clusters), np.float32), empty)
    return Routes(*(np.concatenate(column) for column in zip(*parts, strict=True)))


@torch.no_grad()
def _route_batches(model: VaeGmm, user: np.ndarray, item: np.ndarray, batch_size: int, device: str) -> Iterator[Routes]:
    training = model.training
    model.eval()
    try:
        for start in range(0, len(user), batch_size):
            user_B = torch.tensor(user[start : start + batch_size], device=device)
            item_B = torch.tensor(item[start : start + batch_size], device=device)
            mu_BL, _ = model.encode(user_B, item_B)
            gamma_BK = model.responsibilities(mu_BL)
            rating_B = model.expected_rating(model.decode(mu_BL, model.bias(user_B, item_B))).float()
            yield Routes(
                gamma_BK.argmax(dim=-1).to(torch.int16).cpu().numpy(),
                gamma_BK.cpu().numpy(),
                rating_B.cpu().numpy(),
            )
    finally:
        model.train(training)


def write_routes(path: Path, dataset: Dataset, model: VaeGmm, device: str = "cpu") -> None:
    """Route every pair of every split into one Parquet file, written whole."""
    with write_file(path) as aside, pq.ParquetWriter(aside, _SCHEMA, compression="zstd") as writer:
        for split in SPLITS:
            for pairs in dataset.pairs(split):
                batches = _route_batches(model, pairs.user, pairs.item, BATCH_SIZE, device)
                for start, routes in enumerate(batches):
                    rows = slice(start * BATCH_SIZE, start * BATCH_SIZE + len(routes.cluster))
                    writer.write_table(_table(split, pairs.user[rows], pairs.item[rows], routes))


def _table(split: str, user: np.ndarray, item: np.ndarray, routes: Routes) -> pa.Table:
    clusters = routes.responsibilities.shape[1]
    offsets = np.arange(len(user) + 1, dtype=np.int32) * clusters
    responsibilities = pa.ListArray.from_arrays(offsets, pa.array(routes.responsibilities.reshape(-1)))
    columns = [pa.array([split] * len(user)), user, item, routes.cluster, responsibilities, routes.rating]
    return pa.table([pa.array(column) for column in columns], schema=_SCHEMA)


def read_routes(path: Path, split: str, rows: int | None = None) -> Routes:
    """Routes of one split in its row order; `rows` is how many there must be.

    Raises:
        InputError: no such file, not a routes file, or routes of another dataset.
    """
    _check(path)
    table = pq.read_table(path, filters=[("split", "==", split)])
    routed = table.num_rows
    if rows is not None and routed != rows:
        raise InputError(f"{path}: routes {routed} {split} pairs, the dataset has {rows}; they don't belong together")
    return _routes(table)


def route_batches(path: Path, split: str) -> Iterator[tuple[np.ndarray, Routes]]:
    """(users int32 (B,), their pairs' routes) of one split in its row order, without holding the file in memory.

    Raises:
        InputError: as `read_routes`.
    """
    _check(path)
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            table = table.filter(pc.equal(table["split"], split))
            if len(table):
                yield table["user"].to_numpy(), _routes(table)


def _check(path: Path) -> None:
    try:
        names = pq.read_schema(path).names
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; run stage 1 first") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file ({one_line(error)})") from error
    if names != _SCHEMA.names:
        raise InputError(f"{path}: has columns {', '.join(names)}, not {', '.join(_SCHEMA.names)}")


def _routes(table: pa.Table) -> Routes:
    responsibilities = table["responsibilities"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return Routes(
        table["cluster"].to_numpy(),
        responsibilities.reshape(len(table), -1) if len(table) else np.zeros((0, 0), np.float32),
        table["predicted_rating"].to_numpy(),
    )


class RouteTotals(NamedTuple):
    """The routes of all training pairs, summed up."""

    pairs_K: np.ndarray
    """Number of pairs of each cluster: int64 (K,)."""
    user_means_UK: np.ndarray
    """Mean responsibilities of each known user's training pairs: float64 (known users, K)."""


def training_routes(dataset: Dataset, path: Path) -> RouteTotals:
    """Sum up a routes file, of which one batch is in memory at a time.

    Raises:
        InputError: no such file, not a routes file, or routes of another dataset.
    """
    users, routed = dataset.catalog.known_users, 0
    count_U1, sum_UK, pairs_K = np.zeros((users, 1)), np.zeros(()), np.zeros((), np.int64)
    for user, routes in route_batches(path, "train"):
        if user.max() >= users:
            raise InputError(f"{path}: routes user {user.max()}, the dataset knows {users}; they don't belong together")
        clusters = routes.responsibilities.shape[1]
        sums = [np.bincount(user, weights=column, minlength=users) for column in routes.responsibilities.T]
        sum_UK = sum_UK + np.stack(sums, axis=1)
        count_U1 += np.bincount(user, minlength=users)[:, None]
        pairs_K = pairs_K + np.bincount(routes.cluster, minlength=clusters)
        routed += len(user)
    if routed != dataset.size("train"):
        raise InputError(f"{path}: routes {routed} training pairs, the dataset has {dataset.size('train')}")
    return RouteTotals(pairs_K, sum_UK / np.maximum(count_U1, 1))


def user_responsibilities(dataset: Dataset, path: Path) -> np.ndarray:
    """Mean responsibilities of each known user's training pairs: (known users, K)."""
    return training_routes(dataset, path).user_means_UK


@dataclass(frozen=True)
class TrainingPairs:
    """Where stage 1 sent the training pairs, ordered by user."""

    user: np.ndarray
    """int32 (N,)."""
    item: np.ndarray
    """int32 (N,)."""
    cluster: np.ndarray
    """int16 (N,)."""
    rating: np.ndarray
    """Predicted ratings: float32 (N,)."""
    user_means_UK: np.ndarray
    """Mean responsibilities of each known user's pairs: float64 (known users, K)."""

    @classmethod
    def read(cls, path: Path, known_users: int) -> "TrainingPairs":
        """Read the training part of a routes file.

        Raises:
            InputError: no such file, not a routes file, or one that routes other users.
        """
        _check(path)
        table = pq.read_table(path, filters=[("split", "==", "train")]).sort_by([("user", "ascending")])
        user, routes = table["user"].to_numpy(), _routes(table)
        if len(user) and user.max() >= known_users:
            raise InputError(
                f"{path}: routes user {user.max()}, of {known_users} known ones; they don't belong together"
            )
        means_UK = mean_by_user(user, routes.responsibilities, known_users) if len(user) else np.zeros((known_users, 0))
        return cls(user, table["item"].to_numpy(), routes.cluster, routes.rating, means_UK)

    @property
    def clusters(self) -> int:
        """K."""
        return int(self.user_means_UK.shape[1])

    def counts_K(self) -> np.ndarray:
        """Pairs of each cluster: int64 (K,)."""
        return np.bincount(self.cluster, minlength=self.clusters)

    def items_of_clusters(self, n_items: int, *, weighted: bool = False) -> np.ndarray:
        """Pairs of each cluster and item, or the sums of their predicted ratings if `weighted`: float64 (K, I)."""
        flat = self.cluster.astype(np.int64) * n_items + self.item
        weights = self.rating.astype(np.float64) if weighted else None
        counts = np.bincount(flat, weights=weights, minlength=self.clusters * n_items)
        return counts.reshape(self.clusters, n_items).astype(np.float64)

    def items_of_user(self, user: int) -> np.ndarray:
        """Items of a user's pairs."""
        low, high = np.searchsorted(self.user, [user, user + 1])
        return self.item[low:high]


def mean_by_user(user: np.ndarray, values: np.ndarray, n_users: int) -> np.ndarray:
    """Means of the rows of `values` (N, K) over each user's pairs: (n_users, K)."""
    counts = np.bincount(user, minlength=n_users)
    sums = [np.bincount(user, weights=column, minlength=n_users) for column in values.T]
    return np.stack(sums, axis=1) / np.maximum(counts, 1)[:, None]


def user_group_ari(responsibilities: np.ndarray, groups: np.ndarray, seed: int) -> float:
    """Agreement of users' clusters with planted groups: adjusted Rand index, 0 by chance, 1 perfect.

    Users are clustered by k-means, with as many clusters as groups, on their mean responsibilities.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score

    wanted = len(np.unique(groups))
    distinct = len(np.unique(responsibilities.round(6), axis=0))
    clusters = KMeans(min(wanted, distinct), n_init=10, random_state=seed).fit_predict(responsibilities)
    return float(adjusted_rand_score(groups, clusters))
