"""`gavamoe tune`: wrong input is one line and exit code 2, before anything is trained or written."""

import sys
from collections.abc import Callable
from contextvars import Context
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.cli import ctrl_c_kept

from gavamoe import cli
from gavamoe.artifacts.files import write_json
from gavamoe.config.files import parse_config
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import open_dataset
from gavamoe.data.synthetic.generator import synthesize
from gavamoe.errors import InputError
from gavamoe.tune.folder import TEST_FILE, claimed_folder
from gavamoe.tune.space import Space, parse_space

SPACE: dict[str, Any] = {
    "stages": 1,
    "metric": "rmse",
    "parameters": {"stage1.clusters": {"type": "int", "low": 2, "high": 3}},
}
Call = Callable[..., tuple[int, str]]


@pytest.fixture
def tune(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_dataset: Path, tmp_path: Path
) -> Call:
    """Runs `gavamoe tune` on a space; returns the exit code and what it said."""

    def call(space: dict[str, Any], *options: str, dataset: Path = tiny_dataset) -> tuple[int, str]:
        path = tmp_path / "space.yaml"
        path.write_text(yaml.safe_dump(space))
        (tmp_path / "config.yaml").write_text("")
        arguments = [str(path), str(tmp_path / "config.yaml"), "--dataset", str(dataset)]
        monkeypatch.setattr(
            sys, "argv", ["gavamoe", "tune", *arguments, "--run-dir", str(tmp_path / "search"), *options]
        )
        with ctrl_c_kept(), pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), capsys.readouterr().err

    return call


def claim(folder: Path, dataset: Path, space: dict[str, Any] = SPACE, config: RunConfig | None = None) -> None:
    """What a search that was begun leaves."""
    opened = open_dataset(dataset)
    with claimed_folder(folder, space_of(space), config or RunConfig(), opened, 1, resume=False):
        pass


def space_of(values: dict[str, Any]) -> Space:
    return parse_space(values, "space.yaml")


@pytest.mark.parametrize(
    ("space", "options", "message"),
    [
        (SPACE | {"metric": "rsme"}, [], "space.yaml: metric rsme: unknown; did you mean rmse?"),
        (SPACE | {"parameters": {}}, [], "space.yaml: parameters: the space is empty"),
        ({}, [], "space.yaml: expected a search space"),
        (
            SPACE | {"parameters": {"stage1.clusters": {"type": "int", "low": 3, "high": 2}}},
            [],
            "space.yaml: parameters.stage1.clusters: low 3 is above high 2",
        ),
        (SPACE | {"budget": {"trials": 0}}, [], "space.yaml: budget.trials: a search needs at least 1 trial, not 0"),
        (SPACE, ["--trials", "0"], "--trials 0: at least 1"),
        (SPACE, ["--seeds", "0"], "--seeds 0: at least 1"),
        (SPACE, ["--concurrent", "-1"], "--concurrent -1: at least 1"),
        (SPACE, ["--set", "stage1.beta=-1"], "stage1.beta: -1"),
    ],
)
def test_wrong_input_is_one_line(
    space: dict[str, Any], options: list[str], message: str, tune: Call, tmp_path: Path
) -> None:
    code, said = tune(space, *options)
    assert code == 2
    assert message in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "search").exists()


def test_folder_of_another_space_dataset_or_config(tune: Call, tiny_dataset: Path, tmp_path: Path) -> None:
    claim(tmp_path / "search", tiny_dataset)
    wider = {"stage1.clusters": {"type": "int", "low": 2, "high": 4}}
    code, said = tune(SPACE | {"parameters": wider}, "--resume")
    assert (code, said.count("\n")) == (2, 1)
    assert "holds a search with another space (space.parameters.stage1.clusters.high was 3, now 4)" in said

    synthesize(tmp_path / "second", users=30, items=20, ratings=200, groups=2, seed=3)
    code, said = tune(SPACE, "--resume", dataset=tmp_path / "second")
    assert (code, said.count("\n")) == (2, 1)
    assert "holds a search with another dataset (dataset.fingerprint was" in said

    code, said = tune(SPACE, "--resume", "--set", "stage1.beta=0.7")
    assert code == 2
    assert "holds a search with another config (config.stage1.beta was 0.1, now 0.7)" in said
    code, said = tune(SPACE, "--resume", "--seeds", "3")
    assert code == 2
    assert "holds a search with another --seeds (--seeds was 1, now 3)" in said
    code, said = tune(SPACE)
    assert code == 2
    assert "already holds a search; --resume continues it" in said


def test_folder_that_is_no_search(tune: Call, tmp_path: Path) -> None:
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "config.yaml").write_text("")
    code, said = tune(SPACE, "--resume")
    assert code == 2
    assert "not empty, and not a search's folder" in said
    assert [path.name for path in (tmp_path / "search").iterdir()] == ["config.yaml"]


def test_budget_and_place_may_change_when_resuming(tiny_dataset: Path, tmp_path: Path) -> None:
    claim(tmp_path / "search", tiny_dataset)
    more = space_of(SPACE | {"budget": {"trials": 50, "minutes": 3}})
    config = parse_config({"runtime": {"workers": 2}}, "")
    with claimed_folder(tmp_path / "search", more, config, open_dataset(tiny_dataset), 1, resume=True):
        pass
    write_json(tmp_path / "search" / TEST_FILE, {"trials": 12})
    with (
        pytest.raises(InputError, match="closed: its best trial was scored on the test split"),
        claimed_folder(tmp_path / "search", more, config, open_dataset(tiny_dataset), 1, resume=True),
    ):
        pass


def test_one_search_at_a_time_works_in_a_folder(tiny_dataset: Path, tmp_path: Path) -> None:
    opened, space = open_dataset(tiny_dataset), space_of(SPACE)
    with claimed_folder(tmp_path / "search", space, RunConfig(), opened, 1, resume=False):
        other = claimed_folder(tmp_path / "search", space, RunConfig(), opened, 1, resume=True)
        with pytest.raises(InputError, match="in use by process"):
            Context().run(other.__enter__)  # as another command would


@pytest.mark.parametrize("place", ["a file", "below a file", "name of 300 letters", "lock is a folder"])
def test_a_place_that_can_be_no_folder(place: str, tune: Call, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "locked" / "tune.lock").mkdir(parents=True)
    names = {"a file": "file", "below a file": "file/x", "name of 300 letters": "x" * 300, "lock is a folder": "locked"}
    code, said = tune(SPACE, "--run-dir", str(tmp_path / names[place]))
    assert (code, said.count("\n")) == (2, 1), said
    assert "can't be a search's folder" in said
    assert said.endswith("; use another --run-dir\n")
