"""BLEU and ROUGE of both families: by hand, against independent implementations, and properties that must hold."""

import itertools
import json
import math

import numpy as np
import pytest
from helpers.texts import CANDIDATES, REFERENCES, scores
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from gavamoe.errors import InputError
from gavamoe.evaluation.metrics.ngrams import longest_common_subsequence
from gavamoe.evaluation.metrics.registry import METRICS
from gavamoe.evaluation.metrics.text_scores import aggregate, count, measure

# Words over a small alphabet, so that texts share some; spaces, capitals, other scripts and empty texts occur.
TEXTS = st.lists(st.sampled_from(["the", "pool", "was", "Cold", "über", "泳池", "a", ".", "  "]), max_size=12).map(
    " ".join
)
PAIRS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=8)


def test_bleu_by_hand() -> None:
    """5 tokens against 6: 4, 2, 1, 0 matches of 5, 4, 3, 2 n-grams; no 4-gram, so half a match is assumed."""
    found = scores(["a b c x d"], ["a b c y d z"])
    brevity = math.exp(1 - 6 / 5)
    assert found["bleu_1"] == pytest.approx(100 * brevity * 4 / 5)
    product = (4 / 5) * (2 / 4) * (1 / 3) * (0.5 / 2)
    assert found["bleu_4"] == pytest.approx(100 * brevity * product ** (1 / 4))


def test_rouge_by_hand() -> None:
    """Longest common subsequence "a c d" of 4 and 5 tokens; unigrams in common: 3, for x and y differ."""
    found = scores(["A x c d"], ["a y c z d"])
    f1 = 2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5)
    assert found["rouge_1"] == pytest.approx(100 * f1)
    assert found["rouge_l"] == pytest.approx(100 * f1)
    swapped = scores(["d c"], ["c d"])
    assert (swapped["rouge_1"], swapped["rouge_l"]) == (pytest.approx(100.0), pytest.approx(50.0))


def test_scores_equal_the_libraries_corpus_calls() -> None:
    found = scores(CANDIDATES, REFERENCES)
    assert found["bleu_4"] == pytest.approx(BLEU(tokenize="13a").corpus_score(CANDIDATES, [REFERENCES]).score)
    unigrams = BLEU(tokenize="13a", max_ngram_order=1).corpus_score(CANDIDATES, [REFERENCES]).score
    assert found["bleu_1"] == pytest.approx(unigrams)
    scorer = RougeScorer(["rouge1", "rougeL"])
    rows = [scorer.score(reference, text) for text, reference in zip(CANDIDATES, REFERENCES, strict=True)]
    assert found["rouge_1"] == pytest.approx(25 * sum(row["rouge1"].fmeasure for row in rows))
    assert found["rouge_l"] == pytest.approx(25 * sum(row["rougeL"].fmeasure for row in rows))


def test_group_scores_equal_scoring_the_group_alone() -> None:
    rows = measure(CANDIDATES, REFERENCES)
    group = np.array([0, 3])
    alone = scores([CANDIDATES[i] for i in group], [REFERENCES[i] for i in group])
    assert aggregate(rows, group) == pytest.approx(alone)


def test_what_is_not_measured_is_none_and_empty_rows_count() -> None:
    rows = measure(CANDIDATES, REFERENCES)
    found = aggregate(rows)
    assert {name for name, value in found.items() if value is not None} == {
        "bleu_1", "bleu_4", "rouge_1", "rouge_l", "distinct_1", "distinct_2", "usr",
        "distinct_1_sentence", "distinct_2_sentence",
    }  # fmt: skip
    assert count(rows) == {
        "rows": 4,
        "empty_generations": 1,
        "empty_references": 0,
        "references_without_rouge_tokens": 0,
        "rows_with_features": 0,
        "rows_with_rating": 0,
    }
    without = [0, 1, 3]
    kept = scores([CANDIDATES[i] for i in without], [REFERENCES[i] for i in without])
    assert found["rouge_1"] == pytest.approx(kept["rouge_1"] * 3 / 4)
    assert aggregate(rows, np.array([], dtype=int)) == dict.fromkeys(METRICS)


def test_scores_without_any_reference_text_are_undefined_not_zero() -> None:
    found = scores(["a b", "c"], ["", " "])
    assert found["bleu_1"] is found["bleu_4"] is found["rouge_1"] is found["rouge_l"] is None
    assert found["distinct_1"] == 100.0


def test_texts_in_scripts_rouge_cannot_read_are_counted() -> None:
    rows = measure(["泳池很好", "pool"], ["泳池很好", "pool"])
    assert count(rows)["references_without_rouge_tokens"] == 1
    assert aggregate(rows)["rouge_1"] == pytest.approx(50.0)


@given(PAIRS, st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_row_order_does_not_matter(pairs: list[tuple[str, str]], random: "np.random.Generator") -> None:
    shuffled = list(pairs)
    random.shuffle(shuffled)
    one, other = (scores(*map(list, zip(*rows, strict=True)), "both") for rows in (pairs, shuffled))
    assert one == pytest.approx(other, nan_ok=False)


@given(
    st.lists(st.lists(st.sampled_from(["the", "pool", "cold", "a"]), min_size=4, max_size=9).map(" ".join), min_size=1)
)
@settings(max_examples=20, deadline=None)
def test_identical_texts_score_a_hundred(texts: list[str]) -> None:
    found = scores(texts, texts, "both")
    names = [name for name in METRICS if "bleu" in name or "rouge" in name]
    assert len(names) == 11
    assert [found[name] for name in names] == pytest.approx([100.0] * 11)


@given(PAIRS)
@settings(max_examples=30, deadline=None)
def test_scores_are_json_numbers_within_bounds(pairs: list[tuple[str, str]]) -> None:
    said, meant = map(list, zip(*pairs, strict=True))
    found = scores(said, meant, "both")
    json.dumps(found, allow_nan=False)
    assert all(-1e-9 <= value <= 100 + 1e-9 for value in found.values() if value is not None)


@given(st.lists(st.sampled_from("abcd"), max_size=12), st.lists(st.sampled_from("abcd"), max_size=12))
def test_longest_common_subsequence_equals_the_table(first: list[str], second: list[str]) -> None:
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, j in itertools.product(range(len(first)), range(len(second))):
        table[i + 1][j + 1] = table[i][j] + 1 if first[i] == second[j] else max(table[i][j + 1], table[i + 1][j])
    assert longest_common_subsequence(first, second) == table[-1][-1]


@pytest.mark.timeout(60)
def test_texts_of_100_000_characters_are_scored() -> None:
    text = "the pool was cold " * 6000
    found = scores([text], [text + "today"])
    assert 99 < found["rouge_l"] < 100


def test_unpaired_rows_are_refused() -> None:
    with pytest.raises(InputError, match="1 candidates against 2 references"):
        measure(["a"], ["a", "b"])


def test_peter_bleu_by_hand() -> None:
    """5 tokens against 6: 4, 2, 1, 0 matches of 5, 4, 3, 2 n-grams; add one to each, order 1 too."""
    found = scores(["a b c x d"], ["a b c y d z"], "peter")
    brevity = math.exp(1 - 6 / 5)
    assert found["peter_bleu_1"] == pytest.approx(100 * brevity * 4 / 5)
    assert found["peter_bleu_4"] == 0.0
    assert found["peter_bleu_1_smoothed"] == pytest.approx(100 * brevity * 5 / 6)
    product = (5 / 6) * (3 / 5) * (2 / 4) * (1 / 3)
    assert found["peter_bleu_4_smoothed"] == pytest.approx(100 * brevity * product ** (1 / 4))
    assert found["bleu_4"] is found["rouge_1"] is None


def test_peter_rouge_by_hand() -> None:
    """Sets {a b c} and {a b d e}: 2 in common; pairs {ab bc ca} and {ab bd de}: 1; subsequence "a b a" cut to "a b"."""
    found = scores(["a b c a"], ["a b d e"], "peter")
    assert found["peter_rouge_1"] == pytest.approx(100 * 2 * 2 / 7)
    assert found["peter_rouge_2"] == pytest.approx(100 * 2 * 1 / 6)
    assert found["peter_rouge_l"] == pytest.approx(50.0)  # precision and recall are both 2/4, so beta is 1
    # P 2/2, R 2/4, beta 2: 5 x .5 x 1 / (.5 + 4 x 1)
    assert scores(["a b"], ["a b d e"], "peter")["peter_rouge_l"] == pytest.approx(100 * 2.5 / 4.5)


def test_peter_bleu_equals_nltk() -> None:
    # Without the empty text: nltk counts one n-gram for a text that has none.
    candidates = [CANDIDATES[0], CANDIDATES[1], CANDIDATES[3], "the view from the room was great"]
    references = [REFERENCES[0], REFERENCES[1], REFERENCES[3], "the view from the room is great"]
    said, meant = [text.split() for text in candidates], [[text.split()] for text in references]
    found = scores(candidates, references, "peter")
    assert found["peter_bleu_1"] == pytest.approx(100 * corpus_bleu(meant, said, weights=(1,)))
    assert found["peter_bleu_4"] == pytest.approx(100 * corpus_bleu(meant, said))
    assert found["peter_bleu_4"] > 10
    # nltk's method 2 adds one to orders above 1 only.
    product = (corpus_bleu(meant, said, smoothing_function=SmoothingFunction().method2)) ** 4
    precision = corpus_bleu(meant, said, weights=(1,))  # no brevity penalty: the candidates are longer
    tokens = sum(map(len, said))
    assert tokens > sum(len(one) for [one] in meant)
    corrected = product / precision * (precision * tokens + 1) / (tokens + 1)
    assert found["peter_bleu_4_smoothed"] == pytest.approx(100 * corrected ** (1 / 4))


@given(PAIRS)
@settings(max_examples=40, deadline=None)
def test_sacrebleu_style_equals_the_libraries(pairs: list[tuple[str, str]]) -> None:
    said, meant = map(list, zip(*pairs, strict=True))
    found = scores(said, meant)
    if found["bleu_4"] is None:
        return
    assert found["bleu_4"] == pytest.approx(BLEU(tokenize="13a").corpus_score(said, [meant]).score)
    scorer = RougeScorer(["rouge1", "rougeL"])
    rows = [scorer.score(reference, text) for text, reference in pairs]
    for name, theirs in (("rouge_1", "rouge1"), ("rouge_l", "rougeL")):
        assert found[name] == pytest.approx(100 * sum(row[theirs].fmeasure for row in rows) / len(rows))


def test_unknown_style_is_named() -> None:
    with pytest.raises(InputError, match="style meteor: unknown; known are sacrebleu, peter, both"):
        measure(["a"], ["a"], style="meteor")  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["泳池 很 好 的", "Über größe naïve café", "😀 😀 ok 👍🏽", "a\u200bb c\u00a0d e f g"])
def test_any_script_equals_itself(text: str) -> None:
    found = scores([text, ""], [text, ""], "both")
    assert [found["bleu_1"], found["peter_bleu_1"]] == pytest.approx([100.0, 100.0])
    # The empty pair says nothing right.
    assert [found["peter_rouge_l"], found["peter_rouge_1"]] == pytest.approx([50.0, 50.0])
    assert 0 < (found["distinct_1_sentence"] or 0) <= 50
