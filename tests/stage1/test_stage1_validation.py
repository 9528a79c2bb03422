"""What stage 1 says of itself: collapse named with its remedy, divergence, validation, the likelihood that fits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny import tiny_stage1

from gavamoe.data.dataset import open_dataset
from gavamoe.errors import InputError, RunError
from gavamoe.runtime.context import LocalContext
from gavamoe.stage1.train import train_stage1
from gavamoe.stage1.trainer import Trainer, rating_model
from gavamoe.stage1.validation import Validation, collapse_warnings, validate


def test_a_collapsed_cluster_is_named_or_stops_the_run(tiny_dataset: Path, tmp_path: Path) -> None:
    context = LocalContext()
    train_stage1(tiny_stage1(min_cluster_share=0.5), tiny_dataset, tmp_path / "warned", context)
    warnings = [line["warning"] for line in context.lines if "warning" in line]
    assert any("lower stage1.clusters" in warning for warning in warnings)
    with pytest.raises(RunError, match=r"holds .* of the pairs, less than stage1\.min_cluster_share 50\.0%"):
        train_stage1(
            tiny_stage1(min_cluster_share=0.5, on_collapse="stop"), tiny_dataset, tmp_path / "stopped", LocalContext()
        )
    assert not (tmp_path / "stopped").exists()


def test_each_collapse_names_its_remedy() -> None:
    terms = {"loss": 1.0, "kl": 3.0}
    config = tiny_stage1().stage1

    def found(**changes: Any) -> list[str]:
        values = {
            "terms": terms, "rmse": 0.8, "mae": 0.6, "constant_rmse": 1.3,
            "cluster_shares": [0.5, 0.3, 0.2], "active_dimensions": 4, "pairs": 100, **changes,
        }  # fmt: skip
        return collapse_warnings(Validation(**values), config)

    assert found() == []
    assert "lower stage1.clusters" in found(cluster_shares=[0.6, 0.399, 0.001])[0]
    assert "lower stage1.beta" in found(terms={"loss": 1.0, "kl": 0.01})[0]
    assert "posterior collapse" in found(active_dimensions=0)[0]
    assert "raise stage1.learning_rate" in found(rmse=1.31)[0]


def test_a_diverging_loss_is_a_failure(tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "gavamoe.stage1.vae_gmm.VaeGmm.log_likelihood", lambda _self, output, _rating: output[:, 0] * np.inf
    )
    with pytest.raises(RunError, match=r"step 0: the gradient is not finite; lower stage1\.learning_rate"):
        train_stage1(tiny_stage1(), tiny_dataset, tmp_path / "stage1", LocalContext())


def test_validation_does_not_depend_on_the_workers(tiny_dataset: Path) -> None:
    """Sums over batches shared out over two workers add up to one worker's."""
    trainer = Trainer(tiny_stage1(), open_dataset(tiny_dataset), LocalContext())
    file = trainer.source.held_out("valid")
    pairs = file.all()
    first, second = (validate(trainer.model, file, 0.1, LocalContext()) for _ in range(2))
    assert first == second
    rating = trainer.model.predict_rating(torch.tensor(pairs.user), torch.tensor(pairs.item)).detach().numpy()
    assert first.rmse == pytest.approx(float(np.sqrt(np.mean((rating - pairs.rating) ** 2))), rel=1e-5)
    assert first.constant_rmse == pytest.approx(float(pairs.rating.std()), rel=1e-5)


def test_likelihood_follows_the_data(tiny_dataset: Path, implicit_dataset: Path) -> None:
    rated, implicit = open_dataset(tiny_dataset), open_dataset(implicit_dataset)
    assert rating_model(tiny_stage1().stage1, rated) == ("gaussian", (1, 5))
    assert rating_model(tiny_stage1(likelihood="categorical").stage1, rated) == ("categorical", (1, 2, 3, 4, 5))
    assert rating_model(tiny_stage1(likelihood="bernoulli").stage1, rated) == ("bernoulli", (1, 5))
    assert rating_model(tiny_stage1().stage1, implicit) == ("bernoulli", (0, 1))
    with pytest.raises(InputError, match=r"stage1\.likelihood: categorical needs ratings"):
        rating_model(tiny_stage1(likelihood="categorical").stage1, implicit)
