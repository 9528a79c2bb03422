"""A worker without a Ray: which checkpoint it goes on from, what log it tells, how rank and log agree, damage."""

import errno
import json
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pyarrow.fs import LocalFileSystem

from gavamoe.artifacts.files import write_folder
from gavamoe.config.schema import RuntimeConfig
from gavamoe.errors import InputError, RunError, Stopped
from gavamoe.runtime.checkpoints import checkpoint_problem
from gavamoe.runtime.worker import RayContext, WorkerJob, WorkerLog, run_worker


class Called:
    """A method of an actor: `.remote(...)` calls it at once; `ray.get` gives the value back."""

    def __init__(self, method: Any) -> None:
        self.remote = method


class LocalLog:
    """A worker log as its actor's handle shows it."""

    def __init__(self) -> None:
        self.log_actor = WorkerLog()

    def __getattr__(self, name: str) -> Called:
        return Called(getattr(self.log_actor, name))


class Kept:
    """A registered checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder)

    @contextmanager
    def as_directory(self) -> Iterator[str]:
        yield self.path


class Training:
    """What stands in for Ray Train: one worker, checkpoints copied below a folder, each on a thread of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.kept = folder, [Kept(path) for path in sorted(folder.glob("checkpoint_*"))]
        self.errors: list[BaseException] = []
        self.may_store = threading.Event()
        self.may_store.set()
        self._thread: threading.Thread | None = None

    def persist_current_checkpoint(self, checkpoint: Any, name: str) -> Any:
        shutil.copytree(checkpoint.path, self.folder / name)
        return SimpleNamespace(filesystem=LocalFileSystem(), path=str(self.folder / name))

    def report(
        self, metrics: dict[str, Any], *, checkpoint: Any, checkpoint_upload_fn: Any, checkpoint_upload_mode: Any,
        delete_local_checkpoint_after_upload: bool,
    ) -> None:  # fmt: skip
        assert checkpoint_upload_mode.name == "ASYNC"
        assert delete_local_checkpoint_after_upload
        name = f"checkpoint_{len(self.kept)}"

        def store() -> None:
            self.may_store.wait()
            try:
                kept = Kept(Path(checkpoint_upload_fn(checkpoint, name).path))
            except OSError as error:
                self.errors.append(error)
                return
            shutil.rmtree(checkpoint.path)
            self.kept.append(kept)

        self._thread = threading.Thread(target=store)
        self._thread.start()

    def run(self, job: WorkerJob) -> Any:
        """A worker's whole life: Ray ends it when its last checkpoint is stored."""
        try:
            return run_worker({"job": job})
        finally:
            self.reported()

    def reported(self, **_: Any) -> list[Any]:
        """Those that count, once the last one does."""
        if self._thread is not None:
            self._thread.join()
        return [SimpleNamespace(checkpoint=kept) for kept in self.kept]


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Training:
    import ray
    import ray.train.collective

    found = Training(tmp_path / "kept")
    context = SimpleNamespace(
        get_world_rank=lambda: 0, get_world_size=lambda: 1, get_local_rank=lambda: 0, get_storage=lambda: found
    )
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train, "report", found.report)
    monkeypatch.setattr(ray.train, "get_all_reported_checkpoints", found.reported)
    monkeypatch.setattr(ray.train.collective, "broadcast_from_rank_zero", lambda value: value)
    monkeypatch.setattr("ray.util.metrics.Gauge", lambda *_, **__: SimpleNamespace(
        set=lambda value: None, set_default_tags=lambda tags: None
    ))  # fmt: skip
    return found


def job(log_actor: Any, loop: Any, stop_file: Path | None = None, **arguments: Any) -> WorkerJob:
    return WorkerJob(loop, arguments, RuntimeConfig(), log_actor, {"run": "r", "step": "s"}, stop_file)


def counting(*, context: RayContext, steps: int, work: Path, fail_at: int = -1) -> int:
    start = 0 if context.resume_from is None else int((context.resume_from / "step").read_text())
    for step in range(start, steps):
        if step == fail_at:
            raise ZeroDivisionError("a bug")
        context.log({"phase": "p", "step": step + 1})
        work.mkdir(exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=work))
        (folder / "step").write_text(str(step + 1))
        context.checkpoint(folder, {})
    return start


def steps_at(log_actor: LocalLog) -> list[int]:
    return [line["step"] for line in log_actor.log_actor.since(-1, 0)[2] if "step" in line]


def test_it_goes_on_from_the_newest_whole_checkpoint_with_its_log(training: Training, tmp_path: Path) -> None:
    log_actor, work = LocalLog(), tmp_path / "work"
    with pytest.raises(ZeroDivisionError, match="a bug"):
        training.run(job(log_actor, counting, steps=6, work=work, fail_at=4))
    assert steps_at(log_actor) == [1, 2, 3, 4]
    assert training.run(job(log_actor, counting, steps=6, work=work)) == 4
    assert steps_at(log_actor) == [1, 2, 3, 4, 5, 6]

    Path(training.kept[-1].path, "step").write_text("9")
    Path(training.kept[-2].path, "log.jsonl").unlink()
    assert training.run(job(log_actor, counting, steps=6, work=work)) == 4
    lines = log_actor.log_actor.since(-1, 0)[2]
    assert steps_at(log_actor) == [1, 2, 3, 4, 5, 6]
    warnings = [line["warning"] for line in lines if "warning" in line]
    assert ["step has changed" in warnings[0], "log.jsonl is missing" in warnings[1]] == [True, True]
    assert [json.loads(x)["step"] for x in Path(training.kept[3].path, "log.jsonl").read_text().splitlines()] == [
        1, 2, 3, 4,
    ]  # fmt: skip


def saving(*, context: RayContext, work: Path, steps: int, settle: bool = True) -> None:
    """Each step's checkpoint has a file of its own and one that only the first step writes."""
    for step in range(steps):
        folder = work / f"step{step}"
        (folder / "engine").mkdir(parents=True)
        (folder / "engine/weights").write_text(str(step))
        if step == 0:
            (folder / "best").write_text("the best")
        context.checkpoint(folder, {}, () if step == 0 else ("best",))
        assert list(folder.iterdir()) == [], "taken away, so that the loop's temporary folder can go"
    if settle:
        context.settle()


def test_what_is_unchanged_is_stored_once(training: Training, tmp_path: Path) -> None:
    log_actor, work = LocalLog(), tmp_path / "work"
    training.run(job(log_actor, saving, work=work, steps=3))
    folders = [Path(kept.path) for kept in training.kept]
    assert [(folder / "engine/weights").read_text() for folder in folders] == ["0", "1", "2"]
    assert [checkpoint_problem(folder) for folder in folders] == [None] * 3
    assert {(folder / "best").stat().st_ino for folder in folders} == {(folders[0] / "best").stat().st_ino}
    shutil.rmtree(folders[0])
    shutil.rmtree(folders[1])
    assert checkpoint_problem(folders[2]) is None
    assert sorted(path.name for path in work.iterdir()) == ["step0", "step1", "step2"], "nothing is left aside"


def test_training_goes_on_while_a_checkpoint_is_stored(training: Training, tmp_path: Path) -> None:
    """But a second one waits for it, and the storing of one that a kill cuts off leaves the one before."""
    log_actor, work = LocalLog(), tmp_path / "work"
    training.run(job(log_actor, saving, work=work, steps=1))
    training.may_store.clear()
    run_worker({"job": job(log_actor, saving, work=tmp_path / "more", steps=1, settle=False)})
    assert len(training.kept) == 1, "the loop has ended before its checkpoint is stored"
    (training.folder / "checkpoint_1").mkdir()  # what a kill leaves: files that no list names
    assert checkpoint_problem(Path(training.kept[-1].path)) is None
    (training.folder / "checkpoint_1").rmdir()
    waiting = threading.Thread(
        target=run_worker, args=({"job": job(log_actor, saving, work=tmp_path / "two", steps=2)},)
    )
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    training.may_store.set()
    waiting.join()
    assert len(training.kept) == 4


def test_a_storage_that_is_full_is_refused(training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(checkpoint: Any, name: str) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device", "/data/x")

    monkeypatch.setattr(training, "persist_current_checkpoint", fails)
    log_actor, work = LocalLog(), tmp_path / "work"
    training.run(job(log_actor, saving, work=work, steps=1))
    [error] = log_actor.log_actor.refusals()
    assert str(error).startswith("/data/x: can't be written: no space is left; make room")
    assert len(training.errors) == 1
    assert [path.name for path in work.iterdir()] == ["step0"], "what could not be stored is removed"


class Remote(Kept):
    """A checkpoint at a URI: fetched by the first who asks, removed when the last one is done, as Ray does it."""

    def __init__(self, kept: Kept, local: Path) -> None:
        super().__init__(Path(kept.path))
        self.local, self.open, self.fetched = local, 0, 0

    @contextmanager
    def as_directory(self) -> Iterator[str]:
        if not self.open:
            shutil.copytree(self.path, self.local)
            self.fetched += 1
        self.open += 1
        yield str(self.local)
        self.open -= 1
        if not self.open:
            shutil.rmtree(self.local)


def test_a_checkpoint_at_a_uri_is_fetched_once(training: Training, tmp_path: Path) -> None:
    """What rank 0 has checked is what all go on from; a damaged one does not stay."""
    log_actor, work = LocalLog(), tmp_path / "work"
    training.run(job(log_actor, counting, steps=3, work=work))
    Path(training.kept[-1].path, "step").write_text("9")
    stored = [Remote(kept, tmp_path / f"fetched-{number}") for number, kept in enumerate(training.kept)]
    training.kept[:] = stored
    assert training.run(job(log_actor, counting, steps=5, work=work)) == 2
    assert [each.fetched for each in stored] == [0, 1, 1]
    assert not any(each.local.exists() for each in stored)


def out_of_memory(*, context: RayContext) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation.")


def test_a_gpu_without_room_is_not_tried_again(training: Training) -> None:
    log_actor = LocalLog()
    assert run_worker({"job": job(log_actor, out_of_memory)}) is None
    [error] = log_actor.log_actor.refusals()
    assert isinstance(error, RunError)
    assert str(error).startswith("CUDA out of memory. Tried to allocate 2.00 GiB; stage2.gradient_checkpointing=true")


def test_without_a_whole_checkpoint_it_refuses(training: Training, tmp_path: Path) -> None:
    log_actor, work = LocalLog(), tmp_path / "work"
    training.run(job(log_actor, counting, steps=2, work=work))
    for kept in training.kept:
        Path(kept.path, "step").write_text("")
    assert training.run(job(log_actor, counting, steps=6, work=work)) is None
    [error] = log_actor.log_actor.refusals()
    assert isinstance(error, InputError)
    assert "no whole checkpoint is left" in str(error)
    assert steps_at(log_actor) == [1, 2], "the log is as it was"
    assert training.run(job(log_actor, counting, steps=6, work=work)) is None, "once refused, no attempt follows"


def full(*, context: RayContext) -> None:
    raise OSError(28, "No space left on device", "/data/x")


def test_a_full_disk_is_refused_and_a_bug_is_not(training: Training, tmp_path: Path) -> None:
    log_actor = LocalLog()
    assert run_worker({"job": job(log_actor, full)}) is None
    [error] = log_actor.log_actor.refusals()
    assert isinstance(error, RunError)
    assert str(error).startswith("/data/x: can't be written: no space is left; make room")


def full_folder(*, context: RayContext, out: Path) -> None:
    with write_folder(out):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_is_full_while_the_result_is_written_says_to_go_on(training: Training, tmp_path: Path) -> None:
    log_actor = LocalLog()
    assert run_worker({"job": job(log_actor, full_folder, out=tmp_path / "stage1")}) is None
    [error] = log_actor.log_actor.refusals()
    assert str(error) == (
        "can't be written: no space is left; make room or give permission, then continue with --resume"
    )


def test_a_stop_file_ends_it_at_the_next_line(training: Training, tmp_path: Path) -> None:
    log_actor, stop = LocalLog(), tmp_path / "stop"
    stop.touch()
    assert training.run(job(log_actor, counting, stop, steps=3, work=tmp_path / "work")) is None
    assert isinstance(log_actor.log_actor.refusals()[0], Stopped)
    assert steps_at(log_actor) == [1]


def test_the_worker_log_tells_a_restart_from_new_lines() -> None:
    log_actor = WorkerLog()
    assert log_actor.since(0, 0) == (0, 0, [])
    log_actor.restart([])
    log_actor.add({"step": 1})
    log_actor.add({"step": 2})
    assert log_actor.since(0, 0) == (1, 0, [{"step": 1}, {"step": 2}])
    assert log_actor.since(1, 1) == (1, 0, [{"step": 2}])
    log_actor.restart([{"step": 1}])
    log_actor.add({"step": 2})
    assert log_actor.since(1, 2) == (2, 1, [{"step": 1}, {"step": 2}])
    assert log_actor.refusals() == []
    log_actor.refuse(1, InputError("no"))
    assert str(log_actor.refusals()[0]) == "no"
