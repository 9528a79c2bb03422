"""Ctrl-C in a terminal, whenever it comes: one line, exit code 130, and a run that goes on with --resume."""

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.cli import command
from helpers.terminal import run_in_terminal
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
LINE = "interrupted; --resume continues a training, a search or a comparison"


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
    interrupted = run_in_terminal([*train, "--evaluate"], MOMENTS[moment])
    assert interrupted.code == 130, interrupted.lines[-5:]
    assert interrupted.lines[-1].removeprefix("^C") == LINE
    assert not any("Traceback" in line for line in interrupted.lines)
    assert not list(tmp_path.rglob("*.partial-*"))
    resumed = run_in_terminal([*train, "--resume"], lambda shown, seconds: False)
    assert resumed.code == 0, resumed.lines[-5:]
    assert (tmp_path / "run" / "stage2" / "artifact.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "moment"),
    [
        (("quickstart", "--run-dir", "quick"), lambda shown, seconds: "Stage 1" in shown),
        (
            ("tune", "gates_beta", "tiny.yaml", "--run-dir", "search", "--trials", "2"),
            lambda shown, seconds: seconds > 15,
        ),
    ],
    ids=["quickstart", "tune"],
)
def test_ctrl_c_ends_other_commands_in_one_line(
    arguments: tuple[str, ...], moment: Moment, tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(tiny_yaml("stage2.max_steps=200"))
    more = ("--dataset", tiny_dataset) if arguments[0] == "tune" else ()
    session = run_in_terminal(command(*arguments, *more), moment)
    assert session.code == 130, session.lines[-5:]
    assert session.lines[-1].removeprefix("^C").startswith("interrupted")
    assert not any("Traceback" in line for line in session.lines)
