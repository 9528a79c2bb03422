"""Folders for what a session's tests share; they go with the session."""

import atexit
import shutil
import tempfile
from pathlib import Path

_made: list[Path] = []


def scratch_folder(prefix: str) -> Path:
    """A new empty folder among the machine's temporary ones."""
    _made.append(Path(tempfile.mkdtemp(prefix=prefix)))
    return _made[-1]


@atexit.register
def remove_scratch_folders() -> None:
    """Remove all that were made. At the end of a process; its session may call it earlier."""
    while _made:
        shutil.rmtree(_made.pop(), ignore_errors=True)
