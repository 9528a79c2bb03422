"""Train stage 1 (section 3.4.1) and write its artifact.

`train_stage1` reads a dataset folder and writes the folder `stage1/`: vae_gmm.json, vae_gmm.safetensors,
routes.parquet, metrics.json, artifact.json. The loop itself is in `trainer`.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gavamoe.artifacts.files import write_folder, write_json
from gavamoe.artifacts.manifest import write_manifest
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import SPLITS, open_dataset
from gavamoe.model.tables.hashed import HashedTable
from gavamoe.runtime.context import Context
from gavamoe.stage1.artifact import save_vae_gmm
from gavamoe.stage1.pair_stream import BUCKET_PAIRS, PairFile, Pairs
from gavamoe.stage1.rating_biases import RatingBiases, fit_biases
from gavamoe.stage1.routes import ROUTES_FILE, route_pairs, training_routes, user_group_ari, write_routes
from gavamoe.stage1.strangers.fold_in import Crowd
from gavamoe.stage1.trainer import Trainer
from gavamoe.stage1.user_words import ClusterWords, UserWords, effective, information
from gavamoe.stage1.vae_gmm import VaeGmm
from gavamoe.stage1.validation import idle_gates, no_better_than_biases, validate

_SCORE_STEPS = 2**20


def train_stage1(config: RunConfig, dataset: Path, out: Path, context: Context) -> dict[str, Any]:
    """Train on this worker and, on rank 0, write the artifact `out` and return the metrics.

    The other ranks return {} at once: routing all pairs may take longer than a collective operation may last.

    Raises:
        InputError: the dataset or the checkpoint to resume from does not fit the config.
        RunError: the loss is no longer finite, or the clusters collapsed and `on_collapse` is "stop".
    """
    started = time.perf_counter()
    data = open_dataset(dataset)
    trainer = Trainer(config, data, context)
    if context.resume_from is not None:
        trainer.restore(context.resume_from)
    elif collisions := _collisions(trainer.model):
        numbers = {f"{table}_{name}": value for table, found in collisions.items() for name, value in found.items()}
        context.log({"phase": "stage1-tables", "step": 0, "epoch": 0, **numbers})
    trainer.run()
    if context.rank == 0:
        return _write_artifact(trainer, out, started)
    trainer.tables.publish(None)
    return {}


def _write_artifact(trainer: Trainer, out: Path, started: float) -> dict[str, Any]:
    """Route all pairs with the best model and write the folder whole."""
    with write_folder(out) as folder:
        trainer.tables.publish(folder)
        save_vae_gmm(folder, trainer.model)
        write_routes(folder / ROUTES_FILE, trainer.dataset, trainer.model, trainer.context.device)
        metrics = _final_metrics(trainer, folder)
        metrics["seconds"] = time.perf_counter() - started
        write_json(folder / "metrics.json", metrics)
        write_manifest(folder, "stage1", trainer.run_config, {"dataset": trainer.dataset.fingerprint})
    return metrics


def _final_metrics(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """The content of metrics.json; writes what is known of the clusters' users beside it."""
    dataset = trainer.dataset
    metrics: dict[str, Any] = {}
    biases = None
    if not dataset.implicit:
        biases = fit_biases(trainer.source.observed, trainer.model.n_users + 1, trainer.model.n_items + 1)
    for split in SPLITS[1:]:
        pairs = trainer.source.held_out(split)
        if pairs.size:
            metrics[split] = _split_metrics(trainer, pairs, biases)
    train = training_routes(dataset, folder / ROUTES_FILE)
    shares = train.pairs_K / train.pairs_K.sum()
    metrics["cluster_shares"] = shares.tolist()
    metrics["smallest_cluster_share"] = float(shares.min())
    metrics["effective_clusters"] = effective(shares)
    home_U = train.user_means_UK.argmax(axis=1)
    Crowd.of(trainer.model, home_U, dataset.catalog.training_rows()).save(folder)
    metrics["information"] = _information(trainer, home_U, folder)
    for warning in (*idle_gates(metrics, trainer.config.clusters), *no_better_than_biases(metrics)):
        trainer.context.log({"phase": "stage1", "step": trainer.step, "epoch": trainer.epoch, "warning": warning})
    if collisions := _collisions(trainer.model):
        metrics["collisions"] = collisions
    metrics["interaction_scale"] = trainer.interaction_scale
    metrics["epochs"] = trainer.epoch
    metrics["best_epoch"] = trainer.best["epoch"]
    metrics["steps"] = trainer.step
    metrics["stopped_early"] = trainer.stopped_early
    truth = dataset.truth()
    if truth is not None:
        groups = truth.group[: dataset.catalog.known_users]
        metrics["user_ari"] = user_group_ari(train.user_means_UK, groups, trainer.run_config.seed)
    metrics["history"] = trainer.history
    return metrics


def _collisions(model: VaeGmm) -> dict[str, dict[str, float]]:
    """Rows of hashed tables, and the shares of users and items that they don't tell apart; empty for other tables."""
    tables = {"users": model.user_embedding, "items": model.item_embedding}
    return {name: table.collisions()._asdict() for name, table in tables.items() if isinstance(table, HashedTable)}


def _information(trainer: Trainer, home_U: np.ndarray, folder: Path) -> dict[str, Any] | None:
    """Write the words of the users' clusters, and say what they tell of held-out texts; None without texts, or with one
    cluster."""
    trained = trainer.words or UserWords.read(trainer.dataset, trainer.config.vocabulary)
    if not trained.vocabulary:
        return None
    ClusterWords.of(trained, home_U, trainer.config.clusters).save(folder)
    held_out = trained.of_splits(trainer.dataset, SPLITS[1:])
    found = information(trained, held_out, home_U, trainer.config.clusters, trainer.run_config.seed)
    return None if found is None else found._asdict() | {"interval": list(found.interval)}


def _split_metrics(trainer: Trainer, pairs: PairFile, biases: RatingBiases | None) -> dict[str, Any]:
    worker = _SingleWorker(trainer.context)
    numbers = validate(trainer.model, pairs, trainer.config.beta, worker).numbers()
    if biases is not None:
        squares = 0.0
        for start in range(0, pairs.size, BUCKET_PAIRS):
            batch = pairs.take(slice(start, start + BUCKET_PAIRS))
            users, items = (np.minimum(ids, len(known) - 1) for ids, known in zip(batch[:2], biases[1:3], strict=True))
            squares += float(np.square(biases.predict(users, items) - batch.rating).sum())
        numbers["bias_rmse"] = (squares / pairs.size) ** 0.5
    if trainer.dataset.implicit:
        popularity = np.zeros(trainer.dataset.catalog.n_items, np.int64)
        for observed in trainer.source.observed():
            popularity += np.bincount(observed.item, minlength=len(popularity))
        numbers["auc"] = _auc(
            pairs, lambda batch: route_pairs(trainer.model, batch.user, batch.item, device=worker.device).rating
        )
        numbers["popularity_auc"] = _auc(pairs, lambda batch: popularity[batch.item] / popularity.max())
    return numbers


def _auc(pairs: PairFile, score: Callable[[Pairs], np.ndarray]) -> float:
    """Area under the ROC curve: how often an observed pair scores above a sampled one; .5 by chance, 1 perfect.

    Scores, 0 to 1, are counted in steps of 2^-20: precise to all digits that matter, and the pairs need not be held.
    """
    from sklearn.metrics import roc_auc_score

    counts_2S = np.zeros((2, _SCORE_STEPS + 1), np.int64)
    for start in range(0, pairs.size, BUCKET_PAIRS):
        batch = pairs.take(slice(start, start + BUCKET_PAIRS))
        steps = (score(batch) * _SCORE_STEPS).round().astype(np.int64)
        for chosen in (0, 1):
            counts_2S[chosen] += np.bincount(steps[batch.rating == chosen], minlength=_SCORE_STEPS + 1)
    is_chosen, step = counts_2S.nonzero()
    return float(roc_auc_score(is_chosen, step, sample_weight=counts_2S[is_chosen, step]))


class _SingleWorker:
    """Rank 0 as the only worker, for what it does while the others wait."""

    rank, world_size = 0, 1

    def __init__(self, context: Context) -> None:
        self.device = context.device
