"""Stage-1 results shared between runs: trained once, whoever asks, also when the process that trains is killed."""

import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from gavamoe.artifacts.stage1_cache import cached_stage1, stage1_key
from gavamoe.config.files import parse_config
from gavamoe.config.schema import RunConfig
from gavamoe.errors import RunError


def test_key_changes_with_what_stage1_reads_and_with_nothing_else() -> None:
    base = stage1_key(RunConfig(), "data")
    assert stage1_key(parse_config({"stage2": {"alpha": 0.5}, "runtime": {"workers": 2}}, ""), "data") == base
    for config in ({"stage1": {"beta": 0.2}}, {"seed": 1}):
        assert stage1_key(parse_config(config, ""), "data") != base
    assert stage1_key(RunConfig(), "other") != base


def slow_training(made: Path, cache: Path, calls: Path, hold: float) -> None:
    """A process that wants a stage-1 result; leaves a mark in `calls` if it makes it, which takes `hold` seconds."""

    def train(out: Path) -> None:
        (calls / str(os.getpid())).touch()
        time.sleep(hold)
        shutil.copytree(made, out)

    cached_stage1(cache, "key", train)


@pytest.fixture
def calls(tmp_path: Path) -> Path:
    folder = tmp_path / "calls"
    folder.mkdir()
    return folder


def start(made: Path, cache: Path, calls: Path, hold: float) -> Any:
    process = multiprocessing.get_context("spawn").Process(target=slow_training, args=(made, cache, calls, hold))
    process.start()
    return process


def wait_for(path: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(list(path.iterdir())) < count:
        assert time.monotonic() < deadline, f"{path} has {list(path.iterdir())}"
        time.sleep(0.05)


def test_two_processes_that_want_a_result_train_it_once(stage1: Path, tmp_path: Path, calls: Path) -> None:
    processes = [start(stage1, tmp_path / "cache", calls, 1.0) for _ in range(2)]
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0
    assert len(list(calls.iterdir())) == 1
    assert (tmp_path / "cache" / "key" / "artifact.json").is_file()


def test_a_killed_owner_frees_the_result_at_once(stage1: Path, tmp_path: Path, calls: Path) -> None:
    owner = start(stage1, tmp_path / "cache", calls, 600.0)
    wait_for(calls, 1)
    assert (tmp_path / "cache" / "key.lock").read_text().split()[1] == str(owner.pid)
    other = start(stage1, tmp_path / "cache", calls, 0.0)
    os.kill(owner.pid, signal.SIGKILL)
    owner.join(timeout=60)
    other.join(timeout=120)
    assert other.exitcode == 0
    assert len(list(calls.iterdir())) == 2


def test_a_failed_training_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    def fail(out: Path) -> None:
        del out
        raise RunError("diverged")

    with pytest.raises(RunError, match="diverged"):
        cached_stage1(tmp_path, "key", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["key.lock"]
    (tmp_path / "key").mkdir()
    assert cached_stage1(tmp_path, "key", fail) == (tmp_path / "key", True)
