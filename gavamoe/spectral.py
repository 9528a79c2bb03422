"""Where stage 1's embeddings start: the leading singular vectors of the training ratings.

From small random embeddings the interaction of users with items is a saddle that takes epochs to leave while the
network memorises pairs; the singular vectors of what a user + item bias model leaves over show it at once.

Shape letters: N pairs, U users, I items, R components.
"""

from typing import NamedTuple

import numpy as np
import scipy.sparse  # type: ignore[import-untyped]  # comes with scikit-learn, without stubs
import torch
from sklearn.utils.extmath import randomized_svd

from gavamoe.pairs import Pairs
from gavamoe.vae_gmm import VaeGmm

MAX_COMPONENTS = 16
SCALE = 3.0
"""Standard deviation of the strongest component. Far above the random part, for the encoder's first layer norm sees
only directions, and large enough that the user's own embedding stays visible in the latent (docs/stage1.md)."""
_SHRINKAGE = 5.0
"""Ratings of the mean that each user and item is given beside its own, when biases are fitted."""
_BIAS_ROUNDS = 3


class Spectral(NamedTuple):
    """Coordinates of users and items: the bias first, then the components, the strongest first."""

    user: np.ndarray
    """(U, 1 + R)"""
    item: np.ndarray
    """(I, 1 + R)"""


def spectral_coordinates(pairs: Pairs, n_users: int, n_items: int, components: int, seed: int) -> Spectral | None:
    """Coordinates from the residual ratings, each row and column scaled by its count (plus the mean count).

    Singular values are lowered by the first one left out, so that components of pure noise vanish.
    None when the data are too small or hold no interaction at all.
    """
    components = min(components, n_users - 1, n_items - 1)
    if components < 1:
        return None
    residual, user_bias, item_bias = _biases(pairs, n_users, n_items)
    user_scale, item_scale = _degree_scale(pairs.user, n_users), _degree_scale(pairs.item, n_items)
    values = residual * user_scale[pairs.user] * item_scale[pairs.item]
    matrix = scipy.sparse.csr_matrix((values, (pairs.user, pairs.item)), shape=(n_users, n_items))
    left, singular, right = randomized_svd(matrix, components + 1, random_state=seed)
    kept = (singular - singular[-1])[:-1]
    if kept[0] <= 1e-9:
        return None
    user = _standardised(left[:, :-1] * kept * user_scale[:, None])
    item = _standardised(right[:-1].T * kept * item_scale[:, None])
    return Spectral(np.c_[user_bias, user], np.c_[item_bias, item])


def init_embeddings(model: VaeGmm, pairs: Pairs, seed: int) -> bool:
    """Add the coordinates to the leading columns of the model's tables; the unknown rows stay at the mean, zero."""
    components = min(MAX_COMPONENTS, model.config.embedding_size - 1)
    found = spectral_coordinates(pairs, model.n_users, model.n_items, components, seed)
    if found is None:
        return False
    with torch.no_grad():
        for table, part in ((model.user_embedding, found.user), (model.item_embedding, found.item)):
            added = torch.from_numpy(SCALE * part).to(table.weight)
            table.weight[:-1, : added.shape[1]] += added
    return True


def _biases(pairs: Pairs, n_users: int, n_items: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Residuals (N,) and both biases, in standard deviations of the rating.

    Implicit data have no rating to explain: residuals are 1 and the biases are activity and popularity.
    """
    user, item = pairs.user, pairs.item
    spread = pairs.rating.std()
    if spread == 0:
        counts = (np.bincount(user, minlength=n_users), np.bincount(item, minlength=n_items))
        logs = [np.log1p(count) for count in counts]
        return np.ones(pairs.size), *(log - log.mean() for log in logs)
    rating = (pairs.rating.astype(np.float64) - pairs.rating.mean()) / spread
    user_bias, item_bias = np.zeros(n_users), np.zeros(n_items)
    for _ in range(_BIAS_ROUNDS):
        item_bias = _shrunk_mean(item, rating - user_bias[user], n_items)
        user_bias = _shrunk_mean(user, rating - item_bias[item], n_users)
    return rating - user_bias[user] - item_bias[item], user_bias, item_bias


def _shrunk_mean(index: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    sums = np.bincount(index, weights=values, minlength=count)
    return sums / (np.bincount(index, minlength=count) + _SHRINKAGE)


def _degree_scale(index: np.ndarray, count: int) -> np.ndarray:
    degrees = np.bincount(index, minlength=count)
    return 1 / np.sqrt(degrees + degrees.mean())


def _standardised(part: np.ndarray) -> np.ndarray:
    """Centred, the column that varies most at unit variance.

    Without ratings a leading component is all but constant: the popularity that the bias column tells already.
    """
    part = part - part.mean(axis=0)
    return part / max(part.std(axis=0).max(), 1e-12)
