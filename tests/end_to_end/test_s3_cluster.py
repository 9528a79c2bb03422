"""The whole work at s3:// URIs, on nodes that share nothing else; the driver killed in the middle, on to its end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.cli import command
from helpers.fault_run import FAULTS
from helpers.flaky_s3 import BUCKET, KEYS, FlakyProxy, s3_server
from helpers.ray_head import ROOT
from helpers.tiny import tiny_yaml

from gavamoe.artifacts import remote
from gavamoe.artifacts.object_store import ObjectStore

pytestmark = pytest.mark.slow


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The environment of a client of the cluster; the S3 server fails one request in twenty."""
    with s3_server() as address, FlakyProxy(address, share=0.05) as proxy:
        variables = {**KEYS, "AWS_ENDPOINT_URL": proxy.address, "GAVAMOE_CACHE": str(tmp_path / "cache-client")}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        python_path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
        program = [sys.executable, str(ROOT / "tests" / "helpers" / "s3_cluster.py"), str(tmp_path)]
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        cluster = subprocess.Popen(
            program, env=os.environ | {"PYTHONPATH": python_path}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        assert cluster.stdin is not None
        assert cluster.stdout is not None
        try:
            ray_address = cluster.stdout.readline().strip()
            yield dict(os.environ) | {"PYTHONPATH": python_path, "RAY_ADDRESS": ray_address}
        finally:
            cluster.stdin.close()
            cluster.wait(60)
        assert proxy.failed > 0


def gavamoe(environment: dict[str, str], *arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command(*arguments), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: "subprocess.Popen[str]") -> str:
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    return out


def test_a_run_at_a_uri_survives_its_driver(environment: dict[str, str], tmp_path: Path) -> None:
    data, run = f"s3://{BUCKET}/data", f"s3://{BUCKET}/runs/a"
    config = tmp_path / "small.yaml"
    config.write_text(tiny_yaml(*FAULTS))
    finish(gavamoe(environment, "data", "synthesize", data, "--users", 60, "--items", 40, "--ratings", 1500))
    train = ("train", config, "--dataset", data, "--run-dir", run, "--resume")
    driver = gavamoe(environment, *train)
    end = time.monotonic() + 300
    checkpoints = ObjectStore(f"{run}/checkpoints/stage2")
    while not [name for name in checkpoints.children() if name.startswith("checkpoint_20")] and time.monotonic() < end:
        time.sleep(0.1)
    assert driver.poll() is None, driver.communicate()[1]
    driver.send_signal(signal.SIGKILL)
    driver.communicate()

    elsewhere = environment | {"GAVAMOE_CACHE": str(tmp_path / "cache-another-client")}
    scores: dict[str, Any] = json.loads(finish(gavamoe(elsewhere, *train, "--evaluate", "--json")))
    assert scores["rows"] > 0
    stored = set(ObjectStore(run).children()) - {"checkpoints", "_contents.json"}
    assert stored == {"config.yaml", "dataset.json", "evaluation", "logs", "report.html", "stage1", "stage2"}
    assert not remote.exists(f"{run}/checkpoints/stage2")
    assert json.loads((remote.checkout(run) / "dataset.json").read_text())["path"] == data
    for stage, last in (("stage1", 40), ("stage2", 24)):
        lines = [json.loads(x) for x in (remote.checkout(run) / "logs" / f"{stage}.jsonl").read_text().splitlines()]
        steps = [line["step"] for line in lines if "loss" in line]
        assert steps == sorted(set(steps)), "no step twice"
        assert steps[-1] == last
    for name in ("one", "two"):
        fetched = list((tmp_path / f"cache-{name}").rglob("meta.json"))
        assert fetched, "each node fetched the dataset"
    state = json.loads(finish(gavamoe(elsewhere, "status", run, "--json")))
    assert [step["state"] for step in state["steps"]] == ["done", "done", "done"]
