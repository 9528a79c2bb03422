"""A Ray Train worker's side of a training: its context, its checkpoints with checksums, its messages to the driver.

A checkpoint holds the loop's files, `log.jsonl` (the log so far: the driver's is set back to it when workers restart)
and `checksums-RANK.json` for each rank. Rank 0 checks them before anything is resumed, and goes back to the checkpoint
before where one is damaged.
"""

import errno
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from gavamoe.artifacts import remote
from gavamoe.artifacts.checksums import FileEntry, find_damage, list_files
from gavamoe.artifacts.files import read_json, write_json
from gavamoe.config.schema import RuntimeConfig
from gavamoe.errors import InputError, RunError, Stopped, validated
from gavamoe.runtime.context import Metrics
from gavamoe.runtime.tracking import Line

LOG_FILE = "log.jsonl"
_NO_SPACE = {
    errno.ENOSPC: "no space is left",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "a file would be larger than is allowed",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
}
_TORCH_WRITE_ERRORS = ("file write failed", "unexpected pos")
"""Messages with which torch.save reports a full disk: a RuntimeError without an error number."""
_LESS_MEMORY = (
    "stage2.gradient_checkpointing=true, a smaller stage2.batch_size, a higher stage2.zero_stage or offloading take"
    " less memory (`gavamoe plan` says how much); then train in a new --run-dir"
)
_SECONDS_TO_AGREE = 5.0
GAUGES = {"step": "train_step", "loss": "train_loss", "tokens_per_second": "train_tokens_per_second",
           "pairs_per_second": "train_pairs_per_second"}  # fmt: skip
"""Field of a log line -> Ray metric, which Prometheus shows as ray_gavamoe_NAME."""


class RankChecksums(BaseModel):
    """Content of `checksums-RANK.json`."""

    model_config = ConfigDict(extra="forbid")
    workers: int
    """Number of ranks that wrote the checkpoint."""
    files: dict[str, FileEntry]
    """The files that this rank wrote."""


class WorkerLog:
    """An actor on the driver's node that collects the workers' log lines and errors; it outlives their restarts."""

    def __init__(self) -> None:
        self._generation = self._kept = 0
        self._lines: list[Line] = []
        self._refused: dict[int, Exception] = {}

    def restart(self, lines: list[Line]) -> None:
        """Workers start, with the log of their checkpoint."""
        self._generation += 1
        self._kept, self._lines = len(lines), lines

    def add(self, line: Line) -> None:
        self._lines.append(line)

    def since(self, generation: int, position: int) -> tuple[int, int, list[Line]]:
        """Number of the workers' latest start, how many lines it began with, and the lines from `position` on; all
        lines where `generation` is an earlier start."""
        return self._generation, self._kept, self._lines[position if generation == self._generation else 0 :]

    def refuse(self, rank: int, error: Exception) -> None:
        """The loop's own error: trying again would end the same way."""
        self._refused[rank] = error

    def refusals(self) -> list[Exception]:
        """Those of the ranks, in the order in which they came."""
        return list(self._refused.values())


@dataclass(frozen=True)
class WorkerJob:
    """The arguments of every worker: the loop, what it is called with, and how the worker reports."""

    loop: Callable[..., Any]
    arguments: dict[str, Any]
    """Keyword arguments of the loop; the driver's staged paths are `remote.StoredPath`s here."""
    placement: RuntimeConfig
    worker_log: Any
    """Handle of the `WorkerLog`."""
    labels: dict[str, str]
    """Labels of the Ray metrics: the run and the step."""
    stop_file: Path | None
    """Once it exists, the workers end together at their next log line."""


def run_worker(config: dict[str, Any]) -> Any:
    """One worker's life. The loop's own errors go to the `WorkerLog` and end the training without another attempt."""
    import ray
    import torch
    from ray import train

    job: WorkerJob = config["job"]
    if ray.get(job.worker_log.refusals.remote()):
        return None  # an attempt before this one was refused, by one rank only
    torch.set_num_threads(job.placement.threads_per_worker)
    stored_paths = {name: value for name, value in job.arguments.items() if isinstance(value, remote.StoredPath)}
    try:
        arguments = {name: remote.here(value) for name, value in job.arguments.items()}
        with RayContext(job) as context:
            outcome = job.loop(context=context, **arguments)
        if train.get_context().get_world_rank() == 0:
            for name, stored in stored_paths.items():
                if stored.relative and arguments[name].is_dir():
                    remote.push(arguments[name], stored.uri)
        return outcome
    except InputError as error:
        return _refuse(job, error)
    except (RunError, OSError, RuntimeError) as error:
        problem = storage_problem(error)
        if problem is not None:
            return _refuse(job, RunError(f"{problem}; make room or give permission, then continue with --resume"))
        if isinstance(error, torch.OutOfMemoryError):
            # Another attempt would need as much.
            return _refuse(job, RunError(f"{str(error).partition(chr(10))[0].rstrip('.')}; {_LESS_MEMORY}"))
        if isinstance(error, RunError):
            return _refuse(job, error)
        raise


def storage_problem(error: BaseException | None) -> str | None:
    """The reason why a disk can't be written, in words, if an error comes from that; None for any other error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            where = f"{error.filename}: " if error.filename else ""
            return f"{where}can't be written: {_NO_SPACE[error.errno]}"
        if isinstance(error, RuntimeError) and any(text in str(error) for text in _TORCH_WRITE_ERRORS):
            return "a checkpoint can't be written: the disk for temporary files (TMPDIR) seems full"
        error = error.__cause__ or error.__context__
    return None


def _refuse(job: WorkerJob, error: Exception) -> None:
    """Tell the `WorkerLog`. Where all ranks refuse, training ends at once; else the others wait for this one in a
    collective operation, and only a failure stops them: the next attempt then ends at its start."""
    import ray
    from ray import train

    context = train.get_context()
    ray.get(job.worker_log.refuse.remote(context.get_world_rank(), error))
    end = time.monotonic() + _SECONDS_TO_AGREE
    while len(ray.get(job.worker_log.refusals.remote())) < context.get_world_size():
        if time.monotonic() > end:
            raise error
        time.sleep(0.1)


class RayContext:
    """`gavamoe.runtime.context.Context` backed by Ray Train."""

    def __init__(self, job: WorkerJob) -> None:
        from ray import train

        ray_context = train.get_context()
        self.rank: int = ray_context.get_world_rank()
        self.world_size: int = ray_context.get_world_size()
        self.device = f"cuda:{ray_context.get_local_rank()}" if job.placement.gpu else "cpu"
        self.resume_from: Path | None = None
        self._worker_log, self._labels, self._stop_file = job.worker_log, job.labels, job.stop_file
        self._lines: list[Line] = []
        self._gauges: dict[str, Any] = {}
        self._resources = ExitStack()

    def __enter__(self) -> "RayContext":
        self.resume_from, damaged = _newest_whole_checkpoint(self.rank, self._resources)
        if self.rank == 0:
            self._start_log()
            for problem in damaged:
                self._tell({"phase": "resume", "warning": f"{problem}; the checkpoint before it is used"})
        return self

    def __exit__(self, *error: object) -> None:
        import ray

        self._resources.close()
        if self.rank == 0:
            ray.get(self._worker_log.refusals.remote())  # calls are carried out in order: all lines have arrived

    def log(self, metrics: Metrics) -> None:
        if self.rank == 0:
            self._tell(dict(metrics))
        if self._stop_file is not None:
            self._stop_if_asked(self._stop_file)

    def _tell(self, line: Line) -> None:
        self._lines.append(line)
        self._worker_log.add.remote(line)
        for field, gauge in self._gauges.items():
            value = line.get(field)
            if isinstance(value, int | float):
                gauge.set(value)

    def _stop_if_asked(self, stop_file: Path) -> None:
        """All workers log at the same steps, and rank 0's look decides for all: none waits for one that has left."""
        import torch

        asked = torch.tensor([int(self.rank == 0 and stop_file.exists())], device=self.device)
        if self.world_size > 1:
            torch.distributed.all_reduce(asked)
        if asked:
            raise Stopped(f"asked to by {stop_file}")

    def checkpoint(self, folder: Path, metrics: Metrics) -> None:
        import ray
        from ray import train

        if self.rank == 0:
            text = "".join(json.dumps(line) + "\n" for line in self._lines)
            (folder / LOG_FILE).write_text(text, encoding="utf-8")
        write_checksums(folder, self.rank, self.world_size)
        train.report(dict(metrics), checkpoint=train.Checkpoint.from_directory(folder))
        if self.rank == 0:
            ray.get(self._worker_log.refusals.remote())  # where the actor has died, training ends here, not at its end

    def _start_log(self) -> None:
        from ray.util.metrics import Gauge

        if self.resume_from is not None:
            text = (self.resume_from / LOG_FILE).read_text(encoding="utf-8")
            self._lines = [json.loads(line) for line in text.splitlines()]
        self._worker_log.restart.remote(list(self._lines))
        for field, name in GAUGES.items():
            gauge = Gauge(f"gavamoe_{name}", f"{field} of the latest log line", tag_keys=tuple(self._labels))
            gauge.set_default_tags(self._labels)
            self._gauges[field] = gauge


def _newest_whole_checkpoint(rank: int, resources: ExitStack) -> tuple[Path | None, list[str]]:
    """The folder of the newest registered checkpoint whose files are as they were written (None: nothing to resume),
    the same one on all ranks, and on rank 0 what is wrong with the newer ones.

    Args:
        resources: holds the copies of what lies at a URI. Rank 0's, which it has checked, serves its whole machine.

    Raises:
        InputError: there are checkpoints, and all are damaged.
    """
    from ray import train
    from ray.train.collective import broadcast_from_rank_zero

    reported = train.get_all_reported_checkpoints(consistency_mode=train.CheckpointConsistencyMode.COMMITTED)
    damaged: list[str] = []
    chosen = -1
    if rank == 0:
        for index in reversed(range(len(reported))):
            with ExitStack() as fetched:
                problem = checkpoint_problem(Path(fetched.enter_context(reported[index].checkpoint.as_directory())))
                if problem is None:
                    chosen = index
                    resources.push(fetched.pop_all())
                    break
            damaged.append(f"{reported[index].checkpoint.path}: {problem}")
    chosen = broadcast_from_rank_zero(chosen)
    if chosen >= 0:
        return Path(resources.enter_context(reported[chosen].checkpoint.as_directory())), damaged
    if reported:
        reason = f" ({damaged[0]})" if damaged else ""
        raise InputError(f"no whole checkpoint is left{reason}; start again without --resume")
    return None, damaged


def write_checksums(folder: Path, rank: int, workers: int) -> None:
    """Note size and SHA-256 of this rank's files, which are all that `folder` holds."""
    checksums = RankChecksums(workers=workers, files=list_files(folder))
    write_json(folder / _checksums_file(rank), checksums.model_dump(mode="json"))


def checkpoint_problem(folder: Path) -> str | None:
    """The first damage of a checkpoint's files, in words; None if all ranks' files are as they were written."""
    try:
        ranks = range(_read_checksums(folder, 0).workers)
        files = {name: entry for rank in ranks for name, entry in _read_checksums(folder, rank).files.items()}
    except InputError as error:
        return f"its checksums can't be read ({error})"
    damage = find_damage(folder, files)
    return None if damage is None else damage.text


def _read_checksums(folder: Path, rank: int) -> RankChecksums:
    path = folder / _checksums_file(rank)
    return validated(RankChecksums, read_json(path), path, "the checksums of a rank's files")


def _checksums_file(rank: int) -> str:
    return f"checksums-{rank}.json"
