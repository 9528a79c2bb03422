"""Files that are read once, such as raw reviews: local ones where they lie, those at URIs as copies for the while."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote

from gavamoe.artifacts.home import cache_folder
from gavamoe.artifacts.object_store import ObjectStore, canonical, is_uri
from gavamoe.errors import InputError


@contextmanager
def local_files(names: Sequence[str | Path]) -> Iterator[list[Path]]:
    """Paths of the named files and folders; what lies at a URI is fetched below the cache folder, and removed at the
    end.

    Raises:
        InputError: nothing is stored at a URI, or it can't be read.
    """
    if not any(is_uri(str(name)) for name in names):
        yield [Path(name) for name in names]
        return
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="sources-", dir=cache_folder()) as folder:
        yield [
            _fetched(str(name), Path(folder, str(number))) if is_uri(str(name)) else Path(name)
            for number, name in enumerate(names)
        ]


def _fetched(uri: str, folder: Path) -> Path:
    """A copy of a file, or of a folder's files, under its own name in `folder`."""
    parent, _, name = canonical(uri).rstrip("/").rpartition("/")
    if not name or parent.endswith("/"):
        raise InputError(f"{uri}: names no file")
    target = folder / unquote(name)
    folder.mkdir()
    store = ObjectStore(uri)
    if store.is_file():
        ObjectStore(parent).get_file(unquote(name), target)
        return target
    parts = [part for part in store.children() if store.below(part).is_file()]
    if not parts:
        raise InputError(f"{uri}: no such file, nor a folder of files")
    target.mkdir()
    for part in parts:
        store.get_file(part, target / part)
    return target
