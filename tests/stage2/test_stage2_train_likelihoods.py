"""Every likelihood of stage 1 through stage 2, on every engine and ZeRO stage, interrupted and resumed."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.stage2_runs import Trained, close
from helpers.tiny import tiny
from safetensors.torch import load_file, save_file

from gavamoe.data.dataset import SPLITS, open_dataset
from gavamoe.data.prepare import prepare
from gavamoe.runtime.context import LocalContext
from gavamoe.stage1.artifact import load_vae_gmm
from gavamoe.stage1.train import train_stage1
from gavamoe.stage2.setup import prepare as setup_stage2

pytestmark = pytest.mark.usefixtures("extensions_dir")

LIKELIHOODS = ("categorical", "bernoulli", "gaussian")
ENGINES = {
    "torch": ("runtime.engine=torch",),
    **{f"zero {stage}": ("runtime.engine=deepspeed", f"stage2.zero_stage={stage}") for stage in range(4)},
}
SLOW = [("categorical", "zero 3"), ("bernoulli", "zero 3")]
"""ZeRO-3 takes six times as long as the others; the likelihood that failed on DeepSpeed is among the fast tests."""
SHORT = ("stage2.max_steps=4", "stage2.evaluate_every=2", "stage2.checkpoint_every=2", "stage2.validation_rows=8")


@pytest.fixture(scope="module")
def datasets(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The planted ratings on their grid; off it; and none at all. Splits and texts are the same."""
    folder = tmp_path_factory.mktemp("likelihoods")
    data = open_dataset(tiny_dataset)
    table = pa.concat_tables([data.table(split) for split in SPLITS])
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, len(table))
    columns = {"user": table["user"], "item": table["item"], "text": table["text"], "features": table["features"]}
    off_grid = pa.array(np.clip(table["rating"].to_numpy() + noise, 1, 5))
    pq.write_table(pa.table(columns | {"rating": off_grid}), folder / "off_grid.parquet")
    pq.write_table(pa.table(columns), folder / "implicit.parquet")
    for name in ("off_grid", "implicit"):
        prepare(folder / f"{name}.parquet", folder / name, "table")
    return {"categorical": tiny_dataset, "gaussian": folder / "off_grid", "bernoulli": folder / "implicit"}


@pytest.fixture(scope="module")
def stage1s(datasets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Stage 1 of each dataset, with the likelihood of that name."""
    folder = tmp_path_factory.mktemp("stage1s")
    for likelihood, data in datasets.items():
        train_stage1(tiny(f"stage1.likelihood={likelihood}"), data, folder / likelihood, LocalContext())
        assert json.loads((folder / likelihood / "vae_gmm.json").read_text())["likelihood"] == likelihood
    return {likelihood: folder / likelihood for likelihood in datasets}


@pytest.mark.parametrize(
    ("likelihood", "engine"),
    [
        pytest.param(one, other, marks=pytest.mark.slow if (one, other) in SLOW else ())
        for one in LIKELIHOODS
        for other in ENGINES
    ],
)
def test_a_run_trains_and_resumes(
    likelihood: str, engine: str, datasets: dict[str, Path], stage1s: dict[str, Path], tmp_path: Path
) -> None:
    """DeepSpeed failed on ratings off a grid, whose learned noise had no dimension."""
    config = tiny(*ENGINES[engine], *SHORT)
    data, stage1 = datasets[likelihood], stage1s[likelihood]
    whole = Trained(config, data, stage1, tmp_path / "whole")
    assert whole.metrics["validation_loss"] < whole.metrics["validation_loss_at_start"]
    before, after = load_vae_gmm(stage1).state_dict(), load_vae_gmm(whole.out).state_dict()
    learning = [name for name in before if not name.startswith("encoder.") and not name.endswith("_bias")]
    assert all(not torch.equal(before[name], after[name]) for name in learning)
    resumed = Trained(config, data, stage1, tmp_path / "resumed", resume=whole.context.checkpoints[0])
    assert resumed.lines("train") == whole.lines("train", after=2)
    close(resumed.weights(), whole.weights(), 0.0)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("experts", ["conversion=shared", "conversion=split", "conversion=random", "enabled=false"])
def test_no_parameter_is_without_dimension(
    likelihood: str, experts: str, datasets: dict[str, Path], stage1s: dict[str, Path]
) -> None:
    """DeepSpeed views parameters as bytes to send them, which torch refuses for a 0-dimensional tensor."""
    model = setup_stage2(tiny(f"stage2.experts.{experts}"), datasets[likelihood], stage1s[likelihood]).model
    for name, parameter in model.named_parameters():
        assert parameter.ndim > 0, name
        parameter.detach().view(torch.uint8)


def test_models_written_with_a_noise_of_no_dimension_are_read(stage1s: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    for path in stage1s["gaussian"].glob("vae_gmm.*"):
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "vae_gmm.safetensors")
    save_file(weights | {"log_noise": weights["log_noise"][0].clone()}, folder / "vae_gmm.safetensors")
    assert torch.equal(load_vae_gmm(folder).state_dict()["log_noise"], weights["log_noise"])
