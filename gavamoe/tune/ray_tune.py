"""Ray Tune runs the trials, the Optuna study decides which: the only part of the search that knows Ray.

Ray's own OptunaSearch is not used: it reports a trial that ASHA stopped to Optuna as complete, with the value of its
short budget, which misleads TPE and the importances; and its knowledge is on disk only at Tune's next snapshot. Here a
searcher hands trials out of the study and writes each result into it at once, so that the study alone is enough to
continue from, and Tune's state is thrown away after every session.
"""

import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from ray import tune
from ray.tune import Callback, FailureConfig, RunConfig, TuneConfig, Tuner
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

from gavamoe.config.schema import RuntimeConfig
from gavamoe.errors import InputError, RunError, Stopped, one_line
from gavamoe.runtime.ray_train import ray_session
from gavamoe.runtime.room import described, needs, room_for
from gavamoe.tune.checks import refusal, trial_config
from gavamoe.tune.space import Space
from gavamoe.tune.study import Record, Study
from gavamoe.tune.trial import Job, ask_to_stop, asked_at, discard_work, run_trial

_CONFIGURATION_ERRORS = (InputError, RunError, RuntimeError, ValueError, ArithmeticError, MemoryError)
"""Errors that a configuration can cause (torch's out-of-memory is a RuntimeError), recorded as the trial's result.
Any other failure, such as a killed worker, is tried again, at most `runtime.max_failures` times."""

_LITTLE_ROOM = 64 * 2**20
"""Bytes left on the search's disk below which a trial that fails is not put down to its configuration."""
_FULL_DISK = re.compile(r"no space (is )?left|disk is full|quota", re.IGNORECASE)
"""What a trial says whose own disk, on whatever machine, is full."""

_NEVER_ENOUGH = 1_000_000
"""Samples that Tune may ask for; the searcher says when to stop."""

_RAY_FOLDER = "ray"
_MEBIBYTE = 2**20


class SearchObserver(Protocol):
    """Observer of a running search; `gavamoe.cli.output.search` draws its table."""

    def update(self, state: "SearchState") -> None:
        """The search's state has changed."""


@dataclass(frozen=True)
class SearchState:
    """The state of a running search, as its observer sees it."""

    space: Space
    """The search space."""
    records: list[Record]
    """All trials so far."""
    slots: int
    """Number of trials that run at the same time."""
    earlier: int
    """Number of trials that were finished before this session."""
    seconds: float
    """Seconds since this session began."""
    restarts: dict[int, int] = field(default_factory=dict)
    """Times that a trial was started again after its worker died, by trial number."""


def run_trials(job: Job, study: Study, observer: SearchObserver, *, concurrent: int | None) -> bool:
    """Train trials until the budget is spent; False when Ctrl-C ended it, were it at the end of the last trial.

    Args:
        concurrent: trials at once, at most; None: as many as the cluster's CPUs and GPUs take.
    """
    placement = trial_config(job.config, job.space, {}).runtime
    with _ray(job, placement):
        session = _Session(job, study, observer, _slots(placement, concurrent))
        if not session.work_left():
            return True
        interrupted = _fit(job, session, placement)
    return not interrupted and session.spent and not any(record.state == "running" for record in study.records)


@contextmanager
def _ray(job: Job, placement: RuntimeConfig) -> Iterator[None]:
    """A Ray session; with the dashboard where Ray Train runs inside trials, which may be killed."""
    # Not wanted: Tune's log files for each trial; its check that every report has the metric (the last has none);
    # tracebacks of dead workers in the middle of the live table; the trial folder as working directory.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    with ray_session(placement, dashboard=not job.in_process):
        yield


def _slots(placement: RuntimeConfig, concurrent: int | None) -> int:
    """Trials at once that the cluster's resources allow.

    Raises:
        InputError: not even one fits.
    """
    need = needs(placement, placement.workers)
    fit = room_for(need, placement, concurrent or 1)
    if fit < 1:
        raise InputError(
            f"runtime: a trial needs {described(need)}; lower runtime.workers or runtime.threads_per_worker"
        )
    return fit if concurrent is None else min(fit, concurrent)


def _fit(job: Job, session: "_Session", placement: RuntimeConfig) -> bool:
    """Run Tune to its end; whether Ctrl-C was pressed."""
    storage = job.folder.absolute() / _RAY_FOLDER
    shutil.rmtree(storage, ignore_errors=True)  # of a killed session
    # With Ray Train inside, the trial itself only waits. It must reserve something; a share of a CPU would keep the
    # workers from a machine that they fill.
    resources: dict[str, float] = {"CPU": placement.threads_per_worker} if job.in_process else {"memory": _MEBIBYTE}
    if placement.gpu and job.in_process:
        resources["GPU"] = 1.0

    def trial(config: dict[str, Any]) -> None:  # not with_parameters, which lends the job from Ray's object store
        _trainable(config, job)

    tuner = Tuner(
        tune.with_resources(trial, resources),
        tune_config=TuneConfig(
            search_alg=_StudySearcher(session),
            scheduler=_scheduler(session),
            num_samples=_NEVER_ENOUGH,
            reuse_actors=job.in_process,
        ),
        run_config=RunConfig(
            name="trials",
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=placement.max_failures),
            callbacks=[_Listener(session)],
            verbose=0,
        ),
    )
    try:
        with _ctrl_c_heeded() as pressed:
            tuner.fit()
    except Exception:
        session.raise_failure()
        raise
    shutil.rmtree(storage, ignore_errors=True)
    return pressed.is_set()


@contextmanager
def _ctrl_c_heeded() -> Iterator[threading.Event]:
    """While the block runs, the first Ctrl-C ends Tune in order, and is kept; the second raises KeyboardInterrupt.

    Tune's own handler forgets it: pressed when the last trial had just ended, it changed nothing. And it stays when
    Tune is done, and swallows the next one, be it in the training of the best configuration. Tune ends as well by
    SIGUSR1, for which alone it is left its handler.
    """
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # where Tune has none either
        yield pressed
        return
    others = signal.getsignal(signal.SIGUSR1)

    def heed(number: int, frame: object) -> None:
        if pressed.is_set() or signal.getsignal(signal.SIGUSR1) is others:  # Tune has not put its own there yet
            raise KeyboardInterrupt
        pressed.set()
        signal.raise_signal(signal.SIGUSR1)

    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    before = signal.signal(signal.SIGINT, heed)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
        if others is not None:
            signal.signal(signal.SIGUSR1, others)


def _scheduler(session: "_Session") -> TrialScheduler | None:
    pruning = session.job.space.pruning
    if pruning is None:
        return None
    arguments: dict[str, Any] = {
        "time_attr": "percent",
        "metric": "value",
        "mode": "max" if session.job.space.objectives[0].direction == "higher" else "min",
        "max_t": 100,
        "grace_period": pruning.grace,
        "reduction_factor": pruning.reduction,
    }
    return ASHAScheduler(**arguments) if session.job.in_process else _CooperativeAsha(session, **arguments)


class _CooperativeAsha(ASHAScheduler):
    """ASHA for trials of several workers: it asks a trial to end, where plain ASHA has it killed.

    A killed trial leaves its Ray Train workers behind: they hold their resources until a clean-up finds them, and the
    next trial, which needs those, was seen to wait forever. A trial that is asked to end does so like any other.
    """

    def __init__(self, session: "_Session", **arguments: Any) -> None:
        super().__init__(**arguments)
        self._session = session

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        decision: str = super().on_trial_result(tune_controller, trial, result)
        if decision != TrialScheduler.STOP:
            return decision
        ask_to_stop(self._session.job, result["number"], result["percent"])
        return str(TrialScheduler.CONTINUE)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as the searcher's


def _trainable(config: dict[str, Any], job: Job) -> None:
    """One Tune trial; runs in a worker process."""
    number: int = config["number"]

    def report(percent: int, value: float) -> None:
        tune.report({"number": number, "percent": percent, "value": value})

    try:
        outcome = run_trial(job, number, config["values"], report)
    except Stopped:
        tune.report({"number": number, "stopped": asked_at(job, number)})
    except _CONFIGURATION_ERRORS as error:
        tune.report({"number": number, "failed": f"{type(error).__name__}: {one_line(error)}"})
    else:
        tune.report({"number": number, "finished": json.dumps(asdict(outcome))})


class _Session:
    """State shared by searcher and listener: the study, and the trials that run."""

    def __init__(self, job: Job, study: Study, observer: SearchObserver, slots: int) -> None:
        self.job, self.study, self.slots = job, study, slots
        self.spent = False
        """Whether the budget or the space is exhausted."""
        self._observer = observer
        self._live: dict[str, int] = {}
        """Trial number by Tune's id."""
        self._since: dict[int, float] = {}
        self._began = time.monotonic()
        self._earlier = sum(record.state != "running" for record in study.records)
        self._restarts: dict[int, int] = {}
        self._failure: Exception | None = None

    def hear(self, told: Callable[..., None], *of: Any) -> None:
        """Take in what Tune tells, which must not see an error of ours: it logs the traceback, and takes a trial that
        has ended well for one that failed. The first error is kept, and ends the search (`raise_failure`)."""
        if self._failure is not None:
            return
        try:
            told(*of)
        except Exception as error:  # noqa: BLE001 - raised by raise_failure
            self._failure = error

    def raise_failure(self) -> None:
        """Raise the error of an earlier `hear`, if there was one."""
        if self._failure is not None:
            raise self._failure

    def work_left(self) -> bool:
        records = self.study.records
        return len(records) < self.job.space.budget.trials or any(record.state == "running" for record in records)

    def next(self, trial_id: str) -> dict[str, Any] | None:
        """The next trial for Tune; None when there is none, now or ever (`spent`)."""
        if len(self._live) >= self.slots:
            return None
        if not self.study.interrupted and (
            self._out_of_time() or len(self.study.records) >= self.job.space.budget.trials
        ):
            self.spent = True
            return None
        trial = self.study.next(lambda values: refusal(self.job.config, self.job.space, values))
        if trial is None:
            self.spent = True
            return None
        number, values = trial
        self._live[trial_id] = number
        self._since[number] = time.monotonic()
        self.study.start(number)
        self.show()
        return {"number": number, "values": values}

    def reported(self, result: dict[str, Any]) -> None:
        if "percent" in result:
            self.study.report(result["number"], int(result["percent"]), float(result["value"]))
            self.show()

    def ended(self, trial_id: str, result: dict[str, Any] | None) -> None:
        """A trial returned, or the scheduler stopped it."""
        number = self._live.pop(trial_id, None)
        if number is None or result is None:
            return
        if "finished" in result:
            outcome = json.loads(result["finished"])
            self.study.complete(number, outcome["measured"], outcome["seconds"])
        elif "failed" in result:
            self._fail(number, result["failed"])
        else:
            self.reported(result)  # the value that a killed trial was stopped for, which Tune passes on only here
            percent = result["stopped"] if "stopped" in result else result["percent"]
            seconds = time.monotonic() - self._since[number]
            self.study.prune(number, f"stopped at {percent} % of its training: others did better there", seconds)
        discard_work(self.job, number)
        self.show()

    def died(self, trial_id: str, error: Exception | None) -> None:
        """A trial's worker was lost for good."""
        number = self._live.pop(trial_id, None)
        if number is not None:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = lines[-1] if lines else "no message"
            self._fail(number, f"the worker died {self._restarts.get(number, 0) + 1} times: {reason}")
            discard_work(self.job, number)
            self.show()

    def _fail(self, number: int, reason: str) -> None:
        """Record a trial's failure as that of its configuration, unless there is no room for anything.

        Raises:
            RunError: there is none. The trial counts as running, and is continued when the search is.
        """
        free = shutil.disk_usage(self.job.folder).free
        if free >= _LITTLE_ROOM and not _FULL_DISK.search(reason):
            self.study.fail(number, reason)
            return
        raise RunError(
            f"{self.job.folder}: trial {number} failed ({reason}), and its disk is full ({free >> 20} MiB left here);"
            " make room, then continue with --resume"
        )

    def restarted(self, trial_id: str) -> None:
        number = self._live[trial_id]
        self._restarts[number] = self._restarts.get(number, 0) + 1
        self.show()

    def show(self) -> None:
        seconds = time.monotonic() - self._began
        state = SearchState(
            self.job.space, self.study.records, self.slots, self._earlier, seconds, dict(self._restarts)
        )
        self._observer.update(state)

    def _out_of_time(self) -> bool:
        minutes = self.job.space.budget.minutes
        return minutes is not None and time.monotonic() - self._began > 60 * minutes


class _StudySearcher(Searcher):
    """Tune's search algorithm: takes configurations from the study."""

    def __init__(self, session: _Session) -> None:
        super().__init__()
        self._session: _Session = session

    def suggest(self, trial_id: str) -> Any:
        trial = self._session.next(trial_id)
        return Searcher.FINISHED if trial is None and self._session.spent else trial

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        self._session.hear(self._session.reported, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if not error:  # the reason of an error comes by the listener
            self._session.hear(self._session.ended, trial_id, result)

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the study is on disk already."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing: the study is on disk already."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its set-up for a restore that never comes; an open study can't be pickled


class _Listener(Callback):
    """Passes on to the session which trials failed or were started again, and to Tune what failed in the session."""

    def __init__(self, session: _Session) -> None:
        self._session = session

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._session.hear(self._session.died, trial.trial_id, trial.get_error())

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._session.hear(self._session.restarted, trial.trial_id)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        self._session.raise_failure()

    def __getstate__(self) -> dict[str, Any]:
        return {}
