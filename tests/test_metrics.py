"""Every metric against hand-computed cases, the libraries' own corpus calls, and properties that must hold."""

import itertools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from gavamoe import text_metrics
from gavamoe.errors import InputError
from gavamoe.metrics import (
    METRICS,
    FeatureMatcher,
    distinct,
    feature_coverage,
    feature_diversity,
    feature_share,
    mae,
    rmse,
    unique_sentence_ratio,
    words,
)
from gavamoe.scoring import read_columns, score_files
from gavamoe.text_metrics import (
    BertScore,
    RowStatistics,
    aggregate,
    bert_score,
    count,
    intervals,
    longest_common_subsequence,
    measure,
    not_better,
)

NAMES = [
    *("bleu_1", "bleu_4", "rouge_1", "rouge_l", "distinct_1", "distinct_2"),
    *("bertscore_p", "bertscore_r", "bertscore_f", "usr", "fmr", "fcr", "div", "rmse", "mae"),
]
CANDIDATES = ["The room was clean and quiet.", "great pool, great staff!", "", "The breakfast was cold and late."]
REFERENCES = ["The room was very clean and quiet.", "Great pool.", "Nothing works here.", "The breakfast was cold."]

KNOWN = {"bleu_1": 65.0000, "bleu_4": 37.5412, "rouge_1": 59.7436, "rouge_l": 59.7436}

# Words over a small alphabet, so that texts share some; spaces, capitals, other scripts and empty texts occur.
TEXTS = st.lists(st.sampled_from(["the", "pool", "was", "Cold", "über", "泳池", "a", ".", "  "]), max_size=12).map(
    " ".join
)
PAIRS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=8)


def scores(candidates: list[str], references: list[str]) -> dict[str, float | None]:
    return aggregate(measure(candidates, references))


def test_registry_has_the_names_directions_and_a_line_of_definition() -> None:
    assert list(METRICS) == NAMES
    assert {name for name, metric in METRICS.items() if metric.direction == "lower"} == {"div", "rmse", "mae"}
    assert all(
        metric.name == name and metric.definition and "\n" not in metric.definition for name, metric in METRICS.items()
    )
    assert METRICS["rmse"].better(1.0, 2.0)
    assert not METRICS["bleu_4"].better(1.0, 1.0)


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


def test_distinct_and_usr_by_hand() -> None:
    texts = ["good good pool", "good pool", "Good  pool", ""]
    assert distinct(texts, 1) == pytest.approx(100 * 3 / 7)  # good, pool, Good of 7 words
    assert distinct(texts, 2) == pytest.approx(100 * 3 / 4)  # (good good) (good pool) (Good pool) of 4
    assert unique_sentence_ratio(texts) == 75.0  # the empty text is no sentence
    assert unique_sentence_ratio(["a  b", "a b "]) == 50.0
    assert distinct([], 1) is None
    assert unique_sentence_ratio([]) is None
    assert distinct(["", "one"], 2) == 0.0


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


def test_what_is_not_measured_is_none_and_empty_rows_count() -> None:
    rows = measure(CANDIDATES, REFERENCES)
    found = aggregate(rows)
    assert {name for name, value in found.items() if value is None} == {
        "bertscore_p", "bertscore_r", "bertscore_f", "fmr", "fcr", "div", "rmse", "mae",
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
    assert aggregate(rows, np.array([], dtype=int)) == dict.fromkeys(NAMES)


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
    one, other = (scores(*map(list, zip(*rows, strict=True))) for rows in (pairs, shuffled))
    assert one == pytest.approx(other, nan_ok=False)


@given(
    st.lists(st.lists(st.sampled_from(["the", "pool", "cold", "a"]), min_size=4, max_size=9).map(" ".join), min_size=1)
)
@settings(max_examples=20, deadline=None)
def test_identical_texts_score_a_hundred(texts: list[str]) -> None:
    found = scores(texts, texts)
    assert [found[name] for name in ("bleu_1", "bleu_4", "rouge_1", "rouge_l")] == pytest.approx([100.0] * 4)


@given(PAIRS)
@settings(max_examples=30, deadline=None)
def test_scores_are_json_numbers_within_bounds(pairs: list[tuple[str, str]]) -> None:
    said, meant = map(list, zip(*pairs, strict=True))
    found = scores(said, meant)
    json.dumps(found, allow_nan=False)
    assert all(-1e-9 <= value <= 100 + 1e-9 for value in found.values() if value is not None)


@given(st.lists(st.sampled_from("abcd"), max_size=12), st.lists(st.sampled_from("abcd"), max_size=12))
def test_longest_common_subsequence_equals_the_table(first: list[str], second: list[str]) -> None:
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, j in itertools.product(range(len(first)), range(len(second))):
        table[i + 1][j + 1] = table[i][j] + 1 if first[i] == second[j] else max(table[i][j + 1], table[i + 1][j])
    assert longest_common_subsequence(first, second) == table[-1][-1]


def test_long_texts_score_as_short_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = scores(CANDIDATES, REFERENCES)
    monkeypatch.setattr(text_metrics, "_LCS_TABLE_CELLS", 0)
    assert scores(CANDIDATES, REFERENCES) == pytest.approx(expected)


@pytest.mark.timeout(60)
def test_texts_of_100_000_characters_are_scored() -> None:
    text = "the pool was cold " * 6000
    found = scores([text], [text + "today"])
    assert 99 < found["rouge_l"] < 100


def test_intervals_contain_the_score_and_are_repeatable() -> None:
    said, meant = [*CANDIDATES * 20], [*REFERENCES * 20]
    rows = measure(said, meant, rating_error=np.linspace(-1, 1, 80))
    found, again, other = (intervals(rows, resamples=200, seed=seed) for seed in (1, 1, 2))
    assert found == again
    assert found != other
    point = aggregate(rows)
    assert set(found) == {"bleu_1", "bleu_4", "rouge_1", "rouge_l", "rmse", "mae"}
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


def test_unpaired_rows_are_refused() -> None:
    with pytest.raises(InputError, match="1 candidates against 2 references"):
        measure(["a"], ["a", "b"])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of two layers with a word-piece vocabulary of letters."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    letters = "abcdefghijklmnopqrstuvwxyz.,!"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=64)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_bertscore_from_a_folder_scores_empty_texts_zero(encoder: Path) -> None:
    scored = bert_score(
        ["pool was cold", "", "pool was cold", "x"], ["pool was cold", "a", "", "the view"], str(encoder)
    )
    assert (scored.model, scored.layer) == (str(encoder), 2)
    assert scored.values[0] == pytest.approx([1.0, 1.0, 1.0], abs=1e-4)
    assert scored.values[1:3].tolist() == [[0.0] * 3] * 2
    precision, recall, f = scored.values[3]
    assert f == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-5)
    found = aggregate(measure(["a"] * 4, ["b"] * 4, bertscore=scored))
    assert found["bertscore_f"] == pytest.approx((1 + f) / 4, abs=1e-4)


def test_bertscore_names_wrong_models_and_layers(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"layer 9: .* has 2 layers"):
        bert_score(["a"], ["b"], str(encoder), 9)
    with pytest.raises(InputError, match=r"config.json is missing"):
        bert_score(["a"], ["b"], str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="neither a folder here nor to be had from the hub"):
        bert_score(["a"], ["b"], "nobody/no-such-encoder")


def _statistics(values: np.ndarray) -> RowStatistics:
    texts = ["a"] * len(values)
    return measure(texts, texts, bertscore=BertScore(values, "m", 1))


def test_bertscore_is_the_mean_over_rows() -> None:
    values = np.array([[0.2, 0.4, 0.3], [0.6, 0.0, 0.1]])
    found = aggregate(_statistics(values))
    assert [found[name] for name in NAMES[6:9]] == pytest.approx([0.4, 0.2, 0.2])


def write_pairs(folder: Path) -> dict[str, Path]:
    """The same four pairs in every format."""
    rows = [{"prediction": said, "reference": meant} for said, meant in zip(CANDIDATES, REFERENCES, strict=True)]
    paths = {name: folder / f"pairs.{name}" for name in ("jsonl", "json", "csv", "parquet")}
    paths["jsonl"].write_text("\n".join(map(json.dumps, rows)) + "\n")
    paths["json"].write_text(json.dumps(rows))
    lines = [f'"{row["prediction"]}","{row["reference"]}"' for row in rows]
    paths["csv"].write_text("\n".join(["prediction,reference", *lines]))
    pq.write_table(pa.Table.from_pylist(rows), paths["parquet"])
    return paths


def test_every_format_gives_the_same_scores(tmp_path: Path) -> None:
    (tmp_path / "said.txt").write_text("\n".join(CANDIDATES) + "\n")
    (tmp_path / "meant.txt").write_text("\r\n".join(REFERENCES) + "\r\n")
    expected = score_files(tmp_path / "said.txt", tmp_path / "meant.txt", resamples=0)
    assert expected["counts"]["rows"] == 4
    assert expected["metrics"] == pytest.approx(scores(CANDIDATES, REFERENCES))
    for path in write_pairs(tmp_path).values():
        assert score_files(path, path, resamples=0)["metrics"] == expected["metrics"], path
        assert score_files(path, resamples=0)["metrics"] == expected["metrics"], path


def test_known_values_of_sacrebleu_and_rouge_score(tmp_path: Path) -> None:
    """Computed once with sacrebleu 2.6.0 and rouge-score 0.1.2, by their own corpus calls."""
    path = write_pairs(tmp_path)["parquet"]
    found = score_files(path, resamples=50)
    assert found["metrics"]["bleu_4"] == pytest.approx(KNOWN["bleu_4"], abs=5e-5)
    assert found["metrics"]["bleu_1"] == pytest.approx(KNOWN["bleu_1"], abs=5e-5)
    assert found["metrics"]["rouge_1"] == pytest.approx(KNOWN["rouge_1"], abs=5e-5)
    assert found["metrics"]["rouge_l"] == pytest.approx(KNOWN["rouge_l"], abs=5e-5)
    assert found["bertscore"] is None
    json.dumps(found, allow_nan=False)


def test_line_separators_inside_a_text_do_not_split_rows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\u2028still one\x0b\x85\ntwo\n\n", encoding="utf-8")
    assert read_columns(tmp_path / "a.txt") == {"": ["one\u2028still one\x0b\x85", "two", ""]}


def test_features_column_gives_fmr(tmp_path: Path) -> None:
    rows = [
        {"generated": "a clean pool", "text": "pool", "features": ["pool", "staff"]},
        {"generated": None, "text": "b", "features": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = score_files(tmp_path / "rows.parquet", features_column="features", resamples=0)
    assert found["metrics"]["fmr"] == 50.0
    assert found["metrics"]["fcr"] == 50.0
    assert found["counts"]["empty_generations"] == 1
    (tmp_path / "rows.csv").write_text('generated,text,words\na pool,b,"pool,staff"\n')
    assert score_files(tmp_path / "rows.csv", features_column="words", resamples=0)["metrics"]["fmr"] == 50.0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "the file is empty"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8 text"),
        ("a.jsonl", b'{"prediction": "a"}\n{"predic', "line 2: not valid JSON"),
        ("a.jsonl", b'{"prediction": "a"}\n3\n', "row 2: expected an object with fields, found int"),
        ("a.json", b"[" * 100_000, "not valid JSON"),
        ("a.csv", b"prediction,reference\na,b,c\n", "line 2: 3 fields, the header has 2"),
        ("a.csv", b"prediction,prediction\na,b\n", "two columns of one name"),
        ("a.csv", b"prediction,reference\n", "no rows"),
        ("a.parquet", b"PAR1 this is no Parquet", "not a readable Parquet file"),
        ("a.jsonl", b'{"prediction": 3, "reference": "a"}\n', "row 1, prediction: expected text, found int"),
        ("a.jsonl", b'{"predictions": "a", "references": "b"}\n', "no column named prediction or generated"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        score_files(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_counts_columns_and_paths_are_named(tmp_path: Path) -> None:
    (tmp_path / "said.txt").write_text("a\nb\n")
    (tmp_path / "meant.txt").write_text("a\n")
    with pytest.raises(InputError, match=r"said.txt has 2 rows, .*meant.txt has 1"):
        score_files(tmp_path / "said.txt", tmp_path / "meant.txt")
    with pytest.raises(InputError, match="no such file"):
        score_files(tmp_path / "nowhere.txt", tmp_path / "meant.txt")
    path = write_pairs(tmp_path)["csv"]
    with pytest.raises(InputError, match=r"no column referense; did you mean reference\?"):
        score_files(path, reference_column="referense")
    with pytest.raises(InputError, match="no column zzz; it has prediction, reference"):
        score_files(path, features_column="zzz")


def test_a_corpus_is_counted_as_counters_say() -> None:
    """Distinct and USR against an independent count over a larger random corpus."""
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(list("abcdefgh"), size=random.integers(0, 9))) for _ in range(200)]
    pairs = Counter(pair for text in texts for pair in itertools.pairwise(text.split()))
    assert distinct(texts, 2) == pytest.approx(100 * len(pairs) / pairs.total())
    assert unique_sentence_ratio(texts) == pytest.approx(100 * len(set(texts) - {""}) / 200)
