"""A command in a terminal of its own, in which Ctrl-C is pressed."""

import os
import pty
import re
import select
import signal
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Session(NamedTuple):
    """What a command in a terminal did."""

    code: int
    """Exit code; negative: the signal that ended it."""
    lines: list[str]
    """What it showed, without colors and cursor movements."""
    seconds: float
    """From Ctrl-C to the end; 0 where the command ended by itself."""


def run_in_terminal(
    command: Sequence[str], interrupt: Callable[[str, float], bool], *, patience: float = 120.0
) -> Session:
    """Run a command and press Ctrl-C once.

    Args:
        interrupt: given what was shown so far and the seconds since the start, says whether to press it now.
        patience: seconds after Ctrl-C until the command is killed.
    """
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvp(command[0], list(command))
    shown, start, pressed = b"", time.monotonic(), 0.0
    while True:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                data = os.read(terminal, 65_536)
            except OSError:  # how Linux says that the other side is closed
                break
            if not data:
                break
            shown += data
        if not pressed and interrupt(shown.decode("utf-8", "replace"), time.monotonic() - start):
            os.write(terminal, b"\x03")
            pressed = time.monotonic()
        if pressed and time.monotonic() - pressed > patience:
            os.killpg(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(terminal)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode("utf-8", "replace"))
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    return Session(code, lines, time.monotonic() - pressed if pressed else 0.0)
