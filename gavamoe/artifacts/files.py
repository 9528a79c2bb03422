"""Files and folders written whole or not at all, bounded reads, content fingerprints.

Everything a command leaves on disk goes through `write_folder` or `write_file`: the content is
written aside, in the same parent, and renamed when it is complete.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gavamoe.errors import InputError, RunError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_JSON_BYTES = 64 * 2**20
_REPORTED_PACKAGES = ("gavamoe", "torch", "transformers", "ray", "deepspeed", "numpy", "pyarrow", "scikit-learn")


@contextmanager
def write_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `path`; on success it becomes `path`, on any error it is removed.

    Raises:
        InputError: `path` exists and `replace` is False, is a link to nothing, or its parent cannot be written.
        RunError: the disk is full.
    """
    path = Path(path)
    if path.exists() and not replace:
        raise InputError(f"{path}: already exists; choose another folder or remove it first")
    if path.is_symlink() and not path.exists():
        raise InputError(f"{path}: is a link to {path.readlink()}, which does not exist; make that or remove the link")
    aside = _aside(path)
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
    try:
        with full_disk_named(path):
            yield aside
        if path.exists():  # os.replace refuses a non-empty target folder
            old = _aside(path)
            path.rename(old)
            aside.rename(path)
            _remove(old)
        else:
            aside.rename(path)
    finally:
        _remove(aside)


@contextmanager
def write_file(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; on success it replaces `path`, on any error it is removed.

    Raises:
        RunError: the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(path)
    try:
        with full_disk_named(path):
            yield aside
        os.replace(aside, path)
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
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
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
    return path.with_name(f".{path.name}.partial-{uuid.uuid4().hex[:8]}")


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
