"""No part of an answer reaches a prompt, under either protocol; both protocols in one run, their files apart.

Every explanation consists of words that occur nowhere else, and so do the features of every test row. So a leak,
by whatever way, shows as a marker in a prompt or as a prompt that changes with the texts.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.runs import evaluation_config, make_run
from helpers.tiny import tiny
from helpers.writers import FakeExplainer, parrot

from gavamoe.config.schema import GenerationConfig
from gavamoe.data.dataset import Dataset, open_dataset
from gavamoe.data.writer import DatasetWriter, Rows
from gavamoe.evaluation.evaluate import evaluate, evaluate_run
from gavamoe.evaluation.rows import requests_of, select_rows
from gavamoe.generation.decoding_engine import Engine, Row
from gavamoe.generation.generator import ExplanationGenerator
from gavamoe.runtime.context import LocalContext
from gavamoe.stage1.train import train_stage1
from gavamoe.stage2.setup import prepare
from gavamoe.stage2.train import train_stage2

USERS, ITEMS, ROWS = 20, 25, 400
WORD, FEATURE = "zq", "vk"
"""Every word of an explanation holds the one, every test row's feature the other; nothing else does."""


def marked_dataset(folder: Path, test_word: str) -> Dataset:
    """ROWS rated pairs; texts of words unique to the row, those of the test split made from `test_word`."""
    random = np.random.default_rng(0)
    pair = random.choice(USERS * ITEMS, ROWS, replace=False)
    split = np.repeat(np.array([0, 1, 2], dtype=np.int8), [ROWS - 80, 40, 40])
    rows = Rows(
        users=[f"u{n}" for n in range(USERS)],
        items=[f"i{n}" for n in range(ITEMS)],
        titles=[f"title {n}" for n in range(ITEMS)],
        user=(pair // ITEMS).astype(np.int32),
        item=(pair % ITEMS).astype(np.int32),
        rating=random.integers(1, 6, ROWS).astype(np.float32),
        split=split,
    )
    words = [test_word if part == 2 else WORD for part in split]
    texts = [f"{word}{row}a {word}{row}b" for row, word in enumerate(words)]
    features = [[f"{FEATURE}{row}"] if part == 2 else [f"feature{row % 7}"] for row, part in enumerate(split)]
    folder.mkdir()
    with DatasetWriter(folder, rows) as writer:
        writer.write(pa.array(texts, pa.string()), pa.array(features, pa.list_(pa.string())))
        writer.finish(
            source="x", format="table", text_mode="explanation", seed=0, split="8:1:1", preparation={}, bounds=(1, 5)
        )
    return open_dataset(folder)


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return marked_dataset(tmp_path_factory.mktemp("marked") / "data", WORD)


@pytest.fixture(scope="module")
def run(marked: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages, hardly trained: what a prompt holds does not depend on the weights."""
    work = tmp_path_factory.mktemp("run")
    settings = tiny("stage2.max_steps=1", "stage2.evaluate_every=0", "stage2.checkpoint_every=0")
    train_stage1(settings, marked.path, work / "stage1", LocalContext())
    train_stage2(settings, marked.path, work / "stage1", work / "stage2", LocalContext())
    return work


def readable(explainer: ExplanationGenerator, ids: list[int]) -> str:
    """A prompt without its slots and padding."""
    return explainer.tokenizer.decode([token for token in ids if token < explainer.model.config.vocab_size])


@pytest.mark.parametrize("protocol", ["given", "predicted"])
def test_prompts_hold_no_word_of_any_explanation(marked: Dataset, run: Path, protocol: str) -> None:
    explainer = ExplanationGenerator.load(run / "stage2")
    for split in ("train", "valid", "test"):
        prompts = explainer.prepare(requests_of(select_rows(marked, split, 0, 0), protocol)).prompts
        shown = [readable(explainer, prompt) for prompt in prompts]
        assert len(shown) == marked.size(split)
        assert all("Explanation:" in text for text in shown)
        assert not [text for text in shown if WORD in text.lower()]
        # The features of the row are what "given" gives by definition; "predicted" has none that only test rows know.
        assert sum(FEATURE in text for text in shown) == (len(shown) if (split, protocol) == ("test", "given") else 0)


@pytest.mark.parametrize("protocol", ["given", "predicted"])
def test_other_explanations_leave_prompts_as_they_are(
    marked: Dataset, run: Path, tmp_path: Path, protocol: str
) -> None:
    other = marked_dataset(tmp_path / "other", "replaced")
    assert other.table("test")["text"] != marked.table("test")["text"]
    explainer = ExplanationGenerator.load(run / "stage2")
    one, two = (explainer.prepare(requests_of(select_rows(data, "test", 0, 0), protocol)) for data in (marked, other))
    assert one.prompts == two.prompts
    assert (one.clusters == two.clusters).all()


@pytest.mark.parametrize("protocol", ["given", "predicted"])
def test_what_the_model_is_asked_to_continue_is_the_prompt_alone(
    marked: Dataset, run: Path, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    explainer = ExplanationGenerator.load(run / "stage2")
    seen: list[list[int]] = []

    submit = Engine.submit

    def spy(engine: Engine, row: Row) -> None:
        seen.append(list(row.prompt))
        submit(engine, row)

    monkeypatch.setattr(Engine, "submit", spy)
    requests = requests_of(select_rows(marked, "test", 0, 0), protocol)
    explainer.explain(requests, GenerationConfig(max_new_tokens=1))
    assert sorted(seen) == sorted(explainer.prepare(requests).prompts)
    assert not [ids for ids in seen if WORD in readable(explainer, ids).lower()]


def test_training_learns_answers_only_and_none_of_the_test_split(marked: Dataset, run: Path) -> None:
    setup = prepare(tiny(), marked.path, run / "stage1")
    vocabulary = setup.model.explainer.config.vocab_size

    def text(ids: np.ndarray) -> str:
        return setup.tokenizer.decode([token for token in ids.tolist() if token < vocabulary])

    rows = range(len(setup.train))
    assert len(rows) == marked.size("train")
    assert not [row for row in rows if WORD in text(setup.train.prompts[row]).lower()]
    answers = " ".join(text(setup.train.answers[row]) for row in rows)
    assert all(f"{WORD}{row}a" in answers for row in rows)
    held_out = [
        word for split in ("valid", "test") for text in marked.table(split)["text"].to_pylist() for word in text.split()
    ]
    assert not [word for word in held_out if word in answers.split()]
    batch = setup.train.collate(np.arange(8), setup.clusters["train"], setup.pad)
    for row in range(8):
        start = int(setup.train.prompts.lengths[row])
        assert (batch["labels"][row, :start] == -100).all()
        assert batch["labels"][row, start] == batch["input_ids"][row, start] != -100


def test_both_protocols_in_one_run(tiny_dataset: Path) -> None:
    planted = open_dataset(tiny_dataset)
    fake = FakeExplainer(planted, lambda request: "rated" if request.rating is not None else "unrated")
    result = evaluate(fake, planted, evaluation_config(protocol="both", rows=12))
    metrics = result.metrics
    json.dumps(metrics, allow_nan=False)
    assert metrics["protocol"] == "given"
    shared = {"counts", "metrics", "intervals", "sparsity", "clusters", "planted", "faithfulness", "tokens_written"}
    assert shared <= set(metrics["predicted"]) <= set(metrics)
    assert set(result.generations["generated"].to_pylist()) == {"rated"}
    assert result.predicted is not None
    assert set(result.predicted["generated"].to_pylist()) == {"unrated"}
    assert result.predicted["row"] == result.generations["row"]
    alone = evaluate(fake, planted, evaluation_config(protocol="predicted", rows=12)).metrics
    assert alone["metrics"] == metrics["predicted"]["metrics"]
    assert alone["predicted"] is None


def test_files_of_both_protocols_are_kept_apart(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = open_dataset(tiny_dataset)
    monkeypatch.setattr(ExplanationGenerator, "load", lambda *_: FakeExplainer(planted, parrot(planted)))
    monkeypatch.setattr("gavamoe.evaluation.faithfulness.gates.measure_gates", lambda *_: None)
    run = make_run(tmp_path / "run", planted)
    evaluate_run(run, rows=7, protocol="both", style="both", probe_rows=3)
    names = {path.name for path in (run / "evaluation").iterdir()}
    assert names == {"metrics.json", "generations.parquet", "generations_predicted.parquet", "artifact.json"}
    assert pq.read_table(run / "evaluation" / "generations_predicted.parquet").num_rows == 7
    evaluate_run(run, rows=7, probe_rows=0)
    assert "generations_predicted.parquet" not in {path.name for path in (run / "evaluation").iterdir()}
