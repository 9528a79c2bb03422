"""Ray jobs: a command runs on a cluster, and its log is followed from here.

`submit` uploads this package, the scripts in `jobs/` and the YAML files named on the command line (an allow-list:
Ray alone would upload the whole working directory, secrets included) and starts `jobs/STEP.py` on the cluster.
Datasets and runs are never uploaded: their paths must mean the same on the cluster (docs/cluster.md).
"""

import asyncio
import logging
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from gavamoe.config.files import PACKAGE, load_config, shipped
from gavamoe.config.schema import RunConfig
from gavamoe.config.yaml_reader import MAX_YAML_BYTES
from gavamoe.errors import InputError, RunError, one_line
from gavamoe.runtime.connection import JOB_SERVER, job_server
from gavamoe.runtime.progress import PROGRESS_LINE
from gavamoe.runtime.tracking import check_tracking

STEPS = ("prepare", "stage1", "stage2", "evaluate", "tune", "pipeline")
FORWARDED = ("HF_HUB_OFFLINE", "HF_HOME", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION")
"""Environment variables of this shell that a job gets, where they are set. Keys and passwords are not among them."""

_INPUTS = "inputs"
_YAML = (".yaml", ".yml")
_RECONNECTS = 5
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_VERBOSE_LOGGERS = (
    "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env.packaging",
)  # fmt: skip
"""Loggers of Ray that report every package they upload and every connection that ends."""
_NO_AGENT = "No available agent"


class Follower(Protocol):
    """Receives the lines of a job's log; `gavamoe.cli.output.cluster.JobTerminal` draws progress lines as bars."""

    def text(self, line: str) -> None:
        """A line of the log."""

    def progress(self, title: str, done: int, total: int, note: str) -> None:
        """A progress line: `done` of `total` units of a step."""


@dataclass(frozen=True)
class Job:
    """A Ray job's record at the cluster's job server."""

    id: str
    status: str
    entrypoint: str
    message: str
    exit_code: int | None
    started: float | None
    """Start time in seconds since the epoch; None for a job that has not started."""
    ended: float | None
    """End time in seconds since the epoch; None for a job that has not ended."""


class Jobs:
    """The jobs of one cluster."""

    def __init__(self, address: str | None = None) -> None:
        """Connect.

        Raises:
            InputError: `address` (or the environment's) has another form, or no job server answers there.
            RunError: it refuses this client's token.
        """
        self.address = job_server(address)
        from ray.job_submission import JobSubmissionClient

        for module in _VERBOSE_LOGGERS:
            logging.getLogger(module).setLevel(logging.WARNING)
        # Ray itself puts this variable, and then RAY_ADDRESS, above the address that its client is given.
        os.environ[JOB_SERVER] = self.address
        with self._request():
            self._client = JobSubmissionClient(self.address)

    @contextmanager
    def _request(self) -> Iterator[None]:
        """Wraps a request to the job server: any failure becomes a `RunError` of one line."""
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise RunError(
                f"{self.address}: the cluster refuses this client's token ({one_line(error)}); set RAY_AUTH_MODE=token"
                " and the cluster's token in RAY_AUTH_TOKEN or ~/.ray/auth_token"
            ) from error
        except (ConnectionError, ValueError) as error:
            raise RunError(
                f"{self.address}: no job server answers ({one_line(error)}); --address names the cluster's dashboard"
            ) from error
        except RuntimeError as error:
            raise RunError(f"{self.address}: the job server says: {one_line(error)}") from error

    def submit(self, step: str, arguments: Sequence[str], environment: dict[str, str]) -> str:
        """Start `jobs/STEP.py ARGUMENTS` on the cluster; returns the job's id.

        Args:
            environment: variables of the job's processes. The cluster stores them in plain text: no secrets.
        """
        if step not in STEPS:
            raise InputError(f"{step}: no such step; there are {', '.join(STEPS)}")
        with staged_code(arguments) as (folder, command), self._request():
            return self._submit_when_ready(
                entrypoint=shlex.join(["python", f"jobs/{step}.py", *command]),
                submission_id=f"{step}-{time.strftime('%m%d-%H%M%S')}-{os.urandom(2).hex()}",
                runtime_env={"working_dir": str(folder), "env_vars": job_environment(environment)},
            )

    def _submit_when_ready(self, **job: Any) -> str:
        """Submit; a head that has just started answers before it can take jobs."""
        for attempt in range(_RECONNECTS):
            try:
                return str(self._client.submit_job(**job))
            except RuntimeError as error:
                if _NO_AGENT not in str(error):
                    raise
                time.sleep(2**attempt)
        raise RunError(
            f"{self.address}: the head's agent, which takes jobs, does not run; where another Ray holds its port, start"
            " the head with another --dashboard-agent-listen-port"
        )

    def list(self) -> list[Job]:
        """All jobs that were submitted, the newest first."""
        with self._request():
            jobs = [_job(details) for details in self._client.list_jobs() if details.submission_id]
        return sorted(jobs, key=lambda job: job.started or 0, reverse=True)

    def get(self, job: str) -> Job:
        """One job.

        Raises:
            InputError: the cluster knows no such job.
        """
        with self._request():
            try:
                return _job(self._client.get_job_info(job))
            except RuntimeError as error:
                if "status code 404" not in str(error):
                    raise
                raise InputError(f"{job}: no such job at {self.address}; `gavamoe jobs list` shows them") from error

    def logs(self, job: str) -> str:
        """All that a job has printed so far."""
        self.get(job)
        with self._request():
            return str(self._client.get_job_logs(job))

    def stop(self, job: str) -> bool:
        """Ask a job to end; False if it had ended before."""
        self.get(job)
        with self._request():
            return bool(self._client.stop_job(job))

    def follow(self, job: str, follower: Follower) -> Job:
        """Hand over the job's log as it grows, until the job ends; returns how it ended."""
        self.get(job)
        reader = _Reader(follower)
        for attempt in range(_RECONNECTS + 1):
            try:
                asyncio.run(self._tail(job, reader))
                break
            except (RuntimeError, OSError) as error:
                if attempt == _RECONNECTS:
                    raise RunError(
                        f"{job}: its log can't be followed ({one_line(error)}); the job itself keeps running"
                    ) from error
                time.sleep(2**attempt)
        reader.end()
        while (status := self.get(job)).status not in _ENDED:  # the log closes a moment before the status says so
            time.sleep(0.5)
        return status

    async def _tail(self, job: str, reader: "_Reader") -> None:
        reader.rewind()
        async for chunk in self._client.tail_job_logs(job):
            reader.feed(chunk)


class _Reader:
    """Cuts chunks into lines; after a reconnection, which starts at the log's beginning, skips what was shown."""

    def __init__(self, follower: Follower) -> None:
        self._follower = follower
        self._shown = self._skip = 0
        self._rest = ""

    def rewind(self) -> None:
        self._skip = self._shown

    def feed(self, chunk: str) -> None:
        skipped = min(self._skip, len(chunk))
        self._skip -= skipped
        fresh = chunk[skipped:]
        self._shown += len(fresh)
        *lines, self._rest = (self._rest + fresh).split("\n")
        for line in lines:
            self._hand_over(line)

    def end(self) -> None:
        if self._rest:
            self._hand_over(self._rest)

    def _hand_over(self, line: str) -> None:
        match = re.fullmatch(PROGRESS_LINE, line)
        if match:
            self._follower.progress(match["title"], int(match["done"]), int(match["total"]), match["note"])
        else:
            self._follower.text(line)


@contextmanager
def staged_code(arguments: Sequence[str]) -> Iterator[tuple[Path, list[str]]]:
    """A folder with what a job needs, and the arguments with local YAML files renamed to their copies in it.

    Raises:
        InputError: a YAML file is larger than a config may be, or is the config of a run and names a tracking server
            that nothing else names.
    """
    _check_tracking(arguments)
    with tempfile.TemporaryDirectory(prefix="gavamoe-job-") as name:
        folder = Path(name)
        shutil.copytree(PACKAGE, folder / "gavamoe", ignore=shutil.ignore_patterns("__pycache__", "_jobs"))
        shutil.copytree(shipped("jobs"), folder / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
        if shipped("configs").parent != PACKAGE:  # a checkout; an installed package holds them itself
            shutil.copytree(shipped("configs"), folder / "configs")
            shutil.copytree(shipped("tune_spaces"), folder / "tune_spaces")
        yield folder, [_staged_argument(argument, folder / _INPUTS) for argument in arguments]


def _check_tracking(arguments: Sequence[str]) -> None:
    """What training would refuse here: on the cluster, the copy of a run's config no longer lies in the run."""
    joined = [argument.removeprefix("--set=") for argument in arguments if argument.startswith("--set=")]
    overrides = joined + [value for option, value in pairwise(arguments) if option == "--set"]
    for path in (Path(argument) for argument in arguments):
        if path.suffix in _YAML and path.is_file() and (config := _config(path, overrides)) is not None:
            check_tracking(config, path, overrides)


def _config(path: Path, overrides: Sequence[str]) -> RunConfig | None:
    """The config in a YAML file; None for other content, and for a config with an error, which the job itself tells."""
    try:
        return load_config(path, overrides)
    except InputError:
        return None


def _staged_argument(argument: str, inputs: Path) -> str:
    path = Path(argument)
    if path.suffix not in _YAML or not path.is_file():
        return argument
    if path.stat().st_size > MAX_YAML_BYTES:
        raise InputError(f"{path}: larger than the {MAX_YAML_BYTES} bytes a config may have")
    inputs.mkdir(exist_ok=True)
    taken = inputs / path.name
    if taken.exists() and taken.read_bytes() != path.read_bytes():
        raise InputError(f"{path}: another file of that name is uploaded already; rename one")
    shutil.copyfile(path, taken)
    return f"{_INPUTS}/{path.name}"


def job_environment(extra: dict[str, str]) -> dict[str, str]:
    """Environment variables of the job's processes."""
    forwarded = {name: os.environ[name] for name in FORWARDED if name in os.environ}
    return {"PYTHONUNBUFFERED": "1"} | forwarded | extra


def _job(details: Any) -> Job:
    return Job(
        id=details.submission_id,
        status=str(getattr(details.status, "value", details.status)),
        entrypoint=details.entrypoint,
        message=details.message or "",
        exit_code=details.driver_exit_code,
        started=details.start_time / 1000 if details.start_time else None,
        ended=details.end_time / 1000 if details.end_time else None,
    )
