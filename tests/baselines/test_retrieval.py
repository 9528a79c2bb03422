"""Systems that copy: the nearest training row by brute force, nothing from test, unknown users and items."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.bare_dataset import bare_dataset

from gavamoe.baselines.retrieval import Copier, Source
from gavamoe.config.files import parse_config
from gavamoe.config.schema import GenerationConfig, PromptConfig
from gavamoe.data.dataset import Dataset, open_dataset
from gavamoe.evaluation.evaluate import evaluate
from gavamoe.evaluation.reference_scores import most_frequent_text
from gavamoe.generation.evidence.pair_features import PairFeatures
from gavamoe.generation.evidence.quotes import FeatureIndex
from gavamoe.generation.request import ExplanationRequest
from gavamoe.stage2.tokenized_rows import usual_features

SOURCES: tuple[Source, ...] = ("constant", "user", "item", "features")
GREEDY = GenerationConfig()


def requests(dataset: Dataset, given: bool = True) -> list[ExplanationRequest]:
    rows = dataset.table("test").to_pylist()
    if not given:
        return [ExplanationRequest(row["user"], row["item"]) for row in rows]
    return [ExplanationRequest(row["user"], row["item"], row["rating"], tuple(row["features"])) for row in rows]


def texts(dataset: Dataset, source: Source, asked: Sequence[ExplanationRequest]) -> list[str]:
    return [explanation.text for explanation in Copier(dataset, source).explain(asked, GREEDY)]


def brute_force(dataset: Dataset, source: Source, request: ExplanationRequest) -> str:
    """The definition at the top of `retrieval`, row by row."""
    train = dataset.table("train").to_pylist()
    frequency: dict[str, int] = {}
    for row in train:
        for word in set(row["features"]):
            frequency[word] = frequency.get(word, 0) + 1
    idf = {word: math.log(len(train) / count) + 1 for word, count in frequency.items()}

    def norm(words: set[str]) -> float:
        return math.sqrt(sum(idf.get(word, 0) ** 2 for word in words)) or 1.0

    wanted = set(request.features or ())
    best: tuple[float, float, bool] | None = None
    answer = most_frequent_text(dataset)
    for row in train:
        own = set(row["features"])
        cosine = sum(idf[word] ** 2 for word in own & wanted) / norm(own) / norm(wanted)
        candidate = {"user": row["user"] == request.user, "item": row["item"] == request.item}.get(source, cosine > 0)
        related = row["user"] == request.user or row["item"] == request.item
        key = (round(cosine, 9), -abs(row["rating"] - (request.rating or 0)), related)
        if candidate and (best is None or key > best):
            best, answer = key, row["text"]
    return answer


@pytest.mark.parametrize("source", ["user", "item", "features"])
def test_the_nearest_is_found(planted: Dataset, source: Source) -> None:
    asked = requests(planted)[::7]
    assert texts(planted, source, asked) == [brute_force(planted, source, request) for request in asked]


@pytest.mark.parametrize("source", SOURCES)
def test_nothing_comes_from_the_other_splits(planted: Dataset, source: Source, tmp_path: Path) -> None:
    said = texts(planted, source, requests(planted))
    assert set(said) <= set(planted.table("train", ["text"])["text"].to_pylist())
    shutil.copytree(planted.path, tmp_path / "other")
    for split in ("valid", "test"):
        path = tmp_path / "other" / f"{split}.parquet"
        table = pq.read_table(path)
        place = table.schema.get_field_index("text")
        pq.write_table(table.set_column(place, "text", pa.array(["secret"] * table.num_rows)), path)
    assert texts(open_dataset(tmp_path / "other"), source, requests(planted)) == said


def test_a_copied_text_knows_what_it_was_asked_for(planted: Dataset) -> None:
    asked = requests(planted)
    rows = planted.table("train").to_pylist()
    by_text = {row["text"]: row for row in rows}
    for request, text in zip(asked, texts(planted, "features", asked), strict=True):
        assert set(by_text[text]["features"]) & set(request.features or ())


def test_what_is_not_given_is_filled_in(planted: Dataset) -> None:
    [answer] = Copier(planted, "features").explain(requests(planted, given=False)[:1], GREEDY)
    assert (answer.rating_given, answer.features_given) == (False, False)
    assert answer.rating == answer.predicted_rating
    count = usual_features(planted, PromptConfig().max_features)
    assert len(answer.features) == count
    assert answer.features == PairFeatures.read(planted).rank(*planted_pair(planted), [1.0], count)
    assert answer.text in planted.table("train", ["text"])["text"].to_pylist()


def planted_pair(dataset: Dataset) -> tuple[int, int]:
    row = dataset.table("test", ["user", "item"]).slice(0, 1).to_pylist()[0]
    return row["user"], row["item"]


@pytest.mark.parametrize("source", SOURCES)
def test_strangers_get_the_constant_text(planted: Dataset, source: Source) -> None:
    stranger = ExplanationRequest(10**6, 10**6, 5.0, ("no such feature",))
    assert texts(planted, source, [stranger]) == [most_frequent_text(planted)]


def test_implicit_data_without_features(tmp_path: Path) -> None:
    dataset = bare_dataset(tmp_path / "bare", [f"text number {n}" for n in range(10)])
    metrics = evaluate(Copier(dataset, "item"), dataset, parse_config({}, "test")).metrics
    assert metrics["rows"] == dataset.size("test")
    assert metrics["counts"]["rows_with_rating"] == 0


def test_the_evaluation_scores_a_copier_like_any_system(planted: Dataset) -> None:
    result = evaluate(Copier(planted, "constant"), planted, parse_config({}, "test"))
    constant = result.metrics["baselines"]["constant"]["metrics"]
    assert result.metrics["metrics"]["bleu_4"] == constant["bleu_4"]
    bias = result.metrics["baselines"]["ratings"]["bias_model"]
    assert result.metrics["metrics"]["rmse"] == pytest.approx(bias["rmse"])


def test_cosines_by_hand() -> None:
    index = FeatureIndex([["a"], ["a", "b"], ["b"], None, []])
    weight = math.log(5 / 2) + 1
    rows, cosine = index.similar(["A", "zzz"])
    assert rows.tolist() == [0, 1]
    assert cosine == pytest.approx([1.0, weight / math.sqrt(2 * weight**2)])
    assert index.similarity(["a"], np.array([2, 3])).tolist() == [0.0, 0.0]
    again = index.similar(["a"])
    assert np.array_equal(again[1], cosine)
