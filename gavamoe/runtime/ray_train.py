"""The only place that knows Ray Train: gives a training loop its workers, checkpoints, logs and restarts.

A loop is a function `loop(*, context: Context, **arguments)`, defined at module level. It runs on
`placement.workers` Ray Train workers (their side is `worker`); the log goes to `FOLDER/logs` (see `tracking`),
checkpoints to `FOLDER/checkpoints/NAME` until the step is done. Where FOLDER is the staging folder of a URI
(`artifacts.remote`), checkpoints go to the storage itself, and workers on other machines fetch their inputs from there.
"""

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gavamoe.artifacts import remote
from gavamoe.artifacts.run import RunFolder
from gavamoe.config.schema import RunConfig, RuntimeConfig
from gavamoe.errors import InputError, RunError
from gavamoe.runtime import connection
from gavamoe.runtime.checkpoints import StepCheckpoints, storage_problem
from gavamoe.runtime.context import LocalContext
from gavamoe.runtime.failures import failure_text, keep_traceback, lost_surroundings
from gavamoe.runtime.host_memory import KEPT_MEMORY
from gavamoe.runtime.tracking import Line, RunLog
from gavamoe.runtime.worker import WorkerJob, WorkerLog, run_worker

OnLine = Callable[[Line], None]

_CONTROLLER_RESTARTS = 3
"""A worker group that cannot start is retried without limit by Ray's default, which looks like a hang."""
_POLL_SECONDS = 0.2


@contextmanager
def ray_session(placement: RuntimeConfig, *, dashboard: bool = False) -> Iterator[None]:
    """Connect to the cluster of RAY_ADDRESS, or start a Ray on this machine and stop it at the end.

    A Ray that is already connected in this process is used as it is and left running.

    Args:
        dashboard: a Ray started here has its dashboard (on the loopback interface). Without it Ray does not free what
            the workers of a training held whose caller, such as a trial of a search, was killed.

    Raises:
        InputError: the environment names no cluster that answers, or no places where a Ray can be started.
    """
    # ray.train.report blocks for one poll of the controller: 2 s by default, paid at every checkpoint.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    address = connection.cluster_address()
    if address is None:
        _start_ray(placement, dashboard=dashboard)
    else:
        connection.connect(address, logging_level="WARNING")
    try:
        yield
    finally:
        ray.shutdown()


def _start_ray(placement: RuntimeConfig, *, dashboard: bool) -> None:
    import ray

    environment = worker_environment(placement)
    if dashboard:
        # Ray Train's clean-up asks Ray's State API, which gives up where several Rays run on the machine and none is
        # named: the workers' environment names this one, so its port is chosen before it starts.
        port = free_port("")
        os.environ["RAY_GCS_SERVER_PORT"] = str(port)
        environment["RAY_ADDRESS"] = f"{ray.util.get_node_ip_address()}:{port}"
    try:
        connection.start(
            num_cpus=max(os.cpu_count() or 1, placement.workers * placement.threads_per_worker),
            include_dashboard=dashboard,
            logging_level="ERROR",
            runtime_env={"env_vars": environment},
        )
    finally:
        os.environ.pop("RAY_GCS_SERVER_PORT", None)


def free_port(address: str = "127.0.0.1") -> int:
    """A port of a local address on which nothing listens now; "" means all addresses of this machine."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def run_training(
    loop: Callable[..., Any],
    arguments: dict[str, Any],
    *,
    placement: RuntimeConfig,
    folder: Path,
    name: str,
    resume: bool = False,
    elastic: bool = False,
    on_line: OnLine | None = None,
    stop_file: Path | None = None,
) -> Any:
    """Run `loop` on Ray Train workers and return what rank 0's call returned.

    Args:
        loop: module-level function; called as `loop(context=..., **arguments)` on every worker.
        folder: the run folder; logs and checkpoints go below it.
        resume: continue from the last registered checkpoint of an earlier call, where there is one.
        elastic: the loop can continue with another number of workers: `placement.min_workers` then applies.
        on_line: called in this process with each log line, as it appears.
        stop_file: once it exists, the workers end together at their next log line.

    Raises:
        Stopped: because of `stop_file`.
        InputError, RunError: as raised by the loop; these are not retried.
        RunError: the workers died more often than `placement.max_failures`, or did not start in time.
    """
    import ray
    from ray import train
    from ray.train.torch import TorchConfig, TorchTrainer

    folder = Path(folder).absolute()
    checkpoints = StepCheckpoints(folder, name)
    if not resume:
        checkpoints.remove()
    # Read by Ray Train's controller, which counts a failed start as one of its restarts.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(placement.wait_minutes * 60 / (1 + _CONTROLLER_RESTARTS))
    worker_log = ray.remote(WorkerLog).options(num_cpus=0, scheduling_strategy=_on_this_node()).remote()
    job = WorkerJob(
        loop=loop,
        arguments={key: remote.portable(value) for key, value in arguments.items()},
        placement=placement,
        worker_log=worker_log,
        labels={"run": folder.name, "step": name},
        stop_file=stop_file,
    )
    workers = (placement.min_workers, placement.workers) if elastic and placement.min_workers else placement.workers
    trainer = TorchTrainer(
        run_worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(
            backend="nccl" if placement.gpu else "gloo", timeout_s=round(60 * placement.collective_minutes)
        ),
        scaling_config=train.ScalingConfig(
            num_workers=workers,
            use_gpu=placement.gpu,
            resources_per_worker={"CPU": placement.threads_per_worker} | ({"GPU": 1} if placement.gpu else {}),
        ),
        run_config=train.RunConfig(
            name=name,
            storage_path=checkpoints.path,
            storage_filesystem=checkpoints.filesystem,
            failure_config=train.FailureConfig(
                max_failures=placement.max_failures, controller_failure_limit=_CONTROLLER_RESTARTS
            ),
            checkpoint_config=train.CheckpointConfig(num_to_keep=2),
            logging_config=train.LoggingConfig(log_level="ERROR"),
            worker_runtime_env={"env_vars": worker_environment(placement)},
        ),
    )
    config = arguments.get("config")
    kept = resume and checkpoints.exist()
    with (
        RunLog(folder, name, placement, config if isinstance(config, RunConfig) else None, keep=kept) as log,
        _following(worker_log, log, on_line),
    ):
        outcome = _fit(trainer, worker_log, RunFolder(folder), name)
    checkpoints.remove()
    if remote.stored_path(folder) is not None:
        remote.commit(folder)
        remote.checkout(str(checkpoints.base))
    return outcome


def _fit(trainer: Any, worker_log: Any, run: RunFolder, name: str) -> Any:
    """Train; the loop's own error, which the workers told the `WorkerLog`, is raised as it was.

    To go on is advised only where the training lost something of its surroundings. Any other error, such as one of
    shapes, comes again at the same step; its traceback is left in the run folder.
    """
    import ray
    from ray import train

    failure: Exception | None = None
    outcome = None
    try:
        outcome = _interruptible(trainer.fit).return_value
    except (train.TrainingFailedError, ray.exceptions.RayError) as error:
        failure = error
    try:
        refusals = ray.get(worker_log.refusals.remote())
    except ray.exceptions.RayError as error:
        raise RunError(f"{name}: the process that keeps the log has died; continue with --resume") from error
    if refusals:
        raise refusals[0]
    if failure is not None:
        problem = storage_problem(failure)
        if problem is not None or lost_surroundings(failure):
            raise RunError(f"{name}: {problem or failure_text(failure)}; continue with --resume") from failure
        raise RunError(f"{name}: {failure_text(failure)}; {keep_traceback(run.error(name), failure)}") from failure
    return outcome


def _interruptible(call: Callable[[], Any]) -> Any:
    """What a call returns, made on a thread of its own, so that Ctrl-C raises KeyboardInterrupt here.

    On the main thread Ray Train would put a handler of its own in place of Python's, for good: it aborts one training,
    ends the process with 0, and swallows every Ctrl-C that comes once that training is over.
    """
    outcome: list[Any] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as error:  # noqa: BLE001 - raised again on the other thread
            failure.append(error)

    thread = threading.Thread(target=run, name="fit", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(timeout=1.0)  # with a timeout, or some systems deliver no signal
    except KeyboardInterrupt:
        logging.getLogger("ray").setLevel(logging.CRITICAL)  # what the thread says of a Ray that is being shut down
        raise
    if failure:
        raise failure[0]
    return outcome[0]


def was_cut_off(folder: Path, name: str) -> bool:
    """Whether the last `run_training` of that name was interrupted after a checkpoint. Its workers outlive a killed
    driver for a second or two and may have written their results, which the log then lacks."""
    return StepCheckpoints(Path(folder).absolute(), name).exist()


def _on_this_node() -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Not soft: Ray then puts an actor that asks for no CPU on any node, and the loss of that node ends the training.
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


@contextmanager
def _following(worker_log: Any, log: RunLog, on_line: OnLine | None) -> Iterator[None]:
    """While the block runs, write each line that reaches the `WorkerLog` to the log, and hand it to `on_line`.

    Raises:
        RunError: the block is done, but the log can't be written.
    """
    stop = threading.Event()
    problems: list[OSError] = []
    follower = threading.Thread(target=_follow, args=(worker_log, log, on_line, stop, problems), daemon=True)
    follower.start()
    try:
        yield
    finally:
        stop.set()
        follower.join()
    if problems:
        _rewrite_log(worker_log, log)


def _follow(
    worker_log: Any, log: RunLog, on_line: OnLine | None, stop: threading.Event, problems: list[OSError]
) -> None:
    import ray

    generation = position = 0
    while True:
        last = stop.wait(_POLL_SECONDS)
        try:
            current, kept, lines = ray.get(worker_log.since.remote(generation, position))
        except ray.exceptions.RayError:  # no answer, perhaps for a while; `_fit` reports an actor that has died
            if last:
                return
            continue
        try:
            if current != generation:  # workers have started, and what their checkpoint held is the log now
                log.restart(lines[:kept])
            for line in lines[kept if current != generation else 0 :]:
                log.add(line)
        except OSError as error:  # a full disk, perhaps for a while: the training continues as long as it can
            problems.append(error)
        if current != generation:
            generation, position, lines = current, kept, lines[kept:]
        for line in lines:
            if on_line is not None:
                on_line(line)
        position += len(lines)
        if last:
            return


def _rewrite_log(worker_log: Any, log: RunLog) -> None:
    """Write the whole log again, of which some lines could not be written when they came."""
    import ray

    _, _, lines = ray.get(worker_log.since.remote(-1, 0))
    try:
        log.restart(lines)
    except OSError as error:
        raise RunError(f"{log.path}: the training is done, its log can't be written ({error.strerror})") from error


def run_tasks(
    loop: Callable[..., Any],
    jobs: Sequence[dict[str, Any]],
    placement: RuntimeConfig,
    on_done: Callable[[int, int], None] | None = None,
) -> list[Any]:
    """Call `loop(context=..., **job)` for every job, side by side as Ray tasks; returns the results in jobs' order.

    As many run at once as the cluster has room for, each a single worker with `placement.threads_per_worker` CPUs.

    Args:
        loop: module-level function that needs no checkpoints; a task whose process died starts again.
        on_done: called in this process with (jobs done, jobs) whenever one ends.

    Raises:
        InputError, RunError: as raised by a job; the other jobs are canceled.
        RunError: a job failed otherwise, or its process died more often than `placement.max_failures`.
    """
    import ray

    task = ray.remote(_task).options(
        num_cpus=placement.threads_per_worker,
        num_gpus=1 if placement.gpu else 0,
        max_retries=placement.max_failures,
        runtime_env={"env_vars": worker_environment(placement)},
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
        raise RunError(f"{loop.__name__}: {failure_text(error)}") from error
    finally:
        for result in waiting:
            ray.cancel(result, force=True)
    return list(ray.get(results))


def _task(loop: Callable[..., Any], job: dict[str, Any], placement: RuntimeConfig) -> Any:
    """One job's life; runs in a Ray worker process."""
    import torch

    torch.set_num_threads(placement.threads_per_worker)
    return loop(context=LocalContext(device="cuda" if placement.gpu else "cpu"), **job)


def worker_environment(placement: RuntimeConfig) -> dict[str, str]:
    """What processes that compute are started with: threads, libraries' settings, memory that is kept."""
    threads = str(placement.threads_per_worker)
    environment = {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    # Said in both cases: a variable that was exported for one would have DeepSpeed run its code on the other.
    environment["DS_ACCELERATOR"] = "cuda" if placement.gpu else "cpu"
    if not placement.gpu:
        # Large tensors on huge pages: a training step of stage 1 spends a twentieth less on page faults.
        environment["THP_MEM_ALLOC_ENABLE"] = "1"
        # Experts meet other numbers of tokens at each step: with oneDNN's default of 1,024, bfloat16 products are
        # compiled again and again, a tenth of a step of stage 2.
        environment["DNNL_PRIMITIVE_CACHE_CAPACITY"] = "8192"
        environment |= KEPT_MEMORY
    return environment
