"""Spectral initialization of stage 1's embeddings: the leading singular vectors of the training ratings.

From small random embeddings the interaction of users with items is a saddle that takes epochs to leave while the
network memorizes pairs; the singular vectors of the residuals of a user + item bias model show it at once.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import scipy.sparse.linalg  # type: ignore[import-untyped]  # comes with scikit-learn, without stubs
import torch

from gavamoe.stage1.pair_stream import Pairs
from gavamoe.stage1.vae_gmm import VaeGmm

MAX_COMPONENTS = 16
"""Number of singular vectors at most."""
SCALE = 3.0
"""Standard deviation of the strongest component in the embeddings. It is far above the random part, since the
encoder's first layer norm sees only directions, and large enough that the user's own embedding stays visible in the
latent (docs/stage1.md)."""
_SHRINKAGE = 5.0
"""Shrinkage of the biases: each user and item counts as if it had this many more ratings, all equal to the mean."""
_BIAS_ROUNDS = 3
_NO_SPREAD = 1e-6
_POWER_ITERATIONS = 7
_OVERSAMPLES = 10


class Spectral(NamedTuple):
    """Coordinates of users and items: the bias first, then the components, the strongest first."""

    user: np.ndarray
    """Coordinates of the users: (U, 1 + R)."""
    item: np.ndarray
    """Coordinates of the items: (I, 1 + R)."""


Stream = Callable[[], Iterable[Pairs]]
"""Called for each pass over the training pairs; yields them a batch at a time."""


def spectral_coordinates(pairs: Stream, n_users: int, n_items: int, components: int, seed: int) -> Spectral | None:
    """Coordinates from the residual ratings, each row and column scaled by its count (plus the mean count).

    Singular values are lowered by the first one left out, so that components of pure noise vanish.
    None when the data are too small or hold no interaction at all.
    """
    components = min(components, n_users - 1, n_items - 1)
    if components < 1:
        return None
    biases = _fit_biases(pairs, n_users, n_items)
    matrix = _Residuals(pairs, biases)
    left, singular, right = _singular_vectors(matrix, components + 1, seed)
    kept = (singular - singular[-1])[:-1]
    if kept[0] <= 1e-9:
        return None
    user = _standardized(left[:, :-1] * kept * matrix.user_scale[:, None])
    item = _standardized(right[:, :-1] * kept * matrix.item_scale[:, None])
    return Spectral(np.c_[biases.user, user], np.c_[biases.item, item])


def init_embeddings(model: VaeGmm, pairs: Stream, seed: int) -> bool:
    """Add the coordinates to the leading columns of the model's tables; the unknown rows stay at the mean, zero."""
    components = min(MAX_COMPONENTS, model.config.embedding_size - 1)
    spectral = spectral_coordinates(pairs, model.n_users, model.n_items, components, seed)
    if spectral is None:
        return False
    with torch.no_grad():
        for table, coordinates in ((model.user_embedding, spectral.user), (model.item_embedding, spectral.item)):
            added = torch.from_numpy(SCALE * coordinates).to(table.weight)
            table.weight[:-1, : added.shape[1]] += added
    return True


class _Biases(NamedTuple):
    """A user + item bias model in standard deviations of the rating.

    Implicit data have no rating to explain: residuals are 1 and the biases are activity and popularity.
    """

    user: np.ndarray
    """Bias of each user: (U,)."""
    item: np.ndarray
    """Bias of each item: (I,)."""
    user_count: np.ndarray
    """Number of each user's pairs: (U,)."""
    item_count: np.ndarray
    """Number of each item's pairs: (I,)."""
    mean: float
    """Mean rating."""
    spread: float
    """Standard deviation of the ratings; 0 for implicit data."""

    def rating(self, pairs: Pairs) -> np.ndarray:
        """Standardized ratings, float64 (N,)."""
        return (pairs.rating.astype(np.float64) - self.mean) / self.spread

    def residual(self, pairs: Pairs) -> np.ndarray:
        """Residuals of the bias model: float64 (N,)."""
        if not self.spread:
            return np.ones(pairs.size)
        return self.rating(pairs) - self.user[pairs.user] - self.item[pairs.item]


def _fit_biases(pairs: Stream, n_users: int, n_items: int) -> _Biases:
    user_count, item_count, moments = np.zeros(n_users), np.zeros(n_items), np.zeros(3)
    for batch in pairs():
        user_count += np.bincount(batch.user, minlength=n_users)
        item_count += np.bincount(batch.item, minlength=n_items)
        rating = batch.rating.astype(np.float64)
        moments += np.array([batch.size, rating.sum(), rating @ rating])
    mean = moments[1] / moments[0]
    spread = np.sqrt(max(moments[2] / moments[0] - mean**2, 0.0))
    if spread < _NO_SPREAD:
        activity, popularity = np.log1p(user_count), np.log1p(item_count)
        user, item = activity - activity.mean(), popularity - popularity.mean()
        return _Biases(user, item, user_count, item_count, mean, spread=0.0)
    biases = _Biases(np.zeros(n_users), np.zeros(n_items), user_count, item_count, mean, spread)
    for _ in range(_BIAS_ROUNDS):
        item_sum, user_sum = np.zeros(n_items), np.zeros(n_users)
        for batch in pairs():
            item_sum += np.bincount(batch.item, biases.rating(batch) - biases.user[batch.user], n_items)
        biases = biases._replace(item=item_sum / (item_count + _SHRINKAGE))
        for batch in pairs():
            user_sum += np.bincount(batch.user, biases.rating(batch) - biases.item[batch.item], n_users)
        biases = biases._replace(user=user_sum / (user_count + _SHRINKAGE))
    return biases


class _Residuals(scipy.sparse.linalg.LinearOperator):
    """The matrix of scaled residuals, (U, I), of which one batch of pairs is in memory."""

    def __init__(self, pairs: Stream, biases: _Biases) -> None:
        super().__init__(np.float64, (len(biases.user), len(biases.item)))
        self._pairs, self._biases = pairs, biases
        self.user_scale, self.item_scale = (_degree_scale(count) for count in (biases.user_count, biases.item_count))

    def _blocks(self) -> Iterator[scipy.sparse.csr_matrix]:
        for batch in self._pairs():
            values = self._biases.residual(batch) * self.user_scale[batch.user] * self.item_scale[batch.item]
            yield scipy.sparse.csr_matrix((values, (batch.user, batch.item)), shape=self.shape)

    def _matmat(self, columns: np.ndarray) -> np.ndarray:
        return sum(block @ columns for block in self._blocks())

    def _rmatmat(self, columns: np.ndarray) -> np.ndarray:
        return sum(block.T @ columns for block in self._blocks())


def _singular_vectors(matrix: _Residuals, count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The leading singular vectors, left (U, R) and right (I, R), and values, by subspace iteration (Halko 2011).

    scikit-learn's `randomized_svd` does the same for a matrix in memory.
    """
    basis = np.random.default_rng([seed, 3]).normal(size=(matrix.shape[1], count + _OVERSAMPLES))
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
