"""The registry, and the metrics that need no library: against hand-computed cases and independent counts."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from helpers.texts import scores
from hypothesis import given
from hypothesis import strategies as st

from gavamoe.evaluation.metrics.registry import (
    METRICS,
    FeatureMatcher,
    distinct,
    distinct_in_text,
    feature_coverage,
    feature_diversity,
    feature_share,
    mae,
    rmse,
    unique_sentence_ratio,
    words,
)
from gavamoe.evaluation.metrics.text_scores import aggregate, count, measure


def test_registry_has_the_names_directions_and_a_line_of_definition() -> None:
    assert {name for name, metric in METRICS.items() if metric.direction == "lower"} == {"div", "rmse", "mae"}
    assert all(
        metric.name == name and metric.definition and "\n" not in metric.definition for name, metric in METRICS.items()
    )
    assert METRICS["rmse"].better(1.0, 2.0)
    assert not METRICS["bleu_4"].better(1.0, 1.0)


def test_distinct_and_usr_by_hand() -> None:
    texts = ["good good pool", "good pool", "Good  pool", ""]
    assert distinct(texts, 1)[0] == pytest.approx(100 * 3 / 7)  # good, pool, Good of 7 words
    assert distinct(texts, 2)[0] == pytest.approx(100 * 3 / 4)  # (good good) (good pool) (Good pool) of 4
    assert unique_sentence_ratio(texts)[0] == 75.0  # the empty text is no sentence
    assert unique_sentence_ratio(["a  b", "a b "]) == (50.0, None)
    assert distinct([], 1) == (None, None)
    assert unique_sentence_ratio([]) == (None, None)
    assert distinct(["", "one"], 2) == (0.0, None)
    assert [distinct_in_text(text, 1) for text in texts] == pytest.approx([2 / 3, 1, 1, 0])
    assert [distinct_in_text(text, 2) for text in ("a b a b", "one", "")] == pytest.approx([2 / 3, 0, 0])
    found = scores(texts, ["x"] * 4)
    assert found["distinct_1_sentence"] == pytest.approx(25 * (2 / 3 + 1 + 1))
    assert found["distinct_1_at_1000"] is None


def test_distinct_at_a_fixed_size_by_hand() -> None:
    """Two of three texts: {a b, a c} {a b, d} {a c, d} have 3, 3, 3 different words of 4, 3, 3, a mean of 10/3."""
    texts = ["a b", "a c", "d"]
    assert distinct(texts, 1, fixed=2) == (pytest.approx(100 * 4 / 5), pytest.approx(100 * 3 / (10 / 3)))
    assert distinct(texts, 1, fixed=3)[1] == pytest.approx(100 * 4 / 5)
    assert distinct(texts, 1, fixed=4)[1] is None
    assert unique_sentence_ratio(["a", "a", "b"], fixed=2)[1] == pytest.approx(100 * (2 + 2 + 1) / 3 / 2)


def test_fixed_size_equals_the_mean_over_drawn_samples() -> None:
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(list("abcdefghijklmnop"), size=random.integers(0, 6))) for _ in range(60)]
    drawn = [[texts[i] for i in random.choice(60, 20, replace=False)] for _ in range(3000)]
    pairs = [[pair for text in sample for pair in itertools.pairwise(text.split())] for sample in drawn]
    expected = 100 * np.mean([len(set(sample)) for sample in pairs]) / np.mean([len(sample) for sample in pairs])
    assert distinct(texts, 2, fixed=20)[1] == pytest.approx(expected, rel=0.005)
    unique = [100 * len({text for text in sample if text}) / 20 for sample in drawn]
    assert unique_sentence_ratio(texts, fixed=20)[1] == pytest.approx(np.mean(unique), rel=0.005)


def test_a_corpus_is_counted_as_counters_say() -> None:
    """Distinct and USR against an independent count over a larger random corpus."""
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(list("abcdefgh"), size=random.integers(0, 9))) for _ in range(200)]
    pairs = Counter(pair for text in texts for pair in itertools.pairwise(text.split()))
    assert distinct(texts, 2)[0] == pytest.approx(100 * len(pairs) / pairs.total())
    assert unique_sentence_ratio(texts)[0] == pytest.approx(100 * len(set(texts) - {""}) / 200)


def test_features_are_found_as_words() -> None:
    matcher = FeatureMatcher(["pool", "front desk", "Wi-Fi", "Café", "★", "pool"])
    assert len(matcher) == 4
    named = matcher.find("The FRONT desk, the café and wi-fi; no pools.")
    assert named == matcher.ids(["front desk", "wi-fi", "CAFÉ"])
    assert matcher.find("front of the desk") == frozenset()
    assert matcher.ids(["★", "unheard of"]) == frozenset()
    assert words("Cafe\u0301 naïve") == ["café", "naïve"]


def test_fmr_fcr_div_by_hand() -> None:
    texts = ["pool and staff", "pool", "", "staff, pool"]
    features = [["pool", "staff"], ["staff"], ["pool"], []]
    rows = measure(texts, ["x"] * 4, features=features, feature_set=["pool", "staff", "view", "bed"])
    found = aggregate(rows)
    assert found["fmr"] == pytest.approx(100 * (1 + 0 + 0) / 3)  # the row without features does not count
    assert found["fcr"] == pytest.approx(100 * 2 / 4)
    # pairs of texts: 01 share pool, 03 share both, 13 share pool, the empty one none: 4 of 6 pairs
    assert found["div"] == pytest.approx(4 / 6)
    assert count(rows)["rows_with_features"] == 3
    assert math.isnan(feature_share(frozenset(), frozenset()))
    assert feature_coverage([], 4) is None
    assert feature_diversity([frozenset([1])]) is None


@given(st.lists(st.frozensets(st.integers(0, 5), max_size=4), min_size=2, max_size=9))
def test_div_equals_the_mean_over_all_pairs(found: list[frozenset[int]]) -> None:
    shared = [len(a & b) for a, b in itertools.combinations(found, 2)]
    assert feature_diversity(found) == pytest.approx(sum(shared) / len(shared))


def test_rating_errors_by_hand() -> None:
    error = np.array([1.0, -2.0, np.nan])
    assert rmse(error) == pytest.approx(math.sqrt(2.5))
    assert mae(error) == pytest.approx(1.5)
    assert rmse(np.array([np.nan])) is None
    assert mae(np.array([])) is None
    found = aggregate(measure(["a"] * 3, ["a"] * 3, rating_error=error))
    assert found["rmse"] == pytest.approx(math.sqrt(2.5))
    assert found["mae"] == pytest.approx(1.5)
