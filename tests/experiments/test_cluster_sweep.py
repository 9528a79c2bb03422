"""Choosing K: rows from trainings, the recommendation rule, the picture, and the command from end to end."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny import DEFAULT_RATES, TWO_WORKERS, tiny_yaml

from gavamoe.artifacts.files import write_json
from gavamoe.artifacts.run import Run, open_run
from gavamoe.config.files import load_config
from gavamoe.data.dataset import open_dataset
from gavamoe.data.synthetic.generator import synthesize
from gavamoe.errors import InputError
from gavamoe.experiments import cluster_sweep
from gavamoe.experiments.cluster_sweep import (
    Sweep,
    SweepRow,
    Training,
    compare,
    plot_sweep,
    recommend,
    sweep_clusters,
    train_point,
)
from gavamoe.runtime.context import LocalContext


def training(clusters: int, seed: int, user_cluster: Sequence[int], **changes: Any) -> Training:
    values: dict[str, Any] = {
        "elbo": -2.0, "reconstruction": -1.0, "kl": 10.0, "rmse": 0.8, "smallest_share": 0.2, "user_ari": None,
        "seconds": 3.0, **changes,
    }  # fmt: skip
    return Training(clusters=clusters, seed=seed, user_cluster=list(user_cluster), **values)


def row(clusters: int, elbo: float, stability: float, smallest_share: float = 0.2, rmse: float = 0.8) -> SweepRow:
    return SweepRow(
        clusters=clusters, elbo=elbo, elbo_spread=0.01, reconstruction=-1, kl=10, rmse=rmse,
        smallest_share=smallest_share, stability=stability, user_ari=None, seconds=3,
    )  # fmt: skip


@pytest.fixture
def small_run(tiny_dataset: Path, tmp_path: Path) -> Run:
    folder = tmp_path / "run"
    data = open_dataset(tiny_dataset)
    write_json(folder / "dataset.json", {"path": str(data.path), "fingerprint": data.fingerprint})
    (folder / "config.yaml").write_text(tiny_yaml(*TWO_WORKERS, *DEFAULT_RATES))
    return open_run(folder)


def test_rows_are_means_and_stability_ignores_the_clusters_numbers() -> None:
    swapped = training(2, 1, [1, 1, 0, 0], elbo=-3.0, smallest_share=0.1, user_ari=0.5)
    mixed = [training(3, 0, [0, 1, 2, 0]), training(3, 1, [0, 0, 1, 2])]
    sweep = compare([*mixed, training(2, 0, [0, 0, 1, 1], user_ari=0.7), swapped], min_share=0.02)
    two, three = sweep.rows
    assert (two.clusters, three.clusters) == (2, 3)
    assert two.stability == 1
    assert three.stability < 0.5
    assert two.elbo == -2.5
    assert two.elbo_spread == 1
    assert two.smallest_share == 0.1
    assert two.user_ari == pytest.approx(0.6)
    assert three.user_ari is None
    assert sweep.recommended == 2  # three is not stable


def test_of_the_stable_k_without_a_splinter_the_best_predictor_is_recommended() -> None:
    """As found on three planted groups: five clusters agreed too, but halved one group and shared another out."""
    rows = [row(2, -1.4, 1.0, rmse=0.7488), row(3, -1.5, 0.99, rmse=0.7483), row(5, -1.6, 0.96, rmse=0.7503)]
    chosen, reason = recommend(rows, min_share=0.02)
    assert chosen == 3
    assert "as 2, 5; of these the lowest validation RMSE" in reason


def test_between_equal_predictors_the_larger_k_is_recommended() -> None:
    rows = [row(2, -1.4, 1.0), row(3, -1.5, 0.97), row(4, -1.6, 0.95, smallest_share=0.05), row(5, -1.7, 0.6)]
    assert recommend(rows, min_share=0.02)[0] == 3
    rows[2] = row(4, -1.6, 0.95, smallest_share=0.07)
    assert recommend(rows, min_share=0.02)[0] == 4
    assert recommend(rows, min_share=0.1)[0] == 3
    chosen, reason = recommend([row(2, -1.0, 0.3), row(3, -1.2, 0.4), row(4, -1.1, 0.1)], min_share=0.02)
    assert chosen == 3
    assert "no clear number" in reason


def test_plot_is_a_picture_that_shows_the_recommendation(tmp_path: Path) -> None:
    rows = [row(2, -1.8, 1.0), row(3, -1.6, 0.97), row(4, -1.5, 0.5)]
    for name, chosen in (("a.png", 2), ("b.png", 3)):
        plot_sweep(Sweep(rows=rows, recommended=chosen, reason=""), tmp_path / name)
    pictures = [(tmp_path / name).read_bytes() for name in ("a.png", "b.png")]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert pictures[0] != pictures[1]


def test_one_k_is_nothing_to_compare(small_run: Run) -> None:
    with pytest.raises(InputError, match="give a range such as 2:8"):
        sweep_clusters(small_run, [3])


def test_every_k_is_trained_with_two_seeds(small_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The jobs that are handed to Ray, and what becomes of their results."""
    seen: list[tuple[int, int, str]] = []

    def run_here(loop: Any, jobs: Sequence[dict[str, Any]], *_: object) -> list[Any]:
        seen.extend(
            (job["config"].stage1.clusters, job["config"].seed, job["config"].stage1.on_collapse) for job in jobs
        )
        return [loop(context=LocalContext(), **job) for job in jobs]

    monkeypatch.setattr(cluster_sweep, "run_tasks", run_here)
    monkeypatch.setattr(cluster_sweep, "ray_session", lambda _placement: LocalStack())
    sweep, picture = sweep_clusters(small_run, [3, 2])
    assert seen == [(2, 0, "warn"), (2, 1, "warn"), (3, 0, "warn"), (3, 1, "warn")]
    assert [found.clusters for found in sweep.rows] == [2, 3]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads((small_run.path / "cluster_sweep.json").read_text()) == sweep.model_dump(mode="json")


class LocalStack:
    """A session that starts nothing."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.ray
@pytest.mark.usefixtures("ray_two_workers")
def test_ray_tasks_find_what_this_process_finds(small_run: Run) -> None:
    done: list[tuple[int, int]] = []
    sweep, _ = sweep_clusters(small_run, [2, 3], on_done=lambda count, total: done.append((count, total)))
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    here = train_point(context=LocalContext(), config=small_run.config, dataset=small_run.dataset)
    assert sweep.rows[1].elbo == pytest.approx(here.elbo, abs=sweep.rows[1].elbo_spread + 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [3, 4])
def test_the_planted_number_of_groups_is_recommended(tmp_path: Path, groups: int) -> None:
    dataset = synthesize(tmp_path / "data", groups=groups, seed=0)
    trainings = [
        train_point(
            context=LocalContext(),
            config=load_config("quickstart", [f"seed={seed}", "stage1.epochs=4", f"stage1.clusters={clusters}"]),
            dataset=dataset,
        )
        for clusters in (groups - 1, groups, groups + 1)
        for seed in range(2)
    ]
    assert compare(trainings, min_share=0.02).recommended == groups
    found = [one.user_ari for one in trainings if one.clusters == groups]
    assert np.mean([ari for ari in found if ari is not None]) > 0.9
