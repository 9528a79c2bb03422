"""DeepSpeed at every ZeRO stage and several workers: equal to plain torch in one process."""

from pathlib import Path

import pytest
import torch
from stage2_runs import TWO_WORKERS, Trained, check_equal_runs, close, in_two_workers, numbers, tiny

from gavamoe.checkpoint import load_vae_gmm
from gavamoe.dataset import open_dataset
from gavamoe.engines import make_engine
from gavamoe.errors import InputError
from gavamoe.explainer import load_explainer
from gavamoe.routes import read_routes, route_pairs
from gavamoe.stage2_setup import Setup, prepare

pytestmark = pytest.mark.usefixtures("extensions_dir")


@pytest.fixture
def setup(tiny_dataset: Path, stage1: Path) -> Setup:
    return prepare(tiny(), tiny_dataset, stage1)


def test_deepspeed_equals_torch(
    torch_run: Trained, tiny_dataset: Path, stage1: Path, tmp_path: Path, extensions_dir: Path
) -> None:
    run = Trained(tiny("runtime.engine=deepspeed", "stage2.zero_stage=1"), tiny_dataset, stage1, tmp_path)
    check_equal_runs(run, torch_run)
    assert not torch.distributed.is_initialized()
    assert not list(extensions_dir.rglob("*.so")), "DeepSpeed compiled an operation"


@pytest.mark.parametrize(
    "overrides",
    [("0",), ("2",), ("3",), ("2", "stage2.offload_optimizer=true"), ("3", "stage2.offload_parameters=true")],
)
def test_every_zero_stage_equals_torch(
    overrides: tuple[str, ...],
    torch_run: Trained,
    tiny_dataset: Path,
    stage1: Path,
    tmp_path: Path,
    extensions_dir: Path,
) -> None:
    stage, *others = overrides
    config = tiny("runtime.engine=deepspeed", f"stage2.zero_stage={stage}", *others)
    check_equal_runs(Trained(config, tiny_dataset, stage1, tmp_path), torch_run)


def test_accumulated_batches_equal_one_larger_batch(tiny_dataset: Path, stage1: Path, tmp_path: Path) -> None:
    # alpha 0 and no hidden ids: what is drawn at random would be drawn in another order
    same = ("stage2.alpha=0", "stage1.unknown_id_rate=0", "stage2.evaluate_every=0")
    large = Trained(tiny(*same), tiny_dataset, stage1, tmp_path / "large")
    small = ("stage2.batch_size=4", "stage2.gradient_accumulation=4")
    split = Trained(tiny(*same, *small), tiny_dataset, stage1, tmp_path / "split")
    for line, wanted in zip(split.lines("train"), large.lines("train"), strict=True):
        assert line == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("stage", [1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2, 3))])
def test_two_workers_equal_one(stage: int, tiny_dataset: Path, stage1: Path, tmp_path: Path) -> None:
    same = ("stage2.alpha=0", "stage1.unknown_id_rate=0")  # what is drawn at random differs by worker
    alone = Trained(tiny(*same), tiny_dataset, stage1, tmp_path)
    config = tiny(*same, *TWO_WORKERS, f"stage2.zero_stage={stage}")
    ranks = in_two_workers(config, tiny_dataset, stage1, tmp_path / "two")
    for phase in ("train", "valid"):
        for line, wanted in zip(numbers(ranks[0]["lines"], phase), alone.lines(phase), strict=True):
            assert line == pytest.approx(wanted, rel=1e-4)
    two = load_explainer(tmp_path / "two/stage2")[0].state_dict()
    close(two, load_explainer(alone.out)[0].state_dict(), 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_two_workers_train_stage_1_along(
    stage: int, torch_run: Trained, tiny_dataset: Path, stage1: Path, tmp_path: Path
) -> None:
    """With random latents and hidden ids losses agree roughly; the refreshed routes are those of the weights."""
    config = tiny(*TWO_WORKERS, "stage2.elbo_batch_size=32", f"stage2.zero_stage={stage}")
    ranks = in_two_workers(config, tiny_dataset, stage1, tmp_path / "two")
    for line, wanted in zip(numbers(ranks[0]["lines"], "train"), torch_run.lines("train"), strict=True):
        assert line["explanation_loss"] == pytest.approx(wanted["explanation_loss"], rel=0.02)
        assert line["elbo_loss"] == pytest.approx(wanted["elbo_loss"], rel=0.05)
    out = tmp_path / "two/stage2"
    pairs = open_dataset(tiny_dataset).arrays("train")
    assert (
        read_routes(out / "routes.parquet", "train").cluster
        == route_pairs(load_vae_gmm(out), pairs.user, pairs.item).cluster
    ).all()


def test_torch_engine_refuses_several_workers(setup: Setup) -> None:
    with pytest.raises(InputError, match="torch runs one worker, not 2"):
        make_engine("torch", setup.model, tiny().stage2, world_size=2, device="cpu")
