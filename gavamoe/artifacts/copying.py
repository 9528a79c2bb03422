"""A dataset or a run copied between folders and URIs, every file verified; whole or not at all."""

import shutil
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from gavamoe.artifacts.checksums import (
    FileEntry,
    find_damage,
    find_recorded_damage,
    fingerprint,
    is_hidden,
    list_files,
    refuse_links,
)
from gavamoe.artifacts.files import FULL_DISK, write_folder
from gavamoe.artifacts.object_store import CONTENTS, Contents, ObjectStore, canonical, is_uri, uri_below
from gavamoe.artifacts.remote import NOT_COMMITTED, checkout, exists, is_unit, push, store_folder, verify_stored
from gavamoe.errors import InputError, RunError, one_line


def copy(source: str, target: str) -> None:
    """Copy a dataset or a run between folders and URIs. Every file is compared with what the artifacts in the source
    record of it before, and with the source's content after.

    A copy to a URI that was interrupted counts for nothing there; the same copy again continues it.

    Raises:
        InputError: there is no such source or nothing whole in it, it has links that lead out of it, the target
            exists, or it lies inside the source.
        RunError: a file can't be read or written, or differs from its record; nothing of a local copy stays.
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
    if not is_uri(target) and Path(target).exists():
        raise InputError(f"{target}: already exists; choose another folder or remove it first")
    refuse_links(folder, NOT_COMMITTED)
    files = {name: e for name, e in list_files(folder).items() if set(name.split("/")).isdisjoint(NOT_COMMITTED)}
    damage = find_recorded_damage(folder, files)
    if damage is not None:
        raise RunError(f"{source}: damaged, so it is not copied: {damage}")
    if is_uri(target):
        _copy_to_uri(folder, files, target)
        return
    with write_folder(Path(target)) as aside:
        try:
            for name in files:
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(folder / name, aside / name)
        except OSError as error:
            if error.errno in FULL_DISK:  # not of the source, as the others
                raise
            raise RunError(f"{folder / name}: can't be copied ({one_line(error)})") from error
        difference = find_damage(aside, files, unlisted=())
        if difference is not None:
            raise RunError(f"{target}: not copied: {difference.text}; is something still writing to {source}?")


def _copy_to_uri(folder: Path, files: dict[str, FileEntry], target: str) -> None:
    """Store a copy at a new place, or go on with one of the same content that was interrupted there."""
    store, digest = ObjectStore(target), fingerprint(files)
    if exists(target):
        begun = store.contents()
        if begun is None or begun.complete or begun.by != "copy":
            raise InputError(f"{target}: already exists; choose another URI or remove it first")
        if begun.source != digest:
            raise InputError(
                f"{target}: a copy of something else, or of other content, was interrupted there; choose another URI"
                " or remove it first"
            )
    store.put_contents(Contents(complete=False, by="copy", source=digest, parts=[], files={}))
    if is_unit(folder):
        push(folder, target, files)
        verify_stored(store, files)
        store.delete(CONTENTS)
    else:
        store_folder(folder, target, files)


def _refuse_strangers(store: ObjectStore, staged: Path) -> None:
    """Refuse folders that a checkout passes over: to leave them out of a copy would be to lose them unseen."""
    if store.index() is not None:
        return
    for name in store.children():
        if not (is_hidden(name) or name in (*NOT_COMMITTED, CONTENTS) or (staged / name).exists()):
            raise InputError(
                f"{uri_below(store.uri, name)}: gavamoe did not store it, or not to its end (no list names it);"
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
