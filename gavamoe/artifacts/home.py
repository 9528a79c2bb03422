"""The user's home folder, where it is needed: a container's user may have none; and the cache in it."""

import os
import tempfile
from pathlib import Path

from gavamoe.errors import InputError

WAY_OUT = "set HOME to a folder that can be written"


def home_folder() -> Path:
    """The home folder of this user.

    Raises:
        InputError: HOME is not set, and the system knows no user of this number.
    """
    try:
        return Path.home()
    except RuntimeError as error:
        raise InputError(f"user {os.getuid()} has no home folder: {WAY_OUT}") from error


def writable_home() -> Path:
    """The home folder of this user, in which files can be made.

    Raises:
        InputError: there is none, or it can't be written.
    """
    home = home_folder()
    try:
        with tempfile.TemporaryFile(dir=home):
            return home
    except OSError as error:
        raise InputError(f"{home}: the home folder can't be written ({error.strerror}): {WAY_OUT}") from error


def cache_folder() -> Path:
    """GAVAMOE_CACHE, or the user's cache folder: staging folders and notes. Removing it loses nothing committed.

    Raises:
        InputError: neither is set, and the user has no home folder.
    """
    if own := os.environ.get("GAVAMOE_CACHE"):
        return Path(own).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or home_folder() / ".cache", "gavamoe").absolute()
