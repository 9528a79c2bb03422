"""Which state is kept: the best on validation, named in the metrics, resumed exactly; early stopping."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.stage2_runs import Trained, close
from helpers.tiny import tiny

from gavamoe.cli.output.training import print_training
from gavamoe.config.files import parse_config
from gavamoe.config.schema import Stage2Config
from gavamoe.errors import InputError
from gavamoe.stage2.best_state import BestState, best_step
from gavamoe.stage2.train import Training

pytestmark = pytest.mark.usefixtures("extensions_dir")


def test_the_best_step_is_the_first_of_the_lowest_after_the_start() -> None:
    assert best_step([]) is None
    assert best_step([(0, 1.0)]) is None
    assert best_step([(0, 1.0), (5, 3.0), (10, 2.0), (15, 2.0), (20, 4.0)]) == 10
    assert best_step([(5, math.nan), (10, 2.0), (15, math.inf)]) == 10


def test_patience_counts_validations_since_the_best() -> None:
    best = BestState(Stage2Config(patience=2))
    falling = [(0, 9.0), (5, 3.0), (10, 2.0)]
    assert not best.exhausted(falling)
    assert not best.exhausted([*falling, (15, 2.5)])
    assert best.exhausted([*falling, (15, 2.5), (20, 2.4)])
    assert not best.exhausted([*falling, (15, 2.5), (20, 1.9)])
    assert not BestState(Stage2Config()).exhausted([*falling, (15, 2.5), (20, 2.4)])


@pytest.mark.parametrize("override", ["stage2.evaluate_every=0", "stage2.alpha=1"])
def test_patience_without_validations_to_judge_by_is_refused(override: str) -> None:
    with pytest.raises(InputError, match="patience: needs validations to judge by"):
        parse_config({"stage2": {"patience": 2}}, "test", [override])


BEST = 6
SHORT = (
    "stage2.schedule=constant", "stage2.warmup_share=0", "stage2.evaluate_every=3", "stage2.checkpoint_every=4",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def judged() -> Iterator[None]:
    """Validation as ever, but for its result: it likes the state after 6 of the 12 steps best."""
    validate = Training._validate

    def judge(training: Training) -> None:
        validate(training)
        found = training._progress.validations
        found[-1] = (found[-1][0], 1.0 + abs(found[-1][0] - BEST))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "_validate", judge)
        yield


@pytest.fixture(scope="module")
def best_run(tiny_dataset: Path, stage1: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tiny(*SHORT), tiny_dataset, stage1, tmp_path_factory.mktemp("best"))


def test_the_artifact_is_the_best_state(best_run: Trained, tiny_dataset: Path, stage1: Path, tmp_path: Path) -> None:
    metrics = best_run.metrics
    assert metrics["kept_step"] == BEST
    assert (metrics["steps"], metrics["planned_steps"]) == (12, 12)
    assert (metrics["validation_loss"], metrics["validation_loss_at_end"]) == (1.0, 7.0)
    assert "12 of 12 on 1 workers; these weights are those after 6" in (best_run.out / "README.md").read_text()
    # A run that ends at that step leaves the same weights.
    ended = Trained(tiny(*SHORT, "stage2.max_steps=6"), tiny_dataset, stage1, tmp_path)
    close(best_run.weights(), ended.weights(), 0.0)


def test_the_last_state_on_request(best_run: Trained, tiny_dataset: Path, stage1: Path, tmp_path: Path) -> None:
    last = Trained(tiny(*SHORT, "stage2.keep=last"), tiny_dataset, stage1, tmp_path)
    assert (last.metrics["kept_step"], last.metrics["validation_loss"]) == (12, 7.0)
    best = best_run.weights()
    assert any(not torch.equal(tensor, best[name]) for name, tensor in last.weights().items())
    assert not list(last.context.checkpoints[-1].glob("best*"))


@pytest.mark.parametrize("checkpoint", [0, 1, 2])
def test_resuming_keeps_the_same_best(
    checkpoint: int, best_run: Trained, tiny_dataset: Path, stage1: Path, tmp_path: Path
) -> None:
    """From before the best, from after it, and from the end."""
    resumed = Trained(tiny(*SHORT), tiny_dataset, stage1, tmp_path, resume=best_run.context.checkpoints[checkpoint])
    assert resumed.metrics["validation_losses"] == best_run.metrics["validation_losses"]
    assert resumed.metrics["kept_step"] == BEST
    close(resumed.weights(), best_run.weights(), 0.0)


def test_patience_ends_the_run_at_the_same_step_after_resuming(
    best_run: Trained, tiny_dataset: Path, stage1: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(*SHORT, "stage2.patience=1")
    stopped = Trained(config, tiny_dataset, stage1, tmp_path / "stopped")
    assert [stopped.metrics[name] for name in ("steps", "planned_steps", "kept_step")] == [9, 12, BEST]
    close(stopped.weights(), best_run.weights(), 0.0)
    print_training({"stage2": stopped.metrics}, tmp_path, as_json=False)
    assert "stage2 stopped early" in capsys.readouterr().err
    print_training({"stage2": best_run.metrics}, tmp_path, as_json=False)
    assert "stopped early" not in capsys.readouterr().err.replace("stopped_early", "")
    for checkpoint in (stopped.context.checkpoints[0], stopped.context.checkpoints[-1]):
        again = Trained(config, tiny_dataset, stage1, tmp_path / checkpoint.name, resume=checkpoint)
        assert again.metrics["steps"] == 9
        close(again.weights(), stopped.weights(), 0.0)


def test_the_best_state_of_sharded_weights(best_run: Trained, tiny_dataset: Path, stage1: Path, tmp_path: Path) -> None:
    config = tiny(*SHORT, "runtime.engine=deepspeed", "stage2.zero_stage=3")
    sharded = Trained(config, tiny_dataset, stage1, tmp_path)
    assert sharded.metrics["kept_step"] == BEST
    close(sharded.weights(), best_run.weights(), 1e-3)
