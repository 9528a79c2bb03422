"""The synthetic generator: reproducible bytes, truth that holds in the data, a language that can be scored exactly."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from gavamoe.data.dataset import SPLITS, Dataset, open_dataset
from gavamoe.data.ratings import PLANTED_SCALE
from gavamoe.data.synthetic import grammar
from gavamoe.data.synthetic.generator import bias_model_rmse, expected_rating, synthesize
from gavamoe.errors import InputError

FEATURES = [feature for listed in grammar.GENRES.values() for feature in listed]


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_dataset(synthesize(tmp_path_factory.mktemp("synthetic") / "default"))


def test_the_default_has_the_stated_size_and_scale(default: Dataset) -> None:
    assert [default.size(split) for split in SPLITS] == [48_000, 6_000, 6_000]
    assert default.rating_values == (1, 2, 3, 4, 5)
    assert not default.implicit
    assert 1_900 < default.catalog.known_users < default.catalog.n_users <= 2_000
    assert default.catalog.n_items == 1_000
    pairs = {(user, item) for split in SPLITS for user, item in zip(*default.arrays(split)[:2], strict=True)}
    assert len(pairs) == 60_000, "pairs are distinct"


def test_the_yardstick_is_calibrated(default: Dataset) -> None:
    truth = default.truth()
    assert truth is not None
    assert truth.noise_floor_rmse == pytest.approx(0.67, abs=0.02)
    assert truth.oracle_rmse == pytest.approx(truth.noise_floor_rmse, abs=0.03)
    assert truth.bias_rmse == pytest.approx(1.34, abs=0.03)
    train, test = default.arrays("train"), default.arrays("test")
    constant = np.sqrt(np.mean((test.rating - train.rating.mean()) ** 2))
    assert constant - truth.bias_rmse < 0.05, "a bias model must see next to nothing of the tastes"


def test_half_the_gap_is_the_hard_case(tmp_path: Path) -> None:
    truth = open_dataset(synthesize(tmp_path / "hard", gap=0.5)).truth()
    assert truth is not None
    assert truth.oracle_rmse == pytest.approx(0.744, abs=0.03)
    assert truth.bias_rmse == pytest.approx(0.985, abs=0.04)


def test_groups_tell_ratings_apart(default: Dataset) -> None:
    truth, train = default.truth(), default.arrays("train")
    assert truth is not None
    means = np.array(
        [
            np.bincount(train.item, train.rating * (truth.group[train.user] == g), default.catalog.n_items)
            / np.maximum(np.bincount(train.item, truth.group[train.user] == g, default.catalog.n_items), 1)
            for g in range(3)
        ]
    )
    popular = np.bincount(train.item, minlength=default.catalog.n_items) > 60
    spread = means[:, popular].max(axis=0) - means[:, popular].min(axis=0)
    assert np.median(spread) > 2, "the same item splits the groups by more than two stars"


def test_equal_arguments_give_equal_bytes(tmp_path: Path) -> None:
    size = {"users": 60, "items": 40, "ratings": 1500}
    first, second = (synthesize(tmp_path / name, **size, seed=3) for name in ("first", "second"))
    assert {path.name: path.read_bytes() for path in first.iterdir()} == {
        path.name: path.read_bytes() for path in second.iterdir()
    }
    assert open_dataset(first).fingerprint != open_dataset(synthesize(tmp_path / "other", **size, seed=4)).fingerprint


def test_newcomers_are_only_in_valid_and_test(default: Dataset) -> None:
    catalog = default.catalog
    unknown = 0
    for split in SPLITS:
        arrays = default.arrays(split)
        new = (arrays.user >= catalog.known_users) | (arrays.item >= catalog.known_items)
        assert split != "train" or not new.any()
        unknown += int(new.sum())
    assert catalog.n_users - catalog.known_users >= 20
    assert catalog.n_items - catalog.known_items >= 5
    assert 60 <= unknown <= 600, "enough to measure, too few to drown the rest"


def test_activity_has_a_long_tail(default: Dataset) -> None:
    counts = np.bincount(default.arrays("train").user, minlength=default.catalog.known_users)
    assert np.percentile(counts, 95) > 4 * np.percentile(counts, 10)


def test_the_text_names_exactly_its_features_and_its_sentiment(default: Dataset) -> None:
    truth = default.truth()
    assert truth is not None
    known = {word: name for name, listed in truth.sentiment_words.items() for word in listed}
    for row in default.table("test").to_pylist():
        words = re.findall(r"[a-z]+", row["text"].lower())
        assert Counter(word for word in words if word in FEATURES) == Counter(row["features"])
        assert {known[word] for word in words if word in known} == {PLANTED_SCALE.sentiment(row["rating"])}


def test_features_are_the_items_own_and_follow_the_group(default: Dataset) -> None:
    truth, table = default.truth(), default.table("train")
    assert truth is not None
    by_item: dict[int, set[str]] = {}
    by_group = [Counter() for _ in range(3)]
    for user, item, features in zip(
        table["user"].to_pylist(), table["item"].to_pylist(), table["features"].to_pylist(), strict=True
    ):
        by_item.setdefault(item, set()).update(features)
        by_group[truth.group[user]].update(features)
    genre_of = {feature: name for name, listed in grammar.GENRES.items() for feature in listed}
    assert all(len({genre_of[feature] for feature in features}) == 1 for features in by_item.values())
    favorites = [max(range(3), key=lambda g: by_group[g][feature]) for feature in grammar.GENRES["mystery"]]
    assert sorted(favorites) == [0, 0, 1, 1, 2, 2], "each group has its favorites"


def test_every_group_writes_in_its_own_words(default: Dataset) -> None:
    truth, table = default.truth(), default.table("train").slice(0, 3000)
    assert truth is not None
    openings: list[set[str]] = [set(), set(), set()]
    for user, text in zip(table["user"].to_pylist(), table["text"].to_pylist(), strict=True):
        openings[truth.group[user]].add(text.split()[0])
    assert not openings[0] & openings[1]
    assert not openings[0] & openings[2]
    assert not openings[1] & openings[2]


def test_the_languages_words_do_not_overlap() -> None:
    sentiment = grammar.sentiment_words()
    listed = [word for words in sentiment.values() for word in words]
    assert len(listed) == len(set(listed))
    assert len(FEATURES) == len(set(FEATURES))
    phrases = [text for style in grammar.STYLES for part in (style.one, style.two, style.closings) for text in part]
    plain = set(re.findall(r"[a-z]+", " ".join([*phrases, *(grammar.title(n) for n in range(900))]).lower()))
    assert not plain & set(listed)
    for feature in FEATURES:
        inside = {word for word in plain | set(listed) | set(FEATURES) - {feature} if feature in word}
        assert not inside, f"{feature} is part of {inside}"


def test_titles_are_unique() -> None:
    assert len({grammar.title(number) for number in range(5_000)}) == 5_000
    assert grammar.title(0) != grammar.title(1)


def test_sentiment_of_a_rating() -> None:
    assert [PLANTED_SCALE.sentiment(rating) for rating in (1, 2, 3, 4, 5)] == [
        "negative",
        "negative",
        "neutral",
        "positive",
        "positive",
    ]


def test_expected_rating_against_simulation() -> None:
    rng = np.random.default_rng(0)
    for mean, noise in ((3.2, 0.7), (4.9, 0.7), (0.5, 1.5), (6.5, 0.3)):
        drawn = np.clip(np.round(mean + rng.normal(0, noise, 400_000)), 1, 5).mean()
        assert expected_rating(np.array([mean]), noise)[0] == pytest.approx(drawn, abs=0.01)
    assert expected_rating(np.array([2.4, 7.0]), 0.0).tolist() == [2.0, 5.0]


def test_the_bias_model_recovers_biases() -> None:
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, 30, 30_000), rng.integers(0, 20, 30_000)
    rating = 3 + rng.normal(0, 1, 30)[user] + rng.normal(0, 1, 20)[item] + rng.normal(0, 0.1, 30_000)
    assert bias_model_rmse(user, item, rating, rng.integers(0, 3, 30_000)) == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_other_numbers_of_groups(tmp_path: Path, groups: int) -> None:
    out = synthesize(tmp_path / "d", users=120, items=60, ratings=3000, groups=groups)
    truth = open_dataset(out).truth()
    assert truth is not None
    assert sorted(set(truth.group.tolist())) == list(range(groups))
    assert len(truth.group) == open_dataset(out).catalog.n_users


def test_noise_free_ratings_are_predicted_exactly(tmp_path: Path) -> None:
    truth = open_dataset(synthesize(tmp_path / "d", users=60, items=40, ratings=1500, noise=0)).truth()
    assert truth is not None
    assert truth.oracle_rmse == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"groups": 7}, r"groups: 7 is outside 1\.\.6"),
        ({"users": 5}, r"users: 5 is outside 10\.\."),
        ({"users": 20, "items": 20, "ratings": 300}, r"ratings: 300 is outside 100\.\.280"),
        ({"noise": float("nan")}, r"noise: nan is outside"),
        ({"gap": -1}, r"gap: -1 is outside"),
    ],
)
def test_arguments_out_of_bounds_are_refused(tmp_path: Path, wrong: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        synthesize(tmp_path / "d", **wrong)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(InputError, match="already exists"):
        synthesize(tmp_path, users=60, items=40, ratings=1500)
    assert (tmp_path / "mine").read_text() == "keep"


def test_truth_is_plain_json(default: Dataset) -> None:
    saved = json.loads((default.path / "truth.json").read_text())
    assert saved["groups"] == 3
    assert set(saved["sentiment_words"]) == {"positive", "neutral", "negative"}
    (default.path / "truth.json").write_text(json.dumps(saved))
    assert open_dataset(default.path).truth() is not None
