"""The baseline PETER: its masking, its losses by hand, writing with a cache, training, its part in ablate."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.stage2_runs import tiny
from torch import Tensor

from gavamoe.config.schema import PeterConfig, RunConfig
from gavamoe.data.dataset import Dataset, open_dataset
from gavamoe.errors import InputError
from gavamoe.experiments.ablate import run_ablation
from gavamoe.experiments.baselines.peter_model import Peter, PeterSpec
from gavamoe.experiments.baselines.peter_train import PeterWriter, train_peter
from gavamoe.generation.request import ExplanationRequest

SIZE = PeterConfig(embedding_size=16, feed_forward=32, dropout=0.0)
END = 1


def small(*overrides: str) -> RunConfig:
    return tiny(
        "peter.embedding_size=16", "peter.feed_forward=32", "generation.max_new_tokens=8", "evaluation.rows=12",
        "stage2.max_steps=12", *overrides,
    )  # fmt: skip


def peter(**changes: object) -> Peter:
    torch.manual_seed(0)
    values = {"vocabulary": 20, "n_users": 5, "n_items": 4, "places": 16, "mean_rating": 3.5, "features": True}
    return Peter(PeterSpec(size=SIZE, **values | changes)).eval()  # type: ignore[arg-type]


def a_batch() -> dict[str, Tensor]:
    """Two rows: prefix of two tokens, explanations of three and two tokens, the end token last."""
    return {
        "users": torch.tensor([0, 5]),
        "items": torch.tensor([3, 1]),
        "ratings": torch.tensor([2.0, math.nan]),
        "tokens": torch.tensor([[7, 2, 8, 9, END], [6, 2, 8, END, END]]),
        "labels": torch.tensor([[-100, -100, 8, 9, END], [-100, -100, 8, END, -100]]),
    }


@pytest.fixture(scope="module")
def planted(tiny_dataset: Path) -> Dataset:
    return open_dataset(tiny_dataset)


@pytest.fixture(scope="module")
def trained(planted: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("peter") / "peter"
    train_peter(small(), planted, out, features=True)
    return out


def test_user_and_item_see_each_other_and_nobody_sees_ahead() -> None:
    model, batch = peter(), a_batch()

    def states(item: int, last: int) -> Tensor:
        tokens = batch["tokens"][:1].clone()
        tokens[0, -1] = last
        found: Tensor = model(batch["users"][:1], torch.tensor([item]), tokens)[0][0]
        return found

    with torch.inference_mode():
        one, other_item, other_word = states(3, END), states(2, END), states(3, 9)
    assert not torch.allclose(one[0], other_item[0])  # the user's place sees the item, which comes after it
    assert torch.allclose(one[:-1], other_word[:-1])
    assert not torch.allclose(one[-1], other_word[-1])


def test_losses_by_hand() -> None:
    model, batch = peter(), a_batch()
    with torch.inference_mode():
        found = model.losses(batch, END)
        states, _ = model(batch["users"], batch["items"], batch["tokens"])
        words = torch.log_softmax(model.output(states), dim=-1)
        # Places: 0 user, 1 item, 2 feature, 3 <s>, 4 on the explanation.
        answers = [(0, 3, 8), (0, 4, 9), (0, 5, END), (1, 3, 8), (1, 4, END)]
        explanation = -torch.stack([words[row, place, word] for row, place, word in answers]).mean()
        context = -torch.stack([words[0, 1, 8], words[0, 1, 9], words[1, 1, 8]]).mean()
        rating = (model.predict_rating(states)[0] - 2.0) ** 2
    assert torch.allclose(found["explanation"], explanation)
    assert torch.allclose(found["context"], context)
    assert torch.allclose(found["rating"], rating)
    assert torch.allclose(found["loss"], explanation + context + 0.1 * rating)


def test_padding_changes_no_loss() -> None:
    model, batch = peter(), a_batch()
    alone = {name: values[1:] for name, values in batch.items()}
    cut = alone | {name: alone[name][:, :-1] for name in ("tokens", "labels")}
    with torch.inference_mode():
        assert torch.allclose(model.losses(alone, END)["loss"], model.losses(cut, END)["loss"], atol=1e-6)


def test_cached_writing_equals_reading_all_again() -> None:
    model = peter()
    users, items, prefix = torch.tensor([0, 4, 2]), torch.tensor([1, 0, 3]), torch.tensor([[7, 2], [6, 2], [5, 2]])
    banned = [0, 2]
    texts, ratings = model.write(users, items, prefix, longest=6, end=END, banned=banned)
    with torch.inference_mode():
        for row, text in enumerate(texts):
            tokens = prefix[row : row + 1]
            for word in text:
                states, _ = model(users[row : row + 1], items[row : row + 1], tokens)
                scores = model.output(states[0, -1])
                scores[banned] = -torch.inf
                assert int(scores.argmax()) == word
                tokens = torch.cat([tokens, torch.tensor([[word]])], dim=1)
            assert len(text) == 6 or text[-1] == END
            assert math.isclose(float(model.predict_rating(states)[0]), ratings[row], rel_tol=1e-5)


def test_writing_ends_where_the_places_end() -> None:
    model = peter(places=6)
    texts, _ = model.write(torch.tensor([0]), torch.tensor([0]), torch.tensor([[7, 2]]), 50, END, [END])
    assert len(texts[0]) == 3  # two places after the prefix, and the word after the last of them


def test_training_lowers_the_loss_and_is_reproducible(planted: Dataset, trained: Path, tmp_path: Path) -> None:
    train_peter(small(), planted, tmp_path / "again", features=True)
    for name in ("peter.safetensors", "peter.json"):
        assert (tmp_path / "again" / name).read_bytes() == (trained / name).read_bytes()
    metrics = json.loads((trained / "metrics.json").read_text())
    losses = [point["loss"] for point in metrics["validation_losses"]]
    assert losses[-1] < losses[0] < math.log(400)
    assert metrics["kept_step"] == 12
    longer = train_peter(
        small("stage2.max_steps=60", "peter.learning_rate=1e-2"), planted, tmp_path / "longer", features=True
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
    made = (tmp_path / "peter" / "seed-0" / "peter" / "artifact.json").read_text()
    run_ablation(small(), planted.path, tmp_path, only=names, seeds=2)
    assert (tmp_path / "peter" / "seed-0" / "peter" / "artifact.json").read_text() == made
    changed = run_ablation(small("peter.layers=1"), planted.path, tmp_path, only=names[:1], seeds=1)
    assert changed.outcomes[0].scores["parameters"] != found.outcomes[0].scores["parameters"]
