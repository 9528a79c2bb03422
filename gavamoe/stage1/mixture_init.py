"""Stage 1's mixture and the users' clusters: how they start after pretraining, and how users change cluster.

Pairs are what the mixture models, but users are what the clusters are for. A mixture fitted to the pairs' latents
alone sorts pairs by rating or genre, and one user's pairs then go to every gate. So users are clustered by
their pretrained embeddings, the mixture takes the moments of each cluster's pairs, and in training all pairs of
a user share one q(c|x) (docs/stage1.md).
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture
from torch import Tensor

from gavamoe.config.schema import Stage1Config
from gavamoe.errors import InputError
from gavamoe.stage1.user_words import UserWords

SAMPLE = 20_000
"""Users, or pairs, that a mixture is fitted to, at most."""
_MAX_ITERATIONS = 300
_LEAST_SHARE = 1e-6
_START_SHARE = 0.8
"""Share with which a user starts in the cluster of its words."""
_LEAST_VARIANCE = 1e-3
"""Least variance of a cluster, in variances of all users."""
_TOLERANCE = 1e-5
"""Gain of log-likelihood per user, in nats, below which the mixture is as good as it gets."""


class Mixture(NamedTuple):
    """Parameters of a mixture with diagonal covariances, float64."""

    weights_K: np.ndarray
    means_KL: np.ndarray
    variances_KL: np.ndarray


def fit_pairs(mu_NL: np.ndarray, config: Stage1Config, seed: int) -> Mixture:
    """A mixture fitted to pairs' latents."""
    fitted = _fit(mu_NL, config, seed)
    return Mixture(fitted.weights_, fitted.means_, fitted.covariances_)


def principal_points(
    blocks: Callable[[], Iterable[Tensor]],
    shape: tuple[int, int],
    clusters: int,
    total: Callable[[np.ndarray], np.ndarray] = lambda own: own,
) -> np.ndarray:
    """Users' embeddings in their leading principal components: float64 (U, D).

    K clusters lie in at most K - 1 directions; the embeddings are reduced to that many, and two at least.

    Args:
        blocks: called for each of three passes over the embeddings; yields some users' at a time, (b, E).
        shape: (U, E), the users of all workers together.
        total: sums over the workers, where each has some of the users and gets their points.
    """
    users, size = shape

    def passed() -> Iterable[np.ndarray]:
        return (block_UE.double().cpu().numpy() for block_UE in blocks())

    mean_E, squares_EE = np.zeros(size), np.zeros((size, size))
    for block_UE in passed():
        mean_E += block_UE.sum(axis=0)
    mean_E = total(mean_E) / users
    for block_UE in passed():
        squares_EE += (block_UE - mean_E).T @ (block_UE - mean_E)
    _, directions_EE = np.linalg.eigh(total(squares_EE))
    kept = min(max(clusters - 1, 2), size, users)
    leading_ED = directions_EE[:, ::-1][:, :kept]
    # A direction's sign is free: that of its largest entry is made positive, so that processors agree.
    leading_ED = leading_ED * np.sign(leading_ED[np.abs(leading_ED).argmax(axis=0), np.arange(kept)])
    return np.concatenate([np.zeros((0, kept)), *((block_UE - mean_E) @ leading_ED for block_UE in passed())])


def cluster_users(
    points: np.ndarray,
    config: Stage1Config,
    seed: int,
    words: UserWords | None = None,
    rating_weight: float = 1.0,
) -> np.ndarray:
    """Each user's cluster shares, (U, K), by a mixture fitted to the users' `principal_points` and, if given, words,
    beside which the points' log density has a weight of `rating_weight`."""
    users = len(points)
    sample = np.random.default_rng([seed, 2]).permutation(users)[:SAMPLE]
    by_ratings = _fit(points[np.sort(sample)], config, seed).predict_proba(points)
    if words is None:
        return _by_first_user(by_ratings)
    coordinates = words.coordinates(seed)
    starts = [by_ratings]
    for restart in range(config.mixture_restarts if coordinates.shape[1] else 0):
        labels = KMeans(config.clusters, n_init=1, random_state=seed + restart).fit_predict(coordinates)
        starts.append(_START_SHARE * np.eye(config.clusters)[labels] + (1 - _START_SHARE) / config.clusters)
    found = [_em(points, rating_weight, words, shares_UK, config.word_evidence) for shares_UK in starts]
    return _by_first_user(max(found, key=lambda each: each[0])[1])


def _by_first_user(shares_UK: np.ndarray) -> np.ndarray:
    """The clusters in the order of their first users: a fit numbers them by rounding errors, which differ between
    processors and numbers of threads."""
    users, clusters = shares_UK.shape
    likeliest = shares_UK.argmax(axis=1)
    first = np.full(clusters, users)
    np.minimum.at(first, likeliest, np.arange(users))
    return shares_UK[:, np.argsort(first, kind="stable")]


def _em(
    points_UD: np.ndarray, weight: float, words: UserWords, shares_UK: np.ndarray, cap: float
) -> tuple[float, np.ndarray]:
    """Expectation-maximization of a mixture over points and words, from given shares: log-likelihood and shares."""
    likelihood = -np.inf
    for _ in range(_MAX_ITERATIONS):
        mixture = mixture_of_users(points_UD, np.arange(len(points_UD)), shares_UK)
        variances_KD = mixture.variances_KL + _LEAST_VARIANCE * points_UD.var(axis=0)
        distance_UKD = (points_UD[:, None] - mixture.means_KL) ** 2 / variances_KD
        log_UK = -0.5 * weight * (distance_UKD + np.log(2 * np.pi * variances_KD)).sum(axis=-1)
        log_UK += np.log(mixture.weights_K) + words.evidence_UK(words.rates_KV(shares_UK), cap)
        total_U = np.logaddexp.reduce(log_UK, axis=1)
        shares_UK, before, likelihood = np.exp(log_UK - total_U[:, None]), likelihood, float(total_U.mean())
        if likelihood - before < _TOLERANCE:
            break
    return likelihood, shares_UK


def mixture_of_users(mu_NL: np.ndarray, user_N: np.ndarray, shares_UK: np.ndarray) -> Mixture:
    """The moments of the latents of each cluster's pairs."""
    shares_NK = shares_UK[user_N] + _LEAST_SHARE
    counts_K1 = shares_NK.sum(axis=0)[:, None]
    means_KL = shares_NK.T @ mu_NL / counts_K1
    variances_KL = np.maximum(shares_NK.T @ mu_NL**2 / counts_K1 - means_KL**2, 1e-6)
    return Mixture(counts_K1[:, 0] / counts_K1.sum(), means_KL, variances_KL)


class UserClusters:
    """q(c|u): the cluster distribution that all training pairs of a user share.

    An epoch gathers each user's evidence; `update` makes it the posterior of a cluster drawn once per user,
    q(c|u) ~ pi_c * exp(w * sum over the user's pairs of E[log p(z|c)] + the evidence of the user's words). The unknown
    user has the users' mean.
    """

    def __init__(
        self, shares_UK: np.ndarray, words: UserWords | None = None, cap: float = 0.0, rating_weight: float = 1.0
    ) -> None:
        """`cap`: how many of a user's words count, see `user_words`; `rating_weight`: w."""
        self._words, self._cap, self.rating_weight = words, cap, rating_weight
        self.log_q = self._with_unknown(torch.from_numpy(shares_UK).clamp_min(_LEAST_SHARE).log())
        """log q(c|u) of every known user and of the unknown one: (U + 1, K) float32."""
        self._evidence = torch.zeros_like(self.log_q, dtype=torch.float64)

    def disagreement(self, user_B: Tensor, log_gamma_BK: Tensor) -> Tensor:
        """KL(q(c|u) || gamma) of every pair, (B,): by how much the bound would fall with q(c|u) as q(c|x)."""
        log_q_BK = self.log_q[user_B.long().cpu()].to(log_gamma_BK.device)
        return (log_q_BK.exp() * (log_q_BK - log_gamma_BK)).sum(dim=-1)

    def add(self, user_B: Tensor, log_density_BK: Tensor) -> None:
        """Count a batch's E[log p(z|c)] as evidence."""
        self._evidence.index_add_(0, user_B.long().cpu(), log_density_BK.detach().double().cpu())

    def update(self, log_weights_K: Tensor, world_size: int, device: str) -> None:
        """Turn the epoch's evidence, of all workers, into q(c|u), and reset the evidence to zero."""
        evidence = self._evidence
        if world_size > 1:
            shared = evidence.to(device)
            dist.all_reduce(shared)
            evidence = shared.cpu()
        evidence_UK = self.rating_weight * evidence[:-1]
        if self._words is not None:
            rates_KV = self._words.rates_KV(self.log_q[:-1].exp().double().numpy())
            evidence_UK = evidence_UK + torch.from_numpy(self._words.evidence_UK(rates_KV, self._cap))
        log_q_UK = (log_weights_K.detach().double().cpu() + evidence_UK).log_softmax(dim=-1)
        self.log_q = self._with_unknown(log_q_UK.clamp_min(np.log(_LEAST_SHARE)))
        self._evidence.zero_()

    @staticmethod
    def _with_unknown(log_q_UK: Tensor) -> Tensor:
        log_q_UK = log_q_UK.log_softmax(dim=-1)
        return torch.cat([log_q_UK, log_q_UK.exp().mean(dim=0, keepdim=True).log()]).float()


def _fit(points: np.ndarray, config: Stage1Config, seed: int) -> GaussianMixture:
    if len(points) < config.clusters:
        raise InputError(f"stage1.clusters: {config.clusters} is more than the {len(points)} points to be clustered")
    mixture = GaussianMixture(
        config.clusters,
        covariance_type="diag",
        n_init=config.mixture_restarts,
        random_state=seed,
        max_iter=_MAX_ITERATIONS,
    )
    return mixture.fit(points)
