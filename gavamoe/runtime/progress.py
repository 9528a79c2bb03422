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
