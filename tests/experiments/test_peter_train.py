"""The baseline PETER: training, its answers, its part in a comparison."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny import tiny

from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import Dataset, open_dataset
from gavamoe.errors import InputError
from gavamoe.experiments.ablate import run_ablation
from gavamoe.experiments.baselines.peter_train import PeterWriter, train_peter
from gavamoe.generation.request import ExplanationRequest


def small(*overrides: str) -> RunConfig:
    return tiny(
        "baselines.peter.embedding_size=16", "baselines.peter.feed_forward=32", "generation.max_new_tokens=8",
        "evaluation.rows=12", "stage2.max_steps=12", *overrides,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(planted: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("peter") / "peter"
    train_peter(small(), planted, out, features=True)
    return out


def test_training_lowers_the_loss_and_is_reproducible(planted: Dataset, trained: Path, tmp_path: Path) -> None:
    train_peter(small(), planted, tmp_path / "again", features=True)
    for name in ("peter.safetensors", "peter.json"):
        assert (tmp_path / "again" / name).read_bytes() == (trained / name).read_bytes()
    metrics = json.loads((trained / "metrics.json").read_text())
    losses = [point["loss"] for point in metrics["validation_losses"]]
    assert losses[-1] < losses[0] < math.log(400)
    assert metrics["kept_step"] == 12
    longer = train_peter(
        small("stage2.max_steps=60", "baselines.peter.learning_rate=1e-2"), planted, tmp_path / "longer", features=True
    )
    assert longer["validation_loss"] < 0.8 * metrics["validation_loss"]


def test_it_answers_as_an_explainer(planted: Dataset, trained: Path) -> None:
    config = small()
    writer = PeterWriter.load(trained, planted, config.stage2.prompt)
    requests = [
        ExplanationRequest(user=0, item=1, rating=4.0, features=("battles",)),
        ExplanationRequest(user=2, item=3),
        ExplanationRequest(user=10_000, item=10_000, features=()),
    ]
    together = writer.explain(requests, config.generation)
    alone = [writer.explain([request], config.generation)[0] for request in requests]
    assert [said.text for said in together] == [said.text for said in alone]
    given, predicted, unknown = together
    assert (given.rating, given.rating_given, given.features) == (4.0, True, ("battles",))
    assert predicted.features == planted.catalog.usual_features(2, 3, len(predicted.features))
    assert predicted.rating in (planted.rating_values or ())
    assert not unknown.user_known
    assert np.isfinite(unknown.predicted_rating)


def test_a_wrong_or_damaged_folder_is_named(trained: Path, implicit_dataset: Path, planted: Dataset) -> None:
    prompt = small().stage2.prompt
    with pytest.raises(InputError, match="was trained on another dataset"):
        PeterWriter.load(trained, open_dataset(implicit_dataset), prompt)
    with pytest.raises(InputError, match="no peter artifact here"):
        PeterWriter.load(trained.parent, planted, prompt)


def test_implicit_data_have_no_rating_to_learn(implicit_dataset: Path, tmp_path: Path) -> None:
    data = open_dataset(implicit_dataset)
    metrics = train_peter(small(), data, tmp_path / "peter", features=False)
    assert math.isfinite(metrics["validation_loss"])
    writer = PeterWriter.load(tmp_path / "peter", data, small().stage2.prompt)
    assert writer.explain([ExplanationRequest(user=0, item=0)], small().generation)[0].rating is None


def test_it_takes_part_in_a_comparison(planted: Dataset, tmp_path: Path) -> None:
    names = ["peter", "peter-plus", "constant"]
    found = run_ablation(small(), planted.path, tmp_path, only=names, seeds=2)
    assert [(o.system, o.seed) for o in found.outcomes if o.trained] == [
        ("peter", 0), ("peter-plus", 0), ("peter", 1), ("peter-plus", 1),
    ]  # fmt: skip
    assert all(o.scores["validation_loss"] and o.scores["rmse"] for o in found.outcomes if o.trained)
    artifact = tmp_path / "peter" / "seed-0" / "peter" / "artifact.json"
    made = artifact.read_text()
    run_ablation(small(), planted.path, tmp_path, only=names, seeds=2)
    assert artifact.read_text() == made
    for path in (artifact, artifact.parent.parent / "evaluation" / "artifact.json"):  # as earlier versions wrote it
        manifest = json.loads(path.read_text())
        manifest["config"]["peter"] = manifest["config"].pop("baselines")["peter"]
        path.write_text(json.dumps(manifest))
    made = artifact.read_text()
    run_ablation(small(), planted.path, tmp_path, only=names, seeds=2)
    assert artifact.read_text() == made, "trained under the same settings, which stood at the top level then"
    changed = run_ablation(small("baselines.peter.layers=1"), planted.path, tmp_path, only=names[:1], seeds=1)
    assert changed.outcomes[0].scores["parameters"] != found.outcomes[0].scores["parameters"]
