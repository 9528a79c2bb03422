"""The only place that knows Ray Train: gives a training loop its workers, checkpoints, logs and restarts.

A loop is a function `loop(*, context: Context, **arguments)`, defined at module level. It runs on
`placement.workers` Ray Train workers; rank 0's log lines go to `FOLDER/logs/NAME.jsonl` and to
TensorBoard beside it, checkpoints to `FOLDER/checkpoints/NAME` until the step is done.
"""

import json
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from gavamoe.config import RuntimeConfig
from gavamoe.context import LocalContext, Metrics
from gavamoe.errors import InputError, RunError

Line = dict[str, Any]
OnLine = Callable[[Line], None]

_LOG_POSITION = "log_position.json"
_CONTROLLER_RESTARTS = 3
"""A worker group that cannot start is retried without limit by Ray's default, which looks like a hang."""


class Stopped(RunError):
    """The training ended early because it was asked to."""


@contextmanager
def ray_session(placement: RuntimeConfig, *, dashboard: bool = False) -> Iterator[None]:
    """Connect to the cluster of RAY_ADDRESS, or start a Ray on this machine and stop it at the end.

    A Ray that is already connected in this process is used as it is and left running.

    Args:
        dashboard: a Ray started here has its dashboard (on the loopback interface). Without it Ray does not free what
            the workers of a training held whose caller, such as a trial of a search, was killed.
    """
    # ray.train.report blocks for one poll of the controller: 2 s by default, paid at every checkpoint.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, logging_level="WARNING", log_to_driver=False)
    else:
        _start_ray(placement, dashboard=dashboard)
    try:
        yield
    finally:
        ray.shutdown()


def _start_ray(placement: RuntimeConfig, *, dashboard: bool) -> None:
    import ray

    environment = _worker_environment(placement)
    if dashboard:
        # What frees places asks Ray's State API, which gives up where several Rays run on the machine and none is
        # named: the workers' environment names this one, so its port is chosen before it starts.
        port = _free_port()
        os.environ["RAY_GCS_SERVER_PORT"] = str(port)
        environment["RAY_ADDRESS"] = f"{ray.util.get_node_ip_address()}:{port}"
    try:
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, placement.workers * placement.threads_per_worker),
            include_dashboard=dashboard,
            logging_level="ERROR",
            log_to_driver=False,
            runtime_env={"env_vars": environment},
        )
    finally:
        os.environ.pop("RAY_GCS_SERVER_PORT", None)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
    return port


def run_training(
    loop: Callable[..., Any],
    arguments: dict[str, Any],
    *,
    placement: RuntimeConfig,
    folder: Path,
    name: str,
    resume: bool = False,
    on_line: OnLine | None = None,
    stop_file: Path | None = None,
) -> Any:
    """Run `loop` on Ray Train workers and return what rank 0's call returned.

    Args:
        loop: module-level function; called as `loop(context=..., **arguments)` on every worker.
        folder: the run folder; logs and checkpoints go below it.
        resume: continue from the last registered checkpoint of an earlier call, where there is one.
        on_line: called in this process with each log line, as it appears.
        stop_file: once it exists, the workers end together at their next log line.

    Raises:
        Stopped: because of `stop_file`.
        InputError, RunError: as raised by the loop; these are not retried.
        RunError: the workers died more often than `placement.max_failures`.
    """
    from ray import train
    from ray.train.torch import TorchConfig, TorchTrainer

    folder = Path(folder).absolute()
    log_file = folder / "logs" / f"{name}.jsonl"
    log_file.parent.mkdir(parents=True, exist_ok=True)
    storage = folder / "checkpoints"
    if not resume:
        shutil.rmtree(storage / name, ignore_errors=True)
    log_file.touch()
    if not (storage / name).exists():
        log_file.write_text("")

    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "loop": loop,
            "arguments": arguments,
            "placement": placement,
            "log_file": str(log_file),
            "tensorboard": str(folder / "logs" / "tensorboard" / name),
            "stop_file": stop_file,
        },
        torch_config=TorchConfig(backend="nccl" if placement.gpu else "gloo"),
        scaling_config=train.ScalingConfig(
            num_workers=placement.workers,
            use_gpu=placement.gpu,
            resources_per_worker={"CPU": placement.threads_per_worker} | ({"GPU": 1} if placement.gpu else {}),
        ),
        run_config=train.RunConfig(
            name=name,
            storage_path=str(storage),
            failure_config=train.FailureConfig(
                max_failures=placement.max_failures, controller_failure_limit=_CONTROLLER_RESTARTS
            ),
            checkpoint_config=train.CheckpointConfig(num_to_keep=2),
            logging_config=train.LoggingConfig(log_level="ERROR"),
            worker_runtime_env={"env_vars": _worker_environment(placement)},
        ),
    )
    with _following(log_file, on_line):
        try:
            outcome = trainer.fit().return_value
        except train.TrainingFailedError as error:
            raise RunError(f"{name}: {_failure(error)}; continue with --resume") from error
    shutil.rmtree(storage / name, ignore_errors=True)
    if isinstance(outcome, _Refused):
        raise outcome.error
    return outcome


def run_tasks(
    loop: Callable[..., Any],
    jobs: Sequence[dict[str, Any]],
    placement: RuntimeConfig,
    on_done: Callable[[int, int], None] | None = None,
) -> list[Any]:
    """Call `loop(context=..., **job)` for every job, side by side as Ray tasks; returns the results in jobs' order.

    As many run at once as the cluster has room for, each a single worker with `placement.threads_per_worker` CPUs.

    Args:
        loop: module-level function that needs no checkpoints; a task whose process died starts anew.
        on_done: called in this process with (jobs done, jobs) whenever one ends.

    Raises:
        InputError, RunError: as raised by a job; the other jobs are cancelled.
        RunError: a job failed otherwise, or its process died more often than `placement.max_failures`.
    """
    import ray

    task = ray.remote(_task).options(
        num_cpus=placement.threads_per_worker,
        num_gpus=1 if placement.gpu else 0,
        max_retries=placement.max_failures,
        runtime_env={"env_vars": _worker_environment(placement)},
    )
    results = [task.remote(loop, job, placement) for job in jobs]
    waiting = results
    try:
        while waiting:
            ended, waiting = ray.wait(waiting)
            ray.get(ended)
            if on_done is not None:
                on_done(len(jobs) - len(waiting), len(jobs))
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, InputError | RunError):
            raise cause from None
        raise RunError(f"{loop.__name__}: {_failure(error)}") from error
    finally:
        for result in waiting:
            ray.cancel(result, force=True)
    return list(ray.get(results))


def _task(loop: Callable[..., Any], job: dict[str, Any], placement: RuntimeConfig) -> Any:
    """One job's life; runs in a Ray worker process."""
    import torch

    torch.set_num_threads(placement.threads_per_worker)
    return loop(context=LocalContext(device="cuda" if placement.gpu else "cpu"), **job)


class _Refused:
    """The loop's own error, returned rather than raised so that Ray does not try the same thing again."""

    def __init__(self, error: InputError | RunError) -> None:
        self.error = error


def _worker(job: dict[str, Any]) -> Any:
    """One worker's life; runs in a Ray Train worker process."""
    import torch

    placement: RuntimeConfig = job["placement"]
    torch.set_num_threads(placement.threads_per_worker)
    log_file, tensorboard, stop_file = Path(job["log_file"]), Path(job["tensorboard"]), job["stop_file"]
    with _RayContext(log_file, tensorboard, stop_file, gpu=placement.gpu) as context:
        try:
            return job["loop"](context=context, **job["arguments"])
        except (InputError, RunError) as error:
            return _Refused(error)


class _RayContext:
    """`gavamoe.context.Context` backed by Ray Train."""

    def __init__(self, log_file: Path, tensorboard: Path, stop_file: Path | None, *, gpu: bool) -> None:
        from ray import train

        ray_context = train.get_context()
        self.rank: int = ray_context.get_world_rank()
        self.world_size: int = ray_context.get_world_size()
        self.device = f"cuda:{ray_context.get_local_rank()}" if gpu else "cpu"
        self.resume_from: Path | None = None
        self._resources = ExitStack()
        self._tensorboard_folder = tensorboard
        self._log_path, self._stop_file = log_file, stop_file
        self._log: IO[str] | None = None
        self._board: Any = None

    def __enter__(self) -> "_RayContext":
        from ray import train

        checkpoint = train.get_checkpoint()
        if checkpoint is not None:
            self.resume_from = Path(self._resources.enter_context(checkpoint.as_directory()))
        if self.rank == 0:
            self._open_logs()
        return self

    def __exit__(self, *error: object) -> None:
        self._resources.close()

    def log(self, metrics: Metrics) -> None:
        if self._log is not None:
            self._write(self._log, metrics)
        if self._stop_file is not None:
            self._stop_if_asked(self._stop_file)

    def _write(self, log: IO[str], metrics: Metrics) -> None:
        log.write(json.dumps(dict(metrics)) + "\n")
        log.flush()
        step = metrics.get("step")
        for key, value in metrics.items():
            if isinstance(step, int) and isinstance(value, int | float) and key not in ("step", "steps"):
                self._board.add_scalar(f"{metrics.get('phase', 'train')}/{key}", value, step)

    def _stop_if_asked(self, stop_file: Path) -> None:
        """All workers log at the same steps, and rank 0's look decides for all: none waits for one that has left."""
        import torch

        asked = torch.tensor([int(self.rank == 0 and stop_file.exists())], device=self.device)
        if self.world_size > 1:
            torch.distributed.all_reduce(asked)
        if asked:
            raise Stopped(f"asked to by {stop_file}")

    def checkpoint(self, folder: Path, metrics: Metrics) -> None:
        from ray import train

        if self._log is not None:
            (folder / _LOG_POSITION).write_text(json.dumps({"bytes": self._log.tell()}))
        train.report(dict(metrics), checkpoint=train.Checkpoint.from_directory(folder))

    def _open_logs(self) -> None:
        """Open the log where the checkpoint left it: lines of steps that will be redone are cut off."""
        from torch.utils.tensorboard import SummaryWriter

        position = 0
        if self.resume_from is not None:
            position = json.loads((self.resume_from / _LOG_POSITION).read_text())["bytes"]
        self._log = self._resources.enter_context(self._log_path.open("a", encoding="utf-8"))
        self._log.truncate(position)
        if position == 0:
            shutil.rmtree(self._tensorboard_folder, ignore_errors=True)
        self._board = self._resources.enter_context(SummaryWriter(str(self._tensorboard_folder)))


@contextmanager
def _following(log_file: Path, on_line: OnLine | None) -> Iterator[None]:
    """While the block runs, hand each line that appears in `log_file` to `on_line`."""
    if on_line is None:
        yield
        return
    stop = threading.Event()
    follower = threading.Thread(target=_follow, args=(log_file, on_line, stop), daemon=True)
    follower.start()
    try:
        yield
    finally:
        stop.set()
        follower.join()


def _follow(log_file: Path, on_line: OnLine, stop: threading.Event) -> None:
    position = 0
    while True:
        last = stop.wait(0.2)
        if log_file.stat().st_size < position:  # a restarted worker cut the lines that it will write again
            position = log_file.stat().st_size
        with open(log_file, encoding="utf-8") as file:
            file.seek(position)
            while (line := file.readline()).endswith("\n"):
                position = file.tell()
                on_line(json.loads(line))
        if last:
            return


def _worker_environment(placement: RuntimeConfig) -> dict[str, str]:
    threads = str(placement.threads_per_worker)
    environment = {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    if not placement.gpu:
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def _failure(error: Exception) -> str:
    """The last line of the first worker's error, or of the controller's."""
    failures = getattr(error, "worker_failures", None)
    cause = next(iter(failures.values())) if failures else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[-1] if lines else type(cause).__name__
