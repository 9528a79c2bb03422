"""Ctrl-C in a terminal, whenever it comes: one line, exit code 130, and a run that goes on with --resume."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.cli import command
from helpers.ports import free_port
from helpers.terminal import Session, run_in_terminal
from helpers.tiny import tiny_yaml

pytestmark = pytest.mark.slow

Moment = Callable[[str, float], bool]
MOMENTS: dict[str, Moment] = {
    "at the start": lambda shown, seconds: seconds > 0.5,
    "before Ray is up": lambda shown, seconds: "Stage 1" in shown,
    "in stage 1": lambda shown, seconds: "stage1" in shown,
    "between the stages": lambda shown, seconds: "Stage 2" in shown,
    "in stage 2": lambda shown, seconds: "train, loss" in shown and "Stage 2" in shown,
    "while texts are written": lambda shown, seconds: "Write and score" in shown,
}


def never(shown: str, seconds: float) -> bool:
    """No moment at all: the command runs to its end."""
    return False


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_ends_a_training_in_one_line_and_it_goes_on(
    moment: str, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Train's own handler once stayed after stage 1 and swallowed it, so that stage 2 trained to its end."""
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "tiny.yaml").write_text(
        tiny_yaml("stage1.epochs=4", "stage2.max_steps=60", "stage2.checkpoint_every=10", "runtime.workers=1")
    )
    train = command("train", tmp_path / "tiny.yaml", "--dataset", tiny_dataset, "--run-dir", tmp_path / "run")
    assert_interrupted(run_in_terminal([*train, "--evaluate"], MOMENTS[moment]))
    assert not list(tmp_path.rglob("*.partial-*"))
    resumed = run_in_terminal([*train, "--resume"], never)
    assert resumed.code == 0, resumed.lines[-5:]
    assert (tmp_path / "run" / "stage2" / "artifact.json").is_file()


@pytest.fixture(scope="module")
def trained(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(tiny_yaml("stage2.max_steps=20", "runtime.workers=1"))
    run = command("train", folder / "tiny.yaml", "--dataset", tiny_dataset, "--run-dir", folder / "run")
    assert run_in_terminal(run, never).code == 0
    return folder / "run"


@pytest.mark.parametrize(
    "moment", [lambda shown, seconds: seconds > 1, lambda shown, seconds: "Write and score" in shown]
)
def test_ctrl_c_ends_an_evaluation_and_it_begins_anew(moment: Moment, trained: Path) -> None:
    evaluate = command("evaluate", trained)
    assert_interrupted(run_in_terminal(evaluate, moment))
    assert not (trained / "evaluation").exists()
    assert run_in_terminal([*evaluate, "--rows", "20"], never).code == 0
    shutil.rmtree(trained / "evaluation")


@pytest.mark.parametrize(
    ("moment", "word"),
    [
        (lambda shown, seconds: seconds > 1, "interrupted"),
        (lambda shown, seconds: seconds > 8, "interrupted"),  # Ray starts, or the replicas
        (lambda shown, seconds: "serving " in shown, "requests in progress are finished first"),
    ],
    ids=["at once", "while it starts", "while it serves"],
)
def test_ctrl_c_ends_a_service(moment: Moment, word: str, trained: Path) -> None:
    session = run_in_terminal(command("serve", trained, "--port", free_port()), moment)
    assert_interrupted(session)
    assert any(word in line for line in session.lines)
    assert session.seconds < 60


def test_ctrl_c_ends_a_search_and_it_goes_on(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(tiny_yaml("stage2.max_steps=60"))
    tune = command("tune", "gates_beta", "tiny.yaml", "--dataset", tiny_dataset, "--run-dir", "search", "--trials", "4")
    assert_interrupted(run_in_terminal(tune, lambda shown, seconds: seconds > 1))
    moments: list[Moment] = [lambda shown, seconds: seconds > 15, lambda shown, seconds: " of 4 trials" in shown]
    for moment in moments:
        again = ["--resume"] if Path("search").exists() else []
        assert_interrupted(run_in_terminal([*tune, *again], moment))
    finished = run_in_terminal([*tune, "--resume"], never)
    assert finished.code == 0, finished.lines[-5:]


def test_ctrl_c_ends_the_quickstart_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    quickstart = command("quickstart", "--run-dir", "quick", "--set", "stage2.max_steps=30")
    for moment in (lambda shown, seconds: "Synthesize" in shown, lambda shown, seconds: "train, loss" in shown):
        assert_interrupted(run_in_terminal(quickstart, moment))
    finished = run_in_terminal(quickstart, never)
    assert finished.code == 0, finished.lines[-5:]


def assert_interrupted(session: Session) -> None:
    assert session.code == 130, session.lines[-5:]
    assert session.lines[-1].removeprefix("^C").startswith("interrupted"), session.lines[-5:]
    assert not any("Traceback" in line or "(raylet)" in line for line in session.lines)
