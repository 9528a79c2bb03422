"""Bootstrap intervals and paired comparisons: against theory, and against tests that are known."""

import numpy as np
import pytest
from helpers.texts import CANDIDATES, REFERENCES
from scipy.stats import permutation_test

from gavamoe.errors import InputError
from gavamoe.evaluation.metrics.text_scores import aggregate, measure
from gavamoe.evaluation.significance import compare, intervals, mean_interval, not_better


def test_intervals_contain_the_score_and_are_repeatable() -> None:
    said, meant = [*CANDIDATES * 20], [*REFERENCES * 20]
    rows = measure(said, meant, rating_error=np.linspace(-1, 1, 80))
    found, again, other = (intervals(rows, resamples=200, seed=seed) for seed in (1, 1, 2))
    assert found == again
    assert found != other
    point = aggregate(rows)
    assert set(found) == {
        "bleu_1", "bleu_4", "rouge_1", "rouge_l", "distinct_1_sentence", "distinct_2_sentence", "rmse", "mae",
    }  # fmt: skip
    assert all(low < point[name] < high for name, (low, high) in found.items())
    assert intervals(measure([], [])) == {}


def test_interval_of_a_mean_has_the_width_that_theory_says() -> None:
    error = np.random.default_rng(0).normal(size=400)
    low, high = intervals(measure(["a"] * 400, ["a"] * 400, rating_error=error), resamples=1000)["mae"]
    assert high - low == pytest.approx(2 * 1.96 * np.abs(error).std() / 20, rel=0.1)


def test_paired_comparison_knows_the_better_system() -> None:
    good, bad = measure(REFERENCES * 5, REFERENCES * 5), measure(CANDIDATES * 5, REFERENCES * 5)
    assert not_better(good, bad, resamples=100)["bleu_4"] == 0.0
    assert not_better(bad, good, resamples=100)["bleu_4"] == 1.0
    assert not_better(good, good, resamples=100)["rouge_l"] == 1.0
    error = np.full(20, 0.5)
    near, far = (measure(["a"] * 20, ["a"] * 20, rating_error=error * factor) for factor in (1, 2))
    assert not_better(near, far, resamples=100)["rmse"] == 0.0
    with pytest.raises(InputError, match="20 rows against 4"):
        not_better(good, measure(CANDIDATES, REFERENCES))


def test_p_equals_a_paired_permutation_test() -> None:
    """The MAE's difference is a mean of differences, for which scipy has the same test."""
    random = np.random.default_rng(3)
    one, other = random.normal(size=60), random.normal(size=60) * 1.5
    ours, theirs = (measure(["a"] * 60, ["a"] * 60, rating_error=error) for error in (one, other))
    found = compare(ours, theirs, resamples=2000)["mae"]
    gap = np.abs(one) - np.abs(other)
    exact = permutation_test((gap,), np.mean, permutation_type="samples", n_resamples=5000, random_state=0)
    assert found["difference"] == pytest.approx(gap.mean())
    assert found["p"] == pytest.approx(exact.pvalue, abs=0.02)
    low, high = found["interval"]
    assert high - low == pytest.approx(2 * 1.96 * gap.std() / np.sqrt(60), rel=0.1)


def test_a_system_does_not_differ_from_itself() -> None:
    rows = measure(CANDIDATES * 5, REFERENCES * 5, style="both")
    found = compare(rows, rows, resamples=50)
    assert {"bleu_4", "peter_bleu_4_smoothed", "rouge_l", "distinct_1_sentence"} <= set(found)
    assert {(each["difference"], each["p"], *each["interval"]) for each in found.values()} == {(0.0, 1.0, 0.0, 0.0)}


def test_a_clear_difference_is_significant_whatever_the_order() -> None:
    good, bad = measure(REFERENCES * 10, REFERENCES * 10), measure(CANDIDATES * 10, REFERENCES * 10)
    one, other = compare(good, bad, resamples=200)["bleu_4"], compare(bad, good, resamples=200)["bleu_4"]
    assert one["p"] == pytest.approx(1 / 201)
    assert one["difference"] == -other["difference"] > 0
    assert one["interval"][0] > 0
    with pytest.raises(InputError, match="40 rows against 4"):
        compare(good, measure(CANDIDATES, REFERENCES))


def test_interval_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(size=400)
    low, high = mean_interval(values) or (0.0, 0.0)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert mean_interval(values[:1]) is None


def test_p_is_uniform_where_nothing_differs() -> None:
    """Two systems that draw from one distribution: p below .2 in a fifth of the trials, not more."""
    random = np.random.default_rng(5)
    words = ["the", "pool", "was", "cold", "and", "clean"]

    def texts() -> list[str]:
        return [" ".join(random.choice(words, size=6)) for _ in range(25)]

    found = []
    for _ in range(100):
        references = texts()
        ours, theirs = (measure(texts(), references) for _ in range(2))
        found.append(compare(ours, theirs, resamples=39)["rouge_l"]["p"])
    assert 0.08 < np.mean(np.array(found) <= 0.2) < 0.32
    assert 0.35 < np.mean(found) < 0.65
