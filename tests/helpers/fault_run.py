"""For the tests of faults: small trainings whose processes die, in functions that Ray's workers import by name."""

import json
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from gavamoe.config.schema import RunConfig, RuntimeConfig
from gavamoe.runtime.context import Context
from gavamoe.runtime.ray_train import run_training
from helpers.tiny import DEFAULT_RATES, TWO_WORKERS

FAULTS = (
    *TWO_WORKERS, *DEFAULT_RATES, "stage1.batch_size=128", "stage1.pretrain_epochs=2", "stage1.epochs=2",
    "stage2.batch_size=8", "stage2.elbo_batch_size=32", "stage2.max_steps=24", "stage2.evaluate_every=8",
    "stage2.validation_rows=16",
)  # fmt: skip
"""Overrides of the tiny config: two workers, and steps enough to die in."""
TIMES = ("seconds", "cpu_seconds", "validation_cpu_seconds", "tokens_per_second", "pairs_per_second")
STEPS = {"stage1": 40, "stage2": 24}
"""Steps that a training with `FAULTS` takes, by stage."""
Kills = list[tuple[int, int]]
"""(step, from 0; rank) of processes that are killed before the step."""


def killer(kills: Kills, died: Path, context: Context) -> Any:
    """A function to call before each step: it kills this process with signal 9 where `kills` says so, once each."""

    def before_step(step: int) -> None:
        mark = died / f"{step}-{context.rank}"
        if (step, context.rank) in kills and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return before_step


def stage1_that_dies(
    *, context: Context, kills: Kills, died: Path, config: RunConfig, dataset: Path, out: Path
) -> dict[str, Any]:
    """Stage 1, whose processes are killed before some steps."""
    from gavamoe.stage1 import trainer
    from gavamoe.stage1.train import train_stage1

    before, real = killer(kills, died, context), trainer.Trainer._train_step

    def train_step(self: Any, *arguments: Any) -> Any:
        before(self.step)
        return real(self, *arguments)

    trainer.Trainer._train_step = train_step  # type: ignore[method-assign]
    return train_stage1(config, dataset, out, context)


def stage2_that_dies(
    *, context: Context, kills: Kills, died: Path, config: RunConfig, dataset: Path, stage1: Path, out: Path
) -> dict[str, Any]:
    """Stage 2, the same way."""
    from gavamoe.stage2 import train

    before, real = killer(kills, died, context), train.Training._step

    def take_step(self: Any) -> None:
        before(self._progress.step)
        real(self)

    train.Training._step = take_step  # type: ignore[method-assign]
    return train.train_stage2(config, dataset, stage1, out, context)


def train(stage: str, config: RunConfig, dataset: Path, folder: Path, stage1: Path, kills: Kills) -> dict[str, Any]:
    """Train a stage in `folder`, with deaths; returns its metrics."""
    died = folder / "died"
    died.mkdir(parents=True)
    arguments: dict[str, Any] = {
        "kills": kills, "died": died, "config": config, "dataset": dataset, "out": folder / stage,
    }  # fmt: skip
    if stage == "stage2":
        arguments["stage1"] = stage1
    loop = stage1_that_dies if stage == "stage1" else stage2_that_dies
    found = run_training(loop, arguments, placement=config.runtime, folder=folder, name=stage)
    assert isinstance(found, dict)
    return found


def log_lines(folder: Path, stage: str) -> list[dict[str, Any]]:
    """The log, without what time decides."""
    lines = [json.loads(line) for line in (folder / "logs" / f"{stage}.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def numbers_of(value: Any, prefix: str = "") -> dict[str, float]:
    """Every number of nested metrics by its path, without what time decides."""
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list | tuple):
        parts = ((str(index), one) for index, one in enumerate(value))  # type: ignore[assignment]
    else:
        return {prefix: float(value)} if isinstance(value, int | float) else {}
    found: dict[str, float] = {}
    for name, one in parts:
        if name not in TIMES:
            found |= numbers_of(one, f"{prefix}.{name}")
    return found


def largest_difference(left: Any, right: Any) -> float:
    """Over all numbers of two nested values, relative where they are above 1; infinite where one lacks a number."""
    a, b = numbers_of(left), numbers_of(right)
    if a.keys() != b.keys():
        return float("inf")
    return max((abs(a[name] - b[name]) / max(1.0, abs(a[name])) for name in a), default=0.0)


def counting_loop(
    *, context: Context, steps: int, size: int = 0, pause: float = 0.0, fail_at: int = -1
) -> dict[str, Any]:
    """Counts the workers in each step; a checkpoint of `size` bytes a step; may fail for good before a step."""
    start = 0 if context.resume_from is None else int((context.resume_from / "step").read_text())
    for step in range(start, steps):
        workers = torch.ones(1)
        if context.world_size > 1:
            torch.distributed.all_reduce(workers)
        time.sleep(pause)
        if step == fail_at:
            raise ValueError("as planned")
        context.log(
            {"phase": "count", "step": step + 1, "steps": steps, "workers": int(workers), "loss": 1 / (step + 1)}
        )
        with tempfile.TemporaryDirectory() as name:
            if context.rank == 0:
                (Path(name) / "step").write_text(str(step + 1))
                (Path(name) / "weights").write_bytes(os.urandom(size))
            context.checkpoint(Path(name), {"step": step + 1})
    return {"start": start, "workers": context.world_size}


def count(
    folder: Path, runtime: RuntimeConfig, *, resume: bool = False, elastic: bool = False, **arguments: Any
) -> Any:
    return run_training(
        counting_loop, arguments, placement=runtime, folder=folder, name="count", resume=resume, elastic=elastic
    )
