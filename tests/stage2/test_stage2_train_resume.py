"""Resuming stage 2: equal to never having stopped, on both engines; checkpoints of other runs are refused."""

import json
import shutil
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.stage2_runs import Trained, close, put_code_into
from helpers.tiny import tiny

from gavamoe.errors import InputError
from gavamoe.runtime.context import LocalContext
from gavamoe.stage2 import best_state, train
from gavamoe.stage2.setup import prepare
from gavamoe.stage2.train import Training
from gavamoe.stage2.training_engines import make_engine

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


class Clock:
    """Time as the training loop sees it, where the test turns the monotonic clock."""

    perf_counter, process_time = staticmethod(time.perf_counter), staticmethod(time.process_time)

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def saved_steps(run: Trained) -> list[int]:
    return [json.loads((kept / "state.json").read_text())["progress"]["step"] for kept in run.context.checkpoints]


@pytest.fixture
def two_minutes_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, step = Clock(), Training._step

    def slow(training: Training) -> None:
        step(training)
        clock.now += 120

    monkeypatch.setattr(train, "time", clock)
    monkeypatch.setattr(Training, "_step", slow)
    monkeypatch.setattr(train, "LOG_EVERY", 1)


BY_THE_CLOCK = ("stage2.checkpoint_minutes=5", "stage2.evaluate_every=0")


@pytest.mark.usefixtures("two_minutes_a_step")
def test_checkpoints_by_the_clock(tiny_dataset: Path, stage1: Path, tmp_path: Path) -> None:
    """One at the first line of the log after five minutes since the last, whatever the last was due to."""
    alone = Trained(tiny(*BY_THE_CLOCK, "stage2.checkpoint_every=0"), tiny_dataset, stage1, tmp_path / "alone")
    assert saved_steps(alone) == [3, 6, 9, 12]
    both = Trained(tiny(*BY_THE_CLOCK, "stage2.checkpoint_every=4"), tiny_dataset, stage1, tmp_path / "both")
    assert saved_steps(both) == [3, 4, 7, 8, 11, 12]
    resumed = Trained(
        tiny(*BY_THE_CLOCK, "stage2.checkpoint_every=0"), tiny_dataset, stage1, tmp_path / "resumed",
        resume=alone.context.checkpoints[0],
    )  # fmt: skip
    assert saved_steps(resumed) == [6, 9, 12]
    close(resumed.weights(), alone.weights(), 0.0)


@pytest.mark.usefixtures("two_minutes_a_step")
def test_the_first_workers_clock_decides(
    tiny_dataset: Path, stage1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another worker, whose own clock says nothing, takes what comes with the sums of the losses."""
    config = tiny(*BY_THE_CLOCK, "stage2.checkpoint_every=0")
    setup = prepare(config, tiny_dataset, stage1)
    engine = make_engine("torch", setup.model, config.stage2, world_size=1, device="cpu")
    verdicts = []
    with closing(Training(config, setup, engine, LocalContext(rank=1, world_size=2))) as training:
        for step in range(4):
            monkeypatch.setattr(training, "_sum", lambda values, due=step == 2: values + due * values.new_tensor(
                [0.0] * (len(values) - 1) + [1.0]
            ))  # fmt: skip
            training._step()
            assert not training._minutes_are_over()
            verdicts.append(training._log())
    assert verdicts == [False, False, True, False]


def test_the_best_state_is_written_when_it_has_changed(
    tiny_dataset: Path, stage1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validations after 2, 4 ... 12 steps, of which that after 4 is the best, checkpoints after 3, 4, 6, 9, 12."""
    validate = Training._validate

    def judge(training: Training) -> None:
        validate(training)
        found = training._progress.validations
        found[-1] = (found[-1][0], 1.0 + abs(found[-1][0] - 4))

    written: list[str] = []
    save = torch.save

    def counted(state: Any, path: Path) -> None:
        written.append(path.name)
        save(state, path)

    monkeypatch.setattr(Training, "_validate", judge)
    monkeypatch.setattr(train, "_due", lambda step, every: step in (3, 4, 6, 9, 12) if every == 5 else step % 2 == 0)
    monkeypatch.setattr(best_state.torch, "save", counted)
    config = tiny("stage2.evaluate_every=2", "stage2.checkpoint_every=5")
    run = Trained(config, tiny_dataset, stage1, tmp_path / "whole")
    steps = saved_steps(run)
    assert steps == [3, 4, 6, 9, 12]
    has = [(kept / "best.pt").exists() for kept in run.context.checkpoints]
    assert has == [True, False, True, True, True], "after 4 the engine's own files are the best state"
    assert written.count("best.pt") == 2, "after 3 that of 2, after 6 that of 4; later ones are the same file"
    for index, kept in enumerate(run.context.checkpoints[:-1]):
        resumed = Trained(config, tiny_dataset, stage1, tmp_path / str(index), resume=kept)
        assert resumed.metrics["kept_step"] == 4
        close(resumed.weights(), run.weights(), 0.0)
