"""Lists of files with their sizes and hashes, and what has become of the files since: the one check for damage.

Artifact folders, folders at URIs, checkpoints and the token cache all keep such lists.
"""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict

from gavamoe.artifacts.files import sha256


class FileEntry(BaseModel):
    """A listed file."""

    model_config = ConfigDict(extra="forbid")
    bytes: int
    sha256: str


def file_entries(folder: Path) -> dict[str, FileEntry]:
    """The entries of all files below `folder`, by their paths relative to it, in order."""
    return {
        path.relative_to(folder).as_posix(): FileEntry(bytes=path.stat().st_size, sha256=sha256(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def leaves_folder(name: str) -> bool:
    """Whether a listed path names something outside of its folder."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts


def find_damage(folder: Path, files: Mapping[str, FileEntry], *, hashes: bool = True) -> str | None:
    """The first listed file that is not as it was written, in words; None if all are.

    Args:
        hashes: False compares sizes alone, which is fast.
    """
    for name, entry in files.items():
        path = folder / name
        if leaves_folder(name):
            return f"{name} lies outside of the folder"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry.bytes:
            return f"{name} has {path.stat().st_size} of {entry.bytes} bytes"
        if hashes and sha256(path) != entry.sha256:
            return f"the content of {name} has changed"
    return None
