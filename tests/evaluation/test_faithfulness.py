"""Faithfulness: each measure by hand, and on synthetic data against writers whose faults are known."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.bare_dataset import bare_dataset
from helpers.runs import evaluation_config
from helpers.writers import FakeExplainer, parrot, planted_writer

from gavamoe.data.dataset import Dataset, Truth
from gavamoe.data.synthetic import grammar
from gavamoe.evaluation.evaluate import evaluate
from gavamoe.evaluation.faithfulness.features import Mentions, feature_set
from gavamoe.evaluation.faithfulness.measure import FAITHFULNESS
from gavamoe.evaluation.faithfulness.memorization import TrainingTexts
from gavamoe.evaluation.faithfulness.sentiment import agreement, by_sentiment, learned_reader, planted_reader
from gavamoe.evaluation.faithfulness.user_swaps import UserSwaps, changed, user_alignment
from gavamoe.evaluation.planted_truth import style_of
from gavamoe.evaluation.significance import balanced_interval
from gavamoe.generation.request import ExplanationRequest


@pytest.fixture(scope="module")
def truth(planted: Dataset) -> Truth:
    found = planted.truth()
    assert found is not None
    return found


def scores_of(dataset: Dataset, say: Callable[[ExplanationRequest], str], **options: object) -> dict[str, dict]:
    metrics = evaluate(FakeExplainer(dataset, say), dataset, evaluation_config(probe_rows=40, **options)).metrics
    json.dumps(metrics, allow_nan=False)
    return metrics["faithfulness"]["scores"]


def test_a_writer_who_knows_the_truth_is_perfect(planted: Dataset, truth: Truth) -> None:
    found = scores_of(planted, planted_writer(truth))
    assert list(found) == list(FAITHFULNESS)
    for name in ("feature_precision", "feature_recall", "sentiment_agreement", "sentiment_balanced"):
        assert found[name]["value"] == pytest.approx(100.0), name
    for name in ("changes_with_user", "user_alignment", "style_of_group"):
        assert found[name]["value"] == 100.0, name
    assert found["item_hallucination"]["value"] == 0.0
    assert found["style_of_group"]["references"] == found["sentiment_agreement"]["references"] == 100.0
    assert found["style_of_group"]["chance"] == pytest.approx(100 / 3)
    assert found["user_alignment"]["rows"] == found["changes_with_user"]["rows"] <= 40
    assert found["wrong_gate_gap"] is found["gate_overlap"] is None


def test_a_writer_who_ignores_the_user_shows(planted: Dataset, truth: Truth) -> None:
    found = scores_of(planted, planted_writer(truth, group=1))
    assert found["changes_with_user"]["value"] == 0.0
    assert found["user_alignment"]["value"] == 50.0
    assert 20 < found["style_of_group"]["value"] < 55  # right for the users of group 1 alone
    assert found["sentiment_agreement"]["value"] == pytest.approx(100.0)


def test_a_writer_with_another_items_features_shows(planted: Dataset, truth: Truth) -> None:
    """Features of another genre, and always praise."""
    genre_of = {feature: genre for genre, features in grammar.GENRES.items() for feature in features}

    def say(request: ExplanationRequest) -> str:
        own = genre_of[(request.features or ("clues",))[0]]
        wrong = next(features[0] for genre, features in grammar.GENRES.items() if genre != own)
        return f"What lovely {wrong}!"

    found = scores_of(planted, say)
    assert found["item_hallucination"]["value"] == 100.0
    assert found["item_hallucination"]["references"] == 0.0
    assert found["feature_precision"]["value"] == found["feature_recall"]["value"] == 0.0
    assert found["sentiment_agreement"]["value"] == pytest.approx(found["sentiment_agreement"]["chance"], abs=30)
    assert found["sentiment_balanced"]["value"] == pytest.approx(100 / 3)
    assert found["sentiment_balanced"]["chance"] == pytest.approx(100 / 3)


def test_a_writer_who_copies_shows(planted: Dataset) -> None:
    sentence = planted.table("train", ["text"])["text"][0].as_py()
    found = scores_of(planted, lambda _: sentence)
    assert found["memorized"]["value"] == found["near_memorized"]["value"] == 100.0
    assert 0 < found["memorized"]["references"] < 100
    fresh = scores_of(planted, lambda request: f"nobody wrote {request.user} or {request.item} before")
    assert fresh["near_memorized"]["value"] == 0.0
    silent = scores_of(planted, lambda _: " ")
    assert silent["memorized"]["value"] is None
    assert silent["feature_recall"]["value"] == 0.0


def test_feature_measures_by_hand(planted: Dataset) -> None:
    mentions = Mentions(planted, {"pool", "staff", "front desk", "view"})
    wanted = mentions.wanted([["pool"], ["staff"], []], ["pool by the front desk", "staff", "nothing"])
    texts = ["pool and view", "nothing", "view"]
    assert mentions.precision(texts, wanted) == pytest.approx([0.5, np.nan, 0.0], nan_ok=True)
    assert mentions.recall(texts, wanted) == pytest.approx([0.5, 0.0, np.nan], nan_ok=True)


def test_item_hallucination_by_hand(planted: Dataset) -> None:
    mentions = Mentions(planted, feature_set(planted))
    train = [row for split in ("train", "valid", "test") for row in planted.table(split).to_pylist()]
    item = train[0]["item"]
    own = {word for row in train if row["item"] == item for word in row["features"]}
    foreign = sorted({word for row in train for word in row["features"]} - own)
    mine = sorted(own)
    texts = [f"good {mine[0]}", f"good {mine[0]} and {foreign[0]}", f"good {foreign[0]}", f"good {foreign[1]}", "no"]
    items = np.array([item, item, item, planted.catalog.n_items, item])
    rows: list[list[str]] = [[], [], [foreign[0]], [], []]  # the third row's own feature is new, but its own
    assert mentions.hallucinated(texts, items, rows) == pytest.approx([0, 1, 0, np.nan, 0], nan_ok=True)


def test_copies_by_hand() -> None:
    training = TrainingTexts(["The pool was cold and the staff was kind.", "nice view", "!!!", ""])
    assert len(training) == 2
    assert training.similarity("the POOL was cold and the staff was kind") == 1.0
    # one of nine words differs: 2 x 8 / 18
    assert training.similarity("the pool was warm and the staff was kind") == pytest.approx(16 / 18)
    assert training.similarity("nice") == pytest.approx(2 / 3)
    assert training.similarity("never heard") == 0.0
    assert training.similarity("?!") == 0.0
    assert TrainingTexts([]).similarity("anything") == 0.0


def test_nearest_is_the_nearest_of_all() -> None:
    """The few candidates by word pairs hold the best of all by longest common subsequence, or nearly."""
    random = np.random.default_rng(0)
    words = [f"w{n}" for n in range(30)]
    texts = [" ".join(random.choice(words, size=random.integers(5, 12))) for _ in range(200)]
    training = TrainingTexts(texts)
    altered = [" ".join([*text.split()[1:], "new"]) for text in texts[:50]]
    for text, source in zip(altered, texts, strict=False):
        length = len(source.split())
        assert training.similarity(text) >= 2 * (length - 1) / (2 * length)


def test_user_alignment_by_hand(tmp_path: Path) -> None:
    """Users u and v, five training texts each; v is the one at odd rows."""
    dataset = bare_dataset(tmp_path / "data", ["red apple", "blue sea"] * 4 + ["x", "y"])
    swaps = UserSwaps(
        users=np.array([0, 0, 0, 1]),
        others=np.array([1, 1, 1, 0]),
        items=np.zeros(4, dtype=np.int64),
        texts=["red thing", "blue thing", "same", "blue"],
        swapped=["blue thing", "red thing", "same", "red"],
    )
    assert user_alignment(swaps, dataset, 0).tolist() == [1.0, 0.0, 0.5, 1.0]
    assert changed(swaps).tolist() == [1.0, 1.0, 0.0, 1.0]


def test_styles_are_told_apart_by_their_words() -> None:
    listed = [{*style.positive, *style.neutral, *style.negative} for style in grammar.STYLES]
    assert sum(map(len, listed)) == len(set().union(*listed))
    for group, style in enumerate(grammar.STYLES):
        assert style_of(grammar.sentence(style, "neutral", ("clues",), (1, 2, 1, 0))) == group
    assert style_of("lovely and superb") is None
    assert style_of("nothing of the kind") is None


def test_planted_sentiment_by_hand(truth: Truth) -> None:
    reader = planted_reader(truth)
    assert reader.read(["What lovely clues!", "lovely but awful", "clues"]) == ["positive", None, None]
    ratings = np.array([5.0, 5.0, 1.0, np.nan])
    texts = ["What lovely clues!", "awful", "awful", "lovely"]
    assert agreement(reader, texts, ratings) == pytest.approx([1, 0, 1, np.nan], nan_ok=True)
    assert {name: rows.tolist() for name, rows in by_sentiment(reader, ratings).items()} == {
        "negative": [2],
        "positive": [0, 1],
    }


def test_the_learned_reader_finds_the_planted_sentiment(planted: Dataset, truth: Truth) -> None:
    reader = learned_reader(planted, seed=0)
    assert reader is not None
    table = planted.table("test").to_pydict()
    ratings = np.array(table["rating"])
    agreeing = agreement(reader, table["text"], ratings)
    assert agreeing.mean() > 0.97
    assert reader.read(["", "!!"]) == [None, None]
    assert reader.description == f"logistic regression on {planted.size('train'):,} training texts"


def test_data_without_ratings_texts_or_features(tmp_path: Path) -> None:
    dataset = bare_dataset(tmp_path / "data", ["a b c d e", "b", "a", "a", "b", "c", "d", "e", "f", "a b"])
    assert learned_reader(dataset, seed=0) is None
    found = scores_of(dataset, parrot(dataset))
    assert found["feature_precision"] is found["sentiment_agreement"] is found["style_of_group"] is None
    assert found["memorized"]["value"] == 0.0
    silent = bare_dataset(tmp_path / "silent", [""] * 10)
    assert scores_of(silent, lambda _: "x")["user_alignment"]["value"] is None


def test_probes_are_bounded_seeded_and_can_be_off(planted: Dataset, truth: Truth) -> None:
    fake = FakeExplainer(planted, planted_writer(truth))
    one, two = (
        evaluate(fake, planted, evaluation_config(probe_rows=5, rows=30)).metrics["faithfulness"] for _ in range(2)
    )
    assert one == two
    assert one["rows"] == {"texts": 30, "probes": 5}
    assert len(fake.asked) <= 5
    assert 0 < len(one["swaps"]) <= 5
    assert {row["text"] != row["swapped"] for row in one["swaps"]} == {True}
    off = evaluate(fake, planted, evaluation_config(rows=30)).metrics
    assert off["faithfulness"] is None
    assert "probe_rows" in next(gap["why"] for gap in off["not_measured"] if "personalization" in gap["what"])


def test_balanced_interval_draws_within_groups() -> None:
    sure, even = np.ones(50), np.tile([0.0, 1.0], 50)
    low, high = balanced_interval([sure, even]) or (0.0, 0.0)
    assert low < 0.75 < high <= 1.0
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 10 / 2, rel=0.15)
    assert balanced_interval([]) is None
