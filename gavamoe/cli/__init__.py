"""The `gavamoe` command: parse, call, print.

app          the commands in their boxes, errors and exit codes
options      options that commands share
train        quickstart, train, tune
run          route, explain
serve        serve
export       export
forget       forget
evaluate     evaluate, score, ablate, report
data         gavamoe data ...
human        gavamoe human-eval ...
cluster      submit, jobs, status, copy
plan         plan, doctor: before anything is paid for
status       what ran, how far it is, what is next
terminal     tables, progress bars, JSON on standard output
"""

import atexit
import os
import signal
import sys
import threading

SIGNALED = (130, 143)
"""Exit codes after Ctrl-C and SIGTERM."""
ended: list[int] = []
"""The exit code of a command that a signal has ended."""


def main() -> None:
    """Entry point of the `gavamoe` command."""
    atexit.register(_leave)  # first, so called last
    try:
        try:
            from gavamoe.cli import app

            app.main()
        finally:
            _leave_ctrl_c_to_the_system()
    except KeyboardInterrupt:  # the imports take a moment, in which people notice that they mistyped
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except SystemExit as stop:
        ended[:] = [stop.code] if isinstance(stop.code, int) and stop.code in SIGNALED else []
        raise


def _leave() -> None:
    """End the process here where a signal ended the command: all is told and closed, and what Python would do from now
    on, with threads of Ray's C++ in the middle of something, was seen to end in a segmentation fault."""
    if ended:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended[0])


def _leave_ctrl_c_to_the_system() -> None:
    """Have Ctrl-C end this process at once from now on, as shells expect: the command is over, and all that is left is
    to wait for threads, where Python shows a traceback and exits as if nothing had been."""
    if threading.current_thread() is not threading.main_thread():  # which alone may have handlers
        return
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def run_job(*command: str) -> None:
    """`main()` with the words of `command` before the script's own arguments; the scripts in jobs/ are such calls."""
    from gavamoe.cli import app

    app.run_job(*command)
