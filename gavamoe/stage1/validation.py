"""Stage 1's scores on held-out pairs, and the signs that its clusters or its latent have collapsed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from gavamoe.config.schema import Stage1Config
from gavamoe.stage1.pair_stream import PairFile, Pairs
from gavamoe.stage1.user_words import LITTLE
from gavamoe.stage1.vae_gmm import ElboTerms, VaeGmm

_BATCH_SIZE = 4096
_ACTIVE_VARIANCE = 0.01
"""A latent dimension is active when the means of q(z|x) vary more than this over the pairs (Burda et al. 2015)."""
LEAST_CLUSTERS = 1.5
"""Effective clusters below which gates chosen by them can't be compared with one gate."""
LEAST_GAIN = 1e-4
"""Share of the biases' RMSE by which stage 1's has to be lower to be better."""
_MIN_KL = 0.1
"""Nats per pair; less means that q(z|x) is the prior, whatever the pair."""


class Worker(Protocol):
    """The part of a `Context` that validation needs: which worker this is, of how many, on what device."""

    rank: int
    world_size: int
    device: str


@dataclass(frozen=True)
class Validation:
    """Stage 1's scores: means over the held-out pairs."""

    terms: dict[str, float]
    """The ELBO's parts by name (`ElboTerms`), at the full beta."""
    rmse: float
    """RMSE of the expected ratings."""
    mae: float
    """Mean absolute error of the expected ratings."""
    constant_rmse: float
    """RMSE of these pairs' mean rating: the error of a prediction that knows nothing about a pair."""
    cluster_shares: list[float]
    """Share of the pairs routed to each cluster."""
    active_dimensions: int
    """Number of latent dimensions that vary with the pair."""
    pairs: int
    """Number of held-out pairs."""

    @property
    def loss(self) -> float:
        """-ELBO at the full beta; lower is better."""
        return self.terms["loss"]

    def numbers(self) -> dict[str, Any]:
        """For JSON: the terms beside the rest, the bound itself as "elbo"."""
        rest = {name: value for name, value in self.__dict__.items() if name != "terms"}
        return {"elbo": -self.loss, **self.terms, **rest, "smallest_cluster_share": min(self.cluster_shares)}


@torch.no_grad()
def validate(model: VaeGmm, pairs: PairFile, beta: float, worker: Worker) -> Validation:
    """Measure a model on pairs, shared out over the workers; every worker returns the same numbers.

    The sample of z is seeded by a pair's place, so that the numbers of two epochs can be compared.
    """
    training = model.training
    model.eval()
    total = torch.zeros(len(_Sums.names(model)), dtype=torch.float64)
    # Every worker takes as many batches, the last perhaps empty: lookups in sharded tables are made together.
    for first in range(0, -(-pairs.size // _BATCH_SIZE), worker.world_size):
        index = first + worker.rank
        batch = pairs.take(slice(index * _BATCH_SIZE, (index + 1) * _BATCH_SIZE))
        total += _Sums.of(model, batch, beta, index, worker.device)
    model.train(training)
    if worker.world_size > 1:
        total = total.to(worker.device)
        dist.all_reduce(total)
    return _Sums.finish(model, total.cpu(), pairs.size)


class _Sums:
    """Sums over pairs in one float64 vector, so that one reduction adds up the workers' shares."""

    _SCALARS = (*ElboTerms._fields, "squared", "absolute", "rating", "rating_squared")

    @classmethod
    def names(cls, model: VaeGmm) -> list[str]:
        config = model.config
        vectors = ["cluster"] * config.clusters + ["mean"] * config.latent_size + ["mean_squared"] * config.latent_size
        return [*cls._SCALARS, *vectors]

    @classmethod
    def of(cls, model: VaeGmm, batch: Pairs, beta: float, index: int, device: str) -> Tensor:
        user_B, item_B, rating_B = (torch.tensor(column, device=device) for column in batch)
        mu_BL, log_var_BL = model.encode(user_B, item_B)
        noise_BL = torch.randn(mu_BL.shape, generator=torch.Generator().manual_seed(index)).to(device)
        z_BL = model.sample(mu_BL, log_var_BL, noise_BL)
        bias_B = model.bias(user_B, item_B)
        terms = model.pair_elbo(mu_BL, log_var_BL, z_BL, bias_B, rating_B, beta)
        error_B = model.expected_rating(model.decode(mu_BL, bias_B)) - rating_B
        scalars = [*terms, error_B.square(), error_B.abs(), rating_B, rating_B.square()]
        cluster_B = model.log_responsibilities(mu_BL).argmax(dim=-1)
        vectors = [
            torch.bincount(cluster_B, minlength=model.config.clusters).double(),
            mu_BL.double().sum(dim=0),
            mu_BL.double().square().sum(dim=0),
        ]
        return torch.cat([torch.stack([value.double().sum() for value in scalars]), *vectors]).cpu()

    @classmethod
    def finish(cls, model: VaeGmm, total: Tensor, count: int) -> Validation:
        means = total / max(count, 1)
        scalars = dict(zip(cls._SCALARS, means.tolist(), strict=False))
        sizes = [len(cls._SCALARS), model.config.clusters, model.config.latent_size, model.config.latent_size]
        _, shares_K, mean_L, square_L = means.split(sizes)
        return Validation(
            terms={name: scalars[name] for name in ElboTerms._fields},
            rmse=scalars["squared"] ** 0.5,
            mae=scalars["absolute"],
            constant_rmse=max(scalars["rating_squared"] - scalars["rating"] ** 2, 0.0) ** 0.5,
            cluster_shares=shares_K.tolist(),
            active_dimensions=int((square_L - mean_L.square() > _ACTIVE_VARIANCE).sum()),
            pairs=count,
        )


def idle_gates(metrics: Mapping[str, Any], clusters: int) -> list[str]:
    """Why gates chosen by these clusters would have nothing to do, with the remedy; empty when they would.

    Args:
        metrics: stage 1's metrics.json, whose entries of today may be missing.
        clusters: K.
    """
    found, told = metrics.get("effective_clusters"), metrics.get("information")
    if clusters < 2 or found is None:
        return []
    if found < LEAST_CLUSTERS:
        return [
            f"{found:.2f} of {clusters} clusters in effect: nearly all pairs are in one, so that the other gates never"
            " see a row; set stage1.clusters=1, or train on data whose users have more ratings and texts"
        ]
    if told is not None and told["nats"] < LITTLE:
        return [
            f"the clusters tell {max(told['nats'], 0):.3f} nats a word of held-out texts beyond clusters drawn at"
            f" random, less than {LITTLE}: as far as such clusters can tell, these users don't differ in what they"
            " write, and one gate would write as well; stage1.clusters=1 is the simpler choice"
        ]
    return []


def no_better_than_biases(metrics: Mapping[str, Any]) -> list[str]:
    """That ratings are predicted no better than by user and item biases alone, with the remedy; empty when they are.

    Args:
        metrics: stage 1's metrics.json, whose entries of today may be missing.
    """
    for split in ("test", "valid"):
        scores = metrics.get(split) or {}
        if (biases := scores.get("bias_rmse")) is not None:
            if scores["rmse"] < (1 - LEAST_GAIN) * biases:
                return []
            return [
                f"the {split} RMSE {scores['rmse']:.4f} is no better than that of user + item biases, {biases:.4f}: no"
                " taste beyond them is learned; try stage1.rating_biases=true, a lower stage1.beta or more epochs, or"
                " take the ratings for what the biases say"
            ]
    return []


def collapse_warnings(validation: Validation, config: Stage1Config) -> list[str]:
    """Signs of a collapse, with numbers and the remedy; empty when there are none."""
    warnings = []
    smallest = min(validation.cluster_shares)
    if smallest < config.min_cluster_share:
        warnings.append(
            f"cluster {validation.cluster_shares.index(smallest)} holds {smallest:.1%} of the pairs, less than"
            f" stage1.min_cluster_share {config.min_cluster_share:.1%}: lower stage1.clusters, or raise"
            " stage1.pretrain_epochs and stage1.mixture_restarts (with stage1.mixture_init gmm)"
        )
    if validation.terms["kl"] < _MIN_KL:
        warnings.append(
            f"the KL is {validation.terms['kl']:.3f} nats, less than {_MIN_KL}: the latent says nothing about a pair;"
            " lower stage1.beta or raise stage1.beta_warmup_epochs"
        )
    if validation.active_dimensions == 0:
        warnings.append(
            "no latent dimension is active (posterior collapse): lower stage1.beta, or raise stage1.pretrain_epochs"
        )
    if validation.rmse >= validation.constant_rmse:
        warnings.append(
            f"the RMSE {validation.rmse:.3f} is no better than that of a constant ({validation.constant_rmse:.3f}):"
            " nothing is learned; raise stage1.learning_rate or the epochs"
        )
    return warnings
