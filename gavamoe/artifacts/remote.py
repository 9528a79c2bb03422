"""Datasets and runs on object storage: any URI that pyarrow knows (`s3://`, `gs://`, `abfs://`, `hdfs://`, `file://`).

Commands work on local folders. A URI is checked out into a staging folder in this machine's cache and committed
afterwards. A stored folder is replaced all at once (see `object_store`); loose files, such as a run's config.yaml, are
single objects, which the list of the run's contents has with their hashes.
"""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from gavamoe.artifacts.checksums import (
    FileEntry,
    find_damage,
    fingerprint,
    is_hidden,
    list_files,
    refuse_links,
)
from gavamoe.artifacts.files import sha256, write_folder, write_json
from gavamoe.artifacts.home import cache_folder
from gavamoe.artifacts.object_store import (
    CONTENTS,
    INDEX,
    TRANSFER_ATTEMPTS,
    Contents,
    Index,
    ObjectStore,
    canonical,
    is_uri,
    pause_after,
    uri_below,
)
from gavamoe.errors import InputError, RunError

ORIGIN = "origin.json"
NOT_COMMITTED = ("checkpoints",)
"""Folders of a run that Ray Train writes to the storage itself."""
_UNIT_MARKS = ("meta.json", "artifact.json")
"""A folder with one of these is a dataset or an artifact, and is stored as a unit; a run is stored entry by entry."""
_HERE = "here"
_UNFINISHED = "an upload to it was interrupted, or is still under way; run the same command again to complete it"


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


def located(text: str, *, resuming: bool = False) -> Path:
    """A local path as it is; of a URI, its staging folder, brought up to date (see `checkout`)."""
    return checkout(text, resuming=resuming) if is_uri(text) else Path(text)


def checkout(uri: str, *, resuming: bool = False) -> Path:
    """The local staging folder of what is stored at `uri`, brought up to date; empty where nothing is stored.

    Args:
        resuming: accept work whose first upload was interrupted; never half a copy.

    Raises:
        InputError: the URI can't be read, or an upload to it did not come to its end.
        RunError: what is stored there is damaged.
    """
    staged = _staging(uri)
    store = ObjectStore(uri)
    with _locked(staged):
        if store.index() is not None:
            _fetch(store, staged)
            return staged
        contents = store.contents()
        if contents is None or (resuming and not contents.complete and contents.by == "commit"):
            _fetch_what_is_there(store, staged)
        elif contents.complete:
            _fetch_contents(store, staged)
        else:
            raise InputError(f"{uri}: {_UNFINISHED}")
    return staged


def _fetch_what_is_there(store: ObjectStore, staged: Path) -> None:
    """Bring up to date all that lies at a place without a complete list of its contents."""
    for name in store.children():
        child = store.below(name)
        if child.index() is not None:
            _fetch(child, staged / name)
        elif name not in (*NOT_COMMITTED, CONTENTS) and child.is_file():
            staged.mkdir(parents=True, exist_ok=True)
            child.get_file("", staged / name)


def _fetch_contents(store: ObjectStore, staged: Path) -> None:
    """Bring up to date what a place lists, and the folders that workers have added since."""
    contents = _fetch_loose_files(store, staged)
    for name in sorted({*contents.parts, *store.children()} - {*contents.files, *NOT_COMMITTED, CONTENTS}):
        child = store.below(name)
        if child.index() is not None:
            _fetch(child, staged / name)
        elif name in contents.parts:
            raise InputError(f"{child.uri}: {_UNFINISHED}")


def _fetch_loose_files(store: ObjectStore, staged: Path) -> Contents:
    """Bring up to date the loose files that a place lists, each one checked; returns the list."""
    for attempt in range(TRANSFER_ATTEMPTS):
        contents = store.contents()
        if contents is None or not contents.complete:
            raise InputError(f"{store.uri}: {_UNFINISHED}")
        wrong = next((name for name, entries in contents.files.items() if not _got(store, staged, name, entries)), None)
        if wrong is None:
            return contents
        if attempt + 1 < TRANSFER_ATTEMPTS:
            pause_after(attempt)  # replaced by another writer meanwhile: look again
    raise RunError(f"{store.uri}/{wrong}: differs from what {CONTENTS} records; store it anew")


def _got(store: ObjectStore, staged: Path, name: str, entries: list[FileEntry]) -> bool:
    """Whether a loose file is here as one of the entries says, fetched if it was not."""
    target, hashes = staged / name, {entry.sha256 for entry in entries}
    if target.is_file() and sha256(target) in hashes and len(hashes) == 1:
        return True
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.fetched")
    try:
        store.get_file(name, aside)
        if sha256(aside) not in hashes:
            return False
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)
    return True


def commit(staged: Path) -> None:
    """Store what a staging folder holds now; unchanged folders are not sent again.

    Raises:
        RunError: the storage can't be written.
    """
    stored = stored_path(staged)
    if stored is not None and staged.is_dir():
        refuse_links(staged, NOT_COMMITTED)
        store_folder(staged, stored.uri)


def verify_stored(store: ObjectStore, files: Mapping[str, FileEntry]) -> None:
    """Read a stored folder again and compare it with the list of what was sent.

    Raises:
        RunError: a file differs.
    """
    index = store.index()
    prefix = "" if index is None else index.version
    for name, entry in files.items():
        if store.sha256(f"{prefix}/{name}") != entry.sha256:
            raise RunError(f"{store.uri}: the stored {name} differs from what was sent; run the same command again")


def is_unit(folder: Path) -> bool:
    """Whether a folder is a dataset or an artifact, which is stored as a unit."""
    return any((folder / name).is_file() for name in _UNIT_MARKS)


def store_folder(folder: Path, uri: str, copied: dict[str, FileEntry] | None = None) -> None:
    """Store a dataset or an artifact as a unit, anything else entry by entry, the list of its contents last.

    A place that was complete stays so at every moment: while a loose file is replaced, the list has both contents.

    Args:
        copied: the files of a copy, which is verified and of which nothing counts before its end; else a commit.
    """
    if is_unit(folder):
        push(folder, uri)
        return
    store = ObjectStore(uri)
    paths = [
        path
        for path in sorted(folder.iterdir())
        if not is_hidden(path.name) and path.name not in (*NOT_COMMITTED, CONTENTS)
    ]
    parts = [path.name for path in paths if path.is_dir()]
    loose = {path.name: FileEntry(bytes=path.stat().st_size, sha256=sha256(path)) for path in paths if path.is_file()}
    new = {name: [entry] for name, entry in loose.items()}
    before = store.contents()
    if before is not None and before.complete:
        changed = {name for name, entries in new.items() if before.files.get(name) != entries}
        replaced = {name: [*before.files[name], *new[name]] for name in changed if name in before.files}
        if replaced:
            store.put_contents(before.model_copy(update={"files": before.files | replaced}))
        after = Contents(complete=True, by="commit", parts=sorted({*before.parts, *parts}), files=before.files | new)
    else:
        changed = set(new)
        after = Contents(complete=True, by="commit" if copied is None else "copy", parts=parts, files=new)
        if copied is None and (before is not None or not set(store.children()) - set(NOT_COMMITTED)):
            store.put_contents(after.model_copy(update={"complete": False}))
    for name in parts:
        below = None if copied is None else _below(copied, name)
        push(folder / name, uri_below(uri, name), below)
        if below is not None:
            verify_stored(store.below(name), below)
    for name in sorted(changed):
        store.put_file(folder / name, name)
        if copied is not None and store.sha256(name) != loose[name].sha256:
            raise RunError(f"{uri}: the stored {name} differs from what was sent; run the same command again")
    if after != before:
        store.put_contents(after)


def _below(files: Mapping[str, FileEntry], folder: str) -> dict[str, FileEntry]:
    """The entries of a list that lie in a folder, by their names in it."""
    return {name.removeprefix(f"{folder}/"): entry for name, entry in files.items() if name.startswith(f"{folder}/")}


def push(folder: Path, uri: str, files: dict[str, FileEntry] | None = None) -> None:
    """Store a folder at `uri`: its files under a new prefix, then the index; then the old files are removed.

    Args:
        files: the list of its files, if it is known.

    Raises:
        InputError: the folder has links that lead out of it.
        RunError: the storage can't be written; what was there before is intact.
    """
    refuse_links(folder)
    if files is None:
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


def portable(value: Any) -> Any:
    """A staged path as a place that other machines can fetch; anything else as it is."""
    return (stored_path(value) or value) if isinstance(value, Path) else value


def here(value: Any) -> Any:
    """What `portable` made of a value, on this machine."""
    return local_path(value) if isinstance(value, StoredPath) else value


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
