"""A run folder of somebody else: no command goes where its files send it, unless the command line says so."""

import json
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from helpers.cli import Runner
from helpers.stage2_runs import Trained
from helpers.tiny import tiny

from gavamoe.artifacts import remote
from gavamoe.artifacts.files import read_json, write_json
from gavamoe.artifacts.run import RunFolder
from gavamoe.config.schema import RuntimeConfig
from gavamoe.data.dataset import open_dataset
from gavamoe.errors import InputError
from gavamoe.pipeline import evaluate_and_report
from gavamoe.runtime.jobs import staged_code
from gavamoe.runtime.tracking import check_tracking, told

PAIR = ("--user", "nobody", "--item", "nothing")


@pytest.fixture
def run(tmp_path: Path, tiny_dataset: Path, stage1: Path, torch_run: Trained) -> Path:
    """A trained run whose dataset.json can be changed."""
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(stage1, folder.stage1)
    shutil.copytree(torch_run.out, folder.stage2)
    folder.write_config(tiny())
    refer_to(folder.path, str(tiny_dataset), tiny_dataset)
    return folder.path


def refer_to(run: Path, place: str, dataset: Path) -> None:
    write_json(run / "dataset.json", {"path": place, "fingerprint": open_dataset(dataset).fingerprint})


class Listener:
    """A host that counts its visitors and shuts the door on them."""

    def __init__(self, server: socket.socket) -> None:
        self.address = f"127.0.0.1:{server.getsockname()[1]}"
        self.visitors = 0
        self._server = server
        threading.Thread(target=self._count, daemon=True).start()

    def _count(self) -> None:
        with suppress(OSError):  # closed
            while True:
                self._server.accept()[0].close()
                self.visitors += 1


@pytest.fixture
def listener() -> Iterator[Listener]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield Listener(server)
        server.shutdown(socket.SHUT_RDWR)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAVAMOE_CACHE", str(tmp_path / "cache"))
    for name in ("KEY_ID", "KEY"):
        monkeypatch.setenv(f"AWS_{'ACCESS' if name == 'KEY_ID' else 'SECRET_ACCESS'}_{name}", "x")


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_no_command_visits_the_host_that_a_run_names(
    gavamoe: Runner,
    run: Path,
    tiny_dataset: Path,
    listener: Listener,
    scheme: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stranger's dataset.json must not get requests that are signed with the user's credentials."""
    place = f"gs://b/x?scheme=http&endpoint_override={listener.address}&retry_limit_seconds=1"
    if scheme == "s3":  # as if that were the user's own storage
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{listener.address}")
        place = "s3://b/x"
    refer_to(run, place, tiny_dataset)
    for command in (("explain", run, *PAIR), ("route", run, *PAIR, "--json"), ("route", run), ("status", run)):
        done = gavamoe(*command)
        assert (done.code, listener.visitors) == (0, 0), done.err
    for command in (("evaluate", run), ("route", run, "--sweep-clusters", "2:3")):
        refused = gavamoe(*command)
        assert refused.code == 2, refused.err
        assert "a URI that a run names is not opened unasked: if you trust it, add --dataset" in refused.err
        assert place.partition("?")[0] in refused.err
        assert listener.visitors == 0


def test_the_command_line_may_name_the_uri(gavamoe: Runner, run: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    uri = f"file://{tmp_path}/stored"
    remote.push(tiny_dataset, uri)
    refer_to(run, uri, tiny_dataset)
    refused = gavamoe("evaluate", run, "--rows", 5, "--probe-rows", 0)
    assert (refused.code, f"add --dataset {uri}" in refused.err) == (2, True), refused.err
    assert not (tmp_path / "cache").exists()
    done = gavamoe("evaluate", run, "--rows", 5, "--probe-rows", 0, "--dataset", uri)
    assert done.code == 0, done.err
    assert evaluate_and_report(run, rows=5, probe_rows=0, dataset=remote.located(uri))["rows"] == 5


def test_a_local_dataset_is_found_as_before(gavamoe: Runner, run: Path) -> None:
    done = gavamoe("evaluate", run, "--rows", 5, "--probe-rows", 0)
    assert done.code == 0, done.err


def test_using_a_run_opens_no_dataset(
    gavamoe: Runner, run: Path, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a dataset was opened")

    pair = ("--user", open_dataset(tiny_dataset).catalog.user_id(0), "--item", "nothing")
    monkeypatch.setattr("gavamoe.data.dataset.open_dataset", refuse)
    for command in (("explain", run, *pair), ("route", run, *pair), ("route", run), ("status", run)):
        done = gavamoe(*command)
        assert done.code == 0, done.err
    assert json.loads(gavamoe("route", run, *pair, "--json").out)["user_known"]


def test_a_run_without_stage_2_is_asked_for_its_dataset(gavamoe: Runner, run: Path, tiny_dataset: Path) -> None:
    shutil.rmtree(run / "stage2")
    assert gavamoe("route", run, *PAIR).code == 0
    refer_to(run, "s3://b/x", tiny_dataset)
    refused = gavamoe("route", run, *PAIR)
    assert (refused.code, "add --dataset s3://b/x" in refused.err) == (2, True)
    assert gavamoe("route", run, *PAIR, "--dataset", tiny_dataset).code == 0


def test_an_origin_that_a_folder_brings_along_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in such a folder would be stored at the stranger's place."""
    brought = tmp_path / "unpacked" / "0123456789abcdef0123"
    (brought / "here").mkdir(parents=True)
    (brought / "here" / "config.yaml").write_text("seed: 1")
    write_json(brought / "origin.json", {"uri": f"file://{tmp_path}/stranger"})
    assert remote.stored_path(brought / "here") is None
    remote.commit(brought / "here")
    assert not (tmp_path / "stranger").exists()
    staged = remote.checkout(f"file://{tmp_path}/mine")
    assert remote.stored_path(staged / "stage1") == remote.StoredPath(f"file://{tmp_path}/mine", "stage1")
    monkeypatch.setenv("GAVAMOE_CACHE", str(brought.parent / "other"))
    assert remote.stored_path(staged) is None


def test_no_training_tells_the_server_that_a_run_names(
    gavamoe: Runner, run: Path, tiny_dataset: Path, listener: Listener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stranger's config.yaml must not get the settings, the numbers, or the user's password for MLflow."""
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "S3CRET")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri, config = f"http://{listener.address}", run / "config.yaml"
    RunFolder(run).write_config(tiny("runtime.tracking=mlflow", f"runtime.tracking_uri={uri}"))
    shutil.rmtree(run / "stage2")
    resumed = ("train", config, "--dataset", tiny_dataset, "--run-dir", run, "--resume")
    for command in (
        resumed,
        ("train", config, "--dataset", tiny_dataset, "--run-dir", tmp_path / "new"),
        ("tune", "stage1", config, "--dataset", tiny_dataset, "--run-dir", tmp_path / "new"),
        ("ablate", config, "--dataset", tiny_dataset, "--run-dir", tmp_path / "new"),
        ("quickstart", "--config", config, "--run-dir", tmp_path / "new"),
    ):
        refused = gavamoe(*command)
        assert (refused.code, refused.err.count("\n"), listener.visitors) == (2, 1, 0), refused.err
        assert (
            f"a server that a run names is not told unasked: if you trust it, add --set runtime.tracking_uri={uri}"
            in (refused.err)
        )
    assert not (tmp_path / "new").exists()
    with pytest.raises(InputError, match="is not told unasked"), staged_code([str(part) for part in resumed[1:]]):
        pass

    def stop(placement: RuntimeConfig) -> None:
        raise InputError("as far as the start of Ray")

    monkeypatch.setattr("gavamoe.pipeline.ray_session", stop)
    own = tmp_path / "own.yaml"
    own.write_bytes(config.read_bytes())
    named = ("--set", f"runtime.tracking_uri={uri}")
    for command, variable in (((*resumed, *named), ""), (resumed, uri), (("train", own, *resumed[2:]), "")):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", variable)
        trained = gavamoe(*command)
        assert (trained.code, "as far as the start of Ray" in trained.err) == (2, True), trained.err
        assert f"The log goes to mlflow at {uri}" in trained.err, "said before it is done"
        with staged_code([str(part) for part in command[1:]]) as (_, staged):
            assert len(staged) == len(command) - 1
    silent = gavamoe(*resumed, "--set", "runtime.tracking=none")
    assert "as far as the start of Ray" in silent.err
    assert "The log goes to" not in silent.err


def test_a_tracking_server_is_shown_without_its_keys(run: Path) -> None:
    config = tiny("runtime.tracking=wandb", "runtime.tracking_uri=https://user:S3CRET@host/x?key=S3CRET")
    assert "S3CRET" not in str(told(config.runtime))
    with pytest.raises(InputError, match=r"runtime.tracking_uri https://.*WANDB_BASE_URL") as refused:
        check_tracking(config, run / "config.yaml", [])
    assert "S3CRET" not in str(refused.value)
    assert told(tiny("runtime.tracking=mlflow").runtime) is None, "a file of the run"


def test_keys_that_a_run_names_are_not_shown(gavamoe: Runner, run: Path, tiny_dataset: Path) -> None:
    refer_to(run, "abfs://account:S3CRET@container/x?sig=S3CRET", tiny_dataset)
    shown = gavamoe("status", run)
    assert shown.code == 0
    assert "S3CRET" not in shown.err + gavamoe("status", run, "--json").out + gavamoe("evaluate", run).err
    assert read_json(run / "dataset.json")["path"].endswith("S3CRET")
