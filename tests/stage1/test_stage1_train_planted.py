"""Stage 1 at the quickstart's size finds planted groups, and settings that must fail do."""

from pathlib import Path
from typing import Any

import pytest

from gavamoe.config.files import load_config
from gavamoe.data.dataset import open_dataset
from gavamoe.data.synthetic.generator import synthesize
from gavamoe.runtime.context import LocalContext
from gavamoe.stage1.train import train_stage1


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_groups_are_found(tmp_path: Path, seed: int) -> None:
    dataset = synthesize(tmp_path / "data", seed=seed)
    config = load_config("quickstart", [f"seed={seed}"])
    metrics = train_stage1(config, dataset, tmp_path / "stage1", LocalContext())
    truth = open_dataset(dataset).truth()
    assert truth is not None
    assert metrics["user_ari"] > 0.9
    assert metrics["smallest_cluster_share"] > 0.2
    assert metrics["test"]["rmse"] < 0.6 * truth.bias_rmse
    assert metrics["test"]["rmse"] < 1.14 * truth.noise_floor_rmse


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "what"), [
    ({"embedding_init": "random", "mixture_init": "random", "user_agreement": 0.0}, "clusters"),
    ({"embedding_init": "random", "user_agreement": 0.0, "pretrain_epochs": 0, "epochs": 30, "batch_size": 4096,
      "learning_rate": 1e-5, "mixture_learning_rate": 1e-5, "schedule": "constant"}, "ratings"),
])  # fmt: skip
def test_negative_controls_learn_nothing(tmp_path: Path, changes: dict[str, Any], what: str) -> None:
    """Without a fitted mixture clusters collapse; with the paper's printed rates on small data nothing is learnt."""
    dataset = synthesize(tmp_path / "data", seed=0)
    context = LocalContext()
    config = load_config("quickstart", [f"stage1.{name}={value}" for name, value in changes.items()])
    metrics = train_stage1(config, dataset, tmp_path / "stage1", context)
    assert metrics["user_ari"] < 0.1
    assert any("warning" in line for line in context.lines)
    if what == "clusters":
        assert metrics["smallest_cluster_share"] < 0.02
    else:
        assert metrics["test"]["rmse"] > 0.97 * metrics["test"]["constant_rmse"]
