"""Lists of files: the first difference from one, and the formats that checkpoints and caches have on disk."""

import hashlib
import json
from pathlib import Path

import pytest

from gavamoe.artifacts.checksums import Damage, FileEntry, find_damage, fingerprint, list_files
from gavamoe.runtime.worker import checkpoint_problem

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
