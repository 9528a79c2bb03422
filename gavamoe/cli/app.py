"""The `gavamoe` command: its parts, its errors. Exit codes: 0 done, 1 failed, 2 wrong input or usage, 130
after Ctrl-C, 143 after SIGTERM.

The commands stand in the files beside this one and import what is heavy inside their functions: `gavamoe --help`
answers at once.
"""

import errno
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer

from gavamoe import __version__
from gavamoe.cli.cluster import copy, jobs_app, status, submit
from gavamoe.cli.data import data_app
from gavamoe.cli.evaluate import ablate, evaluate, report, score
from gavamoe.cli.export import export
from gavamoe.cli.forget import forget
from gavamoe.cli.human import human_app
from gavamoe.cli.options import store_work
from gavamoe.cli.plan import doctor, plan
from gavamoe.cli.run import explain, route
from gavamoe.cli.serve import serve
from gavamoe.cli.train import quickstart, train, tune
from gavamoe.errors import InputError, RunError, printable

app = typer.Typer(
    name="gavamoe",
    help="Train and serve a recommender that says WHY, in a sentence written for one user.\n\n"
    "Start with [bold]gavamoe quickstart[/]; then bring your own reviews: "
    "data prepare, train, evaluate, explain, report.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


_INTERRUPTED, _TERMINATED = 130, 143
"""Exit codes after Ctrl-C and SIGTERM, as shells have them."""
_AGAIN_S = 0.1
_GO_ON = dict.fromkeys(("train", "tune", "ablate"), "; --resume continues") | {
    "quickstart": "; the same command continues"
}
"""How to go on with a command that was ended; the others begin anew."""
_WRONG_PATHS = (
    errno.EACCES, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EPERM, errno.EROFS,
)  # fmt: skip
"""What the system says of a path that was not the right one to name."""


class _Terminated(KeyboardInterrupt):
    """A SIGTERM, which ends a command as Ctrl-C does."""


def _panel(name: str, commands: Sequence[Callable[..., None]], groups: dict[str, typer.Typer] | None = None) -> None:
    """A box of `gavamoe --help`."""
    for command in commands:
        settings = {"allow_extra_args": True, "ignore_unknown_options": True} if command is submit else {}
        app.command(rich_help_panel=name, context_settings=settings)(command)
    for group, commands_of_group in (groups or {}).items():
        app.add_typer(commands_of_group, name=group, rich_help_panel=name)


_panel("Data and training", [quickstart, doctor, plan, train, tune], {"data": data_app})
_panel("A trained run", [route, explain, serve, export, forget])
_panel("Scores and comparisons", [evaluate, score, ablate, report], {"human-eval": human_app})
_panel("On a cluster", [submit, status, copy], {"jobs": jobs_app})


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gavamoe {__version__}")
        raise typer.Exit


@app.callback()
def _main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, and library logs.")] = False,
) -> None:
    del version, debug  # read by _print_version, and by main(), which must know it before parsing fails


def main() -> None:
    """Entry point: runs the app and turns errors into one line and an exit code."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    _quiet_libraries(debug)
    terminated = False

    def end() -> None:
        way_on = _GO_ON.get(sys.argv[1] if len(sys.argv) > 1 else "", "")
        print(f"{'terminated' if terminated else 'interrupted'}{way_on}", file=sys.stderr)
        sys.exit(_TERMINATED if terminated else _INTERRUPTED)

    def on_sigterm(number: int, frame: object) -> None:
        nonlocal terminated
        terminated = True
        raise _Terminated

    try:
        with _sigterm(on_sigterm), _lost_signals_repeated():
            try:
                app(prog_name="gavamoe")
            finally:
                store_work()
    except (InputError, RunError) as error:
        if debug:
            traceback.print_exc()
        print(f"error: {printable(_with_uris(str(error)))}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        end()
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:  # typer's way of saying so
            end()
        raise
    except OSError as error:
        if debug:
            raise
        place = printable(_with_uris(str(error.filename or type(error).__name__)))
        wrong_path = error.filename is not None and error.errno in _WRONG_PATHS
        hint = "" if wrong_path else " (--debug shows where)"
        print(f"error: {place}: {error.strerror or error}{hint}", file=sys.stderr)
        sys.exit(2 if wrong_path else 1)
    except Exception as error:
        if debug:
            raise
        print(f"error: {type(error).__name__}: {printable(str(error))} (--debug shows where)", file=sys.stderr)
        sys.exit(1)


@contextmanager
def _lost_signals_repeated() -> Iterator[None]:
    """Send Ctrl-C or SIGTERM again where Python could only report it, while the block runs: what a signal raises in a
    destructor or in a callback of fork() ("Exception ignored in ...") goes no further, and the command would go on."""
    before = sys.unraisablehook

    def report(unraisable: "sys.UnraisableHookArgs") -> None:
        lost, by_ray = unraisable.exc_value, signal.SIGTERM  # while Ray starts, the handler is Ray's, which exits
        if isinstance(lost, _Terminated) or (isinstance(lost, SystemExit) and lost.code == by_ray):
            threading.Timer(_AGAIN_S, os.kill, (os.getpid(), signal.SIGTERM)).start()
        elif isinstance(lost, KeyboardInterrupt):
            threading.Timer(_AGAIN_S, os.kill, (os.getpid(), signal.SIGINT)).start()
        else:
            before(unraisable)

    sys.unraisablehook = report
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextmanager
def _sigterm(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Have SIGTERM, with which schedulers end a command, handled like Ctrl-C while the block runs."""
    if threading.current_thread() is not threading.main_thread():  # which alone may have handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _with_uris(message: str) -> str:
    storage = sys.modules.get("gavamoe.artifacts.remote")  # not imported: no URI was used
    return message if storage is None else str(storage.with_uris(message))


def _quiet_libraries(debug: bool) -> None:
    """Libraries log to standard error by default, in the middle of progress bars; of them errors alone are shown, of
    gavamoe's own modules warnings too."""
    if debug:
        return
    from gavamoe.cli.terminal import LogLines

    logging.basicConfig(level=logging.ERROR, format="%(message)s", handlers=[LogLines()])
    logging.getLogger("gavamoe").setLevel(logging.WARNING)
    # Ray Tune logs, with tracebacks, errors that it then raises and those of its own state, which nobody keeps.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DS_ACCELERATOR_LOG_LEVEL", "ERROR")


def run_job(*command: str) -> None:
    """`main()` with the words of `command` before the script's own arguments; the scripts in jobs/ are such calls."""
    sys.argv = ["gavamoe", *command, *sys.argv[1:]]
    main()
