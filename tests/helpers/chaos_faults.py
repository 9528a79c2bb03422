"""For the chaos run: one command, and what befalls it at a drawn moment.

A moment is a number of events, not of seconds: changes of the files in the command's folder, of its standard error, and
of its child processes. A slow machine meets the same moments as a fast one.
"""

import os
import random
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

DEADLINE = 900.0
"""Seconds after which a command that has not ended counts as hanging."""
ENDS_WITHIN = 120.0
"""The same after a signal that it has to heed, and for processes that it leaves."""
MEBIBYTE = 2**20

KILL, KILL_ALL, KILL_WORKER = "SIGKILL", "SIGKILL to all its processes", "SIGKILL to a worker"
TERM, INT, DISK = "SIGTERM", "SIGINT", "full disk"
OF_COMMANDS = (KILL, TERM, INT, DISK)
"""Faults of any command."""
OF_TRAININGS = (KILL, KILL_ALL, KILL_WORKER, TERM, INT, DISK)
"""Faults of a command that starts Ray."""


@dataclass(frozen=True)
class Moment:
    """When a fault comes: after so many events, and then a share of the usual time to the next."""

    events: int
    then: float


@dataclass
class Attempt:
    """A command that has ended."""

    code: int
    """Exit code; negative: the signal that ended it. One that hangs is killed."""
    shown: list[str]
    """Lines of its standard error."""
    seconds: float
    struck: bool = False
    """Whether the fault came before it ended by itself."""
    hung: bool = False
    left: list[str] = field(default_factory=list)
    """Command lines of its processes that did not end with it."""
    times: list[float] = field(default_factory=list)
    """Seconds at which its events came."""
    peak: int = 0
    """The largest number of bytes that its folder held."""

    @property
    def traceback(self) -> bool:
        return any("Traceback (most recent call last)" in line for line in self.shown)


class Command:
    """A running command whose events are counted."""

    def __init__(self, arguments: Sequence[str], environment: dict[str, str], folder: Path, log: Path) -> None:
        self.folder, self._log = folder, log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                arguments, env=environment, stdout=subprocess.DEVNULL, stderr=out, start_new_session=True,
                preexec_fn=heed_ctrl_c,
            )  # fmt: skip
        self._began = time.monotonic()
        self.times: list[float] = []
        self.peak = 0
        self._seen: object = None
        self._processes: dict[int, psutil.Process] = {}

    def look(self, *, processes: bool) -> None:
        """Count an event if anything has changed."""
        names, size = set(), 0
        for base, _, files in os.walk(self.folder):
            for name in files:
                path = os.path.join(base, name)
                with suppress(OSError):
                    size += os.lstat(path).st_blocks * 512
                    names.add(path)
        self.peak = max(self.peak, size)
        if processes:
            self.descendants()
        seen = (frozenset(names), size, self._log.stat().st_size, len(self._processes))
        if seen != self._seen:
            self._seen = seen
            self.times.append(time.monotonic() - self._began)

    def descendants(self) -> list[psutil.Process]:
        """Its processes that live, itself left out."""
        with suppress(psutil.Error):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                self._processes.setdefault(process.pid, process)
        return [process for process in self._processes.values() if _lives(process)]

    def kill(self) -> None:
        """End it and its processes, if they live."""
        for process in self.descendants():
            with suppress(psutil.Error):
                process.kill()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def end(self, limit: float, *, struck: bool) -> Attempt:
        """Wait for the command's end and that of its processes."""
        hung = False
        try:
            self.process.wait(limit)
        except subprocess.TimeoutExpired:
            hung = True
            self.process.kill()
            self.process.wait()
        seconds = time.monotonic() - self._began
        end = time.monotonic() + ENDS_WITHIN
        while (left := self.descendants()) and time.monotonic() < end:
            time.sleep(0.2)
        told = []
        for process in left:
            with suppress(psutil.Error):
                told.append(" ".join(process.cmdline())[:100])
                process.kill()
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return Attempt(self.process.returncode, lines, seconds, struck, hung, told, self.times, self.peak)


def heed_ctrl_c() -> None:
    """For a child before its program starts: shells have what runs in their background ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _listens(pid: int) -> bool:
    """Whether a command has begun and not ended: outside of that SIGTERM is the system's matter, SIGINT Python's."""
    with suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text()
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
        return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def run(
    command: Command, fault: str | None, moment: Moment | None, draw: random.Random, usual: list[float], deep: bool
) -> Attempt:
    """Run a command to its end; `fault`, if one is given, comes at the moment.

    Args:
        usual: the times of the undisturbed command's events.
        deep: it has many processes, and their coming counts as well.
    """
    pause = 0.05 if deep else 0.001
    due: float | None = None
    signaled = fault is not None and fault != DISK and moment is not None
    while command.process.poll() is None and time.monotonic() - command._began < DEADLINE:
        command.look(processes=deep)
        if signaled and moment is not None and due is None and len(command.times) >= moment.events:
            following = usual[moment.events - 1 : moment.events + 1]
            gap = following[1] - following[0] if len(following) == 2 else 0.5
            due = time.monotonic() + moment.then * gap
        if due is not None and time.monotonic() >= due:
            if strike(command, str(fault), draw):
                return command.end(DEADLINE if fault == KILL_WORKER else ENDS_WITHIN, struck=True)
            due = time.monotonic() + (0.2 if fault == KILL_WORKER else 0)  # none yet; or the command has not begun
        time.sleep(pause)
    attempt = command.end(1.0, struck=False)
    attempt.struck = fault == DISK and attempt.code != 0
    return attempt


def strike(command: Command, fault: str, draw: random.Random) -> bool:
    """Send the fault's signal; False where there is nothing to send it to."""
    processes = command.descendants()
    if command.process.poll() is not None or (fault in (TERM, INT) and not _listens(command.process.pid)):
        return False
    if fault == KILL_WORKER:
        workers = [process for process in processes if _is_worker(process)]
        if not workers:
            return False
        draw.choice(sorted(workers, key=lambda process: process.pid)).kill()
    elif fault == KILL_ALL:
        for process in (psutil.Process(command.process.pid), *processes):
            with suppress(psutil.Error):
                process.kill()
    elif fault == INT and draw.random() < 0.5:
        os.killpg(command.process.pid, signal.SIGINT)  # as a terminal does
    else:
        command.process.send_signal({KILL: signal.SIGKILL, TERM: signal.SIGTERM, INT: signal.SIGINT}[fault])
    return True


def _is_worker(process: psutil.Process) -> bool:
    """Whether it works for Ray at something: a training, a trial, a log."""
    try:
        return process.cmdline()[0].startswith("ray::") and "IDLE" not in process.cmdline()[0]
    except (psutil.Error, IndexError):
        return False


def mount(folder: Path, size: int) -> bool:
    """A file system of so many bytes at a folder; False where this user may not mount."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True, check=False
    )
    return mounted.returncode == 0


def resize(folder: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)


def unmount(folder: Path) -> None:
    subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)
