"""One command at a time in a folder. The lock is the kernel's (flock): it ends with its owner, however that ends."""

import errno
import fcntl
import functools
import inspect
import json
import os
import shlex
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, ParamSpec, TypeVar

from gavamoe.artifacts.files import forget_abandoned
from gavamoe.errors import InputError, printable

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

LOCK_FILE = ".lock"
"""Hidden, so that it belongs to no artifact and is never stored."""
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_SHOWN_CHARS = 200
_held: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())
"""Lock files that this thread of work holds."""


@contextmanager
def locked_folder(folder: Path, name: str = LOCK_FILE) -> Iterator[None]:
    """Keep other commands out of a folder, which is made if it is not there, for as long as the block runs.

    A block within another one for the same folder has it already. A folder that was made for it and stayed empty is
    removed again. Filesystems without locks keep nobody out. What
    killed commands left half written anywhere in the folder is removed once it is a day old.

    Raises:
        InputError: another command works in it (who, where, since when), or no file can be made in it.
    """
    folder = Path(folder)
    own = (folder / name).absolute()
    if own in _held.get():
        yield
        return
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _acquired(folder, folder / name)
    except OSError as error:
        way_out = "name another folder with --run-dir"
        if isinstance(error, FileExistsError):
            raise InputError(f"{folder}: is a file, and a run needs a folder; {way_out}") from error
        raise InputError(f"{folder}: no run can be kept there ({error.strerror}); {way_out}") from error
    with file:
        before = _held.set(_held.get() | {own})
        try:
            forget_abandoned(folder, below=True)
            yield
        finally:
            _held.reset(before)
            (folder / name).unlink(missing_ok=True)  # while it is still held
            if made:
                with suppress(OSError):  # not empty
                    folder.rmdir()


def alone_in(
    parameter: str, *, make: bool = False
) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Let only one call at a time, of whatever process, work in the folder that this parameter of a function names.

    Args:
        make: make a folder that is not there; otherwise the function is called without a lock, and says so itself.
    """

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def locked(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
            folder = Path(signature.bind(*args, **kwargs).arguments[parameter])
            if not (make or folder.is_dir()):
                return function(*args, **kwargs)
            with locked_folder(folder):
                return function(*args, **kwargs)

        return locked

    return decorate


def _acquired(folder: Path, path: Path) -> IO[str]:
    """The open lock file, held."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            with file:
                holder = _holder(file)
            raise InputError(f"{folder}: in use by {holder}; wait for it, or use another --run-dir") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                file.close()
                raise
        with suppress(FileNotFoundError):
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                _sign(file)
                return file
        file.close()  # its last owner has removed it meanwhile


def _sign(file: IO[str]) -> None:
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    since = datetime.now(UTC).isoformat(timespec="seconds")
    file.truncate(0)
    json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": since, "command": command}, file)
    file.flush()


def _holder(file: IO[str]) -> str:
    """Who holds a lock, in words."""
    try:
        file.seek(0)
        value = json.load(file)
        command = printable(str(value["command"]))[:_SHOWN_CHARS]
        where = f"process {value['pid']} on {value['host']} since {value['since']}"
    except (ValueError, KeyError, TypeError):  # it has not signed yet
        return "another command"
    return f"{printable(where)} ({command})"
