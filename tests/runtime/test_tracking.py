"""A run's log and its copies in TensorBoard and MLflow: a restart takes lines back everywhere."""

import json
import threading
from pathlib import Path

import pytest
from helpers.tiny import tiny

from gavamoe.config.schema import RuntimeConfig
from gavamoe.errors import InputError
from gavamoe.runtime.tracking import RunLog


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


def add_many(record: RunLog) -> None:
    """More lines than TensorBoard keeps in memory."""
    for step in range(2, 2000):
        record.add({"phase": "p", "step": step, "loss": 1.0})


def test_a_full_disk_under_tensorboard_is_an_error_of_the_log_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has a thread of its own, whose traceback once stood above the training's one line."""
    told = list[threading.ExceptHookArgs]()
    monkeypatch.setattr(threading, "excepthook", told.append)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with RunLog(tmp_path, "stage1", RuntimeConfig(), None, keep=False) as record:
        record.add({"phase": "p", "step": 1, "loss": 1.0})
        monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
        with pytest.raises(OSError, match="No space left"):
            add_many(record)
        other = threading.Thread(target=full)
        other.start()
        other.join()
    assert [type(each.thread) for each in told] == [threading.Thread], "of other threads it is told"


@pytest.mark.slow
def test_mlflow_has_the_numbers_and_the_config_and_a_resumed_run_is_one_run(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    runtime = RuntimeConfig(tracking="mlflow")
    with RunLog(tmp_path, "stage1", runtime, tiny(), keep=False) as record:
        record.add({"phase": "p", "step": 1, "loss": 2.0})
    with RunLog(tmp_path, "stage1", runtime, tiny(), keep=True) as record:
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
