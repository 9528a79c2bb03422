"""Evaluation with a writer that is told what to say: selection, groups, baselines, planted truth, the artifact."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.bare_dataset import bare_dataset
from helpers.losses import row_losses
from helpers.runs import evaluation_config, make_run
from helpers.writers import FakeExplainer, parrot

from gavamoe.artifacts.files import write_json
from gavamoe.artifacts.manifest import read_manifest
from gavamoe.config.files import parse_config
from gavamoe.data.dataset import Dataset, PairArrays
from gavamoe.errors import InputError
from gavamoe.evaluation.evaluate import evaluate, evaluate_run, write_evaluation
from gavamoe.evaluation.faithfulness.sentiment import agreement, planted_reader
from gavamoe.evaluation.losses.row_losses import LOSSES_FILE, RowLosses
from gavamoe.evaluation.metrics.bertscore import BertScore
from gavamoe.evaluation.metrics_file import read_metrics
from gavamoe.evaluation.reference_scores import BiasModel, most_frequent_text
from gavamoe.evaluation.rows import EvaluatedRows, sparsity_thirds
from gavamoe.generation.generator import ExplanationGenerator


def test_saying_the_references_is_perfect(planted: Dataset) -> None:
    result = evaluate(FakeExplainer(planted, parrot(planted)), planted, evaluation_config())
    metrics = result.metrics
    json.dumps(metrics, allow_nan=False)
    assert [metrics["metrics"][name] for name in ("bleu_1", "bleu_4", "rouge_1", "rouge_l", "fmr")] == pytest.approx(
        [100.0] * 5
    )
    assert metrics["planted"]["sentiment_agreement"] == 100.0
    assert metrics["planted"]["sentiment_agreement_of_references"] == 100.0
    assert metrics["rows"] == metrics["rows_in_split"] == planted.size("test")
    assert metrics["tokens_written"] == 5 * metrics["rows"]
    rating = planted.arrays("test").rating
    assert metrics["metrics"]["rmse"] == pytest.approx(float(np.sqrt(np.mean((3 - rating) ** 2))))
    assert metrics["baselines"]["constant"]["metrics"]["bleu_4"] < 50
    assert metrics["not_better_than_constant"]["bleu_4"] == 0.0


def test_bertscore_is_asked_once_for_both_systems(planted: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[list[str], list[str], str, int]] = []

    def score(candidates: list[str], references: list[str], model: str, layer: int, *, seed: int) -> BertScore:
        calls.append((candidates, references, model, layer))
        ours = np.arange(len(candidates)) < len(candidates) / 2
        return BertScore(np.where(ours, 0.9, 0.2)[:, None].repeat(3, axis=1), model, 4)

    monkeypatch.setattr("gavamoe.evaluation.evaluate.bert_score", score)
    chosen = evaluation_config(rows=6, bertscore_model="some/model", bertscore_layer=4)
    metrics = evaluate(FakeExplainer(planted, lambda _: "x"), planted, chosen).metrics
    [(candidates, references, model, layer)] = calls
    assert candidates == ["x"] * 6 + [metrics["baselines"]["constant"]["text"]] * 6
    assert references[:6] == references[6:]
    assert (model, layer) == ("some/model", 4)
    assert metrics["bertscore"] == {"model": "some/model", "layer": 4, "floor": None, "floor_pairs": 0}
    assert metrics["metrics"]["bertscore_f"] == pytest.approx(0.9)
    assert metrics["baselines"]["constant"]["metrics"]["bertscore_f"] == pytest.approx(0.2)
    assert "BERTScore" not in {gap["what"] for gap in metrics["not_measured"]}


def test_groups_partition_the_rows(planted: Dataset) -> None:
    metrics = evaluate(FakeExplainer(planted, parrot(planted)), planted, evaluation_config()).metrics
    for section in ("sparsity", "clusters"):
        assert sum(group["counts"]["rows"] for group in metrics[section].values()) == metrics["rows"]
    assert list(metrics["sparsity"]) == ["ds1", "ds2", "ds3", "zero_shot"]
    assert metrics["sparsity"]["zero_shot"]["training_rows_per_user"] == [0, 0]
    lows = [metrics["sparsity"][name]["training_rows_per_user"] for name in ("ds1", "ds2", "ds3")]
    assert lows[0][0] >= lows[1][1] >= lows[1][0] >= lows[2][1]
    assert list(metrics["clusters"]) == ["0", "1", "2"]


def test_sparsity_thirds_by_hand() -> None:
    user = np.array([7, 1, 1, 2, 3, 9, 2])
    training_rows = np.array([1, 5, 5, 3, 3, 0, 3])
    thirds = {name: index.tolist() for name, index in sparsity_thirds(user, training_rows).items()}
    # by frequency, ties by user: rows 1 2 (user 1), 3 6 (user 2), 4 (user 3), 0 (user 7)
    assert thirds == {"ds1": [1, 2], "ds2": [3, 6], "ds3": [0, 4], "zero_shot": [5]}
    sizes = [len(part) for part in sparsity_thirds(np.arange(8), np.ones(8)).values()]
    assert sizes == [3, 3, 2, 0]


def test_given_shows_the_row_and_predicted_shows_nothing(planted: Dataset) -> None:
    fake = FakeExplainer(planted, lambda _: "x")
    evaluate(fake, planted, evaluation_config(protocol="given"))
    rows = planted.table("test").to_pylist()
    assert [(ask.rating, list(ask.features or ())) for ask in fake.asked] == [
        (r["rating"], r["features"]) for r in rows
    ]
    evaluate(fake, planted, evaluation_config(protocol="predicted"))
    assert {(ask.rating, ask.features) for ask in fake.asked} == {(None, None)}
    assert [(ask.user, ask.item) for ask in fake.asked] == [(r["user"], r["item"]) for r in rows]


def test_a_subset_is_drawn_by_the_seed_and_keeps_the_order(planted: Dataset) -> None:
    def drawn(seed: int) -> list[int]:
        chosen = parse_config({"seed": seed, "evaluation": {"rows": 20, "probe_rows": 0}}, "test")
        return evaluate(FakeExplainer(planted, lambda _: "x"), planted, chosen).generations["row"].to_pylist()

    one = drawn(1)
    assert len(one) == 20
    assert one == sorted(set(one)) == drawn(1)
    assert one != drawn(2)


def test_empty_generations_stay_and_count(planted: Dataset) -> None:
    metrics = evaluate(FakeExplainer(planted, lambda _: " "), planted, evaluation_config(rows=30)).metrics
    assert metrics["counts"]["empty_generations"] == 30
    for name in ("bleu_1", "bleu_4", "rouge_1", "rouge_l", "distinct_1", "distinct_2", "usr", "fmr", "fcr", "div"):
        assert metrics["metrics"][name] == 0.0, name
    assert metrics["planted"]["sentiment_agreement"] == 0.0
    json.dumps(metrics, allow_nan=False)


def test_conflicting_or_missing_sentiment_words_disagree(planted: Dataset) -> None:
    truth = planted.truth()
    assert truth is not None
    good, bad = truth.sentiment_words["positive"][0], truth.sentiment_words["negative"][0]
    texts = [f"so {good}!", f"{good} but {bad}", "nothing said", f"so {bad}", f"so {good}"]
    ratings = np.array([5.0, 5.0, 5.0, 1.0, np.nan])
    agrees = agreement(planted_reader(truth), texts, ratings)
    assert agrees[:4].tolist() == [1.0, 0.0, 0.0, 1.0]
    assert np.isnan(agrees[4])


def test_bias_model_equals_the_generators(planted: Dataset) -> None:
    metrics = evaluate(FakeExplainer(planted, lambda _: "x"), planted, evaluation_config()).metrics
    truth = planted.truth()
    assert truth is not None
    assert metrics["baselines"]["ratings"]["bias_model"]["rmse"] == pytest.approx(truth.bias_rmse, abs=2e-3)
    mean = planted.arrays("train").rating.mean()
    off = planted.arrays("test").rating - mean
    assert metrics["baselines"]["ratings"]["global_mean"]["mae"] == pytest.approx(float(np.abs(off).mean()), abs=1e-5)


def test_bias_model_finds_planted_biases() -> None:
    user, item = (part.ravel() for part in np.meshgrid(np.arange(200), np.arange(150), indexing="ij"))
    random = np.random.default_rng(0)
    of_user, of_item = random.normal(size=200), random.normal(size=150)
    rating = (3 + of_user[user] + of_item[item]).astype(np.float32)
    rating[:5] = np.nan
    bias = BiasModel.fit(PairArrays(user, item, rating), 201, 150)
    assert np.corrcoef(bias.user_U[:200], of_user)[0, 1] > 0.999
    assert np.corrcoef(bias.item_I, of_item)[0, 1] > 0.999
    assert bias.user_U[200] == 0.0
    assert bias.mean == pytest.approx(float(np.nanmean(rating)), abs=1e-4)
    known, stranger = bias.predict(np.array([3, 201]), np.array([7, 150]))
    assert known == bias.mean + bias.user_U[3] + bias.item_I[7]
    assert stranger == bias.mean


def test_implicit_data_without_features(tmp_path: Path) -> None:
    dataset = bare_dataset(tmp_path / "data", ["b", "a", "a", "b", "c", "d", "e", "f", "g", "a text of five words"])
    assert most_frequent_text(dataset) == "b"
    result = evaluate(FakeExplainer(dataset, parrot(dataset)), dataset, evaluation_config())
    metrics = result.metrics
    json.dumps(metrics, allow_nan=False)
    assert metrics["metrics"]["bleu_4"] == pytest.approx(100.0)
    missing = {name for name, value in metrics["metrics"].items() if value is None}
    assert {"bertscore_f", "fmr", "fcr", "div", "rmse", "mae", "peter_bleu_4", "distinct_1_at_1000"} <= missing
    assert not {"bleu_1", "bleu_4", "rouge_1", "rouge_l", "distinct_1", "usr"} & missing
    assert metrics["planted"] is None
    assert metrics["baselines"]["ratings"] is None
    missing = {gap["what"] for gap in metrics["not_measured"]}
    assert {"BERTScore", "FMR, FCR, DIV", "RMSE, MAE"} <= missing
    assert "BLEU, ROUGE" not in missing
    assert result.generations["rating"].null_count == 1


def test_data_without_texts_has_no_scores_but_runs(tmp_path: Path) -> None:
    dataset = bare_dataset(tmp_path / "data", [""] * 10)
    metrics = evaluate(FakeExplainer(dataset, lambda _: "x"), dataset, evaluation_config()).metrics
    assert metrics["metrics"]["bleu_4"] is None
    assert metrics["baselines"]["constant"]["text"] == ""
    assert "BLEU, ROUGE" in {gap["what"] for gap in metrics["not_measured"]}


def test_generations_hold_what_was_asked_and_said(planted: Dataset) -> None:
    table = evaluate(FakeExplainer(planted, lambda _: "so <b>bold</b>"), planted, evaluation_config(rows=5)).generations
    assert table.schema.names == [
        *("split", "row", "user", "item", "title", "rating", "predicted_rating", "features", "prompt_features"),
        *("reference", "generated", "cluster", "responsibilities", "user_known", "item_known"),
    ]
    first = table.slice(0, 1).to_pylist()[0]
    source = planted.table("test").slice(first["row"], 1).to_pylist()[0]
    assert first["user"] == planted.catalog.user_id(source["user"])
    assert (first["reference"], first["rating"], first["features"]) == (
        source["text"],
        source["rating"],
        source["features"],
    )
    assert sum(first["responsibilities"]) == pytest.approx(1.0)


@pytest.fixture
def run(tmp_path: Path, planted: Dataset, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ExplanationGenerator, "load", lambda *_: FakeExplainer(planted, parrot(planted)))
    monkeypatch.setattr("gavamoe.evaluation.faithfulness.gates.measure_gates", lambda *_: None)  # the fake has no gates
    return make_run(tmp_path / "run", planted)


def test_evaluate_run_writes_a_whole_artifact_and_replaces_it(run: Path) -> None:
    calls: list[tuple[int, int]] = []
    metrics = evaluate_run(run, rows=7, on_progress=lambda done, total: calls.append((done, total)))
    assert calls == [(7, 14), (7, 14), (14, 14), (14, 14)]  # seven texts, then seven for other users
    assert metrics["faithfulness"]["gates"] is None
    folder = run / "evaluation"
    assert {path.name for path in folder.iterdir()} == {"metrics.json", "generations.parquet", "artifact.json"}
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    manifest = read_manifest(folder, "evaluation")
    assert set(manifest.inputs) == {"dataset", "stage2"}
    assert manifest.config["evaluation"]["rows"] == 7
    again = evaluate_run(run, rows=3, protocol="predicted")
    assert (again["rows"], again["protocol"]) == (3, "predicted")
    assert pq.read_table(folder / "generations.parquet").num_rows == 3
    assert read_manifest(folder, "evaluation").config["evaluation"]["protocol"] == "predicted"


def test_losses_are_kept_where_they_are_asked_for(
    planted: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = row_losses(["a", "b"], [0, 30], [4, 6], [2.0, 9.0], rows=[3, 8])
    asked: list[int] = []

    def read(_: Dataset, rows: EvaluatedRows, seed: int) -> RowLosses:
        asked.append(len(rows.references))
        return losses

    fake = FakeExplainer(planted, lambda _: "x")
    off = evaluate(fake, planted, evaluation_config(rows=5), losses=read)
    assert (off.losses, off.metrics["losses"], asked) == (None, None, [])
    why = {gap["what"]: gap["why"] for gap in off.metrics["not_measured"]}
    assert why["Loss of the rows' own texts"] == "evaluation.row_losses is off, or nothing to read"
    on = evaluate(fake, planted, evaluation_config(rows=5, row_losses=True), losses=read)
    assert asked == [5]
    assert on.metrics["losses"]["shown"]["all"] == {"users": 2, "rows": 2, "tokens": 10, "loss": 1.1}
    assert "Loss of the rows' own texts" not in {gap["what"] for gap in on.metrics["not_measured"]}
    for number, (result, names) in enumerate(((on, {LOSSES_FILE}), (off, set()))):
        folder = tmp_path / str(number)
        write_evaluation(folder, result, evaluation_config(), {})
        manifest = read_manifest(folder, "evaluation")
        assert set(manifest.files) == {"metrics.json", "generations.parquet"} | names
        assert read_metrics(folder / "metrics.json") == result.metrics


def test_wrong_runs_and_options_are_named(run: Path, tmp_path: Path, planted: Dataset) -> None:
    with pytest.raises(InputError, match="not a run folder"):
        evaluate_run(tmp_path)
    with pytest.raises(InputError, match="'guessed'"):
        evaluate_run(run, protocol="guessed")
    with pytest.raises(InputError, match="split: unknown value 'tset'"):
        evaluate_run(run, split="tset")
    other = bare_dataset(tmp_path / "other", ["a"] * 10)
    with pytest.raises(InputError, match=r"other: not the dataset of .*run \(fingerprint"):
        evaluate_run(run, dataset=other.path)
    write_json(run / "dataset.json", {"path": str(other.path), "fingerprint": other.fingerprint})
    with pytest.raises(InputError, match="stage2: was trained on another dataset"):
        evaluate_run(run)
    write_json(run / "dataset.json", [])
    with pytest.raises(InputError, match="expected path and fingerprint"):
        evaluate_run(run)
    assert not (run / "evaluation").exists()


def test_user_groups_are_recovered_from_routes(planted: Dataset, tmp_path: Path) -> None:
    """Routes that send every pair to its user's planted group recover the groups; random ones don't."""
    truth = planted.truth()
    assert truth is not None
    train = planted.arrays("train")
    random = np.random.default_rng(0).integers(0, 3, len(train.user))
    for cluster, low, high in ((truth.group[train.user], 1.0, 1.0), (random, -0.2, 0.3)):
        path = tmp_path / "routes.parquet"
        rows = {
            "split": ["train"] * len(train.user),
            "user": train.user,
            "item": train.item,
            "cluster": cluster.astype(np.int16),
            "responsibilities": pa.array(np.eye(3, dtype=np.float32)[cluster].tolist(), pa.list_(pa.float32())),
            "predicted_rating": np.zeros(len(train.user), np.float32),
        }
        pq.write_table(pa.table(rows), path)
        fake = FakeExplainer(planted, lambda _: "x")
        metrics = evaluate(fake, planted, evaluation_config(rows=5), routes=path).metrics
        assert low <= metrics["planted"]["user_ari"] <= high
