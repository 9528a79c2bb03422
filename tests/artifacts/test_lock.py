"""One command at a time in a run: the second is told who holds it; a killed one holds nothing."""

import os
import signal
import subprocess
import sys
from contextvars import Context
from pathlib import Path

import pytest
from helpers.cli import Runner
from helpers.runs import make_run
from helpers.tiny import tiny_yaml

from gavamoe.artifacts.lock import LOCK_FILE, alone_in, locked_folder
from gavamoe.data.dataset import open_dataset
from gavamoe.errors import InputError

HOLDING = """
import sys
from pathlib import Path
from gavamoe.artifacts.lock import locked_folder
with locked_folder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder_of(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(folder), "--resume"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def another_takes(folder: Path) -> None:
    """As another command would: what a block holds, those within it have, but nobody else."""
    Context().run(locked_folder(folder).__enter__)


def test_commands_on_one_run_are_kept_apart(gavamoe: Runner, tiny_dataset: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", open_dataset(tiny_dataset))
    (tmp_path / "tiny.yaml").write_text(tiny_yaml())
    before = sorted(run.rglob("*"))
    holder = holder_of(run)
    try:
        for command in (
            ("train", tmp_path / "tiny.yaml", "--dataset", tiny_dataset, "--run-dir", run, "--resume"),
            ("evaluate", run),
            ("report", run),
        ):
            refused = gavamoe(*command)
            assert refused.code == 2, refused.err
            assert f"{run}: in use by process {holder.pid} on {os.uname().nodename} since 20" in refused.err
            assert "--resume); wait for it" in refused.err
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with locked_folder(run):  # a killed one holds nothing
        pass
    assert sorted(run.rglob("*")) == before


def test_a_lock_leaves_nothing_behind(tmp_path: Path) -> None:
    with locked_folder(tmp_path / "new"):
        assert (tmp_path / "new" / LOCK_FILE).is_file()
        with pytest.raises(InputError, match=f"new: in use by process {os.getpid()} on "):
            another_takes(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: is a file, and a run needs a folder"), locked_folder(tmp_path / "file"):
        pass


def test_a_lock_that_its_owner_removes_is_not_taken_for_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening the file and locking it, its owner may end and another may make a new one."""
    import fcntl

    real, calls = fcntl.flock, list[int]()

    def replaced(file: object, how: int) -> None:
        if not calls:
            (tmp_path / LOCK_FILE).unlink()
        calls.append(how)
        real(file, how)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", replaced)
    with locked_folder(tmp_path), pytest.raises(InputError, match="in use by"):
        another_takes(tmp_path)
    assert len(calls) == 3


def test_a_function_works_alone_in_its_folder(tmp_path: Path) -> None:
    @alone_in("folder")
    def work(number: int, *, folder: Path) -> int:
        assert (folder / LOCK_FILE).exists() == folder.exists()
        return number

    assert work(3, folder=tmp_path) == 3
    assert work(4, folder=tmp_path / "none") == 4
    assert not (tmp_path / "none").exists()
    with locked_folder(tmp_path), pytest.raises(InputError, match="in use by"):
        Context().run(work, 5, folder=tmp_path)


def test_what_killed_commands_left_anywhere_in_a_run_goes_with_the_next_command(tmp_path: Path) -> None:
    """Nothing is ever written again beside a log whose training is done."""
    old, new = (tmp_path / "logs" / f".stage1.jsonl.partial-0000000{number}" for number in (1, 2))
    old.parent.mkdir()
    for path in (old, new):
        path.write_text("half")
    os.utime(old, (1, 1))
    with locked_folder(tmp_path):
        assert [path.name for path in old.parent.iterdir()] == [new.name]


def test_a_block_within_another_has_the_lock_already(tmp_path: Path) -> None:
    with locked_folder(tmp_path):
        with locked_folder(tmp_path):
            pass
        assert (tmp_path / LOCK_FILE).is_file(), "the inner one does not give it up"
        refused = subprocess.run(
            [sys.executable, "-c", HOLDING, str(tmp_path)], capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        assert "in use by process" in refused.stderr
    assert not (tmp_path / LOCK_FILE).exists()


def test_a_second_quickstart_is_told_before_it_begins(gavamoe: Runner, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    holder = holder_of(run)
    try:
        refused = gavamoe("quickstart", "--run-dir", run)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    assert (refused.code, "in use by process" in refused.err) == (2, True)
    assert [path.name for path in run.iterdir()] == [LOCK_FILE], "nothing was synthesized"
