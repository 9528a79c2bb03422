"""Batches one step ahead: the same ones in the same order, errors where they are asked for, a thread that ends."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.stage2_runs import Trained, tiny

from gavamoe.runtime.context import LocalContext
from gavamoe.stage2.engines.plain import TorchEngine
from gavamoe.stage2.setup import prepare
from gavamoe.stage2.step_batches import OneAhead, Step, StepBatches


def batch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


class Maker:
    """Notes which steps were asked of it, and on which thread; fails at one."""

    def __init__(self, fails_at: int = -1) -> None:
        self.made: list[tuple[int, str]] = []
        self.fails_at = fails_at

    def __call__(self, step: int) -> Step:
        self.made.append((step, threading.current_thread().name[:7]))
        if step == self.fails_at:
            raise IndexError(f"no rows for step {step}")
        return Step([{"number": torch.tensor(step)}], step)


@pytest.fixture
def maker() -> Iterator[Maker]:
    yield Maker()
    assert batch_threads() == []


def test_each_step_is_made_once_in_order_and_ahead(maker: Maker) -> None:
    ahead = OneAhead(maker)
    assert [ahead.take(step, ahead=step < 4).tokens for step in range(5)] == list(range(5))
    assert maker.made == [(0, "MainThr"), *((step, "batches") for step in range(1, 5))]
    ahead.close()


def test_what_must_wait_is_made_when_it_is_asked_for(maker: Maker) -> None:
    """A step of which something is still to come, as the routes of the next epoch, and a jump."""
    ahead = OneAhead(maker)
    ahead.take(0, ahead=False)
    assert [step for step, _ in maker.made] == [0]
    ahead.take(1, ahead=True)
    assert ahead.take(7, ahead=False).tokens == 7
    assert maker.made == [(0, "MainThr"), (1, "MainThr"), (2, "batches"), (7, "MainThr")]
    ahead.close()


def test_an_error_is_raised_where_its_step_is_asked_for() -> None:
    ahead = OneAhead(Maker(fails_at=2))
    ahead.take(0, ahead=True)
    ahead.take(1, ahead=True)
    with pytest.raises(IndexError, match="no rows for step 2"):
        ahead.take(2, ahead=True)
    ahead.close()
    assert batch_threads() == []


def test_batches_don_t_depend_on_who_makes_them(tiny_dataset: Path, stage1: Path) -> None:
    config = tiny("stage2.gradient_accumulation=2", "stage2.batch_size=8")
    setup = prepare(config, tiny_dataset, stage1)
    plain = StepBatches(config, setup, LocalContext())
    other = StepBatches(config, setup, LocalContext())
    ahead = OneAhead(other.make)
    for step in range(4):
        wanted, found = plain.make(step), ahead.take(step, ahead=True)
        assert found.tokens == wanted.tokens
        assert len(found.batches) == len(wanted.batches) == 2
        for one, two in zip(found.batches, wanted.batches, strict=True):
            assert one.keys() == two.keys()
            assert all(torch.equal(one[name], two[name]) for name in one)
    ahead.close()


def test_the_thread_ends_with_the_training_and_with_its_failure(
    tiny_dataset: Path, stage1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brief = ("stage2.max_steps=4", "stage2.evaluate_every=0", "stage2.validation_rows=8")
    Trained(tiny(*brief), tiny_dataset, stage1, tmp_path / "whole")
    assert batch_threads() == []
    make = StepBatches.make

    def fails(self: StepBatches, step: int) -> Step:
        if step == 2:
            raise IndexError("no rows")
        return make(self, step)

    monkeypatch.setattr(StepBatches, "make", fails)
    with pytest.raises(IndexError, match="no rows"):
        Trained(tiny(*brief), tiny_dataset, stage1, tmp_path / "cut off")
    assert batch_threads() == []


def test_an_epochs_first_batches_have_its_routes(
    tiny_dataset: Path, stage1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Routes are renewed before an epoch's first step: batches that were made before would have the last epoch's."""
    seen: dict[int, np.ndarray] = {}
    make = StepBatches.make

    def watched(self: StepBatches, step: int) -> Step:
        seen[step] = self.clusters_N
        return make(self, step)

    monkeypatch.setattr(StepBatches, "make", watched)
    monkeypatch.setattr(TorchEngine, "train_step", lambda *_: {"loss": torch.ones(())})  # 9 steps of 400 rows
    config = tiny("stage2.batch_size=400", "stage2.max_steps=9", "stage2.evaluate_every=0")
    run = Trained(config, tiny_dataset, stage1, tmp_path)
    assert run.metrics["steps_per_epoch"] == 3
    assert [seen[step] is seen[step - step % 3] for step in range(9)] == [True] * 9
    assert seen[2] is not seen[3]
    assert seen[5] is not seen[6]
