"""Stage 1's model: a variational autoencoder over user-item pairs whose prior is a Gaussian mixture.

In: indices of known users and items (anything above is the unknown id). Out: the latent's mean and
log-variance (Eq. 1), cluster responsibilities (Eq. 8), the predicted rating (Eq. 3), the ELBO (Eq. 12).
The derivation, term by term, is in docs/stage1.md.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gavamoe.config.schema import Stage1Config
from gavamoe.model.tables.layout import MakeTable, TableLayout

Likelihood = Literal["categorical", "bernoulli", "gaussian"]

LOG_2PI = math.log(2 * math.pi)
LOG_VAR_BOUND = 8.0
"""Posterior log-variances lie within +-8: standard deviations of .018 to 55."""
MIXTURE_LOG_VAR_BOUND = 12.0
INITIAL_LOG_VAR = -4.0
"""The posterior starts narrow, so that the first ELBO steps still see the pretrained latents."""
EMBEDDING_STD = 0.02


class ElboTerms(NamedTuple):
    """The bound and its parts (Eq. 15), in nats: one value per pair, or their means.

    loss = -(reconstruction - beta * kl);
    kl = log_q_z + log_q_c - log_p_z_given_c - log_p_c.
    """

    loss: Tensor
    reconstruction: Tensor
    log_p_z_given_c: Tensor
    log_p_c: Tensor
    log_q_z: Tensor
    log_q_c: Tensor
    kl: Tensor

    def mean(self) -> "ElboTerms":
        """Means over the pairs."""
        return ElboTerms(*(term.mean() for term in self))


class Dropout(nn.Module):
    """nn.Dropout from 16 random bits a value, so at a rate rounded to 1/65,536: a third of its time on a CPU."""

    _VALUES = 2**16

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.dropped = round(rate * self._VALUES)
        """How many of the 65,536 values that 16 bits can take stand for a dropped value."""

    def forward(self, states: Tensor) -> Tensor:
        """The same shape, in training with values at zero and the others scaled up."""
        if not (self.training and self.dropped):
            return states
        words = torch.empty(-(-states.numel() // 4), dtype=torch.int64, device=states.device)
        bits = words.random_(torch.iinfo(torch.int64).min, None).view(torch.int16)[: states.numel()]
        kept = (bits >= self.dropped - self._VALUES // 2).to(states.dtype)
        return states * kept.mul_(self._VALUES / (self._VALUES - self.dropped)).view_as(states)


class PairLayer(nn.Module):
    """A pre-norm transformer layer over the two tokens of ONE pair; pairs never see each other.

    Softmax over two scores is the sigmoid of their difference, and the difference of two keys is the key of the
    difference: one product with the key weights instead of two, and none of the tiny ones of queries with keys. A bias
    of the keys cancels out. Tokens come first in the shape: each is contiguous, and taking one copies nothing.
    """

    def __init__(self, size: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(size)
        self.query = nn.Linear(size, size)
        self.key_value = nn.Linear(size, 2 * size)
        self.output = nn.Linear(size, size)
        self.feedforward_norm = nn.LayerNorm(size)
        self.feedforward = nn.Sequential(nn.Linear(size, feedforward), nn.GELU(), nn.Linear(feedforward, size))
        self.dropout = Dropout(dropout)

    def forward(self, tokens_TBE: Tensor, queries: int) -> Tensor:
        """New states of the first `queries` tokens, each of which attends to both: (queries, B, E)."""
        mixed_QBE = self._attend(self.attention_norm(tokens_TBE), queries)
        tokens_QBE = tokens_TBE if queries == 2 else tokens_TBE[:queries]
        states_QBE = tokens_QBE + self.dropout(self.output(mixed_QBE))
        return states_QBE + self.dropout(self.feedforward(self.feedforward_norm(states_QBE)))

    def _attend(self, normed_TBE: Tensor, queries: int) -> Tensor:
        """Values of both tokens, mixed for each query: (queries, B, E)."""
        first_BE, second_BE = normed_TBE.unbind(0)
        key_weight, value_weight = self.key_value.weight.chunk(2)
        query_QBHD = self._split(self.query(normed_TBE if queries == 2 else first_BE.unsqueeze(0)))
        key_gap_BHD = self._split(F.linear(first_BE - second_BE, key_weight))
        value_TBHD = self._split(F.linear(normed_TBE, value_weight, self.key_value.bias.chunk(2)[1]))
        scale = 1 / math.sqrt(query_QBHD.shape[-1])
        first_QBH1 = (scale * (query_QBHD * key_gap_BHD).sum(dim=-1, keepdim=True)).sigmoid()
        first_value_BHD, second_value_BHD = value_TBHD.unbind(0)
        return torch.lerp(second_value_BHD, first_value_BHD, first_QBH1).flatten(2)

    def _split(self, states: Tensor) -> Tensor:
        """(..., E) to (..., H, D) with D = E / H."""
        return states.unflatten(-1, (self.heads, -1))


class PairEncoder(nn.Module):
    """q(z|x): the pair's user and item embeddings, as two tokens, to the latent's mean and log-variance (Eq. 1)."""

    def __init__(self, config: Stage1Config) -> None:
        super().__init__()
        size = config.embedding_size
        self.token_type = nn.Parameter(torch.randn(2, size) * EMBEDDING_STD)
        self.layers = nn.ModuleList(
            PairLayer(size, config.encoder_heads, config.encoder_feedforward, config.dropout)
            for _ in range(config.encoder_layers)
        )
        self.norm = nn.LayerNorm(size)
        self.mean = nn.Linear(size, config.latent_size)
        self.log_variance = nn.Linear(size, config.latent_size)
        nn.init.normal_(self.log_variance.weight, std=0.01)
        nn.init.constant_(self.log_variance.bias, INITIAL_LOG_VAR)

    def forward(self, user_BE: Tensor, item_BE: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings to (mu_BL, log_var_BL)."""
        states_TBE = torch.stack([user_BE, item_BE]) + self.token_type.unsqueeze(1)
        for layer in self.layers[:-1]:
            states_TBE = layer(states_TBE, queries=2)
        # Only the user token is read out, and it attends to both: the last layer need not compute the item's.
        summary_BE = self.norm(self.layers[-1](states_TBE, queries=1).squeeze(0))
        return self.mean(summary_BE), bounded(self.log_variance(summary_BE), LOG_VAR_BOUND)


class MixturePrior(nn.Module):
    """p(z, c) of Eq. 5 and 6: K Gaussians with diagonal covariance. All arithmetic in float32 log space.

    At 128 dimensions a density underflows to zero in float32, and every responsibility computed from
    densities becomes uniform; log densities and log-sum-exp stay exact.
    """

    def __init__(self, clusters: int, latent_size: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(clusters))
        self.means = nn.Parameter(torch.randn(clusters, latent_size) * EMBEDDING_STD)
        self.raw_log_variances = nn.Parameter(torch.zeros(clusters, latent_size))

    @property
    def log_weights(self) -> Tensor:
        """log pi, (K,)."""
        return self.logits.float().log_softmax(dim=0)

    @property
    def log_variances(self) -> Tensor:
        """(K, L)."""
        return bounded(self.raw_log_variances.float(), MIXTURE_LOG_VAR_BOUND)

    @torch.no_grad()
    def set(self, weights_K: Tensor, means_KL: Tensor, variances_KL: Tensor) -> None:
        """Take over a fitted mixture; variances outside the bounds of this class are moved to them."""
        limit = 0.99 * MIXTURE_LOG_VAR_BOUND
        log_var = variances_KL.double().log().clamp(-limit, limit)
        self.logits.copy_(weights_K.double().clamp_min(1e-12).log())
        self.means.copy_(means_KL)
        self.raw_log_variances.copy_(MIXTURE_LOG_VAR_BOUND * torch.atanh(log_var / MIXTURE_LOG_VAR_BOUND))

    def log_density(self, z_BL: Tensor) -> Tensor:
        """log N(z | c) for every cluster: (B, K)."""
        return self.expected_log_density(z_BL, None)

    def expected_log_density(self, mu_BL: Tensor, log_var_BL: Tensor | None) -> Tensor:
        """E[log N(z | c)] under z ~ N(mu, exp(log_var)), in closed form; a point where log_var is None: (B, K)."""
        distance_BKL = (mu_BL.float().unsqueeze(1) - self.means.float()).square()
        if log_var_BL is not None:
            distance_BKL = distance_BKL + log_var_BL.float().exp().unsqueeze(1)
        log_var_KL = self.log_variances
        return -0.5 * (LOG_2PI + log_var_KL + distance_BKL * torch.exp(-log_var_KL)).sum(dim=-1)

    def log_responsibilities(self, z_BL: Tensor) -> Tensor:
        """log gamma of Eq. 8: (B, K) float32."""
        return (self.log_weights + self.log_density(z_BL)).log_softmax(dim=-1)


class VaeGmm(nn.Module):
    """Stage 1's model: embedding tables, encoder, decoder and mixture prior.

    Args:
        n_users, n_items: numbers of known ids; the tables have one row more, the last, for all unknown ids.
        likelihood: p(x|z). categorical: over `rating_values`. bernoulli: of the rating's position between the ends of
            `rating_values`, (0, 1) for implicit data. gaussian: of the rating, with a learned noise, around the
            decoder's output plus the pair's bias (`config.rating_biases`).
        rating_values: the rating scale in ascending order, or its two ends.
        hash_seed: seed of the functions that hash ids to rows, for hashed tables alone.
        make_table: makes the tables for training; None: as the config says.
    """

    rating_scale: Tensor

    def __init__(
        self,
        config: Stage1Config,
        n_users: int,
        n_items: int,
        likelihood: Likelihood,
        rating_values: Sequence[float],
        hash_seed: int = 0,
        make_table: MakeTable | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.n_users, self.n_items = n_users, n_items
        self.likelihood: Likelihood = likelihood
        self.rating_values = tuple(float(value) for value in rating_values)
        if len(self.rating_values) < 2 or list(self.rating_values) != sorted(set(self.rating_values)):
            raise ValueError(f"rating_values: {rating_values}: at least two ascending values are needed")
        self.layout = TableLayout.of(config, n_users, n_items, hash_seed)
        make = make_table or self.layout.make
        self.user_embedding = make("user", n_users, config.embedding_size, EMBEDDING_STD)
        self.item_embedding = make("item", n_items, config.embedding_size, EMBEDDING_STD)
        self.encoder = PairEncoder(config)
        outputs = len(self.rating_values) if likelihood == "categorical" else 1
        self.decoder = nn.Sequential(
            nn.Linear(config.latent_size, config.decoder_hidden),
            nn.GELU(),
            Dropout(config.dropout),
            nn.Linear(config.decoder_hidden, outputs),
        )
        # with a dimension: DeepSpeed sends parameters viewed as bytes, which torch refuses for a 0-dimensional tensor
        self.log_noise = nn.Parameter(torch.zeros(1)) if likelihood == "gaussian" else None
        self.register_load_state_dict_pre_hook(_widen_noise)
        # Parameters, so that every engine keeps and saves them, but none that a gradient changes.
        biased = config.rating_biases and likelihood == "gaussian"
        self.user_bias = _frozen(n_users + 1) if biased else None
        self.item_bias = _frozen(n_items + 1) if biased else None
        self.prior = MixturePrior(config.clusters, config.latent_size)
        self.register_buffer("rating_scale", torch.tensor(self.rating_values), persistent=False)

    def to_spec(self) -> dict[str, Any]:
        """The constructor's arguments as plain JSON values."""
        hashed = {"hash_seed": self.layout.seed} if self.layout.kind == "hashed" else {}
        return hashed | {
            "config": self.config.model_dump(mode="json"),
            "n_users": self.n_users,
            "n_items": self.n_items,
            "likelihood": self.likelihood,
            "rating_values": list(self.rating_values),
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> "VaeGmm":
        """Rebuild a model, with fresh weights, from `to_spec`'s value; one of a version before biases has none."""
        return cls(**{**spec, "config": Stage1Config.model_validate({"rating_biases": False} | spec["config"])})

    def embed(self, user_B: Tensor, item_B: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors of both tables, (B, E) each; indices at or above the known counts take the unknown row."""
        user_BE = self.user_embedding(user_B.long().clamp(max=self.n_users))
        return user_BE, self.item_embedding(item_B.long().clamp(max=self.n_items))

    def encode(self, user_B: Tensor, item_B: Tensor) -> tuple[Tensor, Tensor]:
        """(mu_BL, log_var_BL) of Eq. 1."""
        mu_BL, log_var_BL = self.encoder(*self.embed(user_B, item_B))
        return mu_BL, log_var_BL

    def log_responsibilities(self, z_BL: Tensor) -> Tensor:
        """log gamma (Eq. 8): (B, K) float32."""
        return self.prior.log_responsibilities(z_BL)

    def responsibilities(self, z_BL: Tensor) -> Tensor:
        """gamma (Eq. 8): (B, K) float32, rows sum to 1."""
        return self.log_responsibilities(z_BL).exp()

    def bias(self, user_B: Tensor, item_B: Tensor) -> Tensor | None:
        """What the ids alone say of the rating, (B,), on the decoder's scale of -1 to 1; None for a model without."""
        if self.user_bias is None or self.item_bias is None:
            return None
        user_bias_B = self.user_bias[user_B.long().clamp(max=self.n_users)]
        return user_bias_B + self.item_bias[item_B.long().clamp(max=self.n_items)]

    @torch.no_grad()
    def set_biases(self, mean: float, user_U: np.ndarray, item_I: np.ndarray) -> None:
        """Take over a user + item bias model in rating units; unknown users and items have an effect of 0."""
        assert self.user_bias is not None
        assert self.item_bias is not None
        low, high = self.rating_values[0], self.rating_values[-1]
        middle, half = (low + high) / 2, (high - low) / 2
        # The mean stands with the users: a pair adds one of each.
        self.user_bias.copy_(torch.from_numpy((np.append(user_U, 0.0) + mean - middle) / half))
        self.item_bias.copy_(torch.from_numpy(np.append(item_I, 0.0) / half))

    def decode(self, z_BL: Tensor, bias_B: Tensor | None) -> Tensor:
        """The likelihood's parameters (Eq. 3): (B, R) logits, or for gaussian the mean on a scale of -1 to 1.

        Args:
            bias_B: the pairs' `bias`; None: what the latent alone says.
        """
        output_BR: Tensor = self.decoder(z_BL)
        return output_BR if bias_B is None else output_BR + bias_B.unsqueeze(-1)

    def predict_rating(self, user_B: Tensor, item_B: Tensor) -> Tensor:
        """Expected rating at z = mu, (B,); the probability of interaction for implicit data."""
        return self.expected_rating(self.decode(self.encode(user_B, item_B)[0], self.bias(user_B, item_B)))

    def expected_rating(self, output_BR: Tensor) -> Tensor:
        """Mean of p(x|z) in rating units, (B,), from the decoder's output; never off the scale."""
        return self.mean_rating(output_BR).clamp(self.rating_values[0], self.rating_values[-1])

    def mean_rating(self, output_BR: Tensor) -> Tensor:
        """Mean of p(x|z) in rating units, (B,); a gaussian's may lie off the scale."""
        if self.likelihood == "categorical":
            return output_BR.softmax(dim=-1) @ self.rating_scale
        low, high = self.rating_values[0], self.rating_values[-1]
        position_B = output_BR[:, 0].sigmoid() if self.likelihood == "bernoulli" else (output_BR[:, 0] + 1) / 2
        return low + (high - low) * position_B

    def rating_variance(self, output_BR: Tensor) -> Tensor:
        """Variance of p(x|z) in rating units, squared: (B,)."""
        low, high = self.rating_values[0], self.rating_values[-1]
        if self.likelihood == "categorical":
            share_BR = output_BR.softmax(dim=-1)
            return share_BR @ self.rating_scale.square() - (share_BR @ self.rating_scale).square()
        if self.likelihood == "bernoulli":
            position_B = output_BR[:, 0].sigmoid()
            return (high - low) ** 2 * position_B * (1 - position_B)
        assert self.log_noise is not None
        return bounded(self.log_noise, LOG_VAR_BOUND).exp().expand(len(output_BR))

    def log_likelihood(self, output_BR: Tensor, rating_B: Tensor) -> Tensor:
        """log p(x|z), (B,), from the decoder's output and the ratings."""
        if self.likelihood == "categorical":
            nearest_B = (rating_B.unsqueeze(-1) - self.rating_scale).abs().argmin(dim=-1)
            return -F.cross_entropy(output_BR, nearest_B, reduction="none")
        if self.likelihood == "bernoulli":
            low, high = self.rating_values[0], self.rating_values[-1]
            target_B = (rating_B - low) / (high - low)
            return -F.binary_cross_entropy_with_logits(output_BR[:, 0], target_B, reduction="none")
        assert self.log_noise is not None
        log_var = bounded(self.log_noise, LOG_VAR_BOUND)
        error_B = rating_B - self.mean_rating(output_BR)
        return -0.5 * (LOG_2PI + log_var + error_B.square() * torch.exp(-log_var))

    def sample(self, mu_BL: Tensor, log_var_BL: Tensor, noise_BL: Tensor) -> Tensor:
        """z of Eq. 2 for standard normal noise."""
        return mu_BL + noise_BL * torch.exp(0.5 * log_var_BL)

    def pair_elbo(
        self,
        mu_BL: Tensor,
        log_var_BL: Tensor,
        z_BL: Tensor,
        bias_B: Tensor | None,
        rating_B: Tensor,
        beta: float,
    ) -> ElboTerms:
        """The bound of every pair (Eq. 15, 16) from its q(z|x), one sample z of it, and its `bias`.

        q(c|x) is the responsibilities at z, as in VaDE; given it, all but the reconstruction is in closed form.
        """
        reconstruction_B = self.log_likelihood(self.decode(z_BL, bias_B), rating_B)
        log_gamma_BK = self.log_responsibilities(z_BL)
        gamma_BK = log_gamma_BK.exp()
        log_p_z_B = (gamma_BK * self.prior.expected_log_density(mu_BL, log_var_BL)).sum(dim=-1)
        log_p_c_B = (gamma_BK * self.prior.log_weights).sum(dim=-1)
        log_q_z_B = -0.5 * (LOG_2PI + 1 + log_var_BL.float()).sum(dim=-1)
        log_q_c_B = (gamma_BK * log_gamma_BK).sum(dim=-1)
        kl_B = log_q_z_B + log_q_c_B - log_p_z_B - log_p_c_B
        loss_B = beta * kl_B - reconstruction_B
        return ElboTerms(loss_B, reconstruction_B, log_p_z_B, log_p_c_B, log_q_z_B, log_q_c_B, kl_B)

    def elbo(
        self, user_B: Tensor, item_B: Tensor, rating_B: Tensor, beta: float, generator: torch.Generator | None = None
    ) -> ElboTerms:
        """Means over the batch of the bound and its terms, at one sample of z per pair drawn from `generator`."""
        mu_BL, log_var_BL = self.encode(user_B, item_B)
        noise_BL = torch.randn(mu_BL.shape, generator=generator, device=mu_BL.device)
        z_BL = self.sample(mu_BL, log_var_BL, noise_BL)
        return self.pair_elbo(mu_BL, log_var_BL, z_BL, self.bias(user_B, item_B), rating_B, beta).mean()


def _widen_noise(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Read the noise of models written when it had no dimension."""
    name = f"{prefix}log_noise"
    if name in state and state[name].ndim == 0:
        state[name] = state[name].reshape(1)


def bounded(value: Tensor, bound: float) -> Tensor:
    """`value` near zero, bent smoothly to stay within +-bound, so that no gradient is cut off."""
    return bound * torch.tanh(value / bound)


def _frozen(size: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(size), requires_grad=False)
