"""A Ray Train worker's side of a training: its context, and its messages to the driver."""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gavamoe.artifacts import remote
from gavamoe.config.schema import RuntimeConfig
from gavamoe.errors import InputError, RunError, Stopped
from gavamoe.runtime.checkpoints import LOG_FILE, Uploads, newest_whole_checkpoint, storage_problem
from gavamoe.runtime.context import Metrics
from gavamoe.runtime.tracking import Line

_LESS_MEMORY = (
    "stage2.gradient_checkpointing=true, a smaller stage2.batch_size, a higher stage2.zero_stage or offloading take"
    " less memory (`gavamoe plan` says how much); then train in a new --run-dir"
)
_SECONDS_TO_AGREE = 5.0
_SECONDS_TO_STORE = 600.0
"""How long a training that ends by an error waits for its last checkpoint to be stored, at most."""
GAUGES = {"step": "train_step", "loss": "train_loss", "tokens_per_second": "train_tokens_per_second",
           "pairs_per_second": "train_pairs_per_second"}  # fmt: skip
"""Field of a log line -> Ray metric, which Prometheus shows as ray_gavamoe_NAME."""


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
        self._uploads = Uploads(self.rank, self.world_size, self._refuse)

    def __enter__(self) -> "RayContext":
        self.resume_from, damaged = newest_whole_checkpoint(self.rank, self._resources)
        if self.rank == 0:
            self._start_log()
            for problem in damaged:
                self._tell({"phase": "resume", "warning": f"{problem}; the checkpoint before it is used"})
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        import ray

        self._resources.close()
        if isinstance(error, Exception):  # an end without an error is waited for by Ray
            # All ranks have begun to store it, and do so whatever has become of their loops.
            with suppress(Exception):
                self._uploads.settle(_SECONDS_TO_STORE)
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

    def settle(self) -> None:
        self._uploads.settle()

    def checkpoint(self, folder: Path, metrics: Metrics, unchanged: Sequence[str] = ()) -> None:
        import ray

        if self.rank == 0:
            text = "".join(json.dumps(line) + "\n" for line in self._lines)
            (folder / LOG_FILE).write_text(text, encoding="utf-8")
        self._uploads.start(folder, metrics, unchanged)
        if self.rank == 0:
            ray.get(self._worker_log.refusals.remote())  # where the actor has died, training ends here, not at its end

    def _refuse(self, error: Exception) -> None:
        import ray

        ray.get(self._worker_log.refuse.remote(self.rank, error))

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
