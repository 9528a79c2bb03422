"""The study: what is drawn, told and remembered, also by a process that comes after a killed one."""

import sqlite3
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
import pyarrow.parquet as pq
import pytest
import yaml
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState

from gavamoe.config.schema import RunConfig
from gavamoe.errors import RunError
from gavamoe.tune.report import markdown_table, table_rows, trials_table, write_results
from gavamoe.tune.space import Space, parse_space
from gavamoe.tune.study import Study, full_disk_told, storage_url

BETA = {"type": "float", "low": 0.0, "high": 1.0}
K = {"type": "int", "low": 2, "high": 5}


def space(**changes: Any) -> Space:
    values = {"stages": 1, "metric": "rmse", "budget": {"trials": 6}, "parameters": {"stage1.beta": BETA}}
    return parse_space(values | changes, "s.yaml")


def anything(values: object) -> None:
    return None


def open_study(folder: Path, of: Space) -> Study:
    return Study(folder, of, {}, seed=0, name="s")


def finish(study: Study, number: int, value: float) -> None:
    study.complete(number, {"stage1.rmse": [value - 0.1, value + 0.1]}, 1.0)


def test_a_killed_search_keeps_what_it_told_and_goes_on_with_what_ran(tmp_path: Path) -> None:
    study = open_study(tmp_path, space())
    done = study.next(anything)
    running = study.next(anything)
    assert done is not None
    assert running is not None
    finish(study, done[0], 0.5)
    study.study.ask()  # killed while this one was drawn

    again = open_study(tmp_path, space())
    assert [record.state for record in again.records] == ["complete", "running"]
    assert again.records[0].objectives == [0.5]
    assert again.next(anything) == running
    new = again.next(anything)
    assert new is not None
    assert new[0] == 3  # number 2 was never a trial
    assert new[1] not in (done[1], running[1])


def test_a_configuration_is_trained_once(tmp_path: Path) -> None:
    study = open_study(tmp_path, space(parameters={"stage1.clusters": K}, budget={"trials": 3}))
    seen = []
    while (drawn := study.next(anything)) is not None:
        finish(study, drawn[0], 0.5)
        seen.append(drawn[1]["stage1.clusters"])
    assert sorted(seen) == [2, 3, 4, 5]
    assert len(study.records) == 4  # repeated draws are no trials


def test_a_space_that_the_budget_covers_is_gone_through_in_order(tmp_path: Path) -> None:
    study = open_study(tmp_path, space(parameters={"stage1.clusters": K}))
    first = study.next(anything)
    assert first is not None
    finish(study, first[0], 0.5)
    again = open_study(tmp_path, space(parameters={"stage1.clusters": K}))
    rest = []
    while (drawn := again.next(anything)) is not None:
        rest.append(drawn)
    assert [(number, values["stage1.clusters"]) for number, values in [first, *rest]] == [
        (0, 2),
        (1, 3),
        (2, 4),
        (3, 5),
    ]


def test_a_grid_with_fewer_trials_than_points_tells_the_others_and_goes_on_with_them(tmp_path: Path) -> None:
    of = space(parameters={"stage1.clusters": K}, sampler="grid", budget={"trials": 3})
    study, tried = open_study(tmp_path, of), []
    for _ in range(3):
        drawn = study.next(anything)
        assert drawn is not None
        finish(study, drawn[0], 0.5)
        tried.append(drawn[1]["stage1.clusters"])
    assert tried == [2, 3, 4]
    assert study.left_out(anything) == [{"stage1.clusters": 5}]
    assert study.left_out(lambda values: "the config can't take it") == []

    again = open_study(tmp_path, space(parameters={"stage1.clusters": K}, sampler="grid", budget={"trials": 4}))
    drawn = again.next(anything)
    assert drawn is not None
    assert drawn[1] == {"stage1.clusters": 5}
    assert again.left_out(anything) == []
    assert again.next(anything) is None


IN_ORDER = [(0, 2), (1, 3), (2, 4), (3, 5)]


def drawn(study: Study) -> list[tuple[int, int]]:
    """All that a study of K still has to try: trial number, K."""
    found = []
    while (trial := study.next(anything)) is not None:
        found.append((trial[0], int(trial[1]["stage1.clusters"])))
    return found


@pytest.mark.parametrize("sampler", ["grid", "tpe"])
@pytest.mark.parametrize("suggested", [False, True])
def test_a_point_that_was_being_drawn_keeps_its_place(suggested: bool, sampler: str, tmp_path: Path) -> None:
    of = space(parameters={"stage1.clusters": K}, sampler=sampler)
    trial = open_study(tmp_path, of).study.ask()
    if suggested:
        of.draw(trial, {})
    again = open_study(tmp_path, of)
    assert drawn(again) == IN_ORDER
    assert len(again.study.trials) == 4


@pytest.mark.parametrize("queued", range(5))
def test_points_that_were_being_queued_keep_their_order(
    queued: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once met in a chaos run: killed after the first point, the search drew the others at random."""
    enqueue, left = optuna.Study.enqueue_trial, [None] * queued

    def killed(study: optuna.Study, *values: Any) -> None:
        if not left:
            raise SystemExit
        left.pop()
        enqueue(study, *values)

    of = space(parameters={"stage1.clusters": K})
    with monkeypatch.context() as patch, suppress(SystemExit):
        patch.setattr(optuna.Study, "enqueue_trial", killed)
        open_study(tmp_path, of)
    again = open_study(tmp_path, of)
    assert drawn(again) == IN_ORDER
    assert drawn(open_study(tmp_path, of)) == IN_ORDER  # none has ended: all are trained again


def test_refused_draws_are_no_trials(tmp_path: Path) -> None:
    study = open_study(tmp_path, space())
    found = study.next(lambda values: "too small" if float(values["stage1.beta"]) < 0.5 else None)
    assert found is not None
    assert float(found[1]["stage1.beta"]) >= 0.5
    assert study.next(lambda values: "never") is None


def test_pruned_trials_are_told_as_pruned(tmp_path: Path) -> None:
    """A stopped trial's short-budget value must not look like a finished one's to the sampler."""
    study = open_study(tmp_path, space())
    first, second = study.next(anything), study.next(anything)
    assert first is not None
    assert second is not None
    study.report(first[0], 30, 0.1)
    study.prune(first[0], "stopped at 30 %", 2.0)
    finish(study, second[0], 0.5)
    trial = study.study.trials[first[0]]
    assert trial.state == TrialState.PRUNED
    assert trial.intermediate_values == {30: 0.1}
    assert study.study.best_trial.number == second[0]
    best = study.best()
    assert best is not None
    assert best.number == second[0]
    assert study.records[0].objectives is None


def test_direction_decides_what_is_best(tmp_path: Path) -> None:
    study = open_study(tmp_path, space(metric="stage1.elbo"))
    for value in (-3.0, -1.0, -2.0):
        drawn = study.next(anything)
        assert drawn is not None
        study.complete(drawn[0], {"stage1.elbo": [value]}, 1.0)
    best = study.best()
    assert best is not None
    assert best.objectives == [-1.0]


def test_the_front_is_what_no_other_beats(tmp_path: Path) -> None:
    of = space(metric=["stage2.validation_loss", "parameters"], stages=2, sampler="nsga2")
    study = open_study(tmp_path, of)
    for loss, size in ((3.0, 10.0), (2.0, 20.0), (3.5, 30.0)):
        drawn = study.next(anything)
        assert drawn is not None
        study.report(drawn[0], 50, loss)  # Optuna takes no curves of several objectives
        study.complete(drawn[0], {"stage2.validation_loss": [loss], "parameters": [size]}, 1.0)
    assert [record.number for record in study.front()] == [1, 0]
    write_results(tmp_path, study, of, RunConfig())
    assert {path.stem for path in (tmp_path / "pareto").iterdir()} == {"trial_0000", "trial_0001"}
    assert (tmp_path / "plots" / "pareto.png").stat().st_size > 5000


@pytest.fixture
def searched(tmp_path: Path) -> tuple[Path, Study, Space]:
    of = space(
        parameters={"stage1.beta": BETA, "stage1.clusters": K | {"when": {"stage1.mixture_init": "gmm"}}},
        budget={"trials": 6, "set": {"stage1.epochs": 2}},
    )
    study = Study(tmp_path, of, {"stage1.mixture_init": "gmm"}, seed=0, name="s")
    for value in (0.9, 0.5, 0.7, 0.6):
        drawn = study.next(anything)
        assert drawn is not None
        study.report(drawn[0], 50, value)
        finish(study, drawn[0], value)
    for end in (study.fail, lambda number, reason: study.prune(number, reason, 1.0)):
        drawn = study.next(anything)
        assert drawn is not None
        end(drawn[0], "why")
    return tmp_path, study, of


def test_results_have_every_trial_and_a_complete_best_config(searched: tuple[Path, Study, Space]) -> None:
    folder, study, of = searched
    best = write_results(folder, study, of, RunConfig())
    assert best is not None
    assert best.number == 1
    rows = pq.read_table(folder / "trials.parquet").to_pylist()
    assert [row["state"] for row in rows] == ["complete"] * 4 + ["failed", "pruned"]
    assert [row["reason"] for row in rows] == [None] * 4 + ["why", "why"]
    assert rows[1]["stage1.rmse"] == pytest.approx(0.5)
    assert rows[1]["stage1.rmse_sd"] == pytest.approx(0.1414, abs=1e-4)
    assert rows[1]["stage1.rmse_by_seed"] == pytest.approx([0.4, 0.6])
    assert rows[1]["stage1.beta"] == best.values["stage1.beta"]
    config = yaml.safe_load((folder / "best.yaml").read_text())
    assert config["stage1"]["beta"] == best.values["stage1.beta"]
    assert config["stage1"]["epochs"] == RunConfig().stage1.epochs  # the cheaper setting was for the trials alone
    assert {path.stem for path in (folder / "plots").iterdir()} == {
        "history", "slice", "parallel_coordinates", "importance", "curves",
    }  # fmt: skip


def test_table_has_mean_and_spread_best_first(searched: tuple[Path, Study, Space]) -> None:
    _, study, of = searched
    heads, rows = table_rows(study.records, of)
    assert heads == ["trial", "beta", "clusters", "RMSE ↓"]
    assert [row[0] for row in rows] == ["1", "3", "2", "0"]
    assert rows[0][-1] == "0.5 ± 0.14"
    text = markdown_table(study.records, of)
    assert "2 seed(s)" in text
    assert "| 0.5 ± 0.14 |" in text


def test_table_of_one_parameter_is_in_its_order(tmp_path: Path) -> None:
    of = space(parameters={"stage1.clusters": {"type": "int", "low": 9, "high": 11}})
    study = open_study(tmp_path, of)
    for value in (0.3, 0.1, 0.2):
        drawn = study.next(anything)
        assert drawn is not None
        finish(study, drawn[0], value)
    assert [row[1] for row in table_rows(study.records, of)[1]] == ["9", "10", "11"]


def test_results_of_a_search_without_a_finished_trial(tmp_path: Path) -> None:
    study = open_study(tmp_path, space())
    assert write_results(tmp_path, study, space(), RunConfig()) is None
    assert pq.read_table(tmp_path / "trials.parquet").num_rows == 0
    assert trials_table([], space()).column_names[:2] == ["trial", "state"]


def test_the_storage_is_what_optuna_opens(searched: tuple[Path, Study, Space]) -> None:
    folder, _, _ = searched
    loaded = optuna.load_study(study_name="s", storage=storage_url(folder))
    assert loaded.best_value == pytest.approx(0.5)
    assert loaded.metric_names == ["stage1.rmse"]


def test_a_full_disk_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was called damage, for which another folder was advised."""
    full = sqlite3.OperationalError("database or disk is full")

    def create(**_: object) -> None:
        raise StorageInternalError("An exception is raised during the commit.") from full

    monkeypatch.setattr(optuna, "create_study", create)
    with pytest.raises(RunError, match=r"study.db: cannot be written: no space is left; make room, then .*--resume"):
        open_study(tmp_path, space())
    with pytest.raises(RunError, match="no space is left"), full_disk_told(tmp_path):
        raise RuntimeError("a callback failed") from full
    with pytest.raises(RuntimeError, match="something else"), full_disk_told(tmp_path):
        raise RuntimeError("something else")
