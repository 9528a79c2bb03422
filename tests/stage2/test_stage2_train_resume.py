"""Resuming stage 2: equal to never having stopped, on both engines; checkpoints of other runs are refused."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.stage2_runs import Trained, close, put_code_into
from helpers.tiny import tiny

from gavamoe.errors import InputError

pytestmark = pytest.mark.usefixtures("extensions_dir")


@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_resuming_equals_never_having_stopped(
    engine: str, torch_run: Trained, tiny_dataset: Path, stage1: Path, tmp_path: Path
) -> None:
    config = tiny(f"runtime.engine={engine}")
    whole = torch_run if engine == "torch" else Trained(config, tiny_dataset, stage1, tmp_path / "whole")
    resumed = Trained(config, tiny_dataset, stage1, tmp_path / "resumed", resume=whole.context.checkpoints[0])
    assert resumed.lines("train") == whole.lines("train", after=6)
    for line, wanted in zip(resumed.lines("valid"), whole.lines("valid", after=6), strict=True):
        assert line == pytest.approx(wanted, rel=1e-5)  # sums of the probe follow the place of tensors in memory
    close(resumed.weights(), whole.weights(), 0.0)
    assert resumed.metrics["validation_losses"] == whole.metrics["validation_losses"]


def test_another_worker_count_is_refused_by_name(
    torch_run: Trained, tiny_dataset: Path, stage1: Path, tmp_path: Path
) -> None:
    """Another count would mean other rows a step, and so other steps."""
    checkpoint = shutil.copytree(torch_run.context.checkpoints[0], tmp_path / "checkpoint")
    state = json.loads((checkpoint / "state.json").read_text())
    state["identity"]["runtime.workers"] = 2
    (checkpoint / "state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match=r"has runtime\.workers 2, this run has 1.*its steps would hold other rows"):
        Trained(tiny(), tiny_dataset, stage1, tmp_path, resume=checkpoint)


def test_a_finished_run_is_only_exported_again(
    torch_run: Trained, tiny_dataset: Path, stage1: Path, tmp_path: Path
) -> None:
    again = Trained(tiny(), tiny_dataset, stage1, tmp_path, resume=torch_run.context.checkpoints[-1])
    assert again.context.lines == []
    close(again.weights(), torch_run.weights(), 0.0)
    assert again.metrics["validation_loss"] == torch_run.metrics["validation_loss"]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("runtime.engine=deepspeed", r"has runtime\.engine torch, this run has deepspeed"),
        ("stage2.zero_stage=2", r"has stage2\.zero_stage 1, this run has 2"),
        ("stage2.max_steps=20", r"has steps 12, this run has 20"),
        ("seed=4", r"has seed 0, this run has 4"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    override: str, problem: str, torch_run: Trained, tiny_dataset: Path, stage1: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=problem):
        Trained(tiny(override), tiny_dataset, stage1, tmp_path, resume=torch_run.context.checkpoints[0])
    assert not (tmp_path / "stage2").exists()


@pytest.mark.parametrize(
    "overrides",
    [
        ("runtime.engine=torch",),
        *[("runtime.engine=deepspeed", f"stage2.zero_stage={stage}") for stage in range(3)],
        pytest.param(("runtime.engine=deepspeed", "stage2.zero_stage=3"), marks=pytest.mark.slow),
        ("runtime.engine=deepspeed", "stage2.zero_stage=2", "stage2.offload_optimizer=true"),
    ],
    ids=lambda overrides: " ".join(one.partition("=")[2] for one in overrides),
)
def test_code_in_a_checkpoint_is_not_run(
    overrides: tuple[str, ...], tiny_dataset: Path, stage1: Path, tmp_path: Path
) -> None:
    """Each file of the checkpoint in turn holds an object that would make a folder, with checksums that are right."""
    brief = ("stage2.max_steps=2", "stage2.evaluate_every=1", "stage2.checkpoint_every=1", "stage2.validation_rows=8")
    config = tiny(*overrides, *brief)
    whole = Trained(config, tiny_dataset, stage1, tmp_path / "whole")
    files = [path for path in whole.context.checkpoints[0].rglob("*.pt") if path.name != "best.pt"]
    assert files
    for file in files:
        checkpoint = shutil.copytree(whole.context.checkpoints[0], tmp_path / f"evil-{file.name}")
        put_code_into(checkpoint / file.relative_to(whole.context.checkpoints[0]), tmp_path / "it ran")
        with pytest.raises(InputError, match="holds more than tensors and plain values"):
            Trained(config, tiny_dataset, stage1, tmp_path / "resumed", resume=checkpoint)
        assert not (tmp_path / "it ran").exists()
