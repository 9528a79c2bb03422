"""Ray Tune runs the trials, the Optuna study decides which: the only part of the search that knows Ray.

Ray's own OptunaSearch is not used: it reports a trial that ASHA stopped to Optuna as complete, with the value of its
short budget, which misleads TPE and the importances; and its knowledge is on disk only at Tune's next snapshot. Here a
searcher hands trials out of the study and writes each result into it at once, so that the study alone is enough to
continue from, and Tune's state is thrown away after every session.
"""

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from ray import tune
from ray.tune import Callback, FailureConfig, RunConfig, TuneConfig, Tuner
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

from gavamoe.config.schema import RuntimeConfig
from gavamoe.errors import InputError, RunError, Stopped, one_line
from gavamoe.runtime.ray_train import ray_session
from gavamoe.runtime.room import described, needs, room_for
from gavamoe.tune.checks import trial_config
from gavamoe.tune.session import SearchObserver, Session
from gavamoe.tune.study import Study
from gavamoe.tune.trial import Job, ask_to_stop, asked_at, run_trial

_CONFIGURATION_ERRORS = (InputError, RunError, RuntimeError, ValueError, ArithmeticError, MemoryError)
"""Errors that a configuration can cause (torch's out-of-memory is a RuntimeError), recorded as the trial's result.
Any other failure, such as a killed worker, is tried again, at most `runtime.max_failures` times."""

_NEVER_ENOUGH = 1_000_000
"""Samples that Tune may ask for; the searcher says when to stop."""

_RAY_FOLDER = "ray"
_MEBIBYTE = 2**20


def run_trials(job: Job, study: Study, observer: SearchObserver, *, concurrent: int | None) -> bool:
    """Train trials until the budget is spent; False when Ctrl-C ended it, were it at the end of the last trial.

    Args:
        concurrent: trials at once, at most; None: as many as the cluster's CPUs and GPUs take.
    """
    placement = trial_config(job.config, job.space, {}).runtime
    with _ray(job, placement):
        session = Session(job, study, observer, _slots(placement, concurrent))
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


def _fit(job: Job, session: Session, placement: RuntimeConfig) -> bool:
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


def _scheduler(session: Session) -> TrialScheduler | None:
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

    def __init__(self, session: Session, **arguments: Any) -> None:
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


class _StudySearcher(Searcher):
    """Tune's search algorithm: takes configurations from the study."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session: Session = session

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

    def __init__(self, session: Session) -> None:
        self._session = session

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._session.hear(self._session.died, trial.trial_id, trial.get_error())

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._session.hear(self._session.restarted, trial.trial_id)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        self._session.raise_failure()

    def __getstate__(self) -> dict[str, Any]:
        return {}
