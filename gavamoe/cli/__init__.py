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

import sys


def main() -> None:
    """Entry point of the `gavamoe` command."""
    try:
        from gavamoe.cli import app
    except KeyboardInterrupt:  # its imports take a moment, in which people notice that they mistyped
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    app.main()


def run_job(*command: str) -> None:
    """`main()` with the words of `command` before the script's own arguments; the scripts in jobs/ are such calls."""
    from gavamoe.cli import app

    app.run_job(*command)
