"""Which training rows are learned: of each sentiment the texts that say it, judged by readers of other texts."""

from pathlib import Path

import numpy as np
import pytest
from helpers.tiny import tiny

from gavamoe.data.dataset import Dataset, open_dataset
from gavamoe.data.prepare import prepare
from gavamoe.stage2.clear_texts import training_rows
from gavamoe.stage2.tokenized_rows import rows_with_text

WORDS = {5: "lovely bright charming", 3: "plain usual middling", 1: "dreadful boring dull"}
"""Words of a text that says its rating."""


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """600 rows; every fourth text has the words of another rating, every fiftieth row no text."""
    folder, random = tmp_path_factory.mktemp("clear"), np.random.default_rng(0)
    lines = ["user,item,rating,text"]
    for row in range(600):
        rating = int(random.choice([5, 5, 5, 3, 1]))
        said = rating if row % 4 else {5: 1, 3: 5, 1: 3}[rating]
        text = (
            ""
            if row % 50 == 7
            else f"{random.choice(WORDS[said].split())} thing {row % 13} {'true' if row % 4 else 'false'}"
        )
        lines.append(f"u{row % 40},i{row // 2},{rating},{text}")
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    prepare(folder / "rows.csv", folder / "out", "table", columns={name: name for name in lines[0].split(",")})
    return open_dataset(folder / "out")


def columns(data: Dataset, rows: np.ndarray) -> tuple[list[str], np.ndarray]:
    table = data.table("train", ["text", "rating"]).take(rows)
    return table["text"].to_pylist(), table["rating"].to_numpy(zero_copy_only=False).astype(np.float64)


def test_all_rows_are_learned_unless_asked_otherwise(mixed: Dataset) -> None:
    assert np.array_equal(training_rows(tiny(), mixed), rows_with_text(mixed, "train"))


def test_the_clearest_texts_of_each_sentiment_stay(mixed: Dataset) -> None:
    every = rows_with_text(mixed, "train")
    kept = training_rows(tiny("stage2.clear_share=0.6"), mixed)
    assert np.all(np.diff(kept) > 0)
    assert np.all(np.isin(kept, every))
    all_ratings, (texts, ratings) = columns(mixed, every)[1], columns(mixed, kept)
    for rating in (1, 3, 5):
        assert np.sum(ratings == rating) == round(0.6 * np.sum(all_ratings == rating))
    assert np.mean(["false" in text for text in texts]) < 0.02


def test_the_choice_is_made_by_the_seed(mixed: Dataset) -> None:
    half = [training_rows(tiny("stage2.clear_share=0.5", f"seed={seed}"), mixed) for seed in (0, 0, 1)]
    assert np.array_equal(half[0], half[1])
    assert len(half[0]) == len(half[2])


def test_nothing_is_left_out_without_ratings(implicit_dataset: Path) -> None:
    data = open_dataset(implicit_dataset)
    assert np.array_equal(training_rows(tiny("stage2.clear_share=0.5"), data), rows_with_text(data, "train"))
