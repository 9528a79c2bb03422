"""Cluster and ratings of a stranger, in closed form from its history; nothing is trained and nothing is kept.

A stranger has a state s = (e, b), its embedding and its level, drawn from the K clusters' own normal distributions:

    c ~ w_c,  s | c ~ N(m_c, P_c)         moments of the known users of cluster c, see `Crowd`

The expected rating of an item is smooth in s. Linearized at a cluster's mean, every rating of the history is a linear
observation with the model's own noise R, and both the state's posterior mean and the ratings' probability are one
solve of as many equations as there are ratings, J = dr/ds (the measurement update of a Gaussian-sum Kalman filter,
Alspach and Sorenson 1972; one Gauss-Newton step per cluster):

    s_c = m_c + P_c J' V^-1 (r - r(m_c)),    log p(r | c) = log N(r; r(m_c), V),    V = J P_c J' + R

The cluster's posterior has the words' evidence beside it (`user_words`), q(c) ~ w_c p(r | c) exp(words), and a rating
is predicted as the mean over clusters, sum_c q(c) r(s_c).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gavamoe.artifacts.files import write_file
from gavamoe.errors import InputError, one_line
from gavamoe.model.tables.embedding import EmbeddingTable
from gavamoe.stage1.routes import BATCH_SIZE, Routes
from gavamoe.stage1.strangers.history import Entry
from gavamoe.stage1.user_words import ClusterWords
from gavamoe.stage1.vae_gmm import VaeGmm

CROWD_FILE = "strangers.safetensors"
_POOLED_USERS = 50.0
"""Users of the whole crowd that each cluster's spread is taken together with."""
_ROUNDS = 20
_LEAST = 1e-9
_LOG_2PI = float(np.log(2 * np.pi))


@dataclass(frozen=True)
class Crowd:
    """Where the known users of K clusters lie, as an artifact keeps it: moments, and nobody's own state."""

    weight_K: Tensor
    """Share of the users in each cluster."""
    mean_KE: Tensor
    """Mean embedding of its users; of an empty cluster, of all."""
    spread_KEE: Tensor
    """Covariance of their embeddings."""
    level_K: Tensor
    """Mean of their levels, on the decoder's scale; 0 without biases."""
    level_variance_K: Tensor
    """Variance of their levels, with what shrinkage took given back."""

    @classmethod
    @torch.no_grad()
    def of(cls, model: VaeGmm, home_U: np.ndarray, rows_U: np.ndarray) -> "Crowd":
        """The moments of a trained model's users by the cluster of each, `home_U`; `rows_U`: their training rows."""
        home_U = np.asarray(home_U)
        moments = _moments(model.user_embedding, torch.from_numpy(home_U).long(), model.config.clusters)
        levels = [_levels(model, home_U == cluster, rows_U) for cluster in range(model.config.clusters)]
        weight_K = torch.from_numpy(np.bincount(home_U, minlength=model.config.clusters) + 1.0)
        return cls(
            weight_K / weight_K.sum(),
            torch.stack([mean for mean, _ in moments]),
            torch.stack([spread for _, spread in moments]),
            torch.tensor([level for level, _ in levels], dtype=torch.float64),
            torch.tensor([variance for _, variance in levels], dtype=torch.float64),
        )

    def save(self, folder: Path) -> None:
        """Write an artifact's file."""
        with write_file(Path(folder) / CROWD_FILE) as path:
            save_file({name: value.contiguous() for name, value in vars(self).items()}, path)

    @classmethod
    def load(cls, folder: Path, model: VaeGmm) -> "Crowd | None":
        """Read an artifact's; None for one of a version that kept none.

        Raises:
            InputError: the file is damaged, or of another model.
        """
        path = Path(folder) / CROWD_FILE
        if not path.is_file():
            return None
        clusters, size = model.config.clusters, model.config.embedding_size
        shapes = {
            "weight_K": (clusters,),
            "mean_KE": (clusters, size),
            "spread_KEE": (clusters, size, size),
            "level_K": (clusters,),
            "level_variance_K": (clusters,),
        }
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{path}: can't be read ({one_line(error)})") from error
        if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != shapes:
            raise InputError(f"{path}: does not belong to this model's {clusters} clusters of {size} numbers")
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise InputError(f"{path}: has numbers that are not finite")
        return cls(**{name: tensor.double() for name, tensor in tensors.items()})


def _moments(table: EmbeddingTable, home_U: Tensor, clusters: int) -> list[tuple[Tensor, Tensor]]:
    """Mean (E,) and covariance (E, E) of each cluster's embeddings, together with some of all users'; float64.

    The table is passed over twice, some users at a time; it may be larger than memory.
    """

    def passed() -> Iterator[tuple[Tensor, Tensor]]:
        start = 0
        for block_UE in table.blocks():
            yield home_U[start : start + len(block_UE)], block_UE.double().cpu()
            start += len(block_UE)

    count_K = torch.bincount(home_U, minlength=clusters).double()
    sum_KE = torch.zeros(clusters, table.embedding_dim, dtype=torch.float64)
    for home, block in passed():
        sum_KE.index_add_(0, home, block)
    everyone_E = sum_KE.sum(0) / count_K.sum().clamp_min(1)
    mean_KE = torch.where(count_K[:, None] > 0, sum_KE / count_K.clamp_min(1)[:, None], everyone_E)
    inside_KEE = torch.zeros(clusters, *[len(everyone_E)] * 2, dtype=torch.float64)
    pooled_EE = torch.zeros_like(inside_KEE[0])
    for home, block in passed():
        for cluster in home.unique().tolist():
            centered = block[home == cluster] - mean_KE[cluster]
            inside_KEE[cluster] += centered.T @ centered
        pooled_EE += (block - everyone_E).T @ (block - everyone_E) / count_K.sum()
    spread_KEE = (inside_KEE + _POOLED_USERS * pooled_EE) / (count_K + _POOLED_USERS)[:, None, None]
    return list(zip(mean_KE, spread_KEE, strict=True))


def _levels(model: VaeGmm, own_U: np.ndarray, rows_U: np.ndarray) -> tuple[float, float]:
    """Mean and variance of a cluster's levels: that of its users' shrunken ones is E[n / (n + lambda)] of it, with
    lambda = noise / variance."""
    if model.user_bias is None or model.log_noise is None:
        return 0.0, 0.0
    levels_U = model.user_bias[:-1].double().cpu().numpy()
    own_U = own_U if own_U.sum() > 1 else np.ones_like(own_U)
    found, rows = float(levels_U[own_U].var()), rows_U[own_U]
    half = (model.rating_values[-1] - model.rating_values[0]) / 2
    noise = float(model.rating_variance(torch.zeros(1, 1, device=model.log_noise.device))[0]) / half**2
    variance = found
    for _ in range(_ROUNDS):
        variance = found / max(float((rows / (rows + noise / max(variance, _LEAST))).mean()), _LEAST)
    return float(levels_U[own_U].mean()), min(variance, 1.0)


@dataclass(frozen=True)
class Stranger:
    """What a history tells of a user: a state for each cluster, and how likely the clusters are."""

    embedding_KE: Tensor
    level_K: Tensor
    log_q_K: Tensor
    """log q(c | history), float64."""


class FoldIn:
    """Strangers for one trained stage 1."""

    def __init__(self, model: VaeGmm, crowd: Crowd, words: ClusterWords | None, device: str = "cpu") -> None:
        self._model, self._words, self._device = model.eval(), words, device
        self._crowd = Crowd(**{name: value.to(device) for name, value in vars(crowd).items()})

    def stranger(self, history: Sequence[Entry]) -> Stranger:
        """Fold a history in; an empty one gives the crowd itself."""
        crowd = self._crowd
        log_K = crowd.weight_K.log()
        embedding_KE, level_K = crowd.mean_KE, crowd.level_K
        items, ratings = self._rated(history)
        if items:
            embedding_KE, level_K, evidence_K = self._posterior(items, ratings)
            log_K = log_K + evidence_K
        if self._words is not None:
            texts = [entry.text for entry in history if entry.text]
            evidence = self._words.evidence_K(texts, self._model.config.word_evidence)
            log_K = log_K + torch.from_numpy(evidence).to(log_K)
        return Stranger(embedding_KE.float(), level_K.float(), log_K.log_softmax(0))

    @torch.no_grad()
    def routes(self, stranger: Stranger, items: np.ndarray) -> Routes:
        """Clusters and ratings of a stranger's pairs with items by index: int64 (N,)."""
        q_K = stranger.log_q_K.exp()
        parts = [
            self._expected(stranger.embedding_KE, stranger.level_K, items[start : start + BATCH_SIZE])
            for start in range(0, len(items), BATCH_SIZE)
        ]
        rating_KN = torch.cat(parts, dim=1) if parts else q_K.new_zeros(len(q_K), 0)
        rating_N = (q_K @ rating_KN).clamp(self._model.rating_values[0], self._model.rating_values[-1])
        cluster_N = np.full(len(items), int(q_K.argmax()), np.int16)
        gamma_NK = np.tile(q_K.float().cpu().numpy(), (len(items), 1))
        return Routes(cluster_N, gamma_NK, rating_N.float().cpu().numpy())

    def _rated(self, history: Sequence[Entry]) -> tuple[list[int], list[float]]:
        """Items and ratings that are observed. In data without ratings an item itself is: it was chosen."""
        implicit = self._model.likelihood == "bernoulli" and self._model.rating_values == (0.0, 1.0)
        if implicit:
            items = [entry.item for entry in history if entry.item < self._model.n_items]
            return items, [1.0] * len(items)
        rated = [(entry.item, entry.rating) for entry in history if entry.rating is not None]
        return [item for item, _ in rated], [rating for _, rating in rated]

    def _posterior(self, items: list[int], ratings: list[float]) -> tuple[Tensor, Tensor, Tensor]:
        """Mean embedding (K, E) and level (K,) after the ratings, and log p(ratings | c), (K,)."""
        crowd, count = self._crowd, len(items)
        # A state of its own for each observation: the gradient of their sum then is each one's own slope.
        states_KNE = crowd.mean_KE.float()[:, None].repeat(1, count, 1).requires_grad_()
        levels_KN = crowd.level_K.float()[:, None].repeat(1, count).requires_grad_()
        with torch.enable_grad():
            output = self._output(states_KNE, levels_KN, np.array(items))
            expected_KN = self._model.mean_rating(output).view(-1, count)
            slopes = torch.autograd.grad(expected_KN.sum(), [states_KNE, levels_KN], allow_unused=True)
        slope_KNE = slopes[0].double()
        slope_KN = torch.zeros_like(slope_KNE[..., 0]) if slopes[1] is None else slopes[1].double()
        spread_KNE = slope_KNE @ crowd.spread_KEE
        level_KN = crowd.level_variance_K[:, None] * slope_KN
        noise_KN = self._model.rating_variance(output.detach()).detach().double().view(-1, count).clamp_min(_LEAST)
        covariance_KNN = (
            spread_KNE @ slope_KNE.mT + level_KN[:, :, None] * slope_KN[:, None] + torch.diag_embed(noise_KN)
        )
        surprise_KN = torch.tensor(ratings, device=self._device).double() - expected_KN.detach().double()
        factor_KNN = torch.linalg.cholesky(covariance_KNN)
        weight_KN = torch.cholesky_solve(surprise_KN[..., None], factor_KNN)[..., 0]
        log_determinant_K = 2 * factor_KNN.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        evidence_K = -0.5 * ((surprise_KN * weight_KN).sum(-1) + log_determinant_K + count * _LOG_2PI)
        embedding_KE = crowd.mean_KE + (spread_KNE * weight_KN[..., None]).sum(1)
        return embedding_KE, crowd.level_K + (level_KN * weight_KN).sum(-1), evidence_K

    def _expected(self, embedding_KE: Tensor, level_K: Tensor, items: np.ndarray) -> Tensor:
        """Expected ratings of each cluster's state: float64 (K, N)."""
        count = len(items)
        output = self._output(embedding_KE[:, None].expand(-1, count, -1), level_K[:, None].expand(-1, count), items)
        return self._model.mean_rating(output).double().view(-1, count)

    def _output(self, states_KNE: Tensor, levels_KN: Tensor, items: np.ndarray) -> Tensor:
        """The decoder's output of states and items: (K x N, R)."""
        item_N = torch.as_tensor(items, dtype=torch.long, device=self._device).clamp(max=self._model.n_items)
        item_KNE = self._model.item_embedding(item_N).expand(len(states_KNE), -1, -1)
        mu, _ = self._model.encoder(states_KNE.flatten(0, 1), item_KNE.flatten(0, 1))
        if self._model.item_bias is None:
            return self._model.decode(mu, None)
        return self._model.decode(mu, (levels_KN + self._model.item_bias[item_N]).flatten())
