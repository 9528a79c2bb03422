"""A worker's side without a Ray: which checkpoint it goes on from, what log it tells, how rank and desk agree."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gavamoe.config.schema import RuntimeConfig
from gavamoe.errors import InputError, RunError, Stopped
from gavamoe.runtime.ray_train import _failure
from gavamoe.runtime.worker import RayContext, WorkerJob, WorkerLog, run_worker


class Called:
    """A method of an actor: `.remote(...)` calls it at once; `ray.get` gives the value back."""

    def __init__(self, method: Any) -> None:
        self.remote = method


class LocalDesk:
    """A desk as its actor's handle shows it."""

    def __init__(self) -> None:
        self.desk = WorkerLog()

    def __getattr__(self, name: str) -> Called:
        return Called(getattr(self.desk, name))


class Kept:
    """A registered checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder)

    @contextmanager
    def as_directory(self) -> Iterator[str]:
        yield self.path


class Training:
    """What stands in for Ray Train: one worker, checkpoints copied below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.kept = folder, [Kept(path) for path in sorted(folder.glob("checkpoint_*"))]

    def report(self, metrics: dict[str, Any], checkpoint: Any) -> None:
        copy = self.folder / f"checkpoint_{len(self.kept)}"
        copy.mkdir(parents=True)
        for path in Path(checkpoint.path).iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        self.kept.append(Kept(copy))


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Training:
    import ray
    import ray.train.collective

    found = Training(tmp_path / "kept")
    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1, get_local_rank=lambda: 0)
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train, "report", found.report)
    monkeypatch.setattr(
        ray.train, "get_all_reported_checkpoints", lambda **_: [SimpleNamespace(checkpoint=kept) for kept in found.kept]
    )
    monkeypatch.setattr(ray.train.collective, "broadcast_from_rank_zero", lambda value: value)
    monkeypatch.setattr("ray.util.metrics.Gauge", lambda *_, **__: SimpleNamespace(
        set=lambda value: None, set_default_tags=lambda tags: None
    ))  # fmt: skip
    return found


def test_the_lack_of_memory_is_named_without_rays_advice() -> None:
    from ray.exceptions import OutOfMemoryError

    killed = OutOfMemoryError(
        "1 worker(s) were killed due to the node running low on memory.\nRefer to a page, please."
    )
    assert _failure(killed) == "a worker was killed, because its machine was running low on memory"
    assert _failure(ValueError("first\nlast\n")) == "last"


def job(desk: Any, loop: Any, stop_file: Path | None = None, **arguments: Any) -> WorkerJob:
    return WorkerJob(loop, arguments, RuntimeConfig(), desk, {"run": "r", "step": "s"}, stop_file)


def counting(*, context: RayContext, steps: int, work: Path, fail_at: int = -1) -> int:
    start = 0 if context.resume_from is None else int((context.resume_from / "step").read_text())
    for step in range(start, steps):
        if step == fail_at:
            raise ZeroDivisionError("a bug")
        context.log({"phase": "p", "step": step + 1})
        folder = work / f"written-{step}-{len(list(work.glob('*')))}"
        folder.mkdir(parents=True)
        (folder / "step").write_text(str(step + 1))
        context.checkpoint(folder, {})
    return start


def steps_at(desk: LocalDesk) -> list[int]:
    return [line["step"] for line in desk.desk.since(-1, 0)[2] if "step" in line]


def test_it_goes_on_from_the_newest_whole_checkpoint_with_its_log(training: Training, tmp_path: Path) -> None:
    desk, work = LocalDesk(), tmp_path / "work"
    with pytest.raises(ZeroDivisionError, match="a bug"):
        run_worker({"job": job(desk, counting, steps=6, work=work, fail_at=4)})
    assert steps_at(desk) == [1, 2, 3, 4]
    assert run_worker({"job": job(desk, counting, steps=6, work=work)}) == 4
    assert steps_at(desk) == [1, 2, 3, 4, 5, 6]

    Path(training.kept[-1].path, "step").write_text("9")
    Path(training.kept[-2].path, "log.jsonl").unlink()
    assert run_worker({"job": job(desk, counting, steps=6, work=work)}) == 4
    lines = desk.desk.since(-1, 0)[2]
    assert steps_at(desk) == [1, 2, 3, 4, 5, 6]
    warnings = [line["warning"] for line in lines if "warning" in line]
    assert ["step has changed" in warnings[0], "log.jsonl is missing" in warnings[1]] == [True, True]
    assert [json.loads(x)["step"] for x in Path(training.kept[3].path, "log.jsonl").read_text().splitlines()] == [
        1, 2, 3, 4,
    ]  # fmt: skip


def test_without_a_whole_checkpoint_it_refuses(training: Training, tmp_path: Path) -> None:
    desk, work = LocalDesk(), tmp_path / "work"
    run_worker({"job": job(desk, counting, steps=2, work=work)})
    for kept in training.kept:
        Path(kept.path, "step").write_text("")
    assert run_worker({"job": job(desk, counting, steps=6, work=work)}) is None
    [error] = desk.desk.refusals()
    assert isinstance(error, InputError)
    assert "no whole checkpoint is left" in str(error)
    assert steps_at(desk) == [1, 2], "the log is as it was"
    assert run_worker({"job": job(desk, counting, steps=6, work=work)}) is None, "once refused, no attempt follows"


def full(*, context: RayContext) -> None:
    raise OSError(28, "No space left on device", "/data/x")


def test_a_full_disk_is_refused_and_a_bug_is_not(training: Training, tmp_path: Path) -> None:
    desk = LocalDesk()
    assert run_worker({"job": job(desk, full)}) is None
    [error] = desk.desk.refusals()
    assert isinstance(error, RunError)
    assert str(error).startswith("/data/x: can't be written: no space is left; make room")


def test_a_stop_file_ends_it_at_the_next_line(training: Training, tmp_path: Path) -> None:
    desk, stop = LocalDesk(), tmp_path / "stop"
    stop.touch()
    assert run_worker({"job": job(desk, counting, stop, steps=3, work=tmp_path / "work")}) is None
    assert isinstance(desk.desk.refusals()[0], Stopped)
    assert steps_at(desk) == [1]
