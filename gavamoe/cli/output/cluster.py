"""What people see of a cluster's jobs and of a run's state, on standard error."""

import time
from collections.abc import Iterable
from datetime import datetime

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.table import Column, Table
from rich.text import Text

from gavamoe.cli.status import RunStatus, StepStatus
from gavamoe.cli.terminal import cell, console, shown
from gavamoe.runtime.jobs import Job


class JobTerminal:
    """A `gavamoe.runtime.jobs.Follower`: the job's lines as they are, its progress as one bar a step."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn())
        note = TextColumn("{task.fields[note]}")
        self._bars = Progress(*columns, note, console=console, disable=not console.is_terminal)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "JobTerminal":
        self._bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bars.stop()

    def text(self, line: str) -> None:
        console.print(Text.from_ansi(line), soft_wrap=True)

    def progress(self, title: str, done: int, total: int, note: str) -> None:
        if self._bars.disable:
            self.text(f"[{title}] {done}/{total} {note}".rstrip())
            return
        if title not in self._tasks:
            self._tasks[title] = self._bars.add_task(title, total=total, note="")
        self._bars.update(self._tasks[title], completed=done, total=total, note=note)


def print_jobs(jobs: Iterable[Job]) -> None:
    """A table of jobs, with unbroken ids however narrow the terminal."""
    jobs = list(jobs)
    if not jobs:
        console.print("no jobs; `gavamoe submit` starts one", markup=False)
        return
    table = Table(
        *[Column(name, no_wrap=True) for name in ("job", "status", "started", "minutes")],
        Column("command, or last message", overflow="fold"),
    )
    for job in jobs:
        started = time.strftime("%m-%d %H:%M", time.localtime(job.started)) if job.started else "-"
        minutes = f"{((job.ended or time.time()) - job.started) / 60:.1f}" if job.started else "-"
        message = job.message.strip().splitlines()[0] if job.ended and job.message.strip() else ""
        about = message or job.entrypoint.removeprefix("python jobs/")
        table.add_row(*[shown(text) for text in (job.id, job.status.lower(), started, minutes, about)])
    console.print(table)


def print_status(status: RunStatus) -> None:
    """What `gavamoe status` prints of a run."""
    console.print(f"[bold]{escape(status.path)}[/]  on {escape(status.dataset)}", soft_wrap=True)
    if status.dataset_problem:
        console.print(f"[red]dataset:[/] {escape(status.dataset_problem)}", soft_wrap=True)
    table = Table("step", "state", "how far", "when", Column("numbers", overflow="fold"))
    for step in status.steps:
        far = f"{step.step:,} of {step.steps:,}" if step.step is not None and step.steps else "-"
        numbers = ", ".join(f"{name} {cell(value)}" for name, value in step.numbers.items())
        table.add_row(step.name, step.state, far, shown(_when(step)), shown(numbers))
    console.print(table)
    for step in status.steps:
        for text in (*step.warnings, *([step.problem] if step.problem else [])):
            console.print(f"[yellow]{step.name}:[/] {escape(text)}", soft_wrap=True)
        if step.checkpoints and step.state != "done":
            console.print(f"{step.name}: checkpoints {', '.join(step.checkpoints)}", markup=False, soft_wrap=True)
    for name, location in status.logs.items():
        console.print(f"{name}: {location}", markup=False, soft_wrap=True)
    console.print(f"next: {status.next}", markup=False, soft_wrap=True)


def _when(step: StepStatus) -> str:
    if step.finished is not None:
        took = f", took {step.seconds / 60:.1f} min" if step.seconds is not None else ""
        return f"{datetime.fromisoformat(step.finished).astimezone():%Y-%m-%d %H:%M}{took}"
    return f"last heard of {step.idle / 60:.0f} min ago" if step.idle is not None else "-"
