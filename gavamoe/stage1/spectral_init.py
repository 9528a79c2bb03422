"""Spectral initialization of stage 1's embeddings: the leading singular vectors of the training ratings.

From small random embeddings the interaction of users with items is a saddle that takes epochs to leave while the
network memorizes pairs; the singular vectors of the residuals of a user + item bias model show it at once.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy.sparse.linalg  # type: ignore[import-untyped]  # comes with scikit-learn, without stubs

from gavamoe.stage1.pair_stream import Pairs
from gavamoe.stage1.rating_biases import RatingBiases, Stream, fit_biases
from gavamoe.stage1.vae_gmm import VaeGmm

MAX_COMPONENTS = 16
"""Number of singular vectors at most."""
SCALE = 3.0
"""Standard deviation of the strongest component in the embeddings. It is far above the random part, since the
encoder's first layer norm sees only directions, and large enough that the user's own embedding stays visible in the
latent (docs/stage1.md)."""
_NO_SPREAD = 1e-6
_POWER_ITERATIONS = 7
OVERSAMPLES = 10
"""Vectors that the subspace iteration carries beside those that are wanted."""


class Spectral(NamedTuple):
    """Coordinates of users and items: the bias first, then the components, the strongest first."""

    user: np.ndarray
    """Coordinates of the users: (U, 1 + R)."""
    item: np.ndarray
    """Coordinates of the items: (I, 1 + R)."""


def spectral_coordinates(pairs: Stream, n_users: int, n_items: int, components: int, seed: int) -> Spectral | None:
    """Coordinates from the residual ratings, each row and column scaled by its count (plus the mean count).

    Singular values are lowered by the first one left out, so that components of pure noise vanish.
    None when the data are too small or hold no interaction at all.
    """
    components = min(components, n_users - 1, n_items - 1)
    if components < 1:
        return None
    biases = _biases(pairs, n_users, n_items)
    matrix = _Residuals(pairs, biases)
    left, singular, right = _singular_vectors(matrix, components + 1, seed)
    kept = (singular - singular[-1])[:-1]
    if kept[0] <= 1e-9:
        return None
    user = _standardized(left[:, :-1] * kept * matrix.user_scale[:, None])
    item = _standardized(right[:, :-1] * kept * matrix.item_scale[:, None])
    return Spectral(np.c_[biases.user, user], np.c_[biases.item, item])


def init_embeddings(model: VaeGmm, pairs: Stream, seed: int, rank: int = 0) -> bool:
    """Add the coordinates to the leading columns of the ids' vectors; the unknown rows stay at the mean, zero.

    Rank 0 computes them; other ranks take part because sharded tables send them to where the rows are.
    """
    spectral = None
    if rank == 0:
        components = min(MAX_COMPONENTS, model.config.embedding_size - 1)
        spectral = spectral_coordinates(pairs, model.n_users, model.n_items, components, seed)
    for table, place in ((model.user_embedding, 0), (model.item_embedding, 1)):
        table.add(None if spectral is None else SCALE * spectral[place])
    return spectral is not None


def add_clusters(model: VaeGmm, shares_UK: np.ndarray, seed: int) -> None:
    """Add users' cluster shares to their embeddings, in K random directions: the encoder reads ids alone, and would
    need many epochs to learn of each user what the user's words said at once. The unknown row stays where it is."""
    square = (model.config.embedding_size,) * 2
    directions_EE, _ = np.linalg.qr(np.random.default_rng([seed, 5]).normal(size=square))
    model.user_embedding.add(SCALE * _standardized(shares_UK), directions_EE[: shares_UK.shape[1]])


def _biases(pairs: Stream, n_users: int, n_items: int) -> RatingBiases:
    """The bias model in standard deviations of the rating; without ratings, the logarithm of activity and popularity,
    with a noise of 0."""
    found = fit_biases(pairs, n_users, n_items)
    if found.noise > _NO_SPREAD:
        spread = found.noise**0.5
        return found._replace(user=found.user / spread, item=found.item / spread)
    activity, popularity = np.log1p(found.user_count), np.log1p(found.item_count)
    return found._replace(user=activity - activity.mean(), item=popularity - popularity.mean(), noise=0.0)


def _residual(biases: RatingBiases, pairs: Pairs) -> np.ndarray:
    """What the bias model leaves of the ratings, standardized: float64 (N,); 1 without ratings."""
    if not biases.noise:
        return np.ones(pairs.size)
    standardized: np.ndarray = (pairs.rating - biases.mean) / biases.noise**0.5
    return standardized - biases.user[pairs.user] - biases.item[pairs.item]


class _Residuals(scipy.sparse.linalg.LinearOperator):
    """The matrix of scaled residuals, (U, I), of which one batch of pairs is in memory."""

    def __init__(self, pairs: Stream, biases: RatingBiases) -> None:
        super().__init__(np.float64, (len(biases.user), len(biases.item)))
        self._pairs, self._biases = pairs, biases
        self.user_scale, self.item_scale = (_degree_scale(count) for count in (biases.user_count, biases.item_count))

    def _blocks(self) -> Iterator[scipy.sparse.csr_matrix]:
        for batch in self._pairs():
            values = _residual(self._biases, batch) * self.user_scale[batch.user] * self.item_scale[batch.item]
            yield scipy.sparse.csr_matrix((values, (batch.user, batch.item)), shape=self.shape)

    def _matmat(self, columns: np.ndarray) -> np.ndarray:
        return sum(block @ columns for block in self._blocks())

    def _rmatmat(self, columns: np.ndarray) -> np.ndarray:
        return sum(block.T @ columns for block in self._blocks())


def _singular_vectors(matrix: _Residuals, count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The leading singular vectors, left (U, R) and right (I, R), and values, by subspace iteration (Halko 2011).

    scikit-learn's `randomized_svd` does the same for a matrix in memory.
    """
    basis = np.random.default_rng([seed, 3]).normal(size=(matrix.shape[1], count + OVERSAMPLES))
    for _ in range(_POWER_ITERATIONS):
        basis, _ = np.linalg.qr(matrix @ basis)
        basis, _ = np.linalg.qr(matrix.T @ basis)
    basis, _ = np.linalg.qr(matrix @ basis)
    right, singular, left = np.linalg.svd(matrix.T @ basis, full_matrices=False)
    return (basis @ left.T)[:, :count], singular[:count], right[:, :count]


def _degree_scale(count: np.ndarray) -> np.ndarray:
    return 1 / np.sqrt(count + count.mean())


def _standardized(components: np.ndarray) -> np.ndarray:
    """The columns centered and scaled together, so that the one that varies most has unit variance.

    Without ratings a leading component is almost constant: it is the popularity, which the bias column has already.
    """
    centered = components - components.mean(axis=0)
    return centered / max(centered.std(axis=0).max(), 1e-12)
