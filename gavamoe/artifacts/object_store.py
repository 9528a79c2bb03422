"""Requests to object storage: any filesystem that pyarrow knows, with retries and errors of one line.

A folder at `URI` is `URI/VERSION/FILES...` and, written last, `URI/_folder.json`, which names the version and lists its
files with size and SHA-256. Object stores have no rename: this one small object is the switch, so that a reader finds
the old folder or the new one, complete. What is stored entry by entry, such as a run, has `URI/_contents.json`, which
lists its folders and loose files and says whether they are all there. `remote` stores and fetches both.
"""

import hashlib
import os
import re
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import quote, unquote, urlsplit

from pyarrow import fs
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from gavamoe.artifacts.checksums import FileEntry
from gavamoe.artifacts.files import MAX_JSON_BYTES
from gavamoe.errors import InputError, RunError, first_problem, one_line

Result = TypeVar("Result")
Model = TypeVar("Model", bound=BaseModel)

INDEX = "_folder.json"
CONTENTS = "_contents.json"
TRANSFER_ATTEMPTS = 4
"""Attempts at a transfer before it counts as failed."""
_PATH_CHARACTERS = "/!$&'()*+,;=:@~"
"""Characters that stand for themselves in the path of a URI, beside letters, digits and `-._`."""
_REQUEST_ATTEMPTS = 8
"""Attempts at each single request, which the client of S3 makes by itself."""
_READ_BYTES = 2**20
_FIRST_PAUSE = 0.2
"""Seconds before the second attempt at a transfer; four times as long before each one more."""


def _inside(name: str) -> str:
    """The name of something below a folder as it is.

    Raises:
        ValueError: it may lie outside, or be the folder itself.
    """
    if any(part in ("", ".", "..") for part in name.split("/")) or "\0" in name:
        raise ValueError(f"{name!r} is no name inside of its folder")
    return name


NameInside = Annotated[str, AfterValidator(_inside)]
"""The relative path of something below a folder: no absolute one, no `..`, no empty part."""


class Index(BaseModel):
    """Content of `_folder.json`. Whoever writes to the storage writes it: no path is built from an unchecked part."""

    model_config = ConfigDict(extra="forbid")
    version: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    """Version of the content: a digest of names and hashes, which is also the name of the prefix with the files."""
    files: dict[NameInside, FileEntry]


class Contents(BaseModel):
    """Content of `_contents.json`: what a place holds that is stored entry by entry, such as a run."""

    model_config = ConfigDict(extra="forbid")
    complete: bool
    """False while what it lists is being stored there for the first time."""
    by: Literal["copy", "commit"]
    """What stores it: a copy counts for nothing before its end; work that is committed may go on."""
    source: str = ""
    """Digest of what is copied, by which the same copy knows its own half again."""
    parts: list[NameInside]
    """Names of folders, each with an index of its own."""
    files: dict[NameInside, list[FileEntry]]
    """Loose files; two entries, of the old content and the new, while a file is being replaced."""


class ObjectStore:
    """What lies below one URI."""

    def __init__(self, uri: str, opened: tuple[fs.FileSystem, str] | None = None) -> None:
        self.uri = canonical(uri)
        self._files, self._root = opened or filesystem(self.uri)

    def below(self, name: str) -> "ObjectStore":
        return ObjectStore(uri_below(self.uri, name), (self._files, f"{self._root}/{name}"))

    def index(self) -> Index | None:
        """The folder's index; None if no folder is stored here."""
        return self._read_model(INDEX, Index, "an index")

    def contents(self) -> Contents | None:
        """The list of what is stored here entry by entry; None where nothing is, or an earlier version stored it."""
        return self._read_model(CONTENTS, Contents, "a list of contents")

    def _read_model(self, name: str, model: type[Model], what: str) -> Model | None:
        """A stored JSON file as a pydantic model; None if there is none."""
        content = self.get_bytes(name)
        if content is None:
            return None
        try:
            return model.model_validate_json(content)
        except ValidationError as error:
            raise RunError(f"{self.uri}/{name}: not {what} ({first_problem(error)}); store it anew") from error

    def put_contents(self, contents: Contents) -> None:
        self.put_bytes(contents.model_dump_json(indent=1).encode(), CONTENTS)

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

    def sha256(self, name: str) -> str:
        """Hex SHA-256 of a stored file's content, which is read for it."""
        path = self._path(name)

        def read() -> str:
            digest = hashlib.sha256()
            with self._files.open_input_stream(path) as stream:
                while block := stream.read(_READ_BYTES):
                    digest.update(block)
            return digest.hexdigest()

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
        folder, _, file = path.rpartition("/")
        renames = not isinstance(self._files, fs.S3FileSystem | fs.GcsFileSystem)
        self._make_parent(path)

        def write() -> None:
            aside = f"{folder}/.{file}.partial-{os.getpid()}" if renames else path  # hidden: counted by nobody
            with self._files.open_output_stream(aside) as stream:
                stream.write(content)
            if renames:
                self._files.move(aside, path)

        self._call(write)

    def delete(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it; nothing happens if there is nothing.

        Raises:
            InputError: the name is empty, or leads out of this place.
        """
        try:
            path = self._path(_inside(name))
        except ValueError as error:
            raise InputError(f"{self.uri}: can't be removed from ({error})") from error
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
        for attempt in range(TRANSFER_ATTEMPTS):
            try:
                return request()
            except (FileNotFoundError, PermissionError, NotADirectoryError) as error:
                raise InputError(f"{self.uri}: {one_line(error)}") from error
            except ValueError as error:  # a path that the storage can't have, such as one with an empty part
                raise InputError(f"{self.uri}: {one_line(error)}") from error
            except OSError as error:
                text = one_line(error)
                if any(word in text for word in ("NO_SUCH_BUCKET", "ACCESS_DENIED", "INVALID_ACCESS_KEY", "SIGNATURE")):
                    raise InputError(f"{self.uri}: {text}") from error
                if attempt + 1 == TRANSFER_ATTEMPTS:
                    raise RunError(f"{self.uri}: the storage failed {TRANSFER_ATTEMPTS} times ({text})") from error
                pause_after(attempt)
        raise AssertionError("unreachable")


def is_uri(text: str) -> bool:
    """Whether it names something on a filesystem of pyarrow rather than a local path, if with a slash too few."""
    return re.match("[A-Za-z][A-Za-z0-9+.-]*://|(s3|gs|gcs|abfss?|hdfs|file):/", text, re.IGNORECASE) is not None


def without_keys(text: str) -> str:
    """A URI as messages may show it: keys of user infos and queries are left out."""
    text = re.sub(r"^([A-Za-z][^:/@]*:/*)[^/@]*(?::|%3a)[^@]*@", r"\1…@", text, flags=re.IGNORECASE)
    return re.sub(r"\?.*=.*", "?…", text, flags=re.DOTALL)


def _refuse_keys(scheme: str, authority: str) -> None:
    """Refuse keys in a URI: it is printed, recorded in runs and in the cache, and seen by others in lists of processes.

    Names without a key stay possible where a scheme needs them: Azure's CONTAINER@ACCOUNT, the user of HDFS, and
    Google's `anonymous`.
    """
    user, at, host = authority.rpartition("@")
    name = unquote(user)
    spoilt = ":" in host and re.search(r":[0-9]*$", host) is None  # a key's own slash has cut it off: no port
    named = scheme in ("abfs", "abfss", "hdfs", "viewfs") or (scheme in ("gs", "gcs") and name == "anonymous")
    if spoilt or ":" in name or (at and not named):
        raise InputError(
            f"{scheme}://…: a URI has no user or key before its place; give keys by the environment or by the files"
            " of the storage's own tools"
        )


def canonical(uri: str) -> str:
    """The one spelling of a URI, whatever its scheme: `%XX` stands for a byte of UTF-8, and characters that URIs don't
    have, such as blanks and umlauts, may stand for themselves. So `a b` and `a%20b` are one place.

    Raises:
        InputError: a user or a key; `#` or `?`, which would cut the path off there or hold settings; `%` without two
            hex digits; `..`; a slash too few; nothing named. No message repeats a key.
    """
    scheme, separator, rest = uri.partition("://")
    if separator:
        _refuse_keys(scheme.lower(), rest.partition("/")[0])
    uri = without_keys(uri)  # for the messages below
    if not separator:
        scheme, _, rest = uri.partition(":")  # keys are left out by now
        slashes = "//" if scheme.lower() == "file" else "/"
        raise InputError(f"{uri}: not a URI; did you mean {scheme}:{slashes}{rest}?")
    authority, slash, path = rest.rstrip("/").partition("/")
    for character, encoded in (("#", "%23"), ("?", "%3F")):
        if character in rest:
            raise InputError(f"{uri}: {character} is no part of a name in a URI; write {encoded} for it")
    if stray := re.search("%(?![0-9A-Fa-f]{2})", rest):
        raise InputError(f"{uri}: {rest[stray.start() :][:3]} is no character; write %25 for a percent sign")
    if not authority and not path:
        raise InputError(f"{uri}: names no folder; expected SCHEME://PLACE/FOLDER")
    try:
        name = unquote(path, errors="strict")
        spelled = quote(name, safe=_PATH_CHARACTERS)
    except UnicodeError as error:
        raise InputError(f"{uri!a}: is not UTF-8 ({one_line(error)})") from error
    if any(unicodedata.category(character) == "Cc" for character in name):
        raise InputError(f"{uri!a}: has a control character")
    if not {".", ".."}.isdisjoint(name.split("/")):
        raise InputError(f"{uri}: has . or .. for a folder; write the path without them")
    return f"{scheme.lower()}://{authority}{slash}{spelled}"


def uri_below(uri: str, relative: str) -> str:
    """The URI of a file or folder below another, by its plain relative path."""
    return f"{uri}/{quote(relative, safe=_PATH_CHARACTERS)}" if relative else uri


def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """pyarrow's filesystem of a URI and the path in it. S3: AWS_ENDPOINT_URL, AWS_REGION and the usual credentials.

    Raises:
        InputError: an unknown scheme, a malformed URI, or wrong settings.
    """
    uri = canonical(uri)
    parts = urlsplit(uri)
    try:
        if parts.scheme != "s3":
            store, path = fs.FileSystem.from_uri(uri)
            return store, path
        endpoint = urlsplit(os.environ.get("AWS_ENDPOINT_URL", ""))
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if region is None and not endpoint.netloc:
            region = fs.resolve_s3_region(parts.netloc)
        options: dict[str, Any] = {"region": region or "us-east-1"}
        if endpoint.netloc:
            options |= {"endpoint_override": endpoint.netloc, "scheme": endpoint.scheme}
        retries = fs.AwsStandardS3RetryStrategy(max_attempts=_REQUEST_ATTEMPTS)
        store = fs.S3FileSystem(retry_strategy=retries, connect_timeout=5, request_timeout=30, **options)
        return store, (parts.netloc + unquote(parts.path)).rstrip("/")
    except (OSError, ValueError) as error:
        raise InputError(f"{uri}: can't be reached ({one_line(error)})") from error


def pause_after(attempt: int) -> None:
    """Wait before the attempt that follows a failed one, which are counted from 0."""
    time.sleep(_FIRST_PAUSE * 4**attempt)
