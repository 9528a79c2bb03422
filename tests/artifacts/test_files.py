"""Folders and files are written whole or not at all; manifests refuse anything else."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gavamoe.artifacts.files import read_json, write_file, write_folder, write_json
from gavamoe.artifacts.manifest import MANIFEST, load_weights, read_manifest, save_weights, write_manifest
from gavamoe.config.schema import RunConfig
from gavamoe.errors import InputError, RunError


def test_folder_appears_only_when_complete(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with write_folder(out) as aside:
        (aside / "a").write_text("1")
        assert not out.exists()
    assert (out / "a").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_failed_folder_leaves_nothing(tmp_path: Path) -> None:
    def half() -> None:
        with write_folder(tmp_path / "out") as aside:
            (aside / "a").write_text("1")
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        half()
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_is_refused_or_replaced_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("1")
    with pytest.raises(InputError, match="already exists"), write_folder(out):
        pass
    with write_folder(out, replace=True) as aside:
        (aside / "new").write_text("2")
    assert [path.name for path in out.iterdir()] == ["new"]


def test_failed_file_keeps_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.json"

    def half() -> None:
        with write_file(path) as aside:
            aside.write_text("half")
            raise RuntimeError("boom")

    write_json(path, {"x": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"x": float("nan")})
    with pytest.raises(RuntimeError, match="boom"):
        half()
    assert read_json(path) == {"x": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such file"), ("{", "not valid JSON"), ("[" * 100_000, "not valid JSON")]
)
def test_bad_json_is_one_clear_error(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_json(path)
    if content == "{":
        with pytest.raises(InputError, match="more than the 0 that"):
            read_json(path, max_bytes=0)


def test_a_link_to_nothing_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with (
        pytest.raises(InputError, match=r"out: is a link to .*nowhere, which does not exist"),
        write_folder(tmp_path / "out"),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("write", [write_folder, write_file])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, write: Any, number: int) -> None:
    def half() -> None:
        with write(tmp_path / "out"):
            raise OSError(number, os.strerror(number))

    with pytest.raises(
        RunError, match=r"out: cannot be written \(.*\): [\d,]+ MiB are free there.*make room"
    ) as caught:
        half()
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def _artifact(folder: Path) -> Path:
    folder.mkdir()
    (folder / "a.txt").write_text("hello")
    write_manifest(folder, "stage1", RunConfig(), {"dataset": "f" * 64})
    return folder


def test_manifest_round_trip(tmp_path: Path) -> None:
    manifest = read_manifest(_artifact(tmp_path / "s"), "stage1")
    assert manifest.inputs == {"dataset": "f" * 64}
    assert set(manifest.files) == {"a.txt"}
    assert RunConfig.model_validate(manifest.config) == RunConfig()
    assert "torch" in manifest.versions


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "a.txt").write_text("jello"),
            "content differs",
        ),
        (lambda folder: (folder / "a.txt").unlink(), "missing file a.txt"),
        (lambda folder: (folder / "b.txt").write_text("x"), "unexpected file b.txt"),
        (lambda folder: (folder / MANIFEST).unlink(), "no stage1 artifact here"),
        (lambda folder: (folder / MANIFEST).write_text('{"kind": 3}'), "not a valid manifest"),
        (
            lambda folder: write_json(folder / MANIFEST, read_json(folder / MANIFEST) | {"format_version": 99}),
            "format version 99 is newer than",
        ),
        (
            lambda folder: write_json(folder / MANIFEST, read_json(folder / MANIFEST) | {"kind": "stage2"}),
            "holds a stage2 artifact, not stage1",
        ),
    ],
)
def test_damaged_artifact_is_refused(tmp_path: Path, damage: object, message: str) -> None:
    folder = _artifact(tmp_path / "s")
    assert callable(damage)
    damage(folder)
    with pytest.raises(InputError, match=message):
        read_manifest(folder, "stage1")


def test_weights_load_strictly(tmp_path: Path) -> None:
    source, path = torch.nn.Linear(2, 3), tmp_path / "w.safetensors"
    save_weights(path, source)
    target = torch.nn.Linear(2, 3)
    load_weights(path, target)
    assert torch.equal(source.weight, target.weight)
    with pytest.raises(InputError, match="weights do not load"):
        load_weights(path, torch.nn.Linear(2, 4))
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(InputError, match="weights do not load"):
        load_weights(path, target)


KILLED = """
import os, signal, sys
from pathlib import Path
from gavamoe.artifacts.files import write_folder
real = Path.rename
def rename(self, target):
    if ".partial-" in self.name:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, target)
Path.rename = rename
with write_folder(Path(sys.argv[1]), replace=True) as aside:
    (aside / "new").write_text("2")
"""


def test_a_replacement_that_is_killed_loses_nothing(tmp_path: Path) -> None:
    out = _artifact(tmp_path / "out")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(out)], check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    read_manifest(out, "stage1")
    subprocess.run([sys.executable, "-c", KILLED, str(out)], check=False, timeout=60)
    with pytest.raises(InputError, match="already exists"), write_folder(out):
        pass
    with write_folder(out, replace=True) as aside:
        (aside / "new").write_text("3")
    assert [path.name for path in out.iterdir()] == ["new"]


def test_a_replacement_that_fails_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = _artifact(tmp_path / "out")
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if ".partial-" in path.name:
            raise OSError(5, "Input/output error")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="Input/output"), write_folder(out, replace=True):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    read_manifest(out, "stage1")


def _age(*paths: Path) -> None:
    """Make them 25 hours old."""
    past = time.time() - 25 * 3600
    for path in paths:
        os.utime(path, (past, past))


@pytest.mark.parametrize("again", [write_folder, write_file])
def test_what_killed_writers_left_goes_after_a_day(tmp_path: Path, again: Any) -> None:
    """Folders and files, whatever name they were to get: once it is there, nobody writes under that name again."""
    kept, busy, strange = (tmp_path / name for name in (".out.partial-00000002", ".out.partial-00000003", ".o.partial"))
    only_copy = tmp_path / ".gone.replaced-00000001"
    old = [tmp_path / f".{name}-00000001" for name in ("out.partial", "out.replaced", "other.partial")]
    for folder in (*old, kept, busy, strange, only_copy):
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "x").write_text("x")
    (tmp_path / "out").mkdir()
    (tmp_path / ".config.yaml.partial-00000001").write_text("half")
    _age(*(path for path in tmp_path.rglob("*") if kept not in (path, *path.parents)))
    (busy / "deep" / "x").write_text("y")
    with again(tmp_path / "new") as aside:
        (aside / "x" if again is write_folder else aside).write_text("x")
    expected = [only_copy.name, strange.name, kept.name, busy.name, "new", "out"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(expected)


def test_content_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = list[str]()
    real, replace, rename = os.fsync, os.replace, Path.rename

    def fsync(handle: int) -> None:
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name.split(".partial-")[0])
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("named"), replace(a, b)))
    monkeypatch.setattr(Path, "rename", lambda a, b: (done.append("named"), rename(a, b)))
    write_json(tmp_path / "a.json", {})
    assert done == [".a.json", "named", tmp_path.name]
    done.clear()
    with write_folder(tmp_path / "out") as aside:
        (aside / "x").write_text("x")
    assert done == ["x", ".out", "named", tmp_path.name]
