"""Choosing the number of clusters: stage 1 trained for every K with two seeds, and a recommendation.

`gavamoe route RUN --sweep-clusters 2:8` trains the run's stage 1 for each K side by side, as Ray tasks,
prints the table, and writes cluster_sweep.json and cluster_sweep.png into the run folder.
"""

import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from gavamoe.artifacts.files import save_png, write_json
from gavamoe.artifacts.run import Run
from gavamoe.config.files import override_config
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import dataset_of_run, open_dataset
from gavamoe.errors import InputError
from gavamoe.runtime.context import Context
from gavamoe.runtime.ray_train import ray_session, run_tasks
from gavamoe.stage1.routes import ROUTES_FILE, user_responsibilities
from gavamoe.stage1.train import train_stage1

SEEDS = 2
"""Number of trainings of each K, with the run's seed and those that follow."""
STABLE = 0.9
"""Agreement (ARI) of the seeds' user clusters from which on a K counts as stable."""
EVEN_SHARE = 0.25
"""Fraction of an even share, 1 / K of the pairs, below which a cluster counts as a splinter."""
RULE = (
    f"of the K whose users' clusters agree between the seeds (ARI of at least {STABLE:g}) and whose smallest cluster"
    f" holds {EVEN_SHARE:g} / K of the pairs and stage1.min_cluster_share, the one with the lowest validation RMSE;"
    " without any, the K that agrees most. The ELBO does not choose: at a beta below 1 it falls with every cluster"
)


class Training(BaseModel):
    """The result of one training of stage 1."""

    model_config = ConfigDict(frozen=True)
    clusters: int
    """K: number of clusters."""
    seed: int
    """Seed of the training."""
    elbo: float
    """ELBO of the validation pairs at the full beta, in nats per pair."""
    reconstruction: float
    """Reconstruction term of that ELBO, in nats per pair."""
    kl: float
    """KL term of that ELBO, in nats per pair."""
    rmse: float
    """RMSE of the validation pairs' expected ratings."""
    smallest_share: float
    """Share of the training pairs that the smallest cluster holds."""
    user_cluster: list[int]
    """Cluster with each known user's highest mean responsibility: (U,)."""
    user_ari: float | None
    """Agreement (ARI) of the users' clusters with the planted groups; None for data that are not synthetic."""
    seconds: float
    """Wall time of the training, in seconds."""


class SweepRow(BaseModel):
    """The results of one K: means over the seeds, but for the smallest share, which is the smallest of them."""

    model_config = ConfigDict(frozen=True)
    clusters: int
    """K: number of clusters."""
    elbo: float
    """ELBO of the validation pairs at the full beta, in nats per pair."""
    elbo_spread: float
    """Largest less smallest ELBO over the seeds."""
    reconstruction: float
    """Reconstruction term of the ELBO, in nats per pair."""
    kl: float
    """KL term of the ELBO, in nats per pair."""
    rmse: float
    """RMSE of the validation pairs' expected ratings."""
    smallest_share: float
    """Smallest share of the training pairs that a cluster holds with any seed."""
    stability: float
    """ARI of the users' clusters between two seeds, mean over the pairs of seeds."""
    user_ari: float | None
    """Agreement (ARI) of the users' clusters with the planted groups; None for data that are not synthetic."""
    seconds: float
    """Wall time of one training, while others run beside it, in seconds."""


class Sweep(BaseModel):
    """The results of all K, and the one that is recommended."""

    model_config = ConfigDict(frozen=True)
    rows: list[SweepRow]
    """Results by K, in ascending order."""
    recommended: int
    """The recommended K."""
    reason: str
    """Why this K is recommended."""
    rule: str = RULE
    """The rule by which it is chosen."""


def sweep_clusters(
    run: Run,
    clusters: Sequence[int],
    *,
    moved_to: Path | None = None,
    on_done: Callable[[int, int], None] | None = None,
) -> tuple[Sweep, Path]:
    """Train stage 1 of `run` for each K with `SEEDS` seeds; returns the comparison and its picture.

    Args:
        moved_to: where the run's dataset is now, if it moved or is a URI.
        on_done: called with (trainings done, trainings) as they end.

    Raises:
        InputError: fewer than two K, a K that the config refuses, or the run's dataset has moved.
    """
    if len(set(clusters)) < 2:
        raise InputError(f"--sweep-clusters: {list(clusters)} leaves nothing to compare; give a range such as 2:8")
    dataset = dataset_of_run(run, moved_to)
    jobs = [
        {"config": _variant(run.config, count, run.config.seed + shift), "dataset": dataset.path.absolute()}
        for count in sorted(set(clusters))
        for shift in range(SEEDS)
    ]
    with ray_session(run.config.runtime):
        trainings = run_tasks(train_point, jobs, run.config.runtime, on_done)
    sweep = compare(trainings, run.config.stage1.min_cluster_share)
    write_json(run.path / "cluster_sweep.json", sweep.model_dump(mode="json"))
    picture = run.path / "cluster_sweep.png"
    plot_sweep(sweep, picture)
    return sweep, picture


def train_point(*, context: Context, config: RunConfig, dataset: Path) -> Training:
    """Train stage 1 once and keep its numbers only."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "stage1"
        metrics = train_stage1(config, dataset, out, context)
        shares_UK = user_responsibilities(open_dataset(dataset), out / ROUTES_FILE)
    if "valid" not in metrics:
        raise InputError(f"{dataset}: the valid split is empty; a sweep compares on it")
    return Training(
        clusters=config.stage1.clusters,
        seed=config.seed,
        **{name: metrics["valid"][name] for name in ("elbo", "reconstruction", "kl", "rmse")},
        smallest_share=metrics["smallest_cluster_share"],
        user_cluster=shares_UK.argmax(axis=1).tolist(),
        user_ari=metrics.get("user_ari"),
        seconds=metrics["seconds"],
    )


def compare(trainings: Sequence[Training], min_share: float) -> Sweep:
    """Rows by K and the recommendation (`RULE`)."""
    counts = sorted({training.clusters for training in trainings})
    rows = [_row([training for training in trainings if training.clusters == count]) for count in counts]
    recommended, reason = recommend(rows, min_share)
    return Sweep(rows=rows, recommended=recommended, reason=reason)


def recommend(rows: Sequence[SweepRow], min_share: float) -> tuple[int, str]:
    """K by `RULE`, and why in words."""
    kept = [
        row
        for row in rows
        if row.stability >= STABLE and row.smallest_share >= max(min_share, EVEN_SHARE / row.clusters)
    ]
    if kept:
        best = min(kept, key=lambda row: (row.rmse, -row.clusters))
        others = ", ".join(str(row.clusters) for row in kept if row is not best) or "no other"
        return best.clusters, (
            f"stable (the seeds agree by {best.stability:.2f}) without a splinter (the smallest cluster holds"
            f" {best.smallest_share:.1%} of the pairs), as {others}; of these the lowest validation RMSE"
        )
    best = max(rows, key=lambda row: row.stability)
    return best.clusters, (
        f"no K is stable (ARI of at least {STABLE:g}) without a splinter; this one agrees most,"
        f" {best.stability:.2f}: these data show no clear number of clusters"
    )


def plot_sweep(sweep: Sweep, out: Path) -> None:
    """Write a PNG: validation ELBO, reconstruction and RMSE, stability, and the smallest cluster's share, over K."""
    from matplotlib.figure import Figure

    counts = [row.clusters for row in sweep.rows]
    figure = Figure(figsize=(14, 3.4), layout="constrained")
    panels: list[tuple[str, dict[str, list[float]]]] = [
        (
            "nats per validation pair",
            {"ELBO": [r.elbo for r in sweep.rows], "reconstruction": [r.reconstruction for r in sweep.rows]},
        ),
        ("RMSE of validation ratings", {"RMSE": [r.rmse for r in sweep.rows]}),
        ("agreement of two seeds (ARI)", {"users' clusters": [r.stability for r in sweep.rows]}),
        ("smallest cluster, share of pairs", {"smallest": [r.smallest_share for r in sweep.rows]}),
    ]
    for axes, (title, lines) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for label, values in lines.items():
            axes.plot(counts, values, marker="o", label=label)
        axes.axvline(sweep.recommended, color="0.6", linestyle="--", label=f"recommended: {sweep.recommended}")
        axes.set(title=title, xlabel="clusters", xticks=counts)
        axes.legend(fontsize="small")
    save_png(figure, out)


def _variant(config: RunConfig, clusters: int, seed: int) -> RunConfig:
    """The run's config with another K and seed; a collapse is a result here, not the end."""
    return override_config(config, [f"stage1.clusters={clusters}", f"seed={seed}", "stage1.on_collapse=warn"])


def _row(trainings: Sequence[Training]) -> SweepRow:
    from sklearn.metrics import adjusted_rand_score

    agreements = [
        adjusted_rand_score(one.user_cluster, other.user_cluster) for one, other in itertools.combinations(trainings, 2)
    ]
    elbos = [training.elbo for training in trainings]
    aris = [training.user_ari for training in trainings if training.user_ari is not None]
    means: dict[str, Any] = {
        name: float(np.mean([getattr(training, name) for training in trainings]))
        for name in ("elbo", "reconstruction", "kl", "rmse", "seconds")
    }
    return SweepRow(
        clusters=trainings[0].clusters,
        **means,
        elbo_spread=max(elbos) - min(elbos),
        smallest_share=min(training.smallest_share for training in trainings),
        stability=float(np.mean(agreements)),
        user_ari=float(np.mean(aris)) if aris else None,
    )
