"""The command line, called in this process and in one of its own."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gavamoe import cli


def command(*arguments: object) -> list[str]:
    """What starts `gavamoe` with these arguments in a process of its own."""
    return [sys.executable, "-c", "from gavamoe.cli import main; main()", *map(str, arguments)]


@contextmanager
def ctrl_c_kept() -> Iterator[None]:
    """For calls of `main()` in this process: it leaves Ctrl-C to the system, as its process is to end, and where a
    signal ended it, has Python end at once."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        cli.ended.clear()


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


class Runner:
    """Calls `main()` as the installed script does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> Result:
        self.monkeypatch.setattr(sys, "argv", ["gavamoe", *map(str, arguments)])
        self.capsys.readouterr()
        code = 0
        with ctrl_c_kept():
            try:
                cli.main()
            except SystemExit as stop:
                code = int(stop.code or 0)
        out, err = self.capsys.readouterr()
        return Result(code, out, err)
