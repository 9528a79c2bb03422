"""Copies and uploads: whole or nothing, nothing from outside, every file verified; through kills and hostile links."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.cli import Runner

from gavamoe.artifacts import copying, remote
from gavamoe.artifacts.manifest import read_manifest, write_manifest
from gavamoe.artifacts.object_store import ObjectStore
from gavamoe.config.schema import RunConfig
from gavamoe.errors import InputError, RunError
from gavamoe.tune.folder import withhold_test

UNFINISHED = "an upload to it was interrupted"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAVAMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("gavamoe.artifacts.object_store._FIRST_PAUSE", 0.0)


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"file://{tmp_path}/stored"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    for stage in ("stage1", "stage2"):
        (folder / stage / "deep").mkdir(parents=True)
        (folder / stage / "deep" / "weights").write_text(f"weights of {stage}")
        write_manifest(folder / stage, stage, RunConfig(), {})  # type: ignore[arg-type]
    (folder / "config.yaml").write_text("seed: 1")
    (folder / "dataset.json").write_text("{}")
    return folder


def content(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


KILLED = """
import os, signal, sys
from gavamoe.artifacts import copying, remote
from gavamoe.artifacts.object_store import ObjectStore
requests, last = 0, int(sys.argv[3])
for name in ("put_file", "put_bytes"):
    def counting(self, *arguments, real=getattr(ObjectStore, name)):
        global requests
        requests += 1
        if requests > last:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *arguments)
    setattr(ObjectStore, name, counting)
copying.copy(sys.argv[1], sys.argv[2])
"""


def copy_killed_after(requests: int, source: Path, uri: str) -> bool:
    """Whether the copy was killed before its end."""
    command = [sys.executable, "-c", KILLED, str(source), uri, str(requests)]
    return subprocess.run(command, check=False, timeout=120).returncode == -signal.SIGKILL


@pytest.mark.parametrize("requests", [1, 4, 5, 8, 9])
def test_half_a_copy_is_never_taken_for_the_whole(
    gavamoe: Runner, run: Path, uri: str, tmp_path: Path, requests: int
) -> None:
    """Of 10 requests: the list, twice two files with manifest... and an index, two loose files, the list again."""
    assert copy_killed_after(requests, run, uri)
    for command in (("copy", uri, tmp_path / "out"), ("status", uri), ("explain", uri, "--user", "a", "--item", "b")):
        refused = gavamoe(*command)
        assert (refused.code, UNFINISHED in refused.err) == (2, True), refused.err
    for resuming in (False, True):
        with pytest.raises(InputError, match=UNFINISHED):
            remote.checkout(uri, resuming=resuming)
    assert not (tmp_path / "out").exists()
    done = gavamoe("copy", run, uri)
    assert done.code == 0, done.err
    assert gavamoe("copy", uri, tmp_path / "out").code == 0
    assert content(tmp_path / "out") == content(run)
    assert "already exists" in gavamoe("copy", run, uri).err


def test_half_a_copy_of_something_else_is_not_continued(gavamoe: Runner, run: Path, uri: str) -> None:
    assert copy_killed_after(4, run, uri)
    (run / "config.yaml").write_text("seed: 2")
    refused = gavamoe("copy", run, uri)
    assert (refused.code, "a copy of something else, or of other content" in refused.err) == (2, True)


def test_half_a_copy_of_one_artifact_is_continued(gavamoe: Runner, run: Path, uri: str, tmp_path: Path) -> None:
    for requests in (1, 2, 3):
        assert copy_killed_after(requests, run / "stage1", uri)
        refused = gavamoe("copy", uri, tmp_path / "out")
        assert (refused.code, UNFINISHED in refused.err) == (2, True), refused.err
    assert gavamoe("copy", run / "stage1", uri).code == 0
    assert "_contents.json" not in ObjectStore(uri).children()
    assert gavamoe("copy", uri, tmp_path / "out").code == 0
    assert content(tmp_path / "out") == content(run / "stage1")


def test_an_interrupted_first_commit_is_gone_on_with(uri: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staged = remote.checkout(uri)
    shutil.copytree(run, staged)
    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "put_file", lambda *_: (_ for _ in ()).throw(RunError("the line is cut")))
        with pytest.raises(RunError, match="the line is cut"):
            remote.commit(staged)
    with pytest.raises(InputError, match=UNFINISHED):
        remote.checkout(uri)
    remote.commit(remote.checkout(uri, resuming=True))
    assert content(remote.checkout(uri)) == content(run)


def test_a_whole_place_stays_whole_while_it_is_replaced(uri: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted commit leaves old files and new ones, each whole and each listed."""
    staged = remote.checkout(uri)
    shutil.copytree(run, staged)
    remote.commit(staged)
    (staged / "config.yaml").write_text("seed: 2")
    (staged / "report.html").write_text("new")
    real, sent = ObjectStore.put_file, list[str]()

    def cut(store: ObjectStore, source: Path, name: str) -> None:
        if sent:
            raise RunError("the line is cut")
        sent.append(name)
        real(store, source, name)

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "put_file", cut)
        with pytest.raises(RunError, match="the line is cut"):
            remote.commit(staged)
    assert sent == ["config.yaml"]
    remote.commit(staged)
    monkeypatch.setenv("GAVAMOE_CACHE", f"{staged}-other")
    assert content(remote.checkout(uri)) == content(run) | {"config.yaml": "seed: 2", "report.html": "new"}


def test_places_of_earlier_versions_open(uri: str, run: Path) -> None:
    for stage in ("stage1", "stage2"):
        remote.push(run / stage, f"{uri}/{stage}")
    for name in ("config.yaml", "dataset.json"):
        ObjectStore(uri).put_file(run / name, name)
    staged = remote.checkout(uri)
    assert content(staged) == content(run)
    remote.commit(staged)
    assert ObjectStore(uri).contents() is not None
    assert content(remote.checkout(uri)) == content(run)


def test_changed_loose_files_and_missing_parts_are_noticed(
    gavamoe: Runner, uri: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gavamoe("copy", run, uri).code == 0
    store = ObjectStore(uri)
    store.put_bytes(b"seed: 666", "config.yaml")
    refused = gavamoe("copy", uri, tmp_path / "out")
    assert (refused.code, "config.yaml: differs from what _contents.json records" in refused.err) == (1, True)
    store.put_bytes(b"seed: 1", "config.yaml")
    store.put_bytes(b"x", "added.txt")
    assert "added.txt: gavamoe did not store it" in gavamoe("copy", uri, tmp_path / "out").err
    store.delete("added.txt")
    store.delete("stage2")
    monkeypatch.setenv("GAVAMOE_CACHE", str(tmp_path / "other"))
    refused = gavamoe("copy", uri, tmp_path / "out")
    assert (refused.code, f"stage2: {UNFINISHED}" in refused.err) == (2, True), refused.err


@pytest.mark.parametrize("evil", ["../config.yaml", "/etc", "a//b", ""])
def test_a_list_of_contents_names_nothing_outside(uri: str, evil: str) -> None:
    for field in ({"parts": [evil]}, {"files": {evil: []}}):
        value = {"complete": True, "by": "commit", "parts": [], "files": {}} | field
        ObjectStore(uri).put_bytes(json.dumps(value).encode(), "_contents.json")
        with pytest.raises(RunError, match="not a list of contents"):
            remote.checkout(uri)


@pytest.mark.parametrize("place", ["notes.txt", "stage1/notes.txt", "stage1/folder", "stage1/deep/gone", "linked"])
@pytest.mark.parametrize("target", ["uri", "folder"])
def test_links_out_of_a_run_are_not_followed(
    gavamoe: Runner, run: Path, uri: str, tmp_path: Path, place: str, target: str
) -> None:
    """A stranger's run must not upload files of the machine on which it is copied."""
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("S3CRET")
    linked = {"folder": tmp_path / "private", "linked": tmp_path / "private", "gone": tmp_path / "nowhere"}
    (run / place).symlink_to(linked.get(Path(place).name, tmp_path / "private" / "key"))
    out = tmp_path / "out"
    refused = gavamoe("copy", run, uri if target == "uri" else out)
    assert (refused.code, refused.err.count("\n")) == (2, 1), refused.err
    assert f"{run / place}: is a link to no file inside of" in refused.err
    assert not out.exists()
    assert not (tmp_path / "stored").exists()


def test_links_out_of_work_are_not_committed(uri: str, run: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("S3CRET")
    staged = remote.checkout(uri)
    shutil.copytree(run, staged)
    (staged / "stage1" / "notes").symlink_to(tmp_path / "key")
    for call in (lambda: remote.commit(staged), lambda: remote.push(staged / "stage1", f"{uri}/stage1")):
        with pytest.raises(InputError, match="is a link to no file inside of"):
            call()
    assert not ObjectStore(uri).children()


def test_an_artifact_with_links_out_of_it_is_refused(run: Path, tmp_path: Path) -> None:
    weights = run / "stage1" / "deep" / "weights"
    shutil.move(weights, tmp_path / "weights")
    weights.symlink_to(tmp_path / "weights")
    with pytest.raises(InputError, match="weights: is a link to no file inside of"):
        read_manifest(run / "stage1", "stage1")
    weights.unlink()
    shutil.move(tmp_path / "weights", run / "stage1" / "deep" / "weights")
    (tmp_path / "latest").symlink_to(run)
    read_manifest(tmp_path / "latest" / "stage1", "stage1")


def test_a_pipe_is_no_file(gavamoe: Runner, run: Path, tmp_path: Path) -> None:
    os.mkfifo(run / "pipe")
    refused = gavamoe("copy", run, tmp_path / "out")
    assert (refused.code, "pipe: is neither a file nor a folder" in refused.err) == (2, True)


def test_a_search_without_its_test_rows_can_be_stored(tiny_dataset: Path, tmp_path: Path, uri: str) -> None:
    from gavamoe.data.dataset import open_dataset

    view = withhold_test(open_dataset(tiny_dataset), tmp_path / "search" / "search_data")
    copying.copy(str(tmp_path / "search"), uri)
    stored = open_dataset(remote.checkout(uri) / "search_data")
    assert (stored.fingerprint, stored.size("test")) == (view.fingerprint, 0)


@pytest.mark.parametrize("target", ["uri", "folder"])
def test_damage_is_not_copied(gavamoe: Runner, run: Path, uri: str, tmp_path: Path, target: str) -> None:
    (run / "stage2" / "deep" / "weights").write_text("weightz of stage2")
    refused = gavamoe("copy", run, uri if target == "uri" else tmp_path / "out")
    assert refused.code == 1
    assert "the content of stage2/deep/weights differs from what artifact.json records" in refused.err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "stored").exists()


def test_damage_of_a_dataset_is_not_copied(gavamoe: Runner, tiny_dataset: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(tiny_dataset, tmp_path / "data"))
    (damaged / "test.parquet").write_bytes(b"x")
    refused = gavamoe("copy", damaged, tmp_path / "out")
    assert (refused.code, "the content of test.parquet differs from what meta.json records" in refused.err) == (1, True)


def test_what_was_stored_is_read_again(
    gavamoe: Runner, run: Path, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ObjectStore.put_file

    def spoilt(store: ObjectStore, source: Path, name: str) -> None:
        real(store, source, name)
        if name == spoil or name.endswith(f"/{spoil}"):
            store.put_bytes(b"spoilt", name)

    monkeypatch.setattr(ObjectStore, "put_file", spoilt)
    for spoil in ("weights", "config.yaml"):
        refused = gavamoe("copy", run, f"{uri}/{spoil}")
        assert (refused.code, "differs from what was sent" in refused.err) == (1, True), refused.err
        with pytest.raises(InputError, match=UNFINISHED):
            remote.checkout(f"{uri}/{spoil}")
    copied = copying.shutil.copy2
    monkeypatch.setattr(copying.shutil, "copy2", lambda a, b: (copied(a, b), Path(b).write_text("spoilt")))
    refused = gavamoe("copy", run, tmp_path / "out")
    assert (refused.code, "not copied:" in refused.err) == (1, True), refused.err
