"""Storage at URIs: whole or not at all, verified, through failures; against an S3 server and the local filesystem."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.cli import Runner
from helpers.flaky_s3 import BUCKET, KEYS, FlakyProxy, s3_server

from gavamoe.artifacts import copying, object_store, remote
from gavamoe.artifacts.object_store import ObjectStore
from gavamoe.data.dataset import open_dataset
from gavamoe.errors import InputError, RunError


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture(autouse=True)
def client(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": server, "GAVAMOE_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(object_store, "_FIRST_PAUSE", 0.0)


@pytest.fixture(params=["s3", "file"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"s3://{BUCKET}/{tmp_path.name}" if request.param == "s3" else f"file://{tmp_path}/stored"


def make_folder(path: Path, text: str = "hello") -> Path:
    (path / "deep" / "er").mkdir(parents=True)
    (path / "meta.json").write_text("{}")
    (path / "deep" / "er" / "empty").write_text("")
    (path / "big").write_bytes(text.encode() * 1_000_000)
    return path


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_a_folder_comes_back_as_it_was(uri: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a")
    remote.push(folder, uri)
    assert content(remote.checkout(uri)) == content(folder)
    first = os.stat(remote.checkout(uri) / "big").st_ino
    assert os.stat(remote.checkout(uri) / "big").st_ino == first, "what is there already is not fetched again"
    remote.remove(uri)
    assert not remote.exists(uri)


def test_a_replacement_is_one_switch_and_the_old_files_go(uri: str, tmp_path: Path) -> None:
    store = ObjectStore(uri)
    remote.push(make_folder(tmp_path / "a"), uri)
    before = store.index()
    remote.push(make_folder(tmp_path / "b", "other"), uri)
    after = store.index()
    assert before is not None
    assert after is not None
    assert store.children() == sorted([after.version, "_folder.json"])
    assert content(remote.checkout(uri)) == content(tmp_path / "b")


def test_an_upload_that_breaks_leaves_what_was_there(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote.push(make_folder(tmp_path / "a"), uri)
    real = object_store.fs.copy_files

    def broken(source: str, *rest: object, **options: object) -> None:
        if source.endswith("empty"):
            raise OSError("the line is cut")
        real(source, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(object_store.fs, "copy_files", broken)
        with pytest.raises(RunError, match=r"the storage failed 4 times \(the line is cut\)"):
            remote.push(make_folder(tmp_path / "b", "other"), uri)
    assert content(remote.checkout(uri)) == content(tmp_path / "a")
    remote.push(tmp_path / "b", uri)
    assert content(remote.checkout(uri)) == content(tmp_path / "b")


def test_damage_is_told_and_nothing_of_it_stays(uri: str, tmp_path: Path) -> None:
    remote.push(make_folder(tmp_path / "a"), uri)
    store = ObjectStore(uri)
    index = store.index()
    assert index is not None
    store.put_bytes(b"x" * 5_000_000, f"{index.version}/big")
    with pytest.raises(RunError, match=r"big differs from what _folder.json records"):
        remote.checkout(uri)
    assert not (remote._staging(uri) / "big").exists()
    store.put_bytes(b"{", "_folder.json")
    with pytest.raises(RunError, match="not an index"):
        remote.checkout(uri)
    evil = index.model_copy(update={"files": {"../../evil": index.files["big"]}})
    store.put_bytes(evil.model_dump_json().encode(), "_folder.json")
    with pytest.raises(RunError, match="not an index"):
        remote.checkout(uri)


def test_a_flaky_server_costs_retries_only(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"s3://{BUCKET}/flaky"
    folder = make_folder(tmp_path / "a", "0123456789" * 2)  # 20 MB: sent in several parts
    with FlakyProxy(server, share=0.3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        remote.push(folder, uri)
        assert content(remote.checkout(uri)) == content(folder)
        assert proxy.failed >= 4
        assert proxy.passed >= 8


def test_a_dead_server_is_one_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(object_store, "_REQUEST_ATTEMPTS", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(RunError, match=r"s3://bucket/x: the storage failed 4 times"):
        remote.checkout("s3://bucket/x")


@pytest.mark.parametrize(
    ("uri", "message"), [("s3://nosuchbucket/x", "nosuchbucket"), ("nosuch://a/b", "nosuch://a/b: can't be reached")]
)
def test_wrong_uris_are_wrong_input(uri: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        remote.push(make_folder(tmp_path / "a"), uri)


def test_places_are_known_by_path_and_fetched_elsewhere(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = remote.checkout(uri)
    assert remote.stored_path(tmp_path) is None
    run.mkdir()
    shutil.copytree(make_folder(tmp_path / "a"), run / "stage1")
    (run / "config.yaml").write_text("seed: 1")
    (run / "checkpoints" / "x").mkdir(parents=True)
    remote.commit(run)
    stored = remote.stored_path(run / "stage1")
    assert stored == remote.StoredPath(uri, "stage1")
    assert ObjectStore(uri).children() == ["_contents.json", "config.yaml", "stage1"]

    monkeypatch.setenv("GAVAMOE_CACHE", str(tmp_path / "other"))
    assert content(remote.local_path(stored)) == content(tmp_path / "a")
    new = remote.local_path(remote.StoredPath(uri, "stage2"))
    assert not new.exists()
    assert remote.stored_path(new) == remote.StoredPath(uri, "stage2")
    assert sorted(path.name for path in remote.checkout(uri).iterdir() if path.name[0] != ".") == [
        "config.yaml",
        "stage1",
    ]


def test_datasets_are_made_described_and_copied_by_uri(
    gavamoe: Runner, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = f"{uri}/data"
    size = ("--users", 60, "--items", 40, "--ratings", 1500)
    made = gavamoe("data", "synthesize", data, *size)
    assert made.code == 0, made.err
    assert f"stored: {data}" in made.err.replace("\n", "")
    assert gavamoe("data", "synthesize", data, *size).code == 2, "it is there already"
    monkeypatch.setenv("GAVAMOE_CACHE", str(tmp_path / "other"))
    described = gavamoe("data", "describe", data, "--json")
    assert json.loads(described.out)["users"] == 60
    assert gavamoe("copy", data, tmp_path / "mine").code == 0
    assert gavamoe("copy", tmp_path / "mine", f"{uri}/again").code == 0
    copied = remote.checkout(f"{uri}/again")
    assert open_dataset(copied).fingerprint == open_dataset(tmp_path / "mine").fingerprint
    twice = gavamoe("copy", tmp_path / "mine", f"{uri}/again")
    assert (twice.code, "already exists" in twice.err) == (2, True)
    assert gavamoe("copy", f"{uri}/nothing", tmp_path / "none").code == 2


NAMES = {
    "a b": ("a b", "a%20b"),
    "wörter": ("wörter", "w%C3%B6rter", "w%c3%b6rter"),
    "a#b": ("a%23b",),
    "a?b": ("a%3Fb", "a%3fb"),
    "a%20b": ("a%2520b",),
    "a+b,c;d=e&f@g:h!$'()*~": ("a+b,c;d=e&f@g:h!$'()*~",),
}
"""Names of folders, and how a URI may spell them."""


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_one_place_however_it_is_spelled(uri: str, name: str, tmp_path: Path) -> None:
    first, *others = NAMES[name]
    folder = make_folder(tmp_path / "a")
    remote.push(folder, f"{uri}/{first}")
    assert ObjectStore(uri).children() == [name]
    for spelling in (first, *others):
        assert content(remote.checkout(f"{uri}/{spelling}")) == content(folder)
        assert remote.checkout(f"{uri}/{spelling}") == remote.checkout(f"{uri}/{first}")
        assert remote.exists(f"{uri}/{spelling}")
    assert not remote.exists(f"{uri}/a")


def test_names_inside_a_run_are_no_uris(uri: str, tmp_path: Path) -> None:
    """What lies below a run may have any name."""
    run = remote.checkout(uri)
    (run / "100% #1?").mkdir(parents=True)
    (run / "100% #1?" / "x").write_text("x")
    (run / "notes #2.txt").write_text("y")
    remote.commit(run)
    assert ObjectStore(uri).children() == ["100% #1?", "_contents.json", "notes #2.txt"]
    stored = remote.stored_path(run / "100% #1?")
    assert stored is not None
    assert content(remote.local_path(stored)) == {"x": b"x"}


def test_hidden_files_stay_where_they_are(uri: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a")
    for name in (".DS_Store", "deep/.nfs1", ".cache/x"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("left by a tool")
    kept = {name for name in content(folder) if "." not in name.replace("meta.json", "")}
    copying.copy(str(folder), uri)
    copying.copy(str(folder), str(tmp_path / "b"))
    assert set(content(remote.checkout(uri))) == set(content(tmp_path / "b")) == kept


def test_a_folder_holds_no_copy_of_itself(gavamoe: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "a b")
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    before = content(folder)
    here = f"file://{tmp_path}"
    for source, target in [
        ("a b", "a b/sub"),
        ("a b", "link/deep/sub"),
        ("link", tmp_path / "a b" / "deep" / ".." / "sub"),
        ("a b", f"{here}/a%20b/sub"),
        (f"{here}/a%20b", "a b/sub"),
        (f"{here}/a b", f"{here}/a%20b/sub"),
        (f"s3://{BUCKET}/x y", f"s3://{BUCKET}/x%20y/sub"),
    ]:
        refused = gavamoe("copy", source, target)
        assert (refused.code, "can't hold a copy of itself" in refused.err) == (2, True), (source, target, refused.err)
    for target in ("a b", ".", "link"):
        refused = gavamoe("copy", "a b/deep", target)
        assert (refused.code, "already exists" in refused.err) == (2, True), refused.err
    assert content(folder) == before
    assert gavamoe("copy", "a b", "a b2").code == 0
    assert content(tmp_path / "a b2") == before


def test_nothing_is_left_out_of_a_copy_unseen(gavamoe: Runner, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    make_folder(plain / "stage1")
    (plain / "config.yaml").write_text("seed: 1")
    refused = gavamoe("copy", f"file://{plain}", tmp_path / "b")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert f"file://{plain}/stage1: gavamoe did not store it" in refused.err
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".DS_Store").touch()
    for target in (tmp_path / "b", f"file://{tmp_path}/c"):
        refused = gavamoe("copy", tmp_path / "empty", target)
        assert (refused.code, "empty: holds nothing to copy" in refused.err) == (2, True)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("number", "message"),
    [(28, "b: cannot be written (No space left on device)"), (5, "empty: can't be copied ([Errno 5] ")],
)
def test_a_file_that_can_not_be_copied_is_one_line(
    number: int, message: str, gavamoe: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk is the target's."""
    folder = make_folder(tmp_path / "a")
    real = copying.shutil.copy2

    def full(source: Path, target: Path) -> object:
        if source.name == "empty":
            raise OSError(number, os.strerror(number), str(target))
        return real(source, target)

    monkeypatch.setattr(copying.shutil, "copy2", full)
    failed = gavamoe("copy", folder, tmp_path / "b")
    assert (failed.code, failed.err.count("\n")) == (1, 1), failed.err
    assert message in failed.err
    assert not (tmp_path / "b").exists()


def test_a_cache_that_can_not_be_written_is_wrong_input(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GAVAMOE_CACHE", "/proc/none")
    with pytest.raises(InputError, match=r"the cache can't be written .*; set GAVAMOE_CACHE to a folder that can be"):
        remote.located(uri)


@pytest.mark.parametrize(
    "change",
    [
        {"version": "../../precious"},
        {"version": ""},
        {"version": "."},
        {"version": "0" * 16 + "/.."},
        {"files": {"../x": None}},
        {"files": {"/x": None}},
        {"files": {"a//x": None}},
        {"files": {"": None}},
        {"files": {"./x": None}},
    ],
)
def test_an_index_names_nothing_outside_its_folder(uri: str, change: dict[str, object], tmp_path: Path) -> None:
    """Whoever may write to a place decides what stands in it, and a push removes what the index before it names."""
    victim = make_folder(tmp_path / "a")
    remote.push(victim, f"{uri}/precious")
    if "files" in change:
        [name] = change["files"]  # type: ignore[misc]
        change = {"files": {name: {"bytes": 1, "sha256": "0"}}}
    evil = {"version": "0" * 16, "files": {}} | change
    ObjectStore(f"{uri}/shared/run").put_bytes(json.dumps(evil).encode(), "_folder.json")
    for call in (lambda: remote.push(victim, f"{uri}/shared/run"), lambda: remote.checkout(f"{uri}/shared/run")):
        with pytest.raises(RunError, match="not an index"):
            call()
    assert content(remote.checkout(f"{uri}/precious")) == content(victim)
    assert ObjectStore(f"{uri}/shared/run").children() == ["_folder.json"]


def test_removal_stays_inside_its_place(uri: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a")
    remote.push(folder, f"{uri}/kept")
    remote.push(folder, f"{uri}/place")
    for name in ("", "..", "../kept", "/", "x/../../kept", "kept/"):
        with pytest.raises(InputError, match="can't be removed from"):
            ObjectStore(f"{uri}/place").delete(name)
    for whole in (f"s3://{BUCKET}", "file:///x"):
        with pytest.raises(InputError, match="is all of a storage"):
            remote.remove(whole)
    assert ObjectStore(uri).children() == ["kept", "place"]


def test_what_a_killed_upload_left_beside_a_list_is_no_stranger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy back once refused the place for it: "gavamoe did not store it"."""
    (tmp_path / "run" / "logs").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "run" / "logs" / "stage1.jsonl").write_text("{}\n")
    place = f"file://{tmp_path}/stored"
    copying.copy(str(tmp_path / "run"), place)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    store = ObjectStore(place)
    monkeypatch.setattr("gavamoe.artifacts.object_store.ObjectStore._call", lambda self, request: request())
    moving = type("Moving", (), {"move": killed, "__getattr__": lambda self, name: getattr(files, name)})
    files, store._files = store._files, moving()
    with pytest.raises(KeyboardInterrupt):
        store.put_bytes(b"{", "_contents.json")
    monkeypatch.undo()
    assert len(list((tmp_path / "stored").iterdir())) == 4, "the half list is there"
    copying.copy(place, str(tmp_path / "back"))
    assert (tmp_path / "back" / "config.yaml").read_text() == "seed: 0\n"
