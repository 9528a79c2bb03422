"""What people and machines are told of a search."""

import json
from pathlib import Path
from typing import Any

import pytest

from gavamoe.cli.output import search
from gavamoe.cli.output.search import SearchTerminal, print_search, status_line, trial_line
from gavamoe.tune.search import SearchResult
from gavamoe.tune.session import SearchState
from gavamoe.tune.space import parse_space
from gavamoe.tune.study import Record

SPACE = parse_space(
    {
        "stages": 1,
        "metric": "rmse",
        "budget": {"trials": 8},
        "parameters": {
            "stage1.clusters": {"type": "int", "low": 2, "high": 5},
            "stage1.beta": {"type": "float", "low": 0, "high": 1},
        },
    },
    "s.yaml",
)
DRAWN: dict[str, Any] = {"stage1.clusters": 3, "stage1.beta": 0.125}
RECORDS = [
    Record(0, "complete", DRAWN, [0.9], measured={"stage1.rmse": [0.8, 1.0]}),
    Record(1, "pruned", DRAWN, None, {30: 1.5}, reason="stopped at 30 % of its way"),
    Record(2, "complete", DRAWN, [0.7], measured={"stage1.rmse": [0.7, 0.7]}),
    Record(3, "failed", DRAWN, None, reason="RunError: collapsed"),
    Record(4, "running", DRAWN, None, {25: 1.25}),
]
STATE = SearchState(SPACE, RECORDS, slots=2, earlier=2, seconds=60.0, restarts={4: 1})


def result(**changes: Any) -> SearchResult:
    values: dict[str, Any] = {
        "folder": Path("/runs/s"), "space": SPACE, "records": RECORDS, "best": RECORDS[2], "front": [RECORDS[2]],
        "left_out": [], "interrupted": False, "test": None,
    }  # fmt: skip
    return SearchResult(**values | changes)


def test_status_counts_names_the_best_and_estimates_what_is_left() -> None:
    # two trials in 60 s in this session, four of eight are left
    assert status_line(STATE) == "4 of 8 trials, best RMSE 0.7 (trial 2), 01:00 gone, about 02:00 left"
    fresh = SearchState(SPACE, [], slots=2, earlier=0, seconds=5.0)
    assert status_line(fresh) == "0 of 8 trials, 00:05 gone"


def test_a_line_says_what_a_trial_drew_and_how_it_ended() -> None:
    assert trial_line(RECORDS[0], SPACE) == "trial 0: clusters=3 beta=0.125: RMSE ↓ 0.9 ± 0.14"
    assert trial_line(RECORDS[3], SPACE) == "trial 3: clusters=3 beta=0.125: failed: RunError: collapsed"


def test_the_points_that_were_left_out_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    left: list[dict[str, Any]] = [{"stage1.clusters": 4, "stage1.beta": 0.5}, {"stage1.clusters": 5}]
    print_search(result(left_out=left), as_json=True)
    out, err = capsys.readouterr()
    assert json.loads(out)["left_out"] == left
    line = "left out: 2 of 7 points (clusters=4 beta=0.5; clusters=5)"
    assert f"{line}; --resume --trials 7 goes on with them, and test scores the best one after the last\n" in err
    closed = result(left_out=left, test={"trial": 2, "trials": 5, "split": "test", "metrics": {}})
    assert search.left_out_line(closed) == line
    many = result(left_out=[{"stage1.clusters": 4}] * 12)
    assert search.left_out_line(many).count("clusters=4") == 10
    assert "; 2 more)" in search.left_out_line(many)


def test_without_a_terminal_each_new_end_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    with SearchTerminal() as terminal:
        terminal.update(STATE)
        terminal.update(STATE)
    said = capsys.readouterr().err
    assert said.count("trial 2:") == said.count("trial 3:") == 1
    assert "trial 0:" not in said  # an earlier session's
    assert "trial 4:" not in said  # still running


def test_on_a_terminal_the_table_has_what_runs_and_what_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    table = search._live_table(STATE)
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    shown = console.export_text()
    assert "running (restarted 1 x)" in shown
    assert "1.25 at 25 %" in shown
    assert "0.9 ± 0.14" in shown
    monkeypatch.setattr(search, "ROWS_SHOWN", 2)
    console.print(search._live_table(STATE))
    assert "pruned" not in console.export_text()


def test_result_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    test = {"trial": 2, "trials": 5, "split": "test", "metrics": {"rmse": 0.75, "history": [1]}}
    print_search(result(test=test, interrupted=True), as_json=False)
    said = capsys.readouterr().err
    for part in (
        "2 complete, 1 pruned, 1 failed, 1 running",
        "RunError: collapsed",
        "best: trial 2: ",
        "its config: /runs/s/best.yaml",
        "trained in full, on the test split",
        "optuna-dashboard sqlite:////runs/s/study.db",
    ):
        assert part in said
    assert "Pareto" not in said


def test_result_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    print_search(result(), as_json=True)
    out = capsys.readouterr().out
    found = json.loads(out)
    assert out.count("\n") == 1
    assert found["best"]["objectives"] == [0.7]
    assert [trial["state"] for trial in found["trials"]] == ["complete", "pruned", "complete", "failed", "running"]
    assert found["metrics"] == ["stage1.rmse"]
    assert found["pareto"] is None


def test_columns_that_do_not_fit_are_left_to_the_file() -> None:
    heads, rows = ["trial", "beta", "x" * 200], [["0", "0.1", "1"]]
    assert search._fitting(heads, rows, 2) == 2
    assert search._fitting(heads, rows, 3) == 3
