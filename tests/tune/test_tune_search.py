"""Searches on Ray Tune: to the end, past failures, through kills, and closed once test has been looked at."""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import optuna
import pyarrow.parquet as pq
import pytest
import yaml
from helpers.cli import command
from helpers.tiny import DEFAULT_RATES, tiny, tiny_yaml

from gavamoe.config.files import load_config
from gavamoe.errors import InputError, RunError
from gavamoe.tune.search import SearchResult, run_search
from gavamoe.tune.session import SearchState
from gavamoe.tune.study import storage_url

pytestmark = pytest.mark.ray

SEARCHED = (*DEFAULT_RATES, "runtime.engine=deepspeed", "stage1.epochs=4")
"""Overrides of the tiny config."""
K = {"stage1.clusters": {"type": "int", "low": 2, "high": 4}}


class Onlooker:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.states: list[SearchState] = []

    def update(self, state: SearchState) -> None:
        self.states.append(state)

    def step(self, title: str) -> None: ...

    def line(self, line: dict[str, Any]) -> None: ...

    def count(self, done: int, total: int) -> None: ...


def write_space(folder: Path, **changes: Any) -> Path:
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump({"stages": 1, "metric": "rmse", "budget": {"trials": 3}, "parameters": K} | changes))
    return path


def search(folder: Path, dataset: Path, space: Path, onlooker: Onlooker | None = None, **options: Any) -> SearchResult:
    config = tiny(*SEARCHED, *options.pop("overrides", ()))
    return run_search(space, config, dataset, folder / "search", progress=onlooker or Onlooker(), **options)


@pytest.mark.usefixtures("ray_two_workers")
def test_search_keeps_every_trial_and_scores_the_best_once(tiny_dataset: Path, tmp_path: Path) -> None:
    onlooker, space = Onlooker(), write_space(tmp_path)
    found = search(tmp_path, tiny_dataset, space, onlooker, seeds=2, final=False)
    assert [record.state for record in found.records] == ["complete"] * 3
    assert found.test is None
    assert found.best is not None
    assert found.best.objectives == [min((record.objectives or [9.0])[0] for record in found.records)]
    assert onlooker.states[-1].slots == 2
    table = pq.read_table(tmp_path / "search" / "trials.parquet").to_pylist()
    assert [len(row["stage1.rmse_by_seed"]) for row in table] == [2, 2, 2]
    best = load_config(tmp_path / "search" / "best.yaml")
    assert best.stage1.clusters == found.best.values["stage1.clusters"]

    scored = search(tmp_path, tiny_dataset, space, seeds=2, resume=True)
    assert scored.test is not None
    assert scored.test["trial"] == found.best.number
    assert scored.records == found.records  # nothing was trained again
    final = json.loads((tmp_path / "search" / "final" / "stage1" / "metrics.json").read_text())
    assert scored.test["metrics"] == final["test"]
    assert load_config(tmp_path / "search" / "final" / "config.yaml") == best

    with pytest.raises(InputError, match="closed: its best trial was scored on the test split"):
        search(tmp_path, tiny_dataset, space, seeds=2, resume=True, trials=4)
    shutil.rmtree(tmp_path / "search" / "final")
    assert search(tmp_path, tiny_dataset, space, seeds=2, resume=True).test == scored.test  # read, not measured again


@pytest.mark.slow
@pytest.mark.usefixtures("ray_two_workers")
def test_a_grid_that_is_cut_short_stays_open_until_its_last_point(tiny_dataset: Path, tmp_path: Path) -> None:
    space = write_space(tmp_path, sampler="grid", budget={"trials": 12})
    found = search(tmp_path, tiny_dataset, space, trials=2)
    assert [record.values["stage1.clusters"] for record in found.records] == [2, 3]
    assert found.left_out == [{"stage1.clusters": 4}]
    assert found.test is None
    assert not (tmp_path / "search" / "final").exists()

    whole = search(tmp_path, tiny_dataset, space, trials=3, resume=True)
    assert [record.values["stage1.clusters"] for record in whole.records] == [2, 3, 4]
    assert whole.records[:2] == found.records
    assert whole.left_out == []
    assert whole.test is not None


@pytest.mark.slow
@pytest.mark.usefixtures("ray_two_workers")
def test_failing_trials_are_recorded_and_the_search_goes_on(tiny_dataset: Path, tmp_path: Path) -> None:
    rates = {"stage1.learning_rate": {"type": "choice", "values": [1.0e30, 0.001]}}
    found = search(tmp_path, tiny_dataset, write_space(tmp_path, parameters=rates), final=False)
    assert [record.state for record in found.records] == ["failed", "complete"]
    assert "the gradient is not finite" in str(found.records[0].reason)
    assert found.best == found.records[1]
    only_bad = {"stage1.learning_rate": {"type": "choice", "values": [1.0e30]}}
    with pytest.raises(RunError, match="none of 1 trials came to an end; the last: RunError: stage 1"):
        search(tmp_path / "bad", tiny_dataset, write_space(tmp_path, parameters=only_bad), final=False)


@pytest.mark.usefixtures("ray_two_workers")
def test_trials_that_fall_behind_are_stopped_and_told_so(tiny_dataset: Path, tmp_path: Path) -> None:
    rates = {"stage1.learning_rate": {"type": "choice", "values": [0.01, 1.0e-9]}}
    space = write_space(tmp_path, parameters=rates, pruning={"grace": 30, "reduction": 2})
    found = search(tmp_path, tiny_dataset, space, final=False, concurrent=1)
    assert [record.state for record in found.records] == ["complete", "pruned"]
    assert found.records[1].reason == "stopped at 50 % of its training: others did better there"
    study = optuna.load_study(study_name="space", storage=storage_url(tmp_path / "search"))
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED"]
    assert [set(trial.intermediate_values) for trial in study.trials] == [{25, 50, 75}, {25, 50}]
    assert not (tmp_path / "search" / "trials" / "0001" / "seed_0" / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_two_workers")
def test_a_killed_worker_is_replaced(tiny_dataset: Path, tmp_path: Path) -> None:
    locks = tmp_path / "search" / "stage1_cache"

    def kill() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            for lock in locks.glob("*.lock"):  # names the worker that trains under it
                if words := lock.read_text().split():
                    os.kill(int(words[1]), signal.SIGKILL)
                    return
            time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    onlooker = Onlooker()
    space = write_space(tmp_path, parameters={"stage1.clusters": {"type": "choice", "values": [3]}})
    found = search(tmp_path, tiny_dataset, space, onlooker, final=False, overrides=["stage1.epochs=40"])
    killer.join()
    assert [record.state for record in found.records] == ["complete"]
    assert onlooker.states[-1].restarts == {0: 1}


@pytest.mark.usefixtures("ray_two_workers")
def test_a_trial_that_does_not_fit_the_cluster_is_refused(tiny_dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a trial needs 64 CPU, the cluster has 2 CPU"):
        search(tmp_path, tiny_dataset, write_space(tmp_path), overrides=["runtime.threads_per_worker=64"])


@pytest.mark.usefixtures("ray_two_workers")
def test_no_trial_starts_when_the_time_is_over(tiny_dataset: Path, tmp_path: Path) -> None:
    space = write_space(tmp_path, budget={"trials": 3, "minutes": 1e-9})
    with pytest.raises(RunError, match=r"no trial was started before budget\.minutes were over"):
        search(tmp_path, tiny_dataset, space)


def slow_search(tmp_path: Path, dataset: Path, *more: str) -> list[str]:
    """The command of a search whose trials take a while."""
    (tmp_path / "config.yaml").write_text(tiny_yaml(*SEARCHED, "stage1.epochs=60"))
    space = write_space(
        tmp_path, parameters={"stage1.beta": {"type": "float", "low": 0.01, "high": 0.5}}, budget={"trials": 6}
    )
    options = ["--dataset", dataset, "--run-dir", tmp_path / "search", "--no-final", "--json"]
    return command("tune", space, tmp_path / "config.yaml", *options, *more)


def results(folder: Path) -> dict[str, int]:
    """When each finished training was finished."""
    return {str(path): path.stat().st_mtime_ns for path in (folder / "trials").glob("*/seed_*/result.json")}


def wait_until_some_are_done(process: subprocess.Popen[str], folder: Path, count: int) -> None:
    deadline = time.monotonic() + 300
    while len(results(folder)) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def start(tmp_path: Path, dataset: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(slow_search(tmp_path, dataset), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(tmp_path: Path, dataset: Path) -> dict[str, Any]:
    """Continue to the end; the JSON document."""
    done = subprocess.run(slow_search(tmp_path, dataset, "--resume"), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_an_ended_driver_loses_nothing(signal_number: int, tiny_dataset: Path, tmp_path: Path) -> None:
    process = start(tmp_path, tiny_dataset)
    wait_until_some_are_done(process, tmp_path / "search", 2)
    process.send_signal(signal_number)
    out, err = process.communicate(timeout=200)
    before = results(tmp_path / "search")
    if signal_number == signal.SIGINT:
        assert process.returncode == 130, err
        assert json.loads(out)["interrupted"] is True
        assert (tmp_path / "search" / "best.yaml").is_file()
        assert pq.read_table(tmp_path / "search" / "trials.parquet").num_rows >= 2
    found = finish(tmp_path, tiny_dataset)
    assert [trial["state"] for trial in found["trials"]] == ["complete"] * 6
    drawn = [tuple(trial["values"].items()) for trial in found["trials"]]
    assert len(set(drawn)) == 6
    after = results(tmp_path / "search")
    assert len(after) == 6
    assert {path: after[path] for path in before} == before  # no finished training was repeated


@pytest.mark.slow
def test_trials_of_several_workers_are_stopped_too_and_leave_room(tiny_dataset: Path, tmp_path: Path) -> None:
    """In its own process, for such a search starts Ray with the dashboard."""
    (tmp_path / "config.yaml").write_text(tiny_yaml(*SEARCHED, "stage1.epochs=30", "runtime.workers=2"))
    rates = {"stage1.learning_rate": {"type": "choice", "values": [0.0005, 1.0e-9, 0.005]}}
    space = write_space(tmp_path, parameters=rates, pruning={"grace": 30, "reduction": 2})
    options = ["--dataset", tiny_dataset, "--run-dir", tmp_path / "search", "--no-final", "--json"]
    tune = command("tune", space, tmp_path / "config.yaml", *options)
    done = subprocess.run(tune, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr
    trials = json.loads(done.stdout)["trials"]
    assert [trial["state"] for trial in trials] == ["complete", "pruned", "complete"]
    assert trials[1]["reason"].endswith("of its training: others did better there")
    assert not (tmp_path / "search" / "trials" / "0001" / "stop").exists()
