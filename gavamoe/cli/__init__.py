"""The `gavamoe` command: parse, call, print.

app          the commands in their boxes, errors and exit codes
options      options that commands share
train        quickstart, train, tune
run          route, explain
serve        serve
forget       forget
evaluate     evaluate, score, ablate, report
data         gavamoe data ...
human        gavamoe human-eval ...
cluster      submit, jobs, status, copy
plan         gavamoe plan
status       what ran, how far it is, what is next
terminal     tables, progress bars, JSON on standard output
"""

import signal
import sys
import threading


def main() -> None:
    """Entry point of the `gavamoe` command."""
    try:
        try:
            from gavamoe.cli import app

            app.main()
        finally:
            _leave_ctrl_c_to_the_system()
    except KeyboardInterrupt:  # the imports take a moment, in which people notice that they mistyped
        print("interrupted", file=sys.stderr)
        sys.exit(130)


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
