"""How long work says how far it is: the protocols, and the line that stands for a bar where there is no terminal."""

from collections.abc import Callable
from typing import Protocol

from gavamoe.runtime.tracking import Line

PROGRESS_LINE = r"\[(?P<title>.+)\] (?P<done>\d+)/(?P<total>\d+) ?(?P<note>.*)"
"""How far a step is, where there is no terminal to draw a bar on; `gavamoe submit` makes bars of such lines."""

OnProgress = Callable[[int, int], None]
"""Called with rows done and rows in all."""


class Progress(Protocol):
    """Where a long job says how far it is; `gavamoe.cli.terminal` draws it."""

    def step(self, title: str) -> None:
        """A new step begins."""

    def line(self, line: Line) -> None:
        """A log line of the running step; "step" of "steps" is how far it is."""

    def count(self, done: int, total: int) -> None:
        """Rows done of the running step."""


class NoProgress:
    """A `Progress` that says nothing."""

    def step(self, title: str) -> None: ...

    def line(self, line: Line) -> None: ...

    def count(self, done: int, total: int) -> None: ...
