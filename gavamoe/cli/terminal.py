"""What people see: rich tables and progress bars, on standard error; JSON for machines goes to standard output."""

import json
import logging
import re
import sys
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from gavamoe.errors import printable

WIDEST_NAME = 24
"""Characters of a table's first column that are kept on one line."""


class _SafeConsole(Console):
    """A console on which texts from files can't send escape sequences: only what rich itself adds gets through."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(printable(each, lines=True) if isinstance(each, str) else each for each in objects), **options)


console = _SafeConsole(stderr=True, highlight=False)

_SECONDS_BETWEEN_LINES = 5.0


class LogLines(logging.Handler):
    """What modules log, as lines of the terminal, above progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        kind = record.levelname.lower()
        console.print(f"[yellow]{kind}:[/] {escape(self.format(record))}", soft_wrap=True)


class TerminalProgress:
    """A `gavamoe.runtime.progress.Progress` that draws one bar per step.

    Where standard error is not a terminal (CI, a job's log), a step prints a line when it begins, one every few
    seconds, and one when it ends.
    """

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._title = ""
        self._note = ""
        self._warned: set[str] = set()
        self._printed_at = time.monotonic()
        """When the last line was printed, where there are no bars."""

    def __enter__(self) -> "TerminalProgress":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._finish()
        self._bars.stop()

    def step(self, title: str) -> None:
        self._finish()
        title = printable(title)
        self._title, self._note = title, ""
        self._warned.clear()
        self._task = self._bars.add_task(title, total=None, note="")
        if self._bars.disable:
            console.print(f"{title} ...", markup=False)
            self._printed_at = time.monotonic()

    def line(self, line: dict[str, Any]) -> None:
        if "warning" in line:
            self._warn(str(line["warning"]))
        numbers = [
            f"{name.removesuffix('_loss').replace('_', ' ')} {line[name]:.3f}"
            for name in ("loss", "validation_loss", "elbo", "rmse")
            if isinstance(line.get(name), int | float)
        ]
        self._note = ", ".join([printable(str(line.get("phase", ""))), *numbers])
        if isinstance(line.get("step"), int):
            self._update(line["step"], line.get("steps"))

    def _warn(self, text: str) -> None:
        """Print a warning once per step of the job, however often it comes with other numbers; logs keep them all."""
        kind = re.sub(r"[\d.]+", "", text)
        if kind not in self._warned:
            self._warned.add(kind)
            console.print(f"[yellow]warning:[/] {escape(text)}", soft_wrap=True)

    def count(self, done: int, total: int) -> None:
        self._update(done, total)

    def rows(self, phase: str, rows: int) -> None:
        """Rows done in a phase of unknown length."""
        self._note = phase
        self._update(rows, None)

    def _update(self, done: int, total: int | None) -> None:
        if self._task is not None:
            self._bars.update(self._task, completed=done, total=total, note=self._note)
        if self._bars.disable and total is not None and time.monotonic() - self._printed_at > _SECONDS_BETWEEN_LINES:
            console.print(f"[{self._title}] {done}/{total} {self._note}".rstrip(), markup=False, soft_wrap=True)
            self._printed_at = time.monotonic()

    def _finish(self) -> None:
        if self._task is None:
            return
        task = self._bars.tasks[self._task]
        if self._bars.disable:
            console.print(f"{self._title}: done {self._note}".rstrip(), markup=False)
        elif task.total is None:
            self._bars.update(self._task, total=1, completed=1)
        self._task = None


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A titled table on standard error; the first column is text, the others are right-aligned."""
    table = Table()
    cells = [[cell(value) for value in row] for row in rows]
    names = max((len(row[0]) for row in cells), default=0)
    for index, column in enumerate(columns):
        # In a narrow terminal numbers fold before names do.
        unbroken = index == 0 and names <= WIDEST_NAME
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold", no_wrap=unbroken)
    for row in cells:
        table.add_row(*[shown(text) for text in row])
    console.print(f"[bold]{shown(title)}[/]", soft_wrap=True)
    console.print(table)


def shown(text: str) -> str:
    """Text from a file as a cell of a table."""
    return escape(printable(text))


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")


def cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10 else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
