"""Train stage 1 (section 3.4.1) and write its artifact.

`train_stage1` reads a dataset folder and writes the folder `stage1/`: vae_gmm.json, vae_gmm.safetensors,
routes.parquet, metrics.json, artifact.json. The loop itself is in `stage1_trainer`.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np

from gavamoe.checkpoint import Manifest, load_vae_gmm, read_manifest, save_vae_gmm, write_manifest
from gavamoe.config import RunConfig
from gavamoe.context import Context
from gavamoe.dataset import SPLITS, open_dataset
from gavamoe.files import write_folder, write_json
from gavamoe.pairs import Pairs
from gavamoe.routes import ROUTES_FILE, mean_by_user, read_routes, route_pairs, user_group_ari, write_routes
from gavamoe.stage1_checks import validate
from gavamoe.stage1_trainer import Trainer, from_rank_0
from gavamoe.vae_gmm import VaeGmm


def train_stage1(config: RunConfig, dataset: Path, out: Path, context: Context) -> dict[str, Any]:
    """Train on this worker and, on rank 0, write the artifact `out`; every rank returns the metrics.

    Raises:
        InputError: the dataset or the checkpoint to resume from does not fit the config.
        RunError: the loss is no longer finite, or the clusters collapsed and `on_collapse` is "stop".
    """
    started = time.perf_counter()
    data = open_dataset(dataset)
    trainer = Trainer(config, data, context)
    if context.resume_from is not None:
        trainer.restore(context.resume_from)
    trainer.run()
    return from_rank_0(context, lambda: _write_artifact(trainer, out, started))


def load_stage1(folder: Path) -> tuple[VaeGmm, Manifest]:
    """The trained model of a stage-1 artifact, in evaluation mode, and the artifact's manifest."""
    manifest = read_manifest(folder, "stage1")
    return load_vae_gmm(folder), manifest


def _write_artifact(trainer: Trainer, out: Path, started: float) -> dict[str, Any]:
    """Route all pairs with the best model and write the folder whole."""
    with write_folder(out) as folder:
        save_vae_gmm(folder, trainer.model)
        write_routes(folder / ROUTES_FILE, trainer.dataset, trainer.model, trainer.context.device)
        metrics = _final_metrics(trainer, folder / ROUTES_FILE)
        metrics["seconds"] = time.perf_counter() - started
        write_json(folder / "metrics.json", metrics)
        write_manifest(folder, "stage1", trainer.run_config, {"dataset": trainer.dataset.fingerprint})
    return metrics


def _final_metrics(trainer: Trainer, routes: Path) -> dict[str, Any]:
    config, dataset = trainer.config, trainer.dataset
    metrics: dict[str, Any] = {}
    for split in SPLITS[1:]:
        pairs = trainer.source.held_out(split)
        if pairs.size:
            metrics[split] = _split_metrics(trainer, pairs)
    train = read_routes(routes, "train")
    shares = np.bincount(train.cluster, minlength=config.clusters) / len(train.cluster)
    metrics["cluster_shares"] = shares.tolist()
    metrics["smallest_cluster_share"] = float(shares.min())
    metrics["epochs"] = trainer.epoch
    metrics["best_epoch"] = trainer.best["epoch"]
    metrics["steps"] = trainer.step
    metrics["stopped_early"] = trainer.stopped_early
    truth = dataset.truth()
    if truth is not None:
        known = dataset.catalog.known_users
        means = mean_by_user(dataset.arrays("train").user, train.responsibilities, known)
        metrics["user_ari"] = user_group_ari(means, truth.group[:known], trainer.run_config.seed)
    metrics["history"] = trainer.history
    return metrics


def _split_metrics(trainer: Trainer, pairs: Pairs) -> dict[str, Any]:
    alone = _Alone(trainer.context)
    numbers = validate(trainer.model, pairs, trainer.config.beta, alone).numbers()
    if trainer.dataset.implicit:
        scores = route_pairs(trainer.model, pairs.user, pairs.item, device=alone.device).rating
        numbers["auc"] = _auc(pairs, scores)
        popularity = np.bincount(trainer.source.observed().item, minlength=trainer.dataset.catalog.n_items)
        numbers["popularity_auc"] = _auc(pairs, popularity[pairs.item])
    return numbers


def _auc(pairs: Pairs, scores: np.ndarray) -> float:
    """How often a chosen pair scores above a sampled negative: .5 by chance, 1 perfect."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(pairs.rating, scores))


class _Alone:
    """Rank 0 working by itself."""

    rank, world_size = 0, 1

    def __init__(self, context: Context) -> None:
        self.device = context.device
