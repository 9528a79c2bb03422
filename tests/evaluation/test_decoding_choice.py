"""The choice of a way to decode: the best by its parts, kept with the model, read by every command, made once."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.stage2_runs import Trained
from helpers.tiny import tiny

from gavamoe.artifacts.manifest import MANIFEST, read_manifest
from gavamoe.artifacts.run import claim_run, open_run
from gavamoe.config.schema import GenerationConfig
from gavamoe.data.dataset import Dataset, open_dataset
from gavamoe.data.synthetic.generator import synthesize
from gavamoe.evaluation import decoding_choice
from gavamoe.evaluation.decoding_choice import choose_decoding, ways
from gavamoe.evaluation.faithfulness.measure import repeats_itself
from gavamoe.generation.artifact import generation_settings
from gavamoe.generation.generator import ExplanationGenerator

CONFIG = tiny("generation.choose=true", "generation.max_new_tokens=8")


@pytest.fixture
def run(torch_run: Trained, planted: Dataset, tmp_path: Path) -> Path:
    """A run folder with a trained stage 2."""
    folder = tmp_path / "run"
    claim_run(folder, CONFIG, planted.path, planted.fingerprint, continuing=False)
    shutil.copytree(torch_run.out, folder / "stage2")
    return folder


def scores(monkeypatch: pytest.MonkeyPatch, best: str) -> None:
    """Have the way of that name score best, without writing."""
    order = iter(ways(CONFIG.generation))
    monkeypatch.setattr(ExplanationGenerator, "explain", lambda *_, **__: [])
    worth = lambda *_: {"rouge_l": np.full(5, float(next(order) == best))}  # noqa: E731
    monkeypatch.setattr(decoding_choice._Judge, "worth", worth)


def test_the_best_way_is_kept_and_read_by_all(run: Path, planted: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    fingerprint = read_manifest(run / "stage2", "stage2").fingerprint
    with monkeypatch.context() as patch:
        scores(patch, "penalty")
        chosen = choose_decoding(run, CONFIG, planted)
    assert chosen is not None
    assert (chosen.no_repeat_ngram, chosen.repetition_penalty) == (3, 1.1)
    assert open_run(run).config.generation == generation_settings(run / "stage2") == chosen
    manifest = read_manifest(run / "stage2", "stage2")
    assert manifest.fingerprint == fingerprint
    assert manifest.details["decoding"]["chosen"] == "penalty"
    # Made once: what is there is not tried again.
    monkeypatch.setattr(ExplanationGenerator, "explain", lambda *_, **__: pytest.fail("written again"))
    assert choose_decoding(run, CONFIG, planted) == chosen


@pytest.mark.parametrize(
    ("lead", "spread", "chosen"),
    [(0.01, 0.0, "as configured"), (0.04, 0.0, "penalty"), (0.04, 0.3, "as configured"), (0.08, 0.3, "penalty")],
)
def test_a_later_way_must_lead_by_more_than_chance(
    lead: float, spread: float, chosen: str, run: Path, planted: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among 100 rows whose differences spread by .3, two standard errors are .06."""
    order = iter(ways(CONFIG.generation))
    monkeypatch.setattr(ExplanationGenerator, "explain", lambda *_, **__: [])
    noise = spread * np.tile([-1.0, 1.0], 50)
    worth = lambda *_: {"rouge_l": 1.5 + (lead + noise) * (next(order) == "penalty")}  # noqa: E731
    monkeypatch.setattr(decoding_choice._Judge, "worth", worth)
    choose_decoding(run, CONFIG, planted)
    assert read_manifest(run / "stage2", "stage2").details["decoding"]["chosen"] == chosen


def test_groups_count_alike_however_large() -> None:
    values = np.array([1.0, 0.0, 1.0, 1.0, np.nan])
    spread = decoding_choice._spread(values, [np.array([0, 1]), np.array([2]), np.array([3])])
    assert spread.mean() == pytest.approx((0.5 + 1 + 1) / 3)


def test_texts_are_judged_by_all_parts(run: Path, planted: Dataset) -> None:
    done: list[tuple[int, int]] = []
    choose_decoding(run, CONFIG, planted, lambda *counts: done.append(counts))
    tried = json.loads((run / "stage2" / MANIFEST).read_text())["details"]["decoding"]["tried"]
    assert list(tried) == list(ways(CONFIG.generation))
    assert done[-1] == (len(tried), len(tried))
    for parts in tried.values():
        plus = parts["rouge_l"] + parts["feature_recall"] + parts["sentiment_balanced"]
        assert parts["score"] == pytest.approx(plus - parts["repeats"] - parts["memorized"])


def test_without_the_wish_a_run_keeps_its_settings(run: Path, planted: Dataset) -> None:
    plain = tiny("generation.max_new_tokens=8")
    open_run(run).write_config(plain)
    assert open_run(run).config.generation == plain.generation


def test_lengths_of_the_config_hold_for_all_ways() -> None:
    configured = GenerationConfig(max_new_tokens=20, min_new_tokens=3, batch_size=5)
    for way in ways(configured).values():
        assert (way.max_new_tokens, way.batch_size, way.beams) == (20, 5, 1)
        assert way.min_new_tokens == 3


def test_repeats_are_of_four_words() -> None:
    assert repeats_itself("it is a good film and it is a good day")
    assert not repeats_itself("it is a good film and it is a bad day")
    assert not repeats_itself("no no no")
    assert not repeats_itself("")


def test_rows_are_of_each_sentiment_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding_choice, "ROWS", 12)
    dataset = open_dataset(synthesize(tmp_path / "data", users=60, items=40, ratings=900))
    rows = decoding_choice._rows(dataset, 0)
    ratings = dataset.arrays("valid").rating[rows.index]
    assert [int(count) for count in (np.sum(ratings < 3), np.sum(ratings == 3), np.sum(ratings > 3))] == [4, 4, 4]
    assert np.array_equal(ratings, rows.pairs.rating)
    texts = dataset.table("valid", ["text"])["text"].to_pylist()
    assert rows.references == [texts[row] for row in rows.index]
    few = dataset.arrays("valid").rating.copy()
    few[few < 3] = 4
    few[np.flatnonzero(few == 4)[0]] = 1
    pairs = dataset.arrays("valid")._replace(rating=few)
    monkeypatch.setattr(dataset, "arrays", lambda _: pairs)
    ratings = few[decoding_choice._rows(dataset, 0).index]
    assert [int(count) for count in (np.sum(ratings < 3), np.sum(ratings == 3), np.sum(ratings > 3))] == [1, 5, 6]
