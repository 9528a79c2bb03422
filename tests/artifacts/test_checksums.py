"""Lists of files: the first difference from one, and the formats that checkpoints and caches have on disk."""

import hashlib
import json
import os
import threading
import time
from pathlib import Path

import pytest

from gavamoe.artifacts import checksums, manifest
from gavamoe.artifacts.checksums import Damage, FileEntry, find_damage, fingerprint, hashed_once, list_files
from gavamoe.artifacts.manifest import read_manifest, write_manifest
from gavamoe.config.schema import RunConfig
from gavamoe.errors import InputError
from gavamoe.runtime.checkpoints import checkpoint_problem

HELLO = hashlib.sha256(b"hello").hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    for name in ("a", "deep/b"):
        (tmp_path / name).write_text("hello")
    return tmp_path


def test_every_file_is_listed(folder: Path) -> None:
    assert list_files(folder) == {name: FileEntry(bytes=5, sha256=HELLO) for name in ("a", "deep/b")}
    listing = json.dumps({"a": HELLO, "deep/b": HELLO})
    assert fingerprint(list_files(folder)) == hashlib.sha256(listing.encode()).hexdigest()


def test_the_first_difference_is_named(folder: Path) -> None:
    files = list_files(folder)
    assert find_damage(folder, files, unlisted=()) is None
    (folder / "list.json").write_text("{}")
    assert find_damage(folder, files) is None
    assert find_damage(folder, files, unlisted={"list.json"}) is None
    assert find_damage(folder, files, unlisted=()) == Damage("unexpected", "list.json", "list.json is not listed")
    (folder / "deep" / "b").write_text("jello")
    assert find_damage(folder, files) == Damage("content", "deep/b", "the content of deep/b has changed")
    assert find_damage(folder, files, hashes=False) is None
    (folder / "deep" / "b").write_text("hell")
    assert find_damage(folder, files, hashes=False) == Damage("content", "deep/b", "deep/b has 4 of 5 bytes")
    assert find_damage(folder, {"deep/b": FileEntry(sha256=hashlib.sha256(b"hell").hexdigest())}) is None
    (folder / "a").unlink()
    assert find_damage(folder, files) == Damage("missing", "a", "a is missing")


def test_a_list_names_nothing_outside_its_folder(folder: Path) -> None:
    damage = find_damage(folder / "deep", {"../a": FileEntry(bytes=5, sha256=HELLO)})
    assert damage is not None
    assert damage.kind == "missing"


def test_checkpoints_of_earlier_versions_are_read(folder: Path) -> None:
    """The format as it is on disk, spelled out."""
    for rank, name in enumerate(("a", "deep/b")):
        files = {name: {"bytes": 5, "sha256": HELLO}}
        (folder / f"checksums-{rank}.json").write_text(json.dumps({"workers": 2, "files": files}))
    assert checkpoint_problem(folder) is None
    (folder / "checksums-1.json").write_text(json.dumps({"workers": 2}))
    assert "its checksums can't be read" in str(checkpoint_problem(folder))


HIDDEN = (".DS_Store", ".gitattributes", ".cache/hub/x", "deep/.nfs0000001")


def test_hidden_files_belong_to_no_list(folder: Path) -> None:
    files = list_files(folder)
    for name in HIDDEN:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("left by a tool")
    assert list_files(folder) == files
    assert find_damage(folder, files, unlisted=()) is None
    earlier = files | {".DS_Store": FileEntry(bytes=1, sha256=HELLO)}
    assert find_damage(folder, earlier, unlisted=()) is None
    (folder / ".DS_Store").unlink()
    assert find_damage(folder, earlier) is None
    (folder / "a.tmp").write_text("x")
    assert find_damage(folder, files, unlisted=()) == Damage("unexpected", "a.tmp", "a.tmp is not listed")


def known(folder: Path, notes: Path) -> bool:
    with hashed_once(folder, ["a", "deep/b"], notes) as found:
        return found


def test_what_was_hashed_lately_is_known_until_it_is_touched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = folder / "notes"
    assert not known(folder, notes)
    assert not known(folder, notes), "files so young may change again unnoticed"
    monkeypatch.setattr(checksums, "_SETTLED_SECONDS", -1)
    assert not known(folder, notes)
    assert known(folder, notes)
    (folder / "a").write_text("jello")
    assert not known(folder, notes)
    assert known(folder, notes)
    with pytest.raises(InputError, match="damaged"), hashed_once(folder, ["a"], notes):
        raise InputError("damaged")
    with hashed_once(folder, ["a"], notes) as found:
        assert not found
    for note in notes.iterdir():
        os.utime(note, (time.time() - 25 * 3600,) * 2)
    assert not known(folder, notes)
    assert notes.stat().st_mode & 0o777 == 0o700
    (folder / "file").touch()
    assert not known(folder, folder / "file" / "notes"), "no place for notes"
    assert known(folder, notes)

    def no_locks(*_: object) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr(checksums.fcntl, "flock", no_locks)
    assert not known(folder, notes)


def test_others_wait_for_the_one_who_hashes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "_SETTLED_SECONDS", -1)
    found: list[bool] = []

    def one() -> None:
        with hashed_once(folder, ["a"], folder / "notes") as seen:
            found.append(seen)
            time.sleep(0.05)

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [False, True, True, True]


def test_an_artifact_is_hashed_once_where_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAVAMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(checksums, "_SETTLED_SECONDS", -1)
    folder = tmp_path / "artifact"
    folder.mkdir()
    (folder / "weights").write_text("hello")
    write_manifest(folder, "stage1", RunConfig(), {})
    assert read_manifest(folder, "stage1", verify="once") == read_manifest(folder, "stage1")
    hashes: list[Path] = []
    monkeypatch.setattr(checksums, "sha256", lambda path: hashes.append(path) or "other")
    read_manifest(folder, "stage1", verify="once")
    assert not hashes
    (folder / "weights").write_text("jello")
    with pytest.raises(InputError, match="damaged"):
        read_manifest(folder, "stage1", verify="once")
    assert hashes
    hashes.clear()

    def homeless() -> Path:
        raise InputError("user 1000 has no home folder")

    monkeypatch.setattr(manifest, "cache_folder", homeless)
    with pytest.raises(InputError, match="damaged"):
        read_manifest(folder, "stage1", verify="once")
    assert hashes, "without a place for notes as without asking for once"


def test_an_artifact_with_hidden_files_is_whole(tmp_path: Path) -> None:
    (tmp_path / ".before").write_text("x")
    (tmp_path / "weights").write_text("hello")
    written = write_manifest(tmp_path, "stage1", RunConfig(), {})
    assert set(written.files) == {"weights"}
    for name in HIDDEN:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("left by a tool")
    assert read_manifest(tmp_path, "stage1") == written
    (tmp_path / "more").write_text("x")
    with pytest.raises(InputError, match="unexpected file more"):
        read_manifest(tmp_path, "stage1")
