"""gavamoe status, from folders in every state."""

import json
import os
import time
from pathlib import Path

import pytest
from helpers.cli import Runner
from helpers.tiny import tiny

from gavamoe.artifacts.files import write_json
from gavamoe.artifacts.manifest import write_manifest
from gavamoe.artifacts.run import claim_run
from gavamoe.cli.status import SECONDS_OF_SILENCE, read_status
from gavamoe.data.dataset import open_dataset
from gavamoe.errors import InputError

LINES = [{"phase": "stage2", "step": step, "steps": 40, "loss": 1 / step} for step in (10, 20)]


@pytest.fixture
def run(tmp_path: Path, tiny_dataset: Path) -> Path:
    """A run that has been claimed and nothing more."""
    claim_run(tmp_path / "run", tiny(), tiny_dataset, open_dataset(tiny_dataset).fingerprint, continuing=False)
    return tmp_path / "run"


def finish(run: Path, stage: str, metrics: dict[str, object]) -> None:
    (run / stage).mkdir()
    write_json(run / stage / "metrics.json", metrics)
    write_manifest(run / stage, stage, tiny(), {})  # type: ignore[arg-type]


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


def test_the_command_prints_both_forms(gavamoe: Runner, run: Path) -> None:
    log(run, "stage1", age=3600)
    shown = gavamoe("status", run)
    assert shown.code == 0
    for text in ("stage1", "stopped", "20 of 40", "last heard of 60 min ago", "next: gavamoe train"):
        assert text in shown.err
    assert json.loads(gavamoe("status", run, "--json").out)["steps"][0]["step"] == 20
    assert gavamoe("status", run / "nothing").code == 2
