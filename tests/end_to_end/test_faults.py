"""What clusters do to a training: killed workers and drivers, lost nodes, full disks, damaged checkpoints."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.cli import command
from helpers.fault_run import FAULTS, STEPS, count, largest_difference, log_lines, train
from helpers.ray_head import ROOT
from helpers.tiny import tiny, tiny_yaml

from gavamoe.artifacts.files import read_json
from gavamoe.artifacts.manifest import MANIFEST
from gavamoe.config.schema import RuntimeConfig
from gavamoe.errors import InputError, RunError
from gavamoe.pipeline import train_run

ONE = RuntimeConfig(workers=1, max_failures=0)
TRIALS = [(stage, seed) for stage in STEPS for seed in range(2)]
KILLS = 5
"""In each trial: 20 in all."""
TOLERANCE = 1e-5
"""What metrics and logged numbers may differ by, relative above 1: float32 sums taken in another order."""


class Undisturbed:
    """Both stages trained without a fault, once."""

    def __init__(self, folder: Path, dataset: Path) -> None:
        self.folder, self.dataset = folder, dataset
        self.metrics: dict[str, Any] = {}

    def get(self, stage: str) -> dict[str, Any]:
        if stage == "stage2":
            self.get("stage1")
        if stage not in self.metrics:
            work = self.folder / stage
            self.metrics[stage] = train(stage, tiny(*FAULTS), self.dataset, work, self.folder / "stage1" / "stage1", [])
        found: dict[str, Any] = self.metrics[stage]
        return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path, ray_two_workers: None) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"), tiny_dataset)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize(("stage", "seed"), TRIALS)
def test_workers_killed_at_random_steps_change_nothing(
    stage: str, seed: int, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    expected = undisturbed.get(stage)
    draw = random.Random(f"{stage} {seed}")
    kills = [(step, draw.randrange(2)) for step in sorted(draw.sample(range(STEPS[stage]), KILLS))]
    work, stage1 = tmp_path / "run", undisturbed.folder / "stage1" / "stage1"
    found = train(stage, tiny(*FAULTS, f"runtime.max_failures={KILLS}"), undisturbed.dataset, work, stage1, kills)
    assert len(list((work / "died").iterdir())) == KILLS, "so many processes were killed"
    reference = log_lines(undisturbed.folder / stage, stage)
    lines = log_lines(work, stage)
    metrics_apart, log_apart = largest_difference(expected, found), largest_difference(reference, lines)
    told = ", ".join(f"{step}/{rank}" for step, rank in kills)
    print(f"| {stage} | {told} | {metrics_apart:.1e} | {log_apart:.1e} | {len(lines)} of {len(reference)} |")
    assert [(x["phase"], x["step"]) for x in lines] == [(x["phase"], x["step"]) for x in reference]
    assert metrics_apart <= TOLERANCE
    assert log_apart <= TOLERANCE


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("stage", STEPS)
def test_a_killed_driver_is_resumed(stage: str, undisturbed: Undisturbed, tmp_path: Path) -> None:
    expected = undisturbed.get("stage1")
    if stage == "stage2":
        expected = undisturbed.get("stage2")
    (tmp_path / "small.yaml").write_text(tiny_yaml(*FAULTS))
    run = tmp_path / "run"
    training = command("train", tmp_path / "small.yaml", "--dataset", undisturbed.dataset, "--run-dir", run, "--resume")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)
    driver = subprocess.Popen(training, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    checkpoints = run / "checkpoints" / stage
    end = time.monotonic() + 300
    while not list(checkpoints.glob("checkpoint_[0-9]*")) and time.monotonic() < end:
        time.sleep(0.05)
    assert not (run / stage).exists(), "killed too late to show anything"
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    resumed = subprocess.run(training, env=environment, capture_output=True, text=True, check=False, timeout=400)
    assert resumed.returncode == 0, resumed.stderr
    lines, reference = log_lines(run, stage), log_lines(undisturbed.folder / stage, stage)
    assert [(x["phase"], x["step"]) for x in lines] == [(x["phase"], x["step"]) for x in reference]
    apart = largest_difference(expected, read_json(run / stage / "metrics.json"))
    print(f"| {stage}, driver killed | {apart:.1e} |")
    assert apart <= TOLERANCE


@pytest.mark.slow
@pytest.mark.ray
def test_what_workers_wrote_after_their_drivers_death_is_made_again_with_its_log(
    undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, run = undisturbed.get("stage1"), tmp_path / "run"

    def die(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gavamoe.runtime.checkpoints.StepCheckpoints.remove", die)
    with pytest.raises(KeyboardInterrupt):  # `resume`, since without it what was there is removed first
        train_run(tiny(*FAULTS), undisturbed.dataset, run, stage="1", resume=True)
    monkeypatch.undo()
    log = run / "logs" / "stage1.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:9]))
    assert (run / "stage1" / MANIFEST).is_file()
    found = train_run(tiny(*FAULTS), undisturbed.dataset, run, stage="1", resume=True)
    assert largest_difference(expected, found["stage1"]) == 0
    assert log_lines(run, "stage1") == log_lines(undisturbed.folder / "stage1", "stage1")
    assert not (run / "checkpoints" / "stage1").exists()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["goes_on", "waits", "in_vain"])
def test_a_node_is_lost(way: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    environment.pop("RAY_ADDRESS", None)
    program = [sys.executable, str(ROOT / "tests" / "helpers" / "node_loss.py"), str(tmp_path / "run"), way]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["beside"], "what keeps the log lay beside the driver, not on a node that may go"
    assert found["workers"][0] == 3
    if way == "in_vain":
        expected = "the workers did not start within runtime.wait_minutes: too few nodes"
        assert found["ended"] == f"count: {expected}; continue with --resume"
        return
    assert found["steps"] == list(range(1, 13)), "no step lost, none twice"
    assert found["workers"][-1] == found["ended"]["workers"] == (2 if way == "goes_on" else 3)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB, which `mount` may make larger or read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(folder)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_two_workers")
def test_a_full_disk_is_one_error_and_the_last_checkpoint_is_whole(small_disk: Path) -> None:
    run, megabyte = small_disk / "run", 2**20
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * (megabyte // 2))
    with pytest.raises(RunError, match=r"no space is left; make room or give permission, then continue with --resume"):
        count(run, ONE, steps=5, size=megabyte)  # two fit, a third does not
    remount(small_disk, "size=20m")
    assert count(run, ONE, resume=True, steps=5, size=megabyte) == {"start": 2, "workers": 1}
    assert [line["step"] for line in log_lines(run, "count")] == [1, 2, 3, 4, 5]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_two_workers")
def test_a_disk_that_becomes_read_only_is_one_error(small_disk: Path) -> None:
    run = small_disk / "run"
    with pytest.raises(RunError, match="as planned"):
        count(run, ONE, steps=5, fail_at=3)
    remount(small_disk, "ro")
    with pytest.raises(InputError, match=r"cannot be written \(Read-only file system\)"):
        count(run, ONE, resume=True, steps=5)
    remount(small_disk, "rw")
    assert count(run, ONE, resume=True, steps=5)["start"] == 3


def damage(checkpoint: Path, way: str) -> None:
    weights = checkpoint / "weights"
    if way == "truncated":
        os.truncate(weights, 100)
    elif way == "changed":
        content = bytearray(weights.read_bytes())
        content[500] ^= 1
        weights.write_bytes(content)
    elif way == "missing":
        weights.unlink()
    else:
        (checkpoint / "checksums-0.json").write_text("{")


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_two_workers")
@pytest.mark.parametrize("way", ["truncated", "changed", "missing", "no checksums"])
def test_the_checkpoint_before_a_damaged_one_is_used(way: str, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="as planned"):
        count(tmp_path, ONE, steps=6, size=1000, fail_at=4)
    kept = sorted((tmp_path / "checkpoints" / "count").glob("checkpoint_[0-9]*"))
    assert len(kept) == 2
    damage(kept[-1], way)
    assert count(tmp_path, ONE, resume=True, steps=6, size=1000) == {"start": 3, "workers": 1}
    lines = log_lines(tmp_path, "count")
    assert [line["step"] for line in lines if "step" in line] == [1, 2, 3, 4, 5, 6]
    [warning] = [line["warning"] for line in lines if "warning" in line]
    assert kept[-1].name in warning
    assert "the checkpoint before it is used" in warning


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_two_workers")
def test_without_any_whole_checkpoint_nothing_is_begun(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="as planned"):
        count(tmp_path, ONE, steps=4, size=1000, fail_at=3)
    for checkpoint in (tmp_path / "checkpoints" / "count").glob("checkpoint_[0-9]*"):
        damage(checkpoint, "truncated")
    with pytest.raises(InputError, match=r"no whole checkpoint is left .*100 of 1000 bytes.*without --resume"):
        count(tmp_path, ONE, resume=True, steps=4, size=1000)
    assert len(log_lines(tmp_path, "count")) == 3, "the log is as it was"
    assert count(tmp_path, ONE, steps=4, size=1000)["start"] == 0
