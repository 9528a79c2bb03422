"""Ray Train plumbing: return value, logs, checkpoints, restart after a killed worker, errors that are not retried."""

import json
import os
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gavamoe.config.schema import RuntimeConfig
from gavamoe.errors import InputError, RunError
from gavamoe.runtime.context import Context
from gavamoe.runtime.ray_train import run_tasks, run_training
from gavamoe.runtime.worker import RayContext

TWO = RuntimeConfig(workers=2, threads_per_worker=1, max_failures=1)

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_two_workers")]


def counting_loop(*, context: Context, steps: int, die_at: int | None = None, always: bool = False) -> dict[str, Any]:
    """Counts steps with a collective in each; checkpoints every third; rank 1 may be killed."""
    start = 0 if context.resume_from is None else int((context.resume_from / "step").read_text())
    for step in range(start, steps):
        ranks = torch.ones(1)
        torch.distributed.all_reduce(ranks)
        context.log({"phase": "count", "step": step + 1, "steps": steps, "ranks": float(ranks)})
        if step == die_at and context.rank == 1 and (always or start == 0):
            context.settle()  # the last checkpoint counts: death is to come after that
            os.kill(os.getpid(), signal.SIGKILL)
        if step % 3 == 2:
            with tempfile.TemporaryDirectory() as folder:
                if context.rank == 0:
                    (Path(folder) / "step").write_text(str(step + 1))
                context.checkpoint(Path(folder), {"step": step + 1})
    return {"start": start, "threads": torch.get_num_threads(), "rank": context.rank}


def refusing_loop(*, context: Context, marker: Path) -> None:
    with open(marker, "a") as file:
        file.write(f"{context.rank}\n")
    raise InputError("the loop says no")


def failing_loop(*, context: Context, marker: Path) -> None:
    """Rank 1 fails by itself, and leaves rank 0 in a collective operation."""
    with open(marker, "a") as file:
        file.write(f"{context.rank}\n")
    if context.rank == 1:
        raise IndexError("Target 288 is out of bounds.")
    torch.distributed.all_reduce(torch.ones(1))


def loop_without_its_log(*, context: RayContext, steps: int) -> int:
    """Checkpoints each step; the process that keeps the log is killed in the second step, if it is the first call."""
    import ray

    start = 0 if context.resume_from is None else int((context.resume_from / "step").read_text())
    for step in range(start, steps):
        context.log({"phase": "count", "step": step + 1, "steps": steps})
        if step == 1 and start == 0:
            ray.kill(context._worker_log)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "step").write_text(str(step + 1))
            context.checkpoint(Path(folder), {"step": step + 1})
    return start


def loop_killed_while_storing(*, context: RayContext, steps: int) -> int:
    """Checkpoints each step, with a file that only the first one writes; the first process dies when the third one's
    files are stored, but do not count yet."""
    start = 0
    if context.resume_from is not None:
        start = int((context.resume_from / "step").read_text())
        assert (context.resume_from / "best").read_text() == "the best"
    store = context._uploads._store

    def killed(storage: Any, checkpoint: Any, name: str, unchanged: Sequence[str]) -> Any:
        stored = store(storage, checkpoint, name, unchanged)
        if start == 0 and (Path(stored.path) / "step").read_text() == "3":
            os.kill(os.getpid(), signal.SIGKILL)
        return stored

    context._uploads._store = killed  # type: ignore[method-assign]
    for step in range(start, steps):
        context.log({"phase": "count", "step": step + 1, "steps": steps})
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "step").write_text(str(step + 1))
            if step == start:
                (Path(folder) / "best").write_text("the best")
            context.checkpoint(Path(folder), {"step": step + 1}, () if step == start else ("best",))
    return start


def log_steps(folder: Path, name: str) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "logs" / f"{name}.jsonl").read_text().splitlines()]


def test_killed_worker_resumes_without_lost_or_doubled_log_lines(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    result = run_training(
        counting_loop, {"steps": 8, "die_at": 4}, placement=TWO, folder=tmp_path, name="count", on_line=seen.append
    )
    assert result == {"start": 3, "threads": 1, "rank": 0}
    assert log_steps(tmp_path, "count") == list(range(1, 9))
    assert {line["ranks"] for line in seen} == {2.0}
    assert seen[-1]["step"] == 8
    assert list((tmp_path / "logs" / "tensorboard" / "count").glob("events.*"))
    assert not (tmp_path / "checkpoints" / "count").exists()


def test_too_many_deaths_fail_and_resume_continues(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"count: .*continue with --resume"):
        run_training(
            counting_loop, {"steps": 8, "die_at": 4, "always": True}, placement=TWO, folder=tmp_path, name="count"
        )
    result = run_training(counting_loop, {"steps": 8}, placement=TWO, folder=tmp_path, name="count", resume=True)
    assert result["start"] == 3
    assert log_steps(tmp_path, "count") == list(range(1, 9))


def test_input_error_reaches_the_caller_once(tmp_path: Path) -> None:
    marker = tmp_path / "calls"
    with pytest.raises(InputError, match="the loop says no"):
        run_training(refusing_loop, {"marker": marker}, placement=TWO, folder=tmp_path, name="refuse")
    assert sorted(marker.read_text().split()) == ["0", "1"]


def test_an_error_of_the_loops_own_does_not_advise_to_resume(tmp_path: Path) -> None:
    two = TWO.model_copy(update={"max_failures": 0})
    kept = tmp_path / "run" / "logs" / "fail.error.txt"
    with pytest.raises(RunError) as caught:
        run_training(failing_loop, {"marker": tmp_path / "calls"}, placement=two, folder=tmp_path / "run", name="fail")
    assert str(caught.value) == (
        "fail: Target 288 is out of bounds.; resuming meets the same error again until its cause is"
        f" removed; traceback: {kept}"
    )
    assert "in failing_loop" in kept.read_text()


def test_a_death_while_a_checkpoint_is_stored_leaves_the_one_before(tmp_path: Path) -> None:
    one = RuntimeConfig(workers=1, max_failures=1)
    started = run_training(loop_killed_while_storing, {"steps": 5}, placement=one, folder=tmp_path, name="count")
    assert started == 2
    assert log_steps(tmp_path, "count") == [1, 2, 3, 4, 5]


def test_workers_wait_for_each_other_as_long_as_they_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time limit of collective operations reaches the process group."""
    seen: list[Any] = []

    class Trainer:
        def __init__(self, *_: Any, torch_config: Any, **__: Any) -> None:
            seen.append(torch_config)

        def fit(self) -> Any:
            return SimpleNamespace(return_value=None)

    monkeypatch.setattr("ray.train.torch.TorchTrainer", Trainer)
    for minutes in (30, 0.5):
        placement = RuntimeConfig(workers=2, collective_minutes=minutes)
        run_training(counting_loop, {"steps": 1}, placement=placement, folder=tmp_path, name="count")
    assert [(config.backend, config.timeout_s) for config in seen] == [("gloo", 1800), ("gloo", 30)]


@pytest.mark.slow
def test_a_training_without_its_log_keeper_ends_at_the_next_checkpoint(tmp_path: Path) -> None:
    one = RuntimeConfig(workers=1, max_failures=1)
    with pytest.raises(RunError, match="count: the process that keeps the log has died; continue with --resume"):
        run_training(loop_without_its_log, {"steps": 6}, placement=one, folder=tmp_path, name="count")
    assert run_training(
        loop_without_its_log, {"steps": 6}, placement=one, folder=tmp_path, name="count", resume=True
    ) in (1, 2)  # fmt: skip
    assert log_steps(tmp_path, "count") == [1, 2, 3, 4, 5, 6]


def squaring_job(*, context: Context, number: int, marker: Path | None = None) -> dict[str, Any]:
    """Squares; the negative is refused; with a marker, the first process that takes the job dies."""
    if number < 0:
        raise InputError(f"{number} is negative")
    if marker is not None and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"square": number**2, "rank": context.rank, "threads": torch.get_num_threads(), "device": context.device}


def test_tasks_return_in_the_order_of_their_jobs_and_survive_a_death(tmp_path: Path) -> None:
    jobs: list[dict[str, Any]] = [{"number": number} for number in (3, 1, 2)]
    jobs[1]["marker"] = tmp_path / "died"
    done: list[tuple[int, int]] = []
    found = run_tasks(squaring_job, jobs, TWO, on_done=lambda count, total: done.append((count, total)))
    assert [one["square"] for one in found] == [9, 1, 4]
    assert found[0] == {"square": 9, "rank": 0, "threads": 1, "device": "cpu"}
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert (tmp_path / "died").exists()


def test_a_tasks_input_error_reaches_the_caller() -> None:
    with pytest.raises(InputError, match="-1 is negative"):
        run_tasks(squaring_job, [{"number": 1}, {"number": -1}], TWO)


def test_a_tasks_own_failure_is_named() -> None:
    with pytest.raises(RunError, match=r"squaring_job: .*not supported between"):
        run_tasks(squaring_job, [{"number": 1}, {"number": "x"}], TWO)
