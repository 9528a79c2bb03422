"""Datasets and runs on object storage: any URI that pyarrow knows (`s3://`, `gs://`, `abfs://`, `hdfs://`, `file://`).

Commands work on local folders. A URI is checked out into a folder of this machine's cache and committed afterwards.
A folder at `URI` is `URI/VERSION/FILES...` and, written last, `URI/_folder.json`, which names the version and lists its
files with size and SHA-256. Object stores have no rename: this one small object is the switch, so that a reader finds
the old folder or the new one, whole. Loose files, such as a run's config.yaml, are single objects, which appear whole.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pyarrow import fs
from pydantic import BaseModel, ConfigDict, ValidationError

from gavamoe.artifacts.checksums import FileEntry, file_entries, find_damage, leaves_folder
from gavamoe.artifacts.files import MAX_JSON_BYTES, write_folder, write_json
from gavamoe.errors import InputError, RunError, first_problem, one_line

Result = TypeVar("Result")

INDEX = "_folder.json"
ORIGIN = "origin.json"
NOT_COMMITTED = ("checkpoints",)
"""Parts of a run that others write to the storage themselves: Ray Train."""
_UNIT_MARKS = ("meta.json", "artifact.json")
"""A folder with one of these is a dataset or an artifact: one unit. Others, such as runs, go part by part."""
_HERE = "here"
_REQUEST_ATTEMPTS = 8
_TRANSFER_ATTEMPTS = 4
_FIRST_PAUSE = 0.2
"""Seconds before the second attempt; four times as long before each one more."""


class Index(BaseModel):
    """Content of `_folder.json`."""

    model_config = ConfigDict(extra="forbid")
    version: str
    """A digest of the names and hashes of the content, and the name of the prefix with the files."""
    files: dict[str, FileEntry]


@dataclass(frozen=True)
class Place:
    """A staged path, told to another machine: a part of what is stored at a URI ("" for the whole)."""

    base: str
    part: str

    @property
    def uri(self) -> str:
        return f"{self.base}/{self.part}" if self.part else self.base


def is_uri(text: str) -> bool:
    """Whether it names something on a filesystem of pyarrow rather than a local path."""
    scheme, found, rest = text.partition("://")
    return bool(found and rest and scheme.isalnum())


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
    store = _Store(uri)
    with _locked(staged):
        if store.index() is not None:
            _fetch(store, staged)
        else:
            for name in store.children():
                part = store.below(name)
                if part.index() is not None:
                    _fetch(part, staged / name)
                elif name not in NOT_COMMITTED and part.is_file():
                    staged.mkdir(parents=True, exist_ok=True)
                    part.get_file("", staged / name)
    return staged


def commit(staged: Path) -> None:
    """Store what a staging folder holds now; unchanged folders are not sent again.

    Raises:
        RunError: the storage can't be written.
    """
    place = place_of(staged)
    if place is not None and staged.is_dir():
        _store(staged, place.uri)


def copy(source: str, target: str) -> None:
    """Copy a dataset or a run between folders and URIs, verified.

    Raises:
        InputError: there is no such source, or the target exists.
    """
    folder = checkout(source) if is_uri(source) else Path(source)
    if not folder.is_dir():
        raise InputError(f"{source}: no such folder")
    if is_uri(target):
        if exists(target):
            raise InputError(f"{target}: already exists; choose another place or remove it first")
        _store(folder, target)
        return
    with write_folder(Path(target)) as aside:
        ignored = shutil.ignore_patterns(".*.version", *NOT_COMMITTED)
        shutil.copytree(folder, aside, dirs_exist_ok=True, ignore=ignored)


def _store(folder: Path, uri: str) -> None:
    """Store a dataset or an artifact as a unit, anything else part by part."""
    if any((folder / name).is_file() for name in _UNIT_MARKS):
        push(folder, uri)
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in NOT_COMMITTED:
            continue
        if path.is_dir():
            push(path, f"{uri}/{path.name}")
        else:
            _Store(uri).put_file(path, path.name)


def push(folder: Path, uri: str) -> None:
    """Store a folder at `uri`: its files under a new prefix, then the index; then the old files are removed.

    Raises:
        RunError: the storage can't be written; what was there before is intact.
    """
    files = file_entries(folder)
    listing = json.dumps({name: entry.sha256 for name, entry in files.items()})
    index = Index(version=hashlib.sha256(listing.encode()).hexdigest()[:16], files=files)
    store = _Store(uri)
    before = store.index()
    if before is not None and before.version == index.version:
        return
    for name in files:
        store.put_file(folder / name, f"{index.version}/{name}")
    store.put_bytes(index.model_dump_json(indent=1).encode(), INDEX)
    if before is not None:
        store.delete(before.version)
    if place_of(folder) is not None:
        _mark_of(folder).write_text(index.version)


def place_of(path: Path) -> Place | None:
    """The stored place that a staged path stands for; None for an ordinary path."""
    path = Path(path).absolute()
    for folder in (path, *path.parents):
        mark = folder.parent / ORIGIN
        if folder.name == _HERE and mark.is_file():
            relative = path.relative_to(folder).as_posix()
            return Place(json.loads(mark.read_text(encoding="utf-8"))["uri"], "" if relative == "." else relative)
    return None


def with_uris(text: str) -> str:
    """A message with the URIs that its staging folders stand for, which is what a user knows."""

    def uri_of(match: re.Match[str]) -> str:
        place = place_of(Path(match[0]))
        return match[0] if place is None else place.uri

    return re.sub(f"{re.escape(str(cache_folder()))}/[0-9a-f]{{20}}/{_HERE}", uri_of, text)


def local_path(place: Place) -> Path:
    """This machine's staging path of a place, fetched if it is stored."""
    staged = _staging(place.base)
    if not place.part:
        return checkout(place.base)
    store = _Store(place.uri)
    with _locked(staged):
        if store.index() is not None:
            _fetch(store, staged / place.part)
    return staged / place.part


def remove(uri: str) -> None:
    """Delete a file, or everything below `uri`; nothing happens if there is nothing."""
    _Store(uri).delete("")


def exists(uri: str) -> bool:
    """Whether a file is stored at `uri`, or anything below it."""
    store = _Store(uri)
    return store.is_file() or bool(store.children())


def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """pyarrow's filesystem of a URI and the path in it. S3: AWS_ENDPOINT_URL, AWS_REGION and the usual credentials.

    Raises:
        InputError: an unknown scheme, or wrong settings.
    """
    parts = urlsplit(uri)
    try:
        if parts.scheme != "s3":
            found, path = fs.FileSystem.from_uri(uri)
            return found, path
        endpoint = urlsplit(os.environ.get("AWS_ENDPOINT_URL", ""))
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if region is None and not endpoint.netloc:
            region = fs.resolve_s3_region(parts.netloc)
        options: dict[str, Any] = {"region": region or "us-east-1"}
        if endpoint.netloc:
            options |= {"endpoint_override": endpoint.netloc, "scheme": endpoint.scheme}
        retries = fs.AwsStandardS3RetryStrategy(max_attempts=_REQUEST_ATTEMPTS)
        store = fs.S3FileSystem(retry_strategy=retries, connect_timeout=5, request_timeout=30, **options)
        return store, (parts.netloc + parts.path).rstrip("/")
    except (OSError, ValueError) as error:
        raise InputError(f"{uri}: can't be reached ({one_line(error)})") from error


def cache_folder() -> Path:
    """Where staging folders lie: GAVAMOE_CACHE, or the user's cache folder. Removing it loses nothing committed."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("GAVAMOE_CACHE") or Path(home) / "gavamoe").absolute()


class _Store:
    """What lies below one URI."""

    def __init__(self, uri: str, opened: tuple[fs.FileSystem, str] | None = None) -> None:
        self.uri = uri.rstrip("/")
        self._files, self._root = opened or filesystem(self.uri)

    def below(self, name: str) -> "_Store":
        return _Store(f"{self.uri}/{name}", (self._files, f"{self._root}/{name}"))

    def index(self) -> Index | None:
        """The folder's index; None if no folder is stored here."""
        content = self.get_bytes(INDEX)
        if content is None:
            return None
        try:
            index = Index.model_validate_json(content)
        except ValidationError as error:
            raise RunError(f"{self.uri}/{INDEX}: not an index ({first_problem(error)}); store it anew") from error
        for name in index.files:
            if leaves_folder(name):
                raise RunError(f"{self.uri}/{INDEX}: names the file {name!r}, outside of its folder")
        return index

    def children(self) -> list[str]:
        """Names directly below."""
        selector = fs.FileSelector(self._root, allow_not_found=True)
        return sorted(info.base_name for info in self._call(lambda: self._files.get_file_info(selector)))

    def is_file(self) -> bool:
        info = self._call(lambda: self._files.get_file_info(self._root))
        return bool(info.type == fs.FileType.File)

    def get_bytes(self, name: str) -> bytes | None:
        """A small file's content, None without it."""
        path = self._path(name)

        def read() -> bytes | None:
            info = self._files.get_file_info(path)
            if info.type != fs.FileType.File:
                return None
            if info.size > MAX_JSON_BYTES:
                raise RunError(f"{self.uri}/{name}: {info.size} bytes, more than such a file may have")
            with self._files.open_input_stream(path) as stream:
                return bytes(stream.read())

        return self._call(read)

    def get_file(self, name: str, target: Path) -> None:
        path = self._path(name)
        aside = target.with_name(f".{target.name}.partial-{os.getpid()}")
        try:
            self._call(lambda: fs.copy_files(path, str(aside), self._files, fs.LocalFileSystem(), use_threads=False))
            os.replace(aside, target)
        finally:
            aside.unlink(missing_ok=True)

    def put_file(self, source: Path, name: str) -> None:
        path = self._path(name)
        self._make_parent(path)
        self._call(lambda: fs.copy_files(str(source), path, fs.LocalFileSystem(), self._files, use_threads=False))

    def put_bytes(self, content: bytes, name: str) -> None:
        """Write a small file whole: a single request on an object store, a rename elsewhere."""
        path = self._path(name)
        renames = not isinstance(self._files, fs.S3FileSystem | fs.GcsFileSystem)
        self._make_parent(path)

        def write() -> None:
            aside = f"{path}.partial-{os.getpid()}" if renames else path
            with self._files.open_output_stream(aside) as stream:
                stream.write(content)
            if renames:
                self._files.move(aside, path)

        self._call(write)

    def delete(self, name: str) -> None:
        path = self._path(name)
        kind = self._call(lambda: self._files.get_file_info(path)).type
        if kind == fs.FileType.Directory:
            self._call(lambda: self._files.delete_dir(path))
        elif kind == fs.FileType.File:
            self._call(lambda: self._files.delete_file(path))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _make_parent(self, path: str) -> None:
        if not isinstance(self._files, fs.S3FileSystem | fs.GcsFileSystem):  # these have no folders
            self._call(lambda: self._files.create_dir(path.rpartition("/")[0], recursive=True))

    def _call(self, request: Callable[[], Result]) -> Result:
        """Make a request again after a failure that may pass; the SDKs' own retries come before."""
        for attempt in range(_TRANSFER_ATTEMPTS):
            try:
                return request()
            except (FileNotFoundError, PermissionError, NotADirectoryError) as error:
                raise InputError(f"{self.uri}: {one_line(error)}") from error
            except OSError as error:
                text = one_line(error)
                if any(word in text for word in ("NO_SUCH_BUCKET", "ACCESS_DENIED", "INVALID_ACCESS_KEY", "SIGNATURE")):
                    raise InputError(f"{self.uri}: {text}") from error
                if attempt + 1 == _TRANSFER_ATTEMPTS:
                    raise RunError(f"{self.uri}: the storage failed {_TRANSFER_ATTEMPTS} times ({text})") from error
                time.sleep(_FIRST_PAUSE * 4**attempt)
        raise AssertionError("unreachable")


def _fetch(store: _Store, target: Path) -> None:
    """Make `target` the folder stored there, unless it is already; every file's hash is checked."""
    mark = _mark_of(target)
    for attempt in range(_TRANSFER_ATTEMPTS):
        index = store.index()
        if index is None:
            raise InputError(f"{store.uri}: is no longer there")
        if target.is_dir() and mark.is_file() and mark.read_text() == index.version:
            return
        try:
            with write_folder(target, replace=True) as aside:
                for name in index.files:
                    (aside / name).parent.mkdir(parents=True, exist_ok=True)
                    store.get_file(f"{index.version}/{name}", aside / name)
                damage = find_damage(aside, index.files)
                if damage is not None:
                    raise RunError(f"{store.uri}: {damage} since {INDEX} was written; store the folder anew")
            mark.write_text(index.version)
            return
        except (InputError, RunError):
            # Replaced by another writer meanwhile, or a broken transfer: look again.
            if attempt + 1 == _TRANSFER_ATTEMPTS:
                raise
            time.sleep(_FIRST_PAUSE * 4**attempt)


def _mark_of(target: Path) -> Path:
    """Where the version of a fetched folder is noted: beside it, for the folder's own files are listed."""
    return target.with_name(f".{target.name}.version")


def _staging(uri: str) -> Path:
    """The staging folder of a URI, made with a note of its origin."""
    uri = uri.rstrip("/")
    base = cache_folder() / hashlib.sha256(uri.encode()).hexdigest()[:20]
    if not (base / ORIGIN).is_file():
        write_json(base / ORIGIN, {"uri": uri})
    return base / _HERE


@contextmanager
def _locked(staged: Path) -> Iterator[None]:
    """One process of this machine at a time brings a staging folder up to date."""
    with open(staged.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
