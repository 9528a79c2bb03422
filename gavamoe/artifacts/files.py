"""Files and folders written whole or not at all, bounded reads, content fingerprints.

Everything a command leaves on disk goes through `write_folder` or `write_file`: the content is
written aside, in the same parent, and renamed when it is complete.
"""

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gavamoe.errors import InputError, RunError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
"""What the system says where no space is left, or a quota is used up."""
MAX_JSON_BYTES = 64 * 2**20
_PARTIAL, _REPLACED = "partial", "replaced"
"""In the names of what is being written, and of what is being replaced."""
_ABANDONED = 24 * 3600
"""Seconds after the last change of what is half written, from which on nobody is writing it any more."""
_LEFT = re.compile(rf"\.(?P<name>.+)\.(?P<kind>{_PARTIAL}|{_REPLACED})-[0-9a-f]{{8}}")
"""Names beside `name` that `write_folder` and `write_file` use for a while."""
_REPORTED_PACKAGES = ("gavamoe", "torch", "transformers", "ray", "deepspeed", "numpy", "pyarrow", "scikit-learn")


@contextmanager
def write_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `path`; on success it becomes `path`, on any error it is removed.

    Raises:
        InputError: `path` exists and `replace` is False, is a link to nothing, or its parent cannot be written.
        RunError: the disk is full.
    """
    path = Path(path)
    recover_folder(path)
    if path.exists() and not replace:
        raise InputError(f"{path}: already exists; choose another folder or remove it first")
    if path.is_symlink() and not path.exists():
        raise InputError(f"{path}: is a link to {path.readlink()}, which does not exist; make that or remove the link")
    aside = _aside(path)
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
    forget_abandoned(path.parent)
    try:
        with full_disk_named(path):
            yield aside
            _publish(aside, path)
    finally:
        _remove(aside)


def recover_folder(path: Path) -> None:
    """Put back the folder that was there, if its replacement was killed between the two renames that it takes."""
    if path.exists() or path.is_symlink():
        return
    with suppress(OSError):  # another process may do the same
        if earlier := sorted(_siblings(path, _REPLACED), key=lambda folder: folder.stat().st_mtime):
            earlier[-1].rename(path)


def forget_abandoned(folder: Path, *, below: bool = False) -> None:
    """Remove the half-written files and folders that killed commands have left in a folder, a day after their last
    change. What was there before, and has not been put back (`recover_folder`), stays.

    Args:
        below: look into the folders in it as well.
    """
    for base, folders, names in os.walk(folder):
        left = [Path(base, name) for name in (*folders, *names) if name.startswith(".") and _LEFT.fullmatch(name)]
        for path in left:
            with suppress(OSError):  # another command may do the same
                if _is_abandoned(path):
                    _remove(path)
        folders[:] = [name for name in folders if not name.startswith(".")] if below else []


def _is_abandoned(path: Path) -> bool:
    found = _LEFT.fullmatch(path.name)
    if found is None or (found["kind"] == _REPLACED and not path.with_name(found["name"]).exists()):
        return False
    inside = path.rglob("*") if path.is_dir() and not path.is_symlink() else ()
    return time.time() - max(each.lstat().st_mtime for each in (path, *inside)) > _ABANDONED


@contextmanager
def write_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; on success it replaces `path`, on any error it is removed.

    Raises:
        RunError: the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    forget_abandoned(path.parent)
    aside = _aside(path)
    try:
        with full_disk_named(path):
            yield aside
            _sync(aside)
        os.replace(aside, path)
        _sync_folder(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Turn the bare error of a full disk into one that names what was being written.

    Raises:
        RunError: no space was left, or a quota was used up, there or in the folder of temporary files.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        free = shutil.disk_usage(path.parent).free / 2**20
        raise RunError(
            f"{path}: cannot be written ({os.strerror(error.errno)}): {free:,.0f} MiB are free there,"
            f" {shutil.disk_usage(tempfile.gettempdir()).free / 2**20:,.0f} among the temporary files (TMPDIR);"
            " make room or choose a folder on another disk"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN and infinity are refused."""
    with write_file(path) as aside:
        aside.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def save_png(figure: "Figure", path: Path) -> None:
    """Write a matplotlib figure as PNG, whole or not at all, without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    with write_file(path) as aside:
        figure.savefig(aside, format="png", dpi=130)


def read_json(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Parse a JSON file of at most `max_bytes`.

    Raises:
        InputError: the file is missing, too large, or not JSON.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise InputError(f"{path}: {size} bytes, more than the {max_bytes} that such a file may have")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide a run's numbers."""
    installed = {}
    for package in _REPORTED_PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{_PARTIAL}-{uuid.uuid4().hex[:8]}")


def _publish(aside: Path, path: Path) -> None:
    """Give a finished folder its name, and what had that name before another one until then."""
    for folder, folders, names in os.walk(aside):
        del folders
        for name in names:
            if not Path(folder, name).is_symlink():
                _sync(Path(folder, name))
        _sync_folder(Path(folder))
    old = path.with_name(f".{path.name}.{_REPLACED}-{uuid.uuid4().hex[:8]}")
    if path.exists():  # os.replace refuses a non-empty target folder
        path.rename(old)
    try:
        aside.rename(path)
    except OSError:
        recover_folder(path)
        raise
    _sync_folder(path.parent)
    _remove(old)


def _siblings(path: Path, kind: str) -> list[Path]:
    """What calls for `path` have left beside it, or are about to use."""
    return list(path.parent.glob(f".{glob.escape(path.name)}.{kind}-*"))


def _sync(path: Path) -> None:
    """Have a file's content on the disk, so that a power failure does not leave an empty one under its final name."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    with suppress(OSError):  # not every filesystem does it for folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
