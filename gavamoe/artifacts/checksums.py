"""Lists of files with size and SHA-256, and the first way in which a folder differs from its list.

Artifacts, checkpoints, folders on object storage and the token cache keep such lists, each in a JSON file of its own.
"""

import fcntl
import hashlib
import json
import os
import stat
import time
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict

from gavamoe.artifacts.files import read_json, sha256
from gavamoe.errors import InputError

_RECORDS = ("artifact.json", "meta.json")
"""Files with which artifacts and datasets list their own files."""
_NOTED_SECONDS = 24 * 3600
"""How long a note of `hashed_once` counts: a disk may go bad."""
_SETTLED_SECONDS = 2
"""A file that was changed so shortly ago may change again without its times telling."""


class FileEntry(BaseModel):
    """What a list says of a file."""

    model_config = ConfigDict(extra="forbid")
    bytes: int | None = None
    """Size of the file; None: not recorded (the token cache)."""
    sha256: str
    """Hex SHA-256 of its content."""


@dataclass(frozen=True)
class Damage:
    """A difference between a file and what its list says."""

    kind: Literal["missing", "unexpected", "content"]
    name: str
    """Path of the file, relative to the folder."""
    text: str
    """The difference in words, with the file's name."""


def is_hidden(name: str) -> bool:
    """Whether a file's relative path has a part that begins with a dot: what file managers (.DS_Store), the hub
    (.cache/), git and NFS leave in folders belongs to no artifact."""
    return any(part.startswith(".") and part != ".." for part in PurePosixPath(name).parts)


def list_files(folder: Path) -> dict[str, FileEntry]:
    """An entry for every file below `folder` that is not hidden, by its relative path."""
    return {
        name: FileEntry(bytes=path.stat().st_size, sha256=sha256(path))
        for path in sorted(folder.rglob("*"))
        if not is_hidden(name := path.relative_to(folder).as_posix()) and path.is_file()
    }


def refuse_links(folder: Path, passed_over: Container[str] = ()) -> None:
    """Refuse a folder with links that lead out of it: who opens or copies it would take along files of their own
    machine that its author chose.

    Args:
        passed_over: folders directly in it that are not looked into; neither are hidden ones.

    Raises:
        InputError: such a link, or one to a folder, or something that is neither a file nor a folder.
    """
    root = folder.resolve()
    for base, folders, names in os.walk(folder):
        here = Path(base)
        folders[:] = [n for n in folders if not is_hidden(n) and not (here == folder and n in passed_over)]
        for path in (here / name for name in (*folders, *names) if not is_hidden(name)):
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                target = path.resolve()
                if root not in target.parents or not target.is_file():
                    raise InputError(f"{path}: is a link to no file inside of {folder}; put the file itself there")
            elif not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise InputError(f"{path}: is neither a file nor a folder; remove it")


def find_recorded_damage(folder: Path, files: Mapping[str, FileEntry]) -> str | None:
    """The first difference, in words, between a folder's files and what the artifacts and datasets in it record of
    themselves; None if there is none.

    Args:
        files: the folder's list, freshly made (`list_files`).

    Raises:
        InputError: a record can't be read.
    """
    for record in files:
        base, _, name = record.rpartition("/")
        if name not in _RECORDS:
            continue
        value = read_json(folder / record)
        recorded = value.get("files") if isinstance(value, dict) else None
        for file, entry in (recorded if isinstance(recorded, dict) else {}).items():
            wanted = entry.get("sha256") if isinstance(entry, dict) else entry
            path = f"{base}/{file}" if base else file
            if is_hidden(file):  # lists of earlier versions may hold such files
                continue
            if path not in files:
                return f"{path} is missing, which {name} lists"
            if files[path].sha256 != wanted:
                return f"the content of {path} differs from what {name} records"
    return None


def fingerprint(files: Mapping[str, FileEntry]) -> str:
    """SHA-256 over the names and hashes of files, in the order given."""
    listing = json.dumps({name: entry.sha256 for name, entry in files.items()})
    return hashlib.sha256(listing.encode()).hexdigest()


def find_damage(
    folder: Path, files: Mapping[str, FileEntry], *, unlisted: Container[str] | None = None, hashes: bool = True
) -> Damage | None:
    """The first difference between a folder and its list; None if there is none. Hidden files don't count.

    Args:
        unlisted: files that may lie there without being listed; None: any may.
        hashes: compare contents, not only sizes.
    """
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    # Lists of earlier versions may hold hidden files.
    files = {name: entry for name, entry in files.items() if not is_hidden(name)}
    if missing := files.keys() - present:
        return Damage("missing", min(missing), f"{min(missing)} is missing")
    if unlisted is None:
        strangers = []
    else:
        strangers = [name for name in present - files.keys() if name not in unlisted and not is_hidden(name)]
    if strangers:
        return Damage("unexpected", min(strangers), f"{min(strangers)} is not listed")
    for name, entry in files.items():
        size = (folder / name).stat().st_size
        if entry.bytes is not None and size != entry.bytes:
            return Damage("content", name, f"{name} has {size} of {entry.bytes} bytes")
        if hashes and sha256(folder / name) != entry.sha256:
            return Damage("content", name, f"the content of {name} has changed")
    return None


@contextmanager
def hashed_once(folder: Path, files: Iterable[str], notes: Path) -> Iterator[bool]:
    """One hashing for all processes of this machine that open the same files: while one hashes them, the others wait.

    Args:
        notes: a folder of this user's alone, made if need be, where it is noted what was hashed.

    Yields:
        Whether these files were hashed less than a day ago and are the same since, by inode, size and times. Where
        not, the block is to hash them; that is noted unless it raises.
    """
    status = [os.stat(folder / name) for name in sorted(files)]
    told = [(each.st_dev, each.st_ino, each.st_size, each.st_mtime_ns, each.st_ctime_ns) for each in status]
    note = notes / hashlib.sha256(json.dumps([str(folder.resolve()), told]).encode()).hexdigest()
    with ExitStack() as held:
        try:
            notes.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = held.enter_context(open(notes / f"{note.name[:2]}.lock", "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
            now = time.time()
            for old in notes.iterdir():
                with suppress(FileNotFoundError):  # gone by another's hand, whose lock is another
                    if old.suffix != ".lock" and now - old.stat().st_mtime > _NOTED_SECONDS:
                        old.unlink()
            known, kept = note.exists(), all(now - each.st_ctime > _SETTLED_SECONDS for each in status)
        except OSError:  # no place for notes, or no locks: each hashes for itself
            known, kept = False, False
        yield known
        if kept and not known:
            with suppress(OSError):  # a full disk is no fault of what was hashed
                note.touch()
