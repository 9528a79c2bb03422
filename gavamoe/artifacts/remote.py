"""Datasets and runs on object storage: any URI that pyarrow knows (`s3://`, `gs://`, `abfs://`, `hdfs://`, `file://`).

Commands work on local folders. A URI is checked out into a staging folder in this machine's cache and committed
afterwards. A stored folder is replaced all at once (see `object_store`); loose files, such as a run's config.yaml, are
single objects.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from gavamoe.artifacts.checksums import find_damage, fingerprint, is_hidden, list_files
from gavamoe.artifacts.files import write_folder, write_json
from gavamoe.artifacts.home import home_folder
from gavamoe.artifacts.object_store import (
    INDEX,
    TRANSFER_ATTEMPTS,
    Index,
    ObjectStore,
    canonical,
    is_uri,
    pause_after,
    uri_below,
)
from gavamoe.errors import InputError, RunError, one_line

ORIGIN = "origin.json"
NOT_COMMITTED = ("checkpoints",)
"""Folders of a run that Ray Train writes to the storage itself."""
_UNIT_MARKS = ("meta.json", "artifact.json")
"""A folder with one of these is a dataset or an artifact, and is stored as a unit; a run is stored entry by entry."""
_HERE = "here"


@dataclass(frozen=True)
class StoredPath:
    """What a staged path stands for, as another machine needs it: a path below the URI of a dataset or a run."""

    base: str
    """The URI of the dataset or run."""
    relative: str
    """The path below it; empty for all of it."""

    @property
    def uri(self) -> str:
        return uri_below(self.base, self.relative)


def located(text: str) -> Path:
    """A local path as it is; of a URI, its staging folder, brought up to date."""
    return checkout(text) if is_uri(text) else Path(text)


def checkout(uri: str) -> Path:
    """The local staging folder of what is stored at `uri`, brought up to date; empty where nothing is stored.

    Raises:
        InputError: the URI can't be read.
        RunError: what is stored there is damaged.
    """
    staged = _staging(uri)
    store = ObjectStore(uri)
    with _locked(staged):
        if store.index() is not None:
            _fetch(store, staged)
        else:
            for name in store.children():
                child = store.below(name)
                if child.index() is not None:
                    _fetch(child, staged / name)
                elif name not in NOT_COMMITTED and child.is_file():
                    staged.mkdir(parents=True, exist_ok=True)
                    child.get_file("", staged / name)
    return staged


def commit(staged: Path) -> None:
    """Store what a staging folder holds now; unchanged folders are not sent again.

    Raises:
        RunError: the storage can't be written.
    """
    stored = stored_path(staged)
    if stored is not None and staged.is_dir():
        _store(staged, stored.uri)


def copy(source: str, target: str) -> None:
    """Copy a dataset or a run between folders and URIs, verified.

    Raises:
        InputError: there is no such source or nothing whole in it, the target exists, or it lies inside the source.
        RunError: a file can't be read or written; nothing of a local copy stays.
    """
    inside, outside = _place(target), _place(source)
    if inside[0] == outside[0] and outside[1] in inside[1].parents:
        raise InputError(f"{target}: lies inside {source}, which can't hold a copy of itself; choose another place")
    folder = checkout(source) if is_uri(source) else Path(source)
    if not folder.is_dir():
        raise InputError(f"{source}: no such folder")
    if is_uri(source):
        _refuse_strangers(ObjectStore(source), folder)
    if not any(not is_hidden(path.name) for path in folder.iterdir()):
        raise InputError(f"{source}: holds nothing to copy")
    if is_uri(target):
        if exists(target):
            raise InputError(f"{target}: already exists; choose another URI or remove it first")
        _store(folder, target)
        return
    with write_folder(Path(target)) as aside:
        try:
            shutil.copytree(folder, aside, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*", *NOT_COMMITTED))
        except shutil.Error as error:  # all of them at the end: (file, its copy, what was wrong)
            file, _, problem = error.args[0][0]
            raise RunError(f"{file}: can't be copied ({problem})") from error
        except OSError as error:
            raise RunError(f"{target}: can't be copied ({one_line(error)})") from error


def _refuse_strangers(store: ObjectStore, staged: Path) -> None:
    """Refuse folders that a checkout passes over: to leave them out of a copy would be to lose them unseen."""
    if store.index() is not None:
        return
    for name in store.children():
        if not (is_hidden(name) or name in NOT_COMMITTED or (staged / name).exists()):
            raise InputError(
                f"{uri_below(store.uri, name)}: gavamoe did not store it, or not to its end ({INDEX} is missing);"
                " name a folder of this machine by its path"
            )


def _place(text: str) -> tuple[str, PurePosixPath]:
    """Where a path or URI lies: on which filesystem, and as a path there without links."""
    if not is_uri(text):
        return "file", PurePosixPath(Path(text).resolve())
    scheme, _, rest = canonical(text).partition("://")
    authority, _, path = rest.partition("/")
    if scheme == "file":
        return "file", PurePosixPath(Path("/" + unquote(path)).resolve())
    return f"{scheme}://{authority}", PurePosixPath("/" + unquote(path))


def _store(folder: Path, uri: str) -> None:
    """Store a dataset or an artifact as a unit, anything else entry by entry."""
    if any((folder / name).is_file() for name in _UNIT_MARKS):
        push(folder, uri)
        return
    for path in sorted(folder.iterdir()):
        if is_hidden(path.name) or path.name in NOT_COMMITTED:
            continue
        if path.is_dir():
            push(path, uri_below(uri, path.name))
        else:
            ObjectStore(uri).put_file(path, path.name)


def push(folder: Path, uri: str) -> None:
    """Store a folder at `uri`: its files under a new prefix, then the index; then the old files are removed.

    Raises:
        RunError: the storage can't be written; what was there before is intact.
    """
    files = list_files(folder)
    index = Index(version=fingerprint(files)[:16], files=files)
    store = ObjectStore(uri)
    before = store.index()
    if before is not None and before.version == index.version:
        return
    for name in files:
        store.put_file(folder / name, f"{index.version}/{name}")
    store.put_bytes(index.model_dump_json(indent=1).encode(), INDEX)
    if before is not None:
        store.delete(before.version)
    if stored_path(folder) is not None:
        _mark_of(folder).write_text(index.version)


def stored_path(path: Path) -> StoredPath | None:
    """The stored path that a staged one stands for; None for an ordinary path.

    Only this user's own cache is believed: a folder from elsewhere may bring an `origin.json` of its own, and work in
    it would be stored where that says.
    """
    path = Path(path).absolute()
    for folder in (path, *path.parents):
        mark = folder.parent / ORIGIN
        if folder.name == _HERE and mark.is_file() and folder.parent.parent == cache_folder():
            relative = path.relative_to(folder).as_posix()
            base = canonical(json.loads(mark.read_text(encoding="utf-8"))["uri"])
            return StoredPath(base, "" if relative == "." else relative)
    return None


def with_uris(text: str) -> str:
    """A message with its staging folders replaced by the URIs that a user knows them by."""

    def uri_of(match: re.Match[str]) -> str:
        stored = stored_path(Path(match[0]))
        return match[0] if stored is None else stored.uri

    try:
        cache = re.escape(str(cache_folder()))
    except InputError:  # no home, so no staging folders
        return text
    return re.sub(f"{cache}/[0-9a-f]{{20}}/{_HERE}", uri_of, text)


def local_path(stored: StoredPath) -> Path:
    """This machine's staging path of a stored path, fetched if something is stored there."""
    staged = _staging(stored.base)
    if not stored.relative:
        return checkout(stored.base)
    store = ObjectStore(stored.uri)
    with _locked(staged):
        if store.index() is not None:
            _fetch(store, staged / stored.relative)
    return staged / stored.relative


def remove(uri: str) -> None:
    """Delete a file, or everything below `uri`; nothing happens if there is nothing.

    Raises:
        InputError: `uri` is all of a storage: a bucket, or the root of a filesystem.
    """
    parent, _, name = canonical(uri).rpartition("/")
    if parent.endswith("/"):
        raise InputError(f"{uri}: is all of a storage; only what lies in it can be removed")
    ObjectStore(parent).delete(unquote(name))


def exists(uri: str) -> bool:
    """Whether a file is stored at `uri`, or anything below it."""
    store = ObjectStore(uri)
    return store.is_file() or bool(store.children())


def cache_folder() -> Path:
    """Where staging folders lie: GAVAMOE_CACHE, or the user's cache folder. Removing it loses nothing committed.

    Raises:
        InputError: neither is set, and the user has no home folder.
    """
    if own := os.environ.get("GAVAMOE_CACHE"):
        return Path(own).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or home_folder() / ".cache", "gavamoe").absolute()


def _fetch(store: ObjectStore, target: Path) -> None:
    """Make `target` the folder stored there, unless it is already; every file's hash is checked."""
    mark = _mark_of(target)
    for attempt in range(TRANSFER_ATTEMPTS):
        index = store.index()
        if index is None:
            raise InputError(f"{store.uri}: was removed meanwhile")
        if target.is_dir() and mark.is_file() and mark.read_text() == index.version:
            return
        try:
            with write_folder(target, replace=True) as aside:
                _fetch_version(store, index, aside)
            mark.write_text(index.version)
            return
        except (InputError, RunError):
            # Replaced by another writer meanwhile, or a broken transfer: look again.
            if attempt + 1 == TRANSFER_ATTEMPTS:
                raise
            pause_after(attempt)


def _fetch_version(store: ObjectStore, index: Index, target: Path) -> None:
    for name in index.files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        store.get_file(f"{index.version}/{name}", target / name)
    damage = find_damage(target, index.files)
    if damage is not None:
        raise RunError(f"{store.uri}: {damage.name} differs from what {INDEX} records; store the folder anew")


def _mark_of(target: Path) -> Path:
    """Where the version of a fetched folder is noted: beside it, because the folder's files are listed."""
    return target.with_name(f".{target.name}.version")


def _staging(uri: str) -> Path:
    """The staging folder of a URI, made with a note of its origin."""
    uri = canonical(uri)
    base = cache_folder() / hashlib.sha256(uri.encode()).hexdigest()[:20]
    try:
        if not (base / ORIGIN).is_file():
            write_json(base / ORIGIN, {"uri": uri})
    except OSError as error:
        raise InputError(
            f"{base}: the cache can't be written ({error.strerror}); set GAVAMOE_CACHE to a folder that can be"
        ) from error
    return base / _HERE


@contextmanager
def _locked(staged: Path) -> Iterator[None]:
    """One process of this machine at a time brings a staging folder up to date."""
    with open(staged.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
