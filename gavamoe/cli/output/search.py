"""What people see of a search: a live table while it runs, Table 3 and the test scores at the end."""

import time
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from gavamoe.cli.terminal import TerminalProgress, console, print_json, print_table
from gavamoe.evaluation.metrics.registry import METRICS
from gavamoe.tune.report import FRONT, TABLE_FILE, mean_text, short_name, table_rows, value_text
from gavamoe.tune.search import SearchResult
from gavamoe.tune.session import SearchState
from gavamoe.tune.space import Space
from gavamoe.tune.study import Record, storage_url

ROWS_SHOWN = 14
"""Rows of the live table: what runs, and what ended last."""


POINTS_SHOWN = 10
"""Points of a grid that are named when they are left out."""


class SearchTerminal:
    """A `tune.SearchProgress`: one live table while trials run, then the bars of the final training.

    Where standard error is not a terminal (CI, a log file), each trial is a line when it ends.
    """

    def __init__(self) -> None:
        self._table = Live(console=console, auto_refresh=False, transient=True)
        self._bars: TerminalProgress | None = None
        self._resources = ExitStack()
        self._said: set[int] = set()

    def __enter__(self) -> "SearchTerminal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._table.stop()
        self._resources.__exit__(kind, error, trace)

    def update(self, state: SearchState) -> None:
        if console.is_terminal:
            self._table.start()
            self._table.update(Group(_live_table(state), Text(status_line(state))), refresh=True)
            return
        for record in state.records:
            if record.state != "running" and record.number not in self._said:
                self._said.add(record.number)
                if len(self._said) > state.earlier:
                    line = f"{trial_line(record, state.space)}\n  {status_line(state)}"
                    console.print(line, markup=False, soft_wrap=True)

    def step(self, title: str) -> None:
        if self._bars is None:  # only one live display at a time
            self._table.stop()
            self._bars = self._resources.enter_context(TerminalProgress())
        self._bars.step(title)

    def line(self, line: dict[str, Any]) -> None:
        if self._bars is not None:
            self._bars.line(line)
        elif "warning" in line:
            console.print(f"[yellow]warning:[/] {escape(str(line['warning']))}", soft_wrap=True)

    def count(self, done: int, total: int) -> None:
        if self._bars is not None:
            self._bars.count(done, total)


def _live_table(state: SearchState) -> Table:
    names = list(state.space.parameters)
    table = Table()
    for head in ("trial", "state", *(short_name(name, names) for name in names), *_labels(state.space)):
        table.add_column(head, overflow="fold")
    running = [record for record in state.records if record.state == "running"]
    ended = [record for record in state.records if record.state != "running"]
    for record in [*ended[-max(1, ROWS_SHOWN - len(running)) :], *running]:
        values = [value_text(record.values.get(name)) for name in names]
        cells = (str(record.number), _state(record, state), *values, *_objectives(record, state.space))
        table.add_row(*map(escape, cells))
    return table


def status_line(state: SearchState) -> str:
    """ "5 of 12 trials, best rmse 0.8123 (trial 3), 02:10 gone, about 03:00 left"."""
    ended = [record for record in state.records if record.state != "running"]
    parts = [f"{len(ended)} of {state.space.budget.trials} trials"]
    objective = state.space.objectives[0]
    complete = [record for record in ended if record.objectives]
    if complete:
        sign = -1 if objective.direction == "higher" else 1
        best = min(complete, key=lambda record: sign * (record.objectives or [0.0])[0])
        parts.append(f"best {objective.label} {(best.objectives or [0.0])[0]:.4g} (trial {best.number})")
    parts.append(f"{_clock(state.seconds)} gone")
    done_now = len(ended) - state.earlier
    if done_now > 0:
        left = max(0, state.space.budget.trials - len(ended)) * state.seconds / done_now
        parts.append(f"about {_clock(left)} left")
    return ", ".join(parts)


def trial_line(record: Record, space: Space) -> str:
    """One line for a trial that has ended."""
    names = list(space.parameters)
    drawn = " ".join(f"{short_name(name, names)}={value_text(value)}" for name, value in record.values.items())
    if record.objectives:
        values = zip(_labels(space), _objectives(record, space), strict=True)
        end = ", ".join(f"{label} {value}" for label, value in values)
    else:
        end = f"{record.state}: {record.reason}"
    return f"trial {record.number}: {drawn}: {end}"


def print_search(result: SearchResult, *, as_json: bool) -> None:
    """The table, the best configuration, its test scores, and where everything is."""
    if as_json:
        print_json(search_json(result))
    heads, rows = table_rows(result.records, result.space)
    if rows:
        parameters, objectives = len(result.space.parameters), len(result.space.objectives)
        # What was searched for comes first: a narrow terminal cuts columns off at the right.
        order = [0, *range(1 + parameters, 1 + parameters + objectives), *range(1, 1 + parameters)]
        order += range(len(order), len(heads))
        heads, rows = [heads[at] for at in order], [[row[at] for at in order] for row in rows]
        fitting = _fitting(heads, rows, 1 + objectives)
        title = "Trials on the validation split"
        if fitting < len(heads):
            title += f" (all {len(heads)} columns: {result.folder / TABLE_FILE})"
        print_table(title, heads[:fitting], [row[:fitting] for row in rows])
    counts = {
        state: sum(r.state == state for r in result.records) for state in ("complete", "pruned", "failed", "running")
    }
    console.print(", ".join(f"{count} {state}" for state, count in counts.items() if count), markup=False)
    for record in result.records:
        if record.state == "failed":
            console.print(trial_line(record, result.space), markup=False, soft_wrap=True)
    if len(result.space.objectives) > 1:
        numbers = ", ".join(str(record.number) for record in result.front)
        console.print(
            f"Pareto front: trials {numbers}; their configs are in {result.folder / FRONT}",
            markup=False,
            soft_wrap=True,
        )
    if result.left_out:
        console.print(left_out_line(result), markup=False, soft_wrap=True)
    if result.test is not None:
        _print_test(result.test)
    if result.best is not None:
        console.print(f"best: {trial_line(result.best, result.space)}", markup=False, soft_wrap=True)
        console.print(f"its config: {result.folder / 'best.yaml'}", markup=False, soft_wrap=True)
    console.print(f"study: optuna-dashboard {storage_url(result.folder)}", markup=False, soft_wrap=True)


def left_out_line(result: SearchResult) -> str:
    """ "left out: 1 of 4 points (clusters=5); --resume --trials 4 tries it too, ..."."""
    names = list(result.space.parameters)
    points = [
        " ".join(f"{short_name(name, names)}={value_text(value)}" for name, value in point.items())
        for point in result.left_out
    ]
    more = [f"{len(points) - POINTS_SHOWN} more"] if len(points) > POINTS_SHOWN else []
    total = len(result.records) + len(points)
    line = f"left out: {len(points)} of {total} points ({'; '.join(points[:POINTS_SHOWN] + more)})"
    if result.test is not None:  # the search is closed
        return line
    return f"{line}; --resume --trials {total} goes on with them, and test scores the best one after the last"


def search_json(result: SearchResult) -> dict[str, Any]:
    """For machines: the best trial, the front, every trial, the test scores."""
    return {
        "folder": str(result.folder),
        "metrics": [measure.name for measure in result.space.objectives],
        "best": None if result.best is None else _record_json(result.best),
        "pareto": [record.number for record in result.front] if len(result.space.objectives) > 1 else None,
        "left_out": result.left_out,
        "interrupted": result.interrupted,
        "trials": [_record_json(record) for record in result.records],
        "test": result.test,
    }


def _record_json(record: Record) -> dict[str, Any]:
    return {
        "trial": record.number,
        "state": record.state,
        "reason": record.reason,
        "values": record.values,
        "objectives": record.objectives,
        "measured": record.measured,
        "seconds": record.seconds,
    }


def _print_test(test: dict[str, Any]) -> None:
    rows = [
        (METRICS[name].label + " " + METRICS[name].arrow if name in METRICS else name, value)
        for name, value in test["metrics"].items()
        if isinstance(value, int | float)
    ]
    print_table(f"Trial {test['trial']}, trained in full, on the test split", ["metric", "value"], rows)


def _fitting(heads: list[str], rows: list[list[str]], least: int) -> int:
    """How many columns the terminal is wide enough for; never fewer than `least`."""
    width, count = 1, 0
    for cells in zip(heads, *rows, strict=True):
        width += max(map(len, cells)) + 3
        if width > console.width:
            break
        count += 1
    return max(count, least)


def _labels(space: Space) -> list[str]:
    return [f"{measure.label} {measure.arrow}" for measure in space.objectives]


def _objectives(record: Record, space: Space) -> list[str]:
    if record.objectives:
        return [mean_text(record.measured.get(measure.name)) for measure in space.objectives]
    last = f"{record.steps[max(record.steps)]:.4g} at {max(record.steps)} %" if record.steps else ""
    return [last, *[""] * (len(space.objectives) - 1)]


def _state(record: Record, state: SearchState) -> str:
    again = state.restarts.get(record.number)
    if record.state == "running" and again:
        return f"running (restarted {again} x)"
    return record.state


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S" if seconds >= 3600 else "%M:%S", time.gmtime(seconds))
