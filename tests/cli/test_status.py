"""gavamoe status, from folders in every state; logs, TensorBoard and MLflow; checksums and errors of full disks."""

import errno
import json
import os
import time
from pathlib import Path

import pytest
from helpers.fault_run import small
from test_cli import Runner

from gavamoe.artifacts.files import write_json
from gavamoe.artifacts.manifest import write_manifest
from gavamoe.cli.status import SECONDS_OF_SILENCE, read_status
from gavamoe.config.schema import RuntimeConfig
from gavamoe.data.dataset import open_dataset
from gavamoe.errors import InputError
from gavamoe.pipeline import claim_run
from gavamoe.runtime.tracking import RunLog
from gavamoe.runtime.worker import WorkerLog, find_damage, storage_problem, write_checksums

LINES = [{"phase": "stage2", "step": step, "steps": 40, "loss": 1 / step} for step in (10, 20)]


@pytest.fixture
def run(tmp_path: Path, tiny_dataset: Path) -> Path:
    """A run that has been claimed and nothing more."""
    claim_run(tmp_path / "run", small(), open_dataset(tiny_dataset), continuing=False)
    return tmp_path / "run"


def finish(run: Path, stage: str, metrics: dict[str, object]) -> None:
    (run / stage).mkdir()
    write_json(run / stage / "metrics.json", metrics)
    write_manifest(run / stage, stage, small(), {})  # type: ignore[arg-type]


def log(run: Path, stage: str, age: float) -> None:
    path = run / "logs" / f"{stage}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES) + '{"cut o')
    os.utime(path, (time.time() - age,) * 2)


def test_each_state_is_told_with_the_command_to_go_on_with(run: Path, tiny_dataset: Path) -> None:
    status = read_status(run)
    assert [step.state for step in status.steps] == ["not started"] * 3
    assert status.dataset_problem is None
    assert status.next == f"gavamoe train {run}/config.yaml --dataset {tiny_dataset} --run-dir {run} --resume"

    finish(run, "stage1", {"test": {"rmse": 0.8}, "smallest_cluster_share": 0.3, "seconds": 90.0})
    log(run, "stage2", age=0)
    status = read_status(run)
    assert [step.state for step in status.steps] == ["done", "running", "not started"]
    assert status.steps[0].numbers == {"rmse": 0.8, "smallest_cluster_share": 0.3}
    assert (status.steps[1].step, status.steps[1].steps, status.steps[1].numbers) == (20, 40, {"loss": 0.05})
    assert status.next.startswith("stage2 is running")

    log(run, "stage2", age=2 * SECONDS_OF_SILENCE)
    (run / "checkpoints" / "stage2" / "checkpoint_2026").mkdir(parents=True)
    stopped = read_status(run)
    assert (stopped.steps[1].state, stopped.steps[1].checkpoints) == ("stopped", ["checkpoint_2026"])
    assert stopped.next.endswith("--resume")

    finish(run, "stage2", {"validation_loss": 0.5})
    assert read_status(run).next == f"gavamoe evaluate {run}"
    finish(run, "evaluation", {"metrics": {"bleu_4": 20.0, "rmse": None}})
    whole = read_status(run)
    assert whole.steps[2].numbers == {"bleu_4": 20.0}
    assert whole.next == f"gavamoe serve {run}"
    (run / "stage1" / "metrics.json").unlink()
    broken = read_status(run)
    assert broken.steps[0].state == "damaged"
    assert "missing file metrics.json" in broken.next


def test_a_dataset_that_is_gone_is_told(run: Path) -> None:
    write_json(run / "dataset.json", {"path": "/nowhere/data", "fingerprint": "x"})
    assert "no such dataset folder" in str(read_status(run).dataset_problem)
    with pytest.raises(InputError, match="not a run folder"):
        read_status(run / "stage1")


def test_the_command_prints_both_forms(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gavamoe = Runner(monkeypatch, capsys)
    log(run, "stage1", age=3600)
    shown = gavamoe("status", run)
    assert shown.code == 0
    for text in ("stage1", "stopped", "20 of 40", "last heard of 60 min ago", "next: gavamoe train"):
        assert text in shown.err
    assert json.loads(gavamoe("status", run, "--json").out)["steps"][0]["step"] == 20
    assert gavamoe("status", run / "nothing").code == 2


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, round(event.value, 4)) for event in events.Scalars(tag)]


def test_a_restart_takes_lines_back_everywhere(tmp_path: Path) -> None:
    lines = [{"phase": "p", "step": step, "steps": 4, "loss": float(step), "note": "x"} for step in range(1, 5)]
    with RunLog(tmp_path, "stage1", RuntimeConfig(), None, keep=False) as record:
        for line in lines[:3]:
            record.add(line)
        record.restart(lines[:1])
        for line in lines[1:]:
            record.add({**line, "loss": line["step"] + 0.5})
    written = [json.loads(line) for line in (tmp_path / "logs" / "stage1.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in written] == [(1, 1.0), (2, 2.5), (3, 3.5), (4, 4.5)]
    board = tmp_path / "logs" / "tensorboard" / "stage1"
    assert points(board, "p/loss") == [(1, 1.0), (2, 2.5), (3, 3.5), (4, 4.5)]
    with RunLog(tmp_path, "stage1", RuntimeConfig(), None, keep=True):
        pass
    assert (tmp_path / "logs" / "stage1.jsonl").read_text().count("\n") == 4
    with RunLog(tmp_path, "stage1", RuntimeConfig(), None, keep=False):
        pass
    assert (tmp_path / "logs" / "stage1.jsonl").read_text() == ""


@pytest.mark.slow
def test_mlflow_has_the_numbers_and_the_config_and_a_resumed_run_is_one_run(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    runtime = RuntimeConfig(tracking="mlflow")
    with RunLog(tmp_path, "stage1", runtime, small(), keep=False) as record:
        record.add({"phase": "p", "step": 1, "loss": 2.0})
    with RunLog(tmp_path, "stage1", runtime, small(), keep=True) as record:
        record.add({"phase": "p", "step": 2, "loss": 1.0})
    client = MlflowClient(f"sqlite:///{tmp_path / 'logs' / 'mlflow.db'}")
    [experiment] = [found for found in client.search_experiments() if found.name == "gavamoe"]
    [found] = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == f"{tmp_path.name}/stage1"
    assert found.info.status == "FINISHED"
    assert found.data.params["stage1.latent_size"] == "4"
    assert [(point.step, point.value) for point in client.get_metric_history(found.info.run_id, "p/loss")] == [
        (1, 2.0),
        (2, 1.0),
    ]


def test_a_service_that_is_not_installed_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="wandb is not installed; pip install wandb"):
        RunLog(tmp_path, "stage1", RuntimeConfig(tracking="wandb"), None, keep=False)


def test_the_desk_tells_a_restart_from_new_lines() -> None:
    desk = WorkerLog()
    assert desk.since(0, 0) == (0, 0, [])
    desk.restart([])
    desk.add({"step": 1})
    desk.add({"step": 2})
    assert desk.since(0, 0) == (1, 0, [{"step": 1}, {"step": 2}])
    assert desk.since(1, 1) == (1, 0, [{"step": 2}])
    desk.restart([{"step": 1}])
    desk.add({"step": 2})
    assert desk.since(1, 2) == (2, 1, [{"step": 1}, {"step": 2}])
    assert desk.refusals() == []
    desk.refuse(1, InputError("no"))
    assert str(desk.refusals()[0]) == "no"


def test_damage_of_any_ranks_file_is_found(tmp_path: Path) -> None:
    parts = [tmp_path / "0", tmp_path / "1"]
    for rank, part in enumerate(parts):
        (part / "engine").mkdir(parents=True)
        (part / "engine" / f"rank{rank}").write_bytes(b"x" * 100)
        write_checksums(part, rank, workers=2)
    whole = tmp_path / "whole"
    (whole / "engine").mkdir(parents=True)
    for part in parts:
        for path in part.rglob("*"):
            if path.is_file():
                (whole / path.relative_to(part)).write_bytes(path.read_bytes())
    assert find_damage(whole) is None
    (whole / "engine" / "rank1").write_bytes(b"x" * 99 + b"y")
    assert find_damage(whole) == "the content of engine/rank1 has changed"
    (whole / "engine" / "rank1").write_bytes(b"x" * 99)
    assert find_damage(whole) == "engine/rank1 has 99 of 100 bytes"
    (whole / "checksums-1.json").unlink()
    assert "its checksums can't be read" in str(find_damage(whole))


def test_full_disks_are_told_from_other_errors() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/data/x")
    outer = RuntimeError("upload")
    outer.__cause__ = full
    assert storage_problem(outer) == "/data/x: can't be written: no space is left"
    assert storage_problem(RuntimeError("[enforce fail] file write failed")) is not None
    assert storage_problem(OSError(errno.ECONNRESET, "reset")) is None
    assert storage_problem(ValueError("x")) is None
