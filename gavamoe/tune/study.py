"""The Optuna study of a search: what was tried, what runs, what is next. The storage file holds all of it.

Every change is written before the next step is taken, so that a search killed at any moment continues with all that
was known. A configuration that is drawn again is answered from the study and not trained again.

States: complete (all seeds measured), pruned (stopped early, with the values measured until then), failed (with a
reason), running. Draws that became no trial (repeated, or refused by the config) are failed ones with `draw` set.
"""

import random
import sqlite3
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning, OptunaError
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from gavamoe.errors import InputError, RunError, one_line
from gavamoe.tune.space import Space, Values

STUDY_FILE = "study.db"
MAX_FAILED_DRAWS = 100
"""Draws in a row without a new configuration after which the space counts as exhausted."""
MAX_REPEATS = 10
"""Draws in a row without a new configuration after which, in a finite space, an untried point is taken instead."""

_FULL = "database or disk is full"
"""What SQLite says of a full disk."""
_LISTED = "listed"
_DRAWN, _REASON, _MEASURED, _FAILED_DRAW, _STARTED, _SECONDS = (
    "values",
    "reason",
    "measured",
    "draw",
    "started",
    "seconds",
)


@dataclass(frozen=True)
class Record:
    """A trial in its present state."""

    number: int
    """Number of the trial in the study."""
    state: str
    """State of the trial: running, complete, pruned or failed."""
    values: Values
    """Drawn values by field path."""
    objectives: list[float] | None
    """Means of the objectives over the seeds, in the space's order; None unless the trial is complete."""
    steps: dict[int, float] = field(default_factory=dict)
    """The first seed's objective during training, where it was reported, by percent of the training done."""
    measured: dict[str, list[float]] = field(default_factory=dict)
    """All measures by name, one value for each seed."""
    reason: str | None = None
    """Why the trial was pruned or failed."""
    started: str | None = None
    """ISO time of the trial's last start."""
    seconds: float | None = None
    """Wall time of all seeds in seconds, waiting for a shared stage 1 included."""


class Study:
    """The study of one space: draws configurations, and stores what became of them."""

    def __init__(self, folder: Path, space: Space, fixed: Values, *, seed: int, name: str) -> None:
        """Open the folder's study, or create it.

        Args:
            fixed: the config's values by path, for conditions and constraints on fields that are not searched.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space, self._fixed, self._seed = space, fixed, seed
        self._points = space.points(fixed)
        self._names = [measure.name for measure in space.objectives]
        directions = [
            StudyDirection.MAXIMIZE if measure.direction == "higher" else StudyDirection.MINIMIZE
            for measure in space.objectives
        ]
        check_database(folder)
        with full_disk_told(folder), damage_named(folder):
            self.study = optuna.create_study(
                storage=storage_url(folder),
                study_name=name,
                load_if_exists=True,
                sampler=RandomSampler(seed=seed),
                directions=directions,
            )
            # A continued search must not draw its first random points again.
            self.study.sampler = make_sampler(space, seed + 1000 * len(self.study.trials))
            with warnings.catch_warnings():  # names for the dashboard's axes, on which nothing rests
                warnings.simplefilter("ignore", ExperimentalWarning)
                self.study.set_metric_names(self._names)
            _ = self.records  # a trial that can't be read is found here, before anything is trained
        if not self.study.user_attrs.get(_LISTED):
            self._list_points()
        self._listed = bool(self.study.user_attrs.get(_LISTED))
        self._half_drawn: list[int] = []
        self._waiting = self._unfinished()

    def next(self, accept: Callable[[Values], str | None]) -> tuple[int, Values] | None:
        """The next trial to train: one that was interrupted, or a new configuration; None when the space is exhausted.

        Args:
            accept: says why a configuration can't be trained, or None.
        """
        if self._waiting:
            return self._waiting.pop(0)
        for failed in range(MAX_FAILED_DRAWS):
            trial = self._ask(failed, accept)
            if trial is None:
                return None
            values = self._space.draw(trial, self._fixed)
            reason = accept(values) or self._repeated(values)
            if reason is None:
                trial.set_user_attr(_DRAWN, values)
                return trial.number, values
            trial.set_user_attr(_FAILED_DRAW, True)
            self.fail(trial.number, reason)
        return None

    def _ask(self, failed: int, accept: Callable[[Values], str | None]) -> optuna.Trial | None:
        """The trial whose values are drawn next, after so many failed draws; None where no point is left."""
        if self._half_drawn:
            return self._trial(self._half_drawn.pop(0))
        if self._listed and not self.study.get_trials(states=[TrialState.WAITING], deepcopy=False):
            return None
        if failed == MAX_REPEATS and self._points is not None and not self._queue_untried(accept):
            return None
        return self.study.ask()

    def _queue_untried(self, accept: Callable[[Values], str | None]) -> bool:
        """Make the next draw one of the points that were not tried, any of them; False when there is none."""
        points = self._points or []
        # The first in order would walk along one edge of the space.
        for values in random.Random(self._seed + len(self.study.trials)).sample(points, len(points)):
            if self._repeated(values) is None and accept(values) is None:
                self.study.enqueue_trial(values)
                return True
        return False

    def left_out(self, accept: Callable[[Values], str | None]) -> list[Values]:
        """The points of a space that is gone through in order for which the budget had no trial, in that order.

        Args:
            accept: says why a configuration can't be trained, or None.
        """
        waiting = self.study.get_trials(states=[TrialState.WAITING], deepcopy=False) if self._listed else []
        points = [dict(trial.system_attrs.get("fixed_params", {})) for trial in waiting]
        return [values for values in points if self._repeated(values) is None and accept(values) is None]

    @property
    def interrupted(self) -> bool:
        """Whether trials of an earlier session wait to be continued."""
        return bool(self._waiting)

    def start(self, number: int) -> None:
        """Note when a trial began."""
        self._trial(number).set_user_attr(_STARTED, datetime.now().astimezone().isoformat(timespec="seconds"))

    def report(self, number: int, percent: int, value: float) -> None:
        """Store a value of the objective during training, for pruning and plots."""
        if len(self._names) > 1:  # Optuna takes none for several objectives
            return
        # A trial that is continued from a checkpoint reports some values again.
        if percent not in self.study.get_trials(deepcopy=False)[number].intermediate_values:
            self._trial(number).report(value, percent)

    def complete(self, number: int, measured: dict[str, list[float]], seconds: float) -> None:
        """Mark a trial as complete: all seeds are measured."""
        trial = self._trial(number)
        trial.set_user_attr(_MEASURED, measured)
        trial.set_user_attr(_SECONDS, seconds)
        self.study.tell(number, [sum(measured[name]) / len(measured[name]) for name in self._names])

    def prune(self, number: int, reason: str, seconds: float) -> None:
        """Mark a trial as stopped early: the sampler learns its values so far, never how good it might have become."""
        trial = self._trial(number)
        trial.set_user_attr(_REASON, reason)
        trial.set_user_attr(_SECONDS, seconds)
        self.study.tell(number, state=TrialState.PRUNED)

    def fail(self, number: int, reason: str) -> None:
        """Mark a trial as failed, with the reason."""
        self._trial(number).set_user_attr(_REASON, reason)
        self.study.tell(number, state=TrialState.FAIL)

    @property
    def records(self) -> list[Record]:
        """All trials whose configuration was trained, in order; draws that were repeated or refused are left out."""
        trials = self.study.get_trials(deepcopy=False)
        return [_record(trial) for trial in trials if _DRAWN in trial.user_attrs]

    def best(self) -> Record | None:
        """The best complete trial by the first objective; None without any."""
        complete = [record for record in self.records if record.objectives]
        sign = -1 if self._space.objectives[0].direction == "higher" else 1
        return min(complete, key=lambda record: sign * (record.objectives or [0.0])[0], default=None)

    def front(self) -> list[Record]:
        """The complete trials that no other beats in every objective, best first by the first one."""
        numbers = {trial.number for trial in self.study.best_trials}
        sign = -1 if self._space.objectives[0].direction == "higher" else 1
        front = [record for record in self.records if record.number in numbers and record.objectives]
        return sorted(front, key=lambda record: sign * (record.objectives or [0.0])[0])

    def _list_points(self) -> None:
        """Queue every point of a grid, and of any space that the budget covers: drawing would only repeat some. Killed
        while it did so, a search is given the rest."""
        points, queued = self._points, self.study.get_trials(deepcopy=False)
        if points is None or any(trial.state != TrialState.WAITING for trial in queued):
            return
        if self._space.sampler == "grid" or len(points) <= self._space.budget.trials:
            for values in points[len(queued) :]:
                self.study.enqueue_trial(values)
            self.study.set_user_attr(_LISTED, True)

    def _unfinished(self) -> list[tuple[int, Values]]:
        """Trials that an earlier process left running. Those it was still drawing are drawn on where their values stand
        in the queue, so that the order stays, and else given up."""
        unfinished = []
        for trial in self.study.get_trials(states=[TrialState.RUNNING]):
            values = trial.user_attrs.get(_DRAWN)
            if values is not None:
                unfinished.append((trial.number, values))
            elif self._listed:
                self._half_drawn.append(trial.number)
            else:
                self.fail(trial.number, "the search was killed while it drew this")
        return unfinished

    def _repeated(self, values: Values) -> str | None:
        for record in self.records:
            if record.values == values:
                return f"the same configuration as trial {record.number}"
        return None

    def _trial(self, number: int) -> optuna.Trial:
        frozen = self.study.get_trials(deepcopy=False)[number]
        return optuna.Trial(self.study, frozen._trial_id)


def check_database(folder: Path) -> None:
    """Look whether the folder's study, if there is one, is a whole database.

    Raises:
        InputError: it is damaged, or no database.
    """
    path = folder / STUDY_FILE
    if not path.exists():
        return
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as database:
            [(verdict,)] = database.execute("PRAGMA quick_check(1)").fetchall()
    except (sqlite3.Error, ValueError) as error:
        raise _damaged(path, one_line(error)) from error
    if verdict != "ok":
        raise _damaged(path, one_line(ValueError(verdict)))


@contextmanager
def full_disk_told(folder: Path) -> Iterator[None]:
    """Turn what SQLite, through Optuna or Ray Tune, says of a full disk into one error.

    Raises:
        RunError: the study could not be written.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and _FULL not in str(cause):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise RunError(
            f"{folder / STUDY_FILE}: cannot be written: no space is left; make room, then continue with --resume"
        ) from error


@contextmanager
def damage_named(folder: Path) -> Iterator[None]:
    """Whatever Optuna, SQLAlchemy and JSON say of a study that holds what no search wrote, as one InputError."""
    try:
        yield
    except (OptunaError, SQLAlchemyError, sqlite3.Error, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise _damaged(folder / STUDY_FILE, one_line(error)) from error
    except (AssertionError, AttributeError, RuntimeError) as error:
        raise _damaged(folder / STUDY_FILE, one_line(error)) from error


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(f"{path}: damaged, or not a study of this program ({reason}); use another --run-dir")


def storage_url(folder: Path) -> str:
    """URL of the study's storage, for Optuna and optuna-dashboard."""
    return f"sqlite:///{folder.absolute() / STUDY_FILE}"


def make_sampler(space: Space, seed: int) -> BaseSampler:
    """The sampler by the space's name for it, sized to the budget."""
    if space.sampler in ("random", "grid"):  # a grid's points are queued, and nothing else is ever drawn
        return RandomSampler(seed=seed)
    trials = space.budget.trials
    if space.sampler == "nsga2":
        return NSGAIISampler(seed=seed, population_size=min(50, max(4, trials // 4)))
    # Ten random trials, Optuna's default, would be the whole of a small budget. The constant liar keeps trials that
    # run at the same time apart.
    return TPESampler(seed=seed, n_startup_trials=min(10, max(4, trials // 3)), constant_liar=True)


_STATES = {
    TrialState.RUNNING: "running",
    TrialState.WAITING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


def _record(trial: FrozenTrial) -> Record:
    attrs: dict[str, Any] = trial.user_attrs
    return Record(
        number=trial.number,
        state=_STATES[trial.state],
        values=attrs[_DRAWN],
        objectives=list(trial.values) if trial.state == TrialState.COMPLETE else None,
        steps=dict(trial.intermediate_values),
        measured=attrs.get(_MEASURED, {}),
        reason=attrs.get(_REASON),
        started=attrs.get(_STARTED),
        seconds=attrs.get(_SECONDS),
    )
