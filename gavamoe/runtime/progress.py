"""Progress of long jobs: the protocols, and the line printed instead of a bar where there is no terminal."""

from collections.abc import Callable
from typing import Protocol

from gavamoe.runtime.tracking import Line

PROGRESS_LINE = r"\[(?P<title>.+)\] (?P<done>\d+)/(?P<total>\d+) ?(?P<note>.*)"
"""Pattern of the progress lines printed where standard error is not a terminal; `gavamoe submit` draws them as bars."""

OnProgress = Callable[[int, int], None]
"""Called with rows done and rows in all."""


class Progress(Protocol):
    """Receives the progress of a long job; `gavamoe.cli.terminal` draws it."""

    def step(self, title: str) -> None:
        """A new step begins."""

    def line(self, line: Line) -> None:
        """A log line of the running step; its "step" of "steps" is the progress."""

    def count(self, done: int, total: int) -> None:
        """Rows done of the running step."""


class NoProgress:
    """A `Progress` that ignores everything."""

    def step(self, title: str) -> None: ...

    def line(self, line: Line) -> None: ...

    def count(self, done: int, total: int) -> None: ...


class Parts:
    """One count of rows for a job of several parts, each of which counts its own."""

    def __init__(self, on_progress: OnProgress | None, total: int) -> None:
        """`total`: rows of all parts together."""
        self._tell, self._total, self._end = on_progress, total, 0

    def part(self, rows: int) -> OnProgress:
        """The count of the next part, of `rows` rows; those before it are done, whatever they have counted."""
        start, self._end = self._end, self._end + rows
        if start:
            self._say(start)
        return lambda done, _: self._say(start + min(done, rows))

    def end(self) -> None:
        """All parts are done."""
        self._say(self._total)

    def _say(self, done: int) -> None:
        if self._tell is not None:
            self._tell(done, self._total)
