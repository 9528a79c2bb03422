"""How far users and items rate above or below the mean, shrunk by how little is known of each.

The model is r = mean + b_u + b_i + noise with normal effects b_u ~ N(0, s_u^2), b_i ~ N(0, s_i^2). An effect's estimate
is its mean residual times n / (n + lambda), lambda = noise variance / effect variance, and the three variances come
from the ratings themselves (empirical Bayes by expectation-maximization; Robbins 1956, Dempster et al. 1977). No
setting fits both a set whose items have 25 ratings and one whose items have 4; this needs none.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch

from gavamoe.stage1.pair_stream import PairFile, Pairs
from gavamoe.stage1.vae_gmm import VaeGmm

Stream = Callable[[], Iterable[Pairs]]
"""Called for each pass over the training pairs; yields them a batch at a time."""

SWEEPS = 20
"""Rounds of estimating effects and variances; two passes over the pairs each. Most is done after five."""
_START = 5.0
"""Lambda of the first round."""
_LEAST = 1e-12
LEAST_HELD_OUT = 100
"""Held-out pairs from which on they say by how much to shrink the interaction."""
_BATCH_SIZE = 4096


class RatingBiases(NamedTuple):
    """A fitted user + item bias model, in units of the rating."""

    mean: float
    """Mean of the training ratings."""
    user: np.ndarray
    """Effect of each user, 0 for one without ratings: float64 (U,)."""
    item: np.ndarray
    """Effect of each item: float64 (I,)."""
    user_count: np.ndarray
    """Number of each user's pairs: float64 (U,)."""
    item_count: np.ndarray
    """Number of each item's pairs: float64 (I,)."""
    noise: float
    """Variance of the ratings around the model."""

    def predict(self, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        """mean + b_u + b_i of pairs, float64 (N,)."""
        predicted: np.ndarray = self.mean + self.user[user] + self.item[item]
        return predicted


def fit_biases(pairs: Stream, n_users: int, n_items: int, sweeps: int = SWEEPS) -> RatingBiases:
    """Fit the model to a stream of pairs with ratings, of which one batch at a time is in memory."""
    user_count, item_count, moments = np.zeros(n_users), np.zeros(n_items), np.zeros(3)
    for batch in pairs():
        user_count += np.bincount(batch.user, minlength=n_users)
        item_count += np.bincount(batch.item, minlength=n_items)
        rating = batch.rating.astype(np.float64)
        moments += np.array([batch.size, rating.sum(), rating @ rating])
    mean = float(moments[1] / moments[0])
    noise = max(float(moments[2] / moments[0]) - mean**2, 0.0)
    found = RatingBiases(mean, np.zeros(n_users), np.zeros(n_items), user_count, item_count, noise)
    user_lambda = item_lambda = _START
    for _ in range(sweeps if noise > _LEAST else 0):
        found, user_lambda, item_lambda = _sweep(found, pairs, user_lambda, item_lambda)
    return found


def _sweep(
    found: RatingBiases, pairs: Stream, user_lambda: float, item_lambda: float
) -> tuple[RatingBiases, float, float]:
    """The effects by the present lambdas, then the variances, and so the lambdas, by the effects."""
    item_sum, user_sum = np.zeros(len(found.item)), np.zeros(len(found.user))
    for batch in pairs():
        item_sum += np.bincount(batch.item, batch.rating - found.mean - found.user[batch.user], len(item_sum))
    item = item_sum / (found.item_count + item_lambda)
    squares = 0.0
    for batch in pairs():
        residual = batch.rating - found.mean - item[batch.item]
        user_sum += np.bincount(batch.user, residual, len(user_sum))
        squares += float(residual @ residual)
    user = user_sum / (found.user_count + user_lambda)
    squares -= float(2 * user @ user_sum - user**2 @ found.user_count)  # of the residuals with the users' effects
    # What the effects are still uncertain by belongs to the noise, and to the effects' variances.
    user_variance = found.noise / (found.user_count + user_lambda)
    item_variance = found.noise / (found.item_count + item_lambda)
    count = found.user_count.sum()
    uncertain = user_variance @ found.user_count + item_variance @ found.item_count
    noise = max((squares + float(uncertain)) / count, _LEAST)
    seen_users, seen_items = found.user_count > 0, found.item_count > 0
    user_lambda = noise / max(float((user**2 + user_variance)[seen_users].mean()), _LEAST)
    item_lambda = noise / max(float((item**2 + item_variance)[seen_items].mean()), _LEAST)
    return found._replace(user=user, item=item, noise=noise), user_lambda, item_lambda


@torch.no_grad()
def shrink_interaction(model: VaeGmm, held_out: PairFile, device: str) -> float:
    """Scale what the decoder adds to a pair's bias by what it is worth on held-out pairs: by the share, 0 to 1, with
    which their squared error is least. Returns that share; 1 for a model without biases, or too few pairs.

    Where a user has five ratings, the decoder has learned noise beside taste. One number can't overfit.
    """
    if model.user_bias is None or held_out.size < LEAST_HELD_OUT:
        return 1.0
    model.eval()
    low, high = model.rating_values[0], model.rating_values[-1]
    products = torch.zeros(2, dtype=torch.float64)
    for start in range(0, held_out.size, _BATCH_SIZE):
        batch = held_out.take(slice(start, start + _BATCH_SIZE))
        user_B, item_B, rating_B = (torch.tensor(column, device=device) for column in batch)
        mu_BL, _ = model.encode(user_B, item_B)
        added_B = model.decode(mu_BL, None)[:, 0]
        bias_B = model.bias(user_B, item_B)
        assert bias_B is not None
        left_B = 2 * (rating_B - low) / (high - low) - 1 - bias_B
        products += torch.stack([(added_B * left_B).double().sum(), added_B.double().square().sum()]).cpu()
    share = min(max(float(products[0] / products[1].clamp_min(_LEAST)), 0.0), 1.0)
    for parameter in model.decoder[-1].parameters():
        parameter.mul_(share)
    return share
