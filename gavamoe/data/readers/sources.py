"""Opening source files: plain, compressed or packed, in any encoding, always as a stream of UTF-8 bytes."""

import bz2
import codecs
import gzip
import io
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal

import pyarrow as pa

from gavamoe.errors import InputError, listed

Quoting = Literal["auto", "standard", "none"]
"""How values of delimited files are quoted. standard: as in RFC 4180; none: a quote is a character like any other;
auto: what the whole file is consistent with."""
BUFFER_BYTES = 2**20
Stream = Any
"""A buffered binary stream with `peek`: io.BufferedReader, over whatever raw stream."""
_TAR_MAGIC_AT = 257
_ZIP_MAGICS = (b"PK\x03\x04", b"PK\x05\x06")
_PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".tbz2", ".txz")
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16's, with which it begins
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_NOT_TEXT = {"idna", "punycode", "unicode_escape", "raw_unicode_escape", "undefined"}
_BAD_BYTE = b"\xff"
"""What an undecodable byte of another encoding becomes: no UTF-8, so the row that holds it is rejected and counted."""


@dataclass(frozen=True)
class SourceOptions:
    """What the user says about how a source is to be read."""

    columns: dict[str, str] = field(default_factory=dict)
    """Format table: the source's column of each field whose column has another name; `NO_COLUMN` drops the field."""
    encoding: str | None = None
    """Encoding of a text file, such as utf-16 or latin-1; None: UTF-8, or UTF-16 with a byte-order mark."""
    quoting: Quoting = "auto"
    """Quoting of a delimited file."""
    escape: str | None = None
    r"""Escape character of a delimited file, such as \; None: none, unless `quoting` is auto and finds one."""


NO_COLUMN = "-"
"""The column name that leaves a field out."""


def check_file(path: Path) -> None:
    """Raise InputError unless `path` is a file with something in it."""
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if not path.is_file():
        raise InputError(f"{path}: not a file")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty")


def check_encoding(name: str) -> str:
    """The usual name of a text encoding; InputError for an unknown one."""
    try:
        info = codecs.lookup(name)
    except (LookupError, ValueError):
        info = None
    if info is None or not getattr(info, "_is_text_encoding", True) or info.name.replace("-", "_") in _NOT_TEXT:
        raise InputError(
            f"encoding: unknown value {name!r}; known are those of Python, such as utf-16, latin-1, cp1252"
        )
    return info.name


def plain_suffix(path: Path) -> str:
    """The last suffix of a file's name without those of compression: .csv of reviews.csv.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in _PACKED_SUFFIXES]
    return suffixes[-1] if suffixes else ""


def content_name(path: Path, wanted: Sequence[str] = ()) -> Path:
    """The name of what `open_source` reads: the member's of a zip or tar archive, else the file's own."""
    check_file(path)
    with _opening(path), _unpacked(path, wanted) as (_, name):
        return Path(name)


@contextmanager
def open_source(path: Path, encoding: str | None = None, wanted: Sequence[str] = ()) -> Iterator[Stream]:
    """Open a file for reading as UTF-8 bytes without a byte-order mark, whatever it is compressed with.

    gzip, bzip2, xz and Zstandard are read, and zip and tar archives that hold one file; by content, not by name.

    Args:
        encoding: of the text; None: UTF-8, or UTF-16 where a byte-order mark says so.
        wanted: names of the members of an archive that are taken though it holds several files.

    Raises:
        InputError: the file is missing, empty, unreadable, or compressed and damaged (also while it is read).
    """
    check_file(path)
    with _opening(path), _unpacked(path, wanted) as (stream, _):
        yield _as_utf8(path, stream, encoding)


def read_head(path: Path, size: int, encoding: str | None = None, wanted: Sequence[str] = ()) -> bytes:
    """The first `size` bytes of what `open_source` would read."""
    with open_source(path, encoding, wanted) as file:
        return file.read(size)


@contextmanager
def _opening(path: Path) -> Iterator[None]:
    """Damage and refusals of every library as one InputError."""
    again = "copy or download it again"
    try:
        yield
    except EOFError as error:
        raise InputError(f"{path}: the compressed file is cut off before its end; {again}") from error
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise InputError(f"{path}: the compressed file is damaged ({error}); {again}") from error
    except (NotImplementedError, RuntimeError) as error:  # zipfile's words for a method or a password it lacks
        if "encrypt" in str(error) or "compress" in str(error):
            raise InputError(f"{path}: the archive cannot be read ({error}); unpack it first") from error
        raise
    except OSError as error:
        if error.errno is None:  # bz2 and Arrow's codecs
            raise InputError(f"{path}: the compressed file is damaged ({error}); {again}") from error
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error


@contextmanager
def _unpacked(path: Path, wanted: Sequence[str]) -> Iterator[tuple[Stream, str]]:
    """What a file holds, decompressed, and its name: the member's of an archive."""
    with open(path, "rb", buffering=BUFFER_BYTES) as opened, ExitStack() as stack:
        file: Stream = opened
        if file.peek(4)[:4] in _ZIP_MAGICS:
            archive = stack.enter_context(zipfile.ZipFile(file))
            names = [info.filename for info in archive.infolist() if not info.is_dir()]
            member = _only_member(path, names, wanted)
            yield _buffered(stack.enter_context(archive.open(member))), member
            return
        stream = _decompressed(stack, file)
        if stream.peek(_TAR_MAGIC_AT + 5)[_TAR_MAGIC_AT : _TAR_MAGIC_AT + 5] != b"ustar":
            yield stream, str(path)
            return
        member = _tar_member(path, wanted)
        tar = stack.enter_context(tarfile.open(fileobj=stream, mode="r|"))
        content = next((tar.extractfile(entry) for entry in tar if entry.name == member and entry.isfile()), None)
        if content is None:
            raise InputError(f"{path}: changed while it was read")
        yield _buffered(content), member


def _tar_member(path: Path, wanted: Sequence[str]) -> str:
    """The file to read of a tar archive. It is listed in a pass of its own: a compressed stream is read once."""
    with (
        open(path, "rb", buffering=BUFFER_BYTES) as file,
        ExitStack() as stack,
        tarfile.open(fileobj=_decompressed(stack, file), mode="r|") as tar,
    ):
        return _only_member(path, [entry.name for entry in tar if entry.isfile()], wanted)


def _decompressed(stack: ExitStack, file: Stream) -> Stream:
    head = file.peek(6)
    for magic, opened in _DECOMPRESSORS.items():
        if head.startswith(magic):
            unpacked = opened(file)
            stack.callback(unpacked.close)
            return _buffered(unpacked)
    return file


def _buffered(stream: Any) -> Stream:
    return io.BufferedReader(stream, BUFFER_BYTES)


class _ArrowStream(io.RawIOBase):
    """An Arrow input stream as a raw Python one."""

    def __init__(self, stream: pa.NativeFile) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        data = self._stream.read(len(view))
        view[: len(data)] = data
        return len(data)


_DECOMPRESSORS: dict[bytes, Callable[[Stream], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"\x28\xb5\x2f\xfd": lambda file: _ArrowStream(pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd")),
}
"""How a compressed file is opened, by its first bytes."""


def _only_member(path: Path, names: list[str], wanted: Sequence[str]) -> str:
    """The member to read: one of the `wanted` names, else the only one that is not hidden."""
    names = [
        name for name in names if not name.startswith("__MACOSX/") and not PurePosixPath(name).name.startswith(".")
    ]
    by_name = {PurePosixPath(name).name: name for name in names}
    for name in wanted:
        if name in by_name:
            return by_name[name]
    if len(names) == 1:
        return names[0]
    found = f"holds {len(names)} files ({listed(names, 8)})" if names else "holds no file"
    raise InputError(f"{path}: the archive {found}, one is expected; unpack it and name the file of reviews")


def _as_utf8(path: Path, stream: Stream, encoding: str | None) -> Stream:
    head = stream.peek(4)[:4]
    for bom, name in _BOMS:
        if head.startswith(bom):
            stream.read(len(bom))
            encoding = name
            break
    if encoding is None and stream.peek(64)[:64].count(0) > 8:
        raise InputError(f"{path}: not UTF-8 text but UTF-16 or binary; UTF-16 is read with --encoding utf-16-le")
    encoding = check_encoding(encoding or "utf-8")
    if encoding == "utf-8":
        return stream
    return _buffered(_Recoded(stream, encoding))


class _Recoded(io.RawIOBase):
    """A stream of text in another encoding as UTF-8; what can't be decoded becomes bytes that are no UTF-8."""

    def __init__(self, stream: BinaryIO, encoding: str) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)(errors="gavamoe-bad-byte")
        self._pending = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        more = True
        while not self._pending and more:
            data = self._stream.read(BUFFER_BYTES)
            more = bool(data)
            text = self._decoder.decode(data, final=not more)
            self._pending = text.encode("utf-8", "gavamoe-bad-byte")
        size = min(len(view), len(self._pending))
        view[:size], self._pending = self._pending[:size], self._pending[size:]
        return size


def _bad_byte(error: UnicodeError) -> tuple[str | bytes, int]:
    if isinstance(error, UnicodeDecodeError):
        return "\udcff", error.end
    if isinstance(error, UnicodeEncodeError):
        return _BAD_BYTE * (error.end - error.start), error.end
    raise error


codecs.register_error("gavamoe-bad-byte", _bad_byte)
