"""Stage 1's training loop: pretrain the autoencoder, fit the mixture to its latents, then raise the ELBO.

It runs as one of `context.world_size` workers. Every random choice is a function of (seed, epoch, place in the
epoch), so that a resumed run equals one that never stopped, and workers only share out the same global batches.
"""

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from gavamoe.artifacts.tensor_files import load_tensors
from gavamoe.config.schema import RunConfig, Stage1Config
from gavamoe.data.dataset import Dataset
from gavamoe.errors import InputError, RunError
from gavamoe.model.tables.layout import MakeTable
from gavamoe.runtime.context import Context
from gavamoe.stage1.mixture_init import (
    SAMPLE,
    UserClusters,
    cluster_users,
    fit_pairs,
    mixture_of_users,
)
from gavamoe.stage1.pair_stream import Epoch, Pairs, PairSource, global_batches, worker_slices
from gavamoe.stage1.rating_biases import fit_biases, shrink_interaction
from gavamoe.stage1.sharding.held_tables import hold, table_maker
from gavamoe.stage1.sparse_adam import GradientSum, clip_gradients
from gavamoe.stage1.spectral_init import add_clusters, init_embeddings
from gavamoe.stage1.user_words import UserWords
from gavamoe.stage1.vae_gmm import Likelihood, VaeGmm
from gavamoe.stage1.validation import Validation, collapse_warnings, validate

CHECKPOINT_FILE = "stage1.pt"
LOGS_PER_EPOCH = 10
FINAL_RATE = 0.05
"""Share of the learning rates with which a linear schedule ends."""


def build_model(config: RunConfig, dataset: Dataset, make_table: MakeTable | None = None) -> VaeGmm:
    """The untrained model for a dataset, its weights a function of the seed."""
    likelihood, values = rating_model(config.stage1, dataset)
    torch.manual_seed(config.seed)
    catalog = dataset.catalog
    sizes = (catalog.known_users, catalog.known_items)
    return VaeGmm(config.stage1, *sizes, likelihood, values, config.seed, make_table)


def rating_model(config: Stage1Config, dataset: Dataset) -> tuple[Likelihood, tuple[float, ...]]:
    """p(x|z) and its rating values, resolved for a dataset.

    Raises:
        InputError: the configured likelihood cannot describe the dataset's ratings.
    """
    wanted = config.likelihood
    if dataset.implicit:
        if wanted not in ("auto", "bernoulli"):
            raise InputError(f"stage1.likelihood: {wanted} needs ratings, and {dataset.path} has none; use bernoulli")
        return "bernoulli", (0.0, 1.0)
    scale, ends = dataset.rating_values, dataset.rating_range
    if ends is None or ends[0] >= ends[1]:
        raise InputError(f"{dataset.path}: all ratings are equal ({ends}); there is nothing for stage 1 to learn")
    if wanted == "categorical" and scale is None:
        raise InputError(
            f"stage1.likelihood: categorical needs a scale of few values; ratings of {dataset.path} are continuous"
        )
    if wanted == "bernoulli":
        return "bernoulli", ends
    if wanted == "categorical" and scale is not None:
        return "categorical", scale
    return "gaussian", ends


class Trainer:
    """One worker's training state."""

    def __init__(self, config: RunConfig, dataset: Dataset, context: Context) -> None:
        stage1 = config.stage1
        self.run_config, self.config, self.dataset, self.context = config, stage1, dataset, context
        self.source = PairSource(
            dataset, negatives=stage1.negatives, unknown_rate=stage1.unknown_id_rate, seed=config.seed
        )
        self.held_out = self.source.held_out("valid")
        self.words = UserWords.read(dataset, stage1.vocabulary) if stage1.word_evidence else None
        self.model = build_model(config, dataset, table_maker(stage1, context)).to(context.device)
        self.tables = hold(self.model, stage1, dataset.fingerprint)
        self._make_optimizers()
        if context.resume_from is None:
            if context.rank == 0 and self.model.user_bias is not None:
                biases = fit_biases(self.source.observed, self.model.n_users, self.model.n_items)
                self.model.set_biases(biases.mean, biases.user, biases.item)
            if stage1.embedding_init == "spectral":
                init_embeddings(self.model, self.source.observed, config.seed, context.rank)
        self._share_parameters()
        self.user_clusters: UserClusters | None = None
        """q(c|u) in the ELBO phase, unless `user_agreement` is 0."""
        self.epoch = 0
        """Epochs done, pretraining included."""
        self.step = 0
        self.best: dict[str, Any] = {"loss": float("inf"), "epoch": -1, "model": None}
        self.history: list[dict[str, Any]] = []
        self.interaction_scale = 1.0
        """What the decoder's part of the ratings was multiplied by at the end, see `shrink_interaction`."""

    @property
    def total_epochs(self) -> int:
        """Epochs of both phases, if training is not stopped early."""
        return self.config.pretrain_epochs + self.config.epochs

    @property
    def stopped_early(self) -> bool:
        """Whether `patience` ELBO epochs went by without a better validation ELBO."""
        waited = self.epoch - 1 - self.best["epoch"]
        return bool(self.config.patience and self.best["model"] is not None and waited >= self.config.patience)

    def run(self) -> None:
        """Train to the end and put the best state into the model."""
        while self.epoch < self.total_epochs and not self.stopped_early:
            if self.epoch == self.config.pretrain_epochs:
                self._init_mixture()
            self._train_epoch()
            self._after_epoch()
        self.tables.restore_best(self.best["model"])
        self.interaction_scale = shrink_interaction(self.model, self.held_out, self.context.device)

    def _make_optimizers(self) -> None:
        config, model = self.config, self.model
        mixture = list(model.prior.parameters())
        others = {id(parameter) for parameter in self.tables.parameters + mixture}
        network = [each for each in model.parameters() if each.requires_grad and id(each) not in others]
        self.dense = network + mixture
        self.sum_gradients = GradientSum(self.dense, self.tables.shared, self.tables.lookups)
        groups = [
            {"params": network, "lr": config.learning_rate, "weight_decay": config.weight_decay},
            {"params": mixture, "lr": config.mixture_learning_rate, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.row_optimizer = self.tables.optimizer

    def _train_epoch(self) -> None:
        config, context = self.config, self.context
        pretraining = self.epoch < config.pretrain_epochs
        pairs = self.source.epoch(self.epoch)
        batches = list(global_batches(pairs.size, config.batch_size))
        noise = torch.Generator().manual_seed(_stream(self.run_config.seed, self.epoch))
        torch.manual_seed(_stream(self.run_config.seed, self.epoch, context.rank))  # of dropout
        self.model.train()
        started, log_every = time.perf_counter(), max(1, len(batches) // LOGS_PER_EPOCH)
        for index, rows in enumerate(batches):
            beta = None if pretraining else self._beta(index / len(batches))
            self._set_rates(index / len(batches))
            noise_BL = torch.randn(rows.stop - rows.start, config.latent_size, generator=noise)
            terms = self._train_step(pairs, rows, beta, noise_BL)
            self.step += 1
            if (index + 1) % log_every == 0 or index + 1 == len(batches):
                self._log_step(terms, beta, len(batches), rows.stop / (time.perf_counter() - started))

    def _train_step(self, pairs: Epoch, rows: slice, beta: float | None, noise_BL: Tensor) -> dict[str, Tensor]:
        """One optimizer step on one global batch, of which this worker computes its slice."""
        slices = worker_slices(rows, self.context.world_size)
        local = slices[self.context.rank]
        user_B, item_B, rating_B = (torch.tensor(column, device=self.context.device) for column in pairs.take(local))
        mu_BL, log_var_BL = self.model.encode(user_B, item_B)
        bias_B = self.model.bias(user_B, item_B)
        # Slices may differ by a pair, so losses are summed over a slice and divided by the size of the GLOBAL batch:
        # the sum of the workers' gradients is then the gradient of the mean, on any number of workers.
        share = 1 / (rows.stop - rows.start)
        if beta is None:
            # Pretraining: a plain autoencoder, at z = mu and without a prior.
            loss = -self.model.log_likelihood(self.model.decode(mu_BL, bias_B), rating_B).sum() * share
            parts = {"loss": loss.detach()}
        else:
            # The noise was drawn for the global batch: a pair has the same sample of z whichever worker computes it.
            local_noise_BL = noise_BL[local.start - rows.start : local.stop - rows.start].to(self.context.device)
            z_BL = self.model.sample(mu_BL, log_var_BL, local_noise_BL)
            terms = self.model.pair_elbo(mu_BL, log_var_BL, z_BL, bias_B, rating_B, beta)
            loss = terms.loss.sum() * share
            parts = {name: value.detach().sum() * share for name, value in terms._asdict().items()}
            if self.user_clusters is not None:
                # q(c|u) is fixed during an epoch. This one's evidence moves users between clusters after it, while
                # the KL term pulls each pair's responsibilities toward its user's present cluster.
                self.user_clusters.add(user_B, self.model.prior.expected_log_density(mu_BL, log_var_BL))
                apart_B = self.user_clusters.disagreement(user_B, self.model.log_responsibilities(z_BL))
                parts["disagreement"] = apart_B.detach().sum() * share
                loss = loss + self.config.user_agreement * apart_B.sum() * share
        loss.backward()
        # Clipping needs the joint norm of the summed gradients: first the exchange, then the norm, then the step.
        self.sum_gradients([piece.stop - piece.start for piece in slices])
        self.tables.collect_gradients()
        norm = clip_gradients(self.dense, self.tables.parameters, self.config.clip_norm, self.tables.over_workers)
        if not torch.isfinite(norm):
            raise RunError(f"stage 1, step {self.step}: the gradient is not finite; lower stage1.learning_rate")
        for optimizer in (self.optimizer, self.row_optimizer):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return {**parts, "gradient_norm": norm}

    def _beta(self, progress: float) -> float:
        """The KL's weight at `progress` (0 to 1) in the present epoch, growing linearly over the warm-up."""
        done = self.epoch - self.config.pretrain_epochs + progress
        warmup = self.config.beta_warmup_epochs
        return self.config.beta * (min(1.0, done / warmup) if warmup else 1.0)

    def _set_rates(self, progress: float) -> None:
        """Set both learning rates to their values at `progress` (0 to 1) in the present epoch."""
        config, done = self.config, (self.epoch + progress) / self.total_epochs
        share = 1 - (1 - FINAL_RATE) * done if config.schedule == "linear" else 1.0
        network, mixture = self.optimizer.param_groups
        rows = self.row_optimizer.param_groups[0]
        network["lr"] = rows["lr"] = share * config.learning_rate
        mixture["lr"] = share * config.mixture_learning_rate

    def _log_step(self, parts: Mapping[str, Tensor], beta: float | None, steps: int, rate: float) -> None:
        """Log one step: the global batch's loss and terms (summed over the workers), pairs per second."""
        names = [name for name in parts if name != "gradient_norm"]
        values = torch.stack([parts[name] for name in names])
        if self.context.world_size > 1:
            dist.all_reduce(values)
        self.context.log(
            {
                "phase": "stage1-pretrain" if beta is None else "stage1",
                "step": self.step,
                "steps": steps * self.total_epochs,
                "epoch": self.epoch,
                **dict(zip(names, values.tolist(), strict=True)),
                "beta": beta or 0.0,
                "gradient_norm": float(parts["gradient_norm"]),
                "pairs_per_second": rate,
            }
        )

    @torch.no_grad()
    def _init_mixture(self) -> None:
        """Cluster the users of the pretrained model, and fit the mixture to the latents: on rank 0, for every rank.

        What reads embeddings is done by all ranks, since each may hold some of the rows.
        """
        config, seed = self.config, self.run_config.seed
        if config.mixture_init == "random":
            return
        sample = self.source.sample(SAMPLE, np.random.default_rng([seed, 1]))
        shares, weight = None, from_rank_0(self.context, self._rating_weight(), lambda own: own)
        if config.user_agreement:
            points = self.tables.user_points(config.clusters, self.context.rank)
            shares = from_rank_0(self.context, points, lambda own: cluster_users(own, config, seed, self.words, weight))
            if self.words is not None:
                add_clusters(self.model, shares, seed)
        mu_NL, var_NL = self._latents(sample)
        if self.context.rank == 0:
            mixture = fit_pairs(mu_NL, config, seed) if shares is None else mixture_of_users(mu_NL, sample.user, shares)
            variances_KL = mixture.variances_KL + var_NL.mean(axis=0)
            self.model.prior.set(*map(torch.from_numpy, (mixture.weights_K, mixture.means_KL, variances_KL)))
        self._share_parameters()
        self.user_clusters = None if shares is None else self._user_clusters(shares, weight)

    def _user_clusters(self, user_shares: np.ndarray, rating_weight: float) -> UserClusters:
        return UserClusters(user_shares, self.words, self.config.word_evidence, rating_weight)

    def _rating_weight(self) -> float:
        """How much ratings count as evidence of users' clusters beside words: the nats that users' latents add to what
        is known of held-out ratings, over those that a cluster is worth; at most 1, and 1 without words or held-out
        pairs. Densities of embeddings have no such measure: where ratings hold no taste, they tell outliers apart.
        """
        if self.words is None or not self.held_out.size or self.config.clusters < 2:
            return 1.0
        pairs = self.held_out.take(slice(0, SAMPLE))
        user_N, item_N, rating_N = (torch.tensor(column, device=self.context.device) for column in pairs)
        other_N = user_N[torch.randperm(len(user_N), generator=torch.Generator().manual_seed(self.run_config.seed))]
        bias_N = self.model.bias(user_N, item_N)
        own, other = (
            self.model.log_likelihood(self.model.decode(self.model.encode(users_N, item_N)[0], bias_N), rating_N).mean()
            for users_N in (user_N, other_N)
        )
        pairs_per_user = self.source.size / self.model.n_users
        return min(1.0, max(0.0, float(own - other)) * pairs_per_user / math.log(self.config.clusters))

    def _latents(self, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
        """Means and variances of q(z|x), float64 (N, L) each."""
        self.model.eval()
        ids = (torch.tensor(column, device=self.context.device).split(4096) for column in pairs[:2])
        parts = [self.model.encode(user_B, item_B) for user_B, item_B in zip(*ids, strict=True)]
        mu_NL, log_var_NL = (torch.cat(column).double().cpu() for column in zip(*parts, strict=True))
        return mu_NL.numpy(), log_var_NL.exp().numpy()

    def _share_parameters(self) -> None:
        """Give every rank rank 0's parameters, but for rows that each has its own of."""
        if self.context.world_size > 1:
            own = {id(each) for each in self.tables.parameters} - {id(each) for each in self.tables.shared}
            for parameter in self.model.parameters():
                if id(parameter) not in own:
                    dist.broadcast(parameter.data, src=0)

    def _after_epoch(self) -> None:
        """Move users between clusters, validate, keep the best state, log, register a checkpoint."""
        config = self.config
        if self.user_clusters is not None:
            self.user_clusters.update(self.model.prior.log_weights, self.context.world_size, self.context.device)
        phase = "pretrain" if self.epoch < config.pretrain_epochs else "elbo"
        held_out = validate(self.model, self.held_out, config.beta, self.context)
        numbers = held_out.numbers()
        self.history.append({"epoch": self.epoch, "phase": phase, **numbers})
        if phase == "elbo" and held_out.loss <= self.best["loss"]:  # always, where there is nothing to validate on
            state = self.tables.keep_best(self.best["model"])
            self.best = {"loss": held_out.loss, "epoch": self.epoch, "model": state}
        self.epoch += 1
        log = {f"valid_{name}": value for name, value in numbers.items() if isinstance(value, float)}
        self.context.log({"phase": f"stage1-{phase}-valid", "step": self.step, "epoch": self.epoch, **log})
        if phase == "elbo" and held_out.pairs:
            self._guard(held_out)
        self._save(log)

    def _guard(self, held_out: Validation) -> None:
        """Log signs of a collapse; stop there if the config says so."""
        for warning in collapse_warnings(held_out, self.config):
            self.context.log({"phase": "stage1", "step": self.step, "epoch": self.epoch, "warning": warning})
            if self.config.on_collapse == "stop" and self._beta(0.0) >= self.config.beta:
                raise RunError(f"stage 1, epoch {self.epoch}: {warning}")

    def _save(self, metrics: Mapping[str, float]) -> None:
        """Register a checkpoint; rank 0 has the file, for all ranks hold the same state but for rows of their own."""
        with tempfile.TemporaryDirectory() as folder:
            rows = self.tables.save(Path(folder), best=self.best["model"] is not None)
            if self.context.rank == 0:
                torch.save(self._state(rows), Path(folder) / CHECKPOINT_FILE)
            self.context.checkpoint(Path(folder), {"epoch": self.epoch, "step": self.step, **metrics})

    def _state(self, rows: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "dataset": self.dataset.fingerprint,
            "config": self.config.model_dump(mode="json"),
            "seed": self.run_config.seed,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "row_optimizer": rows,
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "history": self.history,
            "user_clusters": None if self.user_clusters is None else self.user_clusters.log_q,
            "rating_weight": None if self.user_clusters is None else self.user_clusters.rating_weight,
        }

    def restore(self, folder: Path) -> None:
        """Take over a checkpoint's state.

        Raises:
            InputError: the checkpoint is missing or belongs to another dataset, seed or config.
        """
        path = folder / CHECKPOINT_FILE
        if not path.is_file():
            raise InputError(f"{path}: no such checkpoint file; start without --resume")
        state = load_tensors(path, self.context.device)
        present = self._state(None)
        for name in ("dataset", "seed", "config"):
            if state[name] != present[name]:
                raise InputError(f"{path}: {_difference(name, state[name], present[name])}; start without --resume")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.tables.load(folder, state["row_optimizer"], best=state["best"]["model"] is not None)
        self.epoch, self.step = state["epoch"], state["step"]
        self.best, self.history = state["best"], state["history"]
        if state["user_clusters"] is not None:
            shares_UK = state["user_clusters"][:-1].exp().double().cpu().numpy()
            self.user_clusters = self._user_clusters(shares_UK, state["rating_weight"])
            self.user_clusters.log_q = state["user_clusters"].cpu()


def from_rank_0(context: Context, value: Any, make: Callable[[Any], Any]) -> Any:
    """What rank 0 makes of its value, on every rank."""
    if context.world_size == 1:
        return make(value)
    box = [make(value) if context.rank == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _stream(*parts: int) -> int:
    """A 63-bit seed from whole numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def _difference(name: str, saved: Any, present: Any) -> str:
    if name != "config":
        return f"made with {name} {saved}, not {present}"
    field = next(key for key in present if saved.get(key) != present[key])
    return f"made with stage1.{field} {saved.get(field)}, not {present[field]}"
