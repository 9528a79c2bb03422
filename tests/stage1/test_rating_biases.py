"""Biases that shrink by themselves, and an interaction that counts for what it is worth on held-out pairs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny import tiny_stage1

from gavamoe.data.dataset import open_dataset
from gavamoe.runtime.context import LocalContext
from gavamoe.stage1.artifact import load_vae_gmm
from gavamoe.stage1.pair_stream import PairFile, Pairs
from gavamoe.stage1.rating_biases import LEAST_HELD_OUT, fit_biases, shrink_interaction
from gavamoe.stage1.train import train_stage1
from gavamoe.stage1.trainer import build_model
from gavamoe.stage1.validation import LEAST_GAIN, no_better_than_biases

USERS, ITEMS = 400, 300


def planted(per_user: int, item_spread: float, seed: int = 0) -> tuple[Pairs, np.ndarray, np.ndarray]:
    """Ratings of known effects: the users' with a standard deviation of .5, noise of .8."""
    random = np.random.default_rng(seed)
    user_effect, item_effect = random.normal(0, 0.5, USERS), random.normal(0, item_spread, ITEMS)
    user = np.repeat(np.arange(USERS, dtype=np.int32), per_user)
    item = random.integers(ITEMS, size=len(user)).astype(np.int32)
    rating = 3 + user_effect[user] + item_effect[item] + random.normal(0, 0.8, len(user))
    return Pairs(user, item, rating.astype(np.float32)), user_effect, item_effect


@pytest.mark.parametrize(("per_user", "item_spread"), [(4, 0.5), (30, 0.5), (30, 0.05)])
def test_effects_and_noise_are_found_without_a_setting(per_user: int, item_spread: float) -> None:
    """By the best that can be done: no fixed shrinkage, tried over a grid, has a smaller error."""
    pairs, user_effect, item_effect = planted(per_user, item_spread)
    found = fit_biases(lambda: [pairs], USERS, ITEMS)
    assert found.noise == pytest.approx(0.64, rel=0.08)

    def error(user: np.ndarray, item: np.ndarray) -> float:
        truth = 3 + user_effect[:, None] + item_effect
        return float(np.sqrt(np.mean((found.mean + user[:, None] + item - truth) ** 2)))

    fixed = []
    for shrinkage in (0.5, 1, 2, 5, 10, 25, 100):
        user, item = np.zeros(USERS), np.zeros(ITEMS)
        for _ in range(20):
            left = pairs.rating - found.mean - user[pairs.user]
            item = np.bincount(pairs.item, left, ITEMS) / (found.item_count + shrinkage)
            left = pairs.rating - found.mean - item[pairs.item]
            user = np.bincount(pairs.user, left, USERS) / (found.user_count + shrinkage)
        fixed.append(error(user, item))
    assert error(found.user, found.item) < 1.02 * min(fixed)


def test_a_stream_in_pieces_gives_the_same() -> None:
    pairs, _, _ = planted(10, 0.3)
    whole = fit_biases(lambda: [pairs], USERS, ITEMS)
    cut = fit_biases(lambda: [pairs.take(slice(0, 1_000)), pairs.take(slice(1_000, None))], USERS, ITEMS)
    np.testing.assert_allclose(cut.user, whole.user)
    np.testing.assert_allclose(cut.item, whole.item)
    assert cut.noise == pytest.approx(whole.noise)


@pytest.mark.parametrize("ratings", [np.full(6, 4.0), np.array([4.0, 4, 4, 4, 4, 5])])
def test_hardly_anything_to_learn_from(ratings: np.ndarray) -> None:
    pairs = Pairs(np.arange(6, dtype=np.int32), np.zeros(6, np.int32), ratings.astype(np.float32))
    found = fit_biases(lambda: [pairs], 8, 2)
    assert np.isfinite(found.user).all()
    assert np.abs(found.user).max() <= 1
    assert found.user[6:].tolist() == [0, 0], "users without ratings are as the mean"


def test_a_model_starts_from_them_and_says_so_for_unknown_ids(tiny_dataset: Path) -> None:
    data = open_dataset(tiny_dataset)
    model = build_model(tiny_stage1(), data)
    users, items = data.catalog.known_users, data.catalog.known_items
    random = np.random.default_rng(0)
    user_effect, item_effect = random.normal(0, 0.2, users), random.normal(0, 0.2, items)
    model.set_biases(3.5, user_effect, item_effect)
    with torch.no_grad():
        for parameter in model.decoder[-1].parameters():
            parameter.zero_()
    pairs = torch.tensor([[0, 0], [users - 1, items - 1], [users + 7, 0], [0, items], [users, items]])
    expected = [
        3.5 + user_effect[0] + item_effect[0], 3.5 + user_effect[-1] + item_effect[-1], 3.5 + item_effect[0],
        3.5 + user_effect[0], 3.5,
    ]  # fmt: skip
    predicted = model.predict_rating(pairs[:, 0], pairs[:, 1])
    torch.testing.assert_close(predicted.double(), torch.tensor(expected).double(), atol=1e-5, rtol=0)
    model.set_biases(4.9, user_effect + 1, item_effect)
    assert model.predict_rating(pairs[:, 0], pairs[:, 1]).max() <= 5, "never off the scale"


def held_out(model: torch.nn.Module, share: float, count: int = 500) -> PairFile:
    """Pairs whose ratings are their bias and so much of what the decoder adds."""
    random = np.random.default_rng(1)
    user = random.integers(model.n_users, size=count).astype(np.int32)
    item = random.integers(model.n_items, size=count).astype(np.int32)
    with torch.no_grad():
        ids = torch.tensor(user), torch.tensor(item)
        bias_N = model.bias(*ids)
        added_N = model.decode(model.encode(*ids)[0], None)[:, 0]
    file = PairFile()
    file.append(Pairs(user, item, (3 + 2 * (bias_N + share * added_N)).numpy().astype(np.float32)))
    return file


@pytest.mark.parametrize(("share", "found"), [(0.0, 0.0), (0.4, 0.4), (1.0, 1.0), (-0.5, 0.0), (1.7, 1.0)])
def test_the_interaction_is_scaled_to_what_it_is_worth(share: float, found: float, tiny_dataset: Path) -> None:
    model = build_model(tiny_stage1(), open_dataset(tiny_dataset)).eval()
    with torch.no_grad():
        model.decoder[-1].weight.normal_(std=0.1)
    pairs = held_out(model, share)
    assert shrink_interaction(model, pairs, "cpu") == pytest.approx(found, abs=1e-3)
    if 0 <= share <= 1:
        everything = pairs.all()
        predicted = model.predict_rating(torch.tensor(everything.user), torch.tensor(everything.item))
        np.testing.assert_allclose(predicted.detach().numpy(), everything.rating.clip(1, 5), atol=2e-3)


def test_few_pairs_change_nothing(tiny_dataset: Path) -> None:
    model = build_model(tiny_stage1(), open_dataset(tiny_dataset)).eval()
    assert shrink_interaction(model, held_out(model, 0.0, LEAST_HELD_OUT - 1), "cpu") == 1


def test_a_model_of_a_version_before_is_read_without(tiny_dataset: Path, tmp_path: Path) -> None:
    train_stage1(tiny_stage1(rating_biases=False), tiny_dataset, tmp_path / "stage1", LocalContext())
    spec = tmp_path / "stage1" / "vae_gmm.json"
    spec.write_text(spec.read_text().replace('"rating_biases": false,', ""))
    assert load_vae_gmm(tmp_path / "stage1").user_bias is None


def test_training_compares_itself_with_the_biases(tiny_dataset: Path, tmp_path: Path) -> None:
    context = LocalContext()
    metrics = train_stage1(tiny_stage1(), tiny_dataset, tmp_path / "stage1", context)
    data = open_dataset(tiny_dataset)
    pairs = data.arrays("test")
    biases = fit_biases(lambda: [Pairs(*data.arrays("train"))], data.catalog.n_users, data.catalog.n_items)
    errors = biases.predict(pairs.user, pairs.item) - pairs.rating
    assert metrics["test"]["bias_rmse"] == pytest.approx(float(np.sqrt(np.mean(errors**2))), rel=1e-4)
    warned = [line["warning"] for line in context.lines if "user + item biases" in str(line.get("warning"))]
    assert bool(warned) == (metrics["test"]["rmse"] >= (1 - LEAST_GAIN) * metrics["test"]["bias_rmse"])


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"test": {"rmse": 0.8, "bias_rmse": 0.9}}, False),
        ({"test": {"rmse": 0.9, "bias_rmse": 0.9}}, True),
        ({"valid": {"rmse": 1.0, "bias_rmse": 0.9}}, True),
        ({"test": {"rmse": 0.8}}, False),
        ({}, False),
    ],
)
def test_no_gain_over_biases_is_said(metrics: dict[str, dict[str, float]], said: bool) -> None:
    warnings = no_better_than_biases(metrics)
    assert bool(warnings) == said
    assert all("no better than that of user + item biases" in warning for warning in warnings)
