"""A session of a search: hands trials out of the study, takes their results into it, shows its state. Knows no Ray."""

import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from gavamoe.errors import RunError
from gavamoe.tune.checks import refusal
from gavamoe.tune.space import Space
from gavamoe.tune.study import Record, Study
from gavamoe.tune.trial import Job, discard_work

_LITTLE_ROOM = 64 * 2**20
"""Bytes left on the search's disk below which a trial that fails is not put down to its configuration."""
_FULL_DISK = re.compile(r"no space (is )?left|disk is full|quota", re.IGNORECASE)
"""What a trial says whose own disk, on whatever machine, is full."""


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


class SearchObserver(Protocol):
    """Observer of a running search; `gavamoe.cli.output.search` draws its table."""

    def update(self, state: SearchState) -> None:
        """The search's state has changed."""


class Session:
    """What Tune's searcher and listener share: the study, and the trials that run."""

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
        """Whether a trial of the budget has not ended, or not begun."""
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
        """Note a value on the way, if the result is one."""
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
        """A trial's worker was lost, and it begins again."""
        number = self._live[trial_id]
        self._restarts[number] = self._restarts.get(number, 0) + 1
        self.show()

    def show(self) -> None:
        """Tell the observer of the state."""
        seconds = time.monotonic() - self._began
        state = SearchState(
            self.job.space, self.study.records, self.slots, self._earlier, seconds, dict(self._restarts)
        )
        self._observer.update(state)

    def _out_of_time(self) -> bool:
        minutes = self.job.space.budget.minutes
        return minutes is not None and time.monotonic() - self._began > 60 * minutes
