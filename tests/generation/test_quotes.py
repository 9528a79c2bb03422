"""Quoted reviews: which are nearest, that none is the answer, that they reach prompts, and that users can leave."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.tiny import tiny

from gavamoe.artifacts.run import claim_run, open_run
from gavamoe.data.dataset import Dataset, open_dataset
from gavamoe.errors import InputError
from gavamoe.generation.evidence.quotes import QUOTES_FILE, Quotes
from gavamoe.generation.forget import forget_users
from gavamoe.generation.generator import ExplanationGenerator
from gavamoe.generation.request import ExplanationRequest
from gavamoe.runtime.context import LocalContext
from gavamoe.stage2.tokenized_rows import encode_rows, prompt_builder, rows_with_text
from gavamoe.stage2.train import train_stage2

ROWS = [
    # user, item, rating, features, text
    (0, 0, 5.0, ["lid"], "a fine lid"),
    (1, 0, 5.0, ["lid"], "its lid holds"),
    (2, 1, 1.0, ["lid"], "no lid at all"),
    (3, 2, 5.0, ["lid", "rim"], "lid and rim"),
    (3, 1, 4.0, ["rim"], "a rim to like"),
    (4, 3, 2.0, [], "nothing to say"),
]


def quotes_of(rows: list[tuple[int, int, float, list[str], str]] = ROWS) -> Quotes:
    names = ("user", "item", "rating", "features", "text")
    return Quotes(pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows]))


def test_the_nearest_share_features_then_rating_then_user_or_item() -> None:
    quotes = quotes_of()
    assert quotes.nearest(9, 1, 1.0, ["lid"], 2) == ("no lid at all", "a fine lid")
    assert quotes.nearest(9, 9, 5.0, ["LID"], 3) == ("a fine lid", "its lid holds", "no lid at all")
    assert quotes.nearest(1, 9, 5.0, ["lid"], 1) == ("its lid holds",)  # of the same user
    assert quotes.nearest(9, 9, 5.0, ["rim", "lid"], 1) == ("lid and rim",)
    assert quotes.nearest(9, 9, None, ["lid"], 1) == quotes.nearest(9, 9, float("nan"), ["lid"], 1) == ("a fine lid",)


def test_a_pair_never_quotes_itself() -> None:
    quotes = quotes_of()
    assert "a fine lid" not in quotes.nearest(0, 0, 5.0, ["lid"], 9)
    assert quotes.nearest(4, 3, 2.0, [], 9) == ()


def test_without_a_shared_feature_the_items_or_the_users_rows_are_quoted() -> None:
    quotes = quotes_of()
    assert quotes.nearest(9, 1, 4.0, ["handle"], 2) == ("a rim to like", "no lid at all")
    assert quotes.nearest(3, 9, 4.0, [], 1) == ("a rim to like",)
    assert quotes.nearest(9, 9, 4.0, [], 1) == ()


def test_equal_texts_are_quoted_once() -> None:
    twice = quotes_of([*ROWS, (5, 5, 5.0, ["lid"], "a fine lid")])
    assert twice.nearest(9, 9, 5.0, ["lid"], 2) == ("a fine lid", "its lid holds")


def test_training_prompts_quote_other_rows_alone(planted: Dataset) -> None:
    config = tiny("stage2.prompt.quotes=2", "stage2.prompt.max_tokens=160", "stage2.prompt.quote_tokens=60")
    builder, rows = prompt_builder(config, planted), rows_with_text(planted, "train")
    encoded = encode_rows(builder, planted, "train", rows)
    texts = planted.table("train", ["text"])["text"].to_pylist()
    words = len(builder.tokenizer)
    prompts = [builder.tokenizer.decode([t for t in encoded.prompts[row] if t < words]) for row in range(40)]
    assert all("Similar reviews:\n- " in prompt for prompt in prompts)
    train = planted.arrays("train")
    for row, prompt in enumerate(prompts):
        own = np.flatnonzero((train.user == train.user[row]) & (train.item == train.item[row]))
        others = {text for place, text in enumerate(texts) if place not in own}
        assert texts[row] in others or texts[row] not in prompt
    plain = encode_rows(prompt_builder(tiny(), planted), planted, "train", rows)
    assert encoded.prompts.lengths.sum() > plain.prompts.lengths.sum()


@pytest.fixture(scope="module")
def trained(tiny_dataset: Path, stage1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose prompts quote."""
    run = tmp_path_factory.mktemp("quotes") / "run"
    config = tiny("stage2.prompt.quotes=1", "generation.max_new_tokens=8", "stage2.max_steps=2")
    claim_run(run, config, tiny_dataset, open_dataset(tiny_dataset).fingerprint, continuing=False)
    shutil.copytree(stage1, run / "stage1")
    train_stage2(config, tiny_dataset, run / "stage1", run / "stage2", LocalContext())
    return run


def test_requests_quote_what_is_nearest_and_texts_are_written(trained: Path) -> None:
    explainer, kept = ExplanationGenerator.load(trained / "stage2"), Quotes.load(trained / "stage2")
    request = ExplanationRequest(user=0, item=1, rating=5.0, features=("battles",))
    prepared = explainer.prepare([request])
    assert prepared.requests[0].quotes == kept.nearest(0, 1, 5.0, ["battles"], 1) != ()
    words = [token for token in prepared.prompts[0] if token < len(explainer.tokenizer)]
    assert "Similar reviews:" in explainer.tokenizer.decode(words)
    [written] = explainer.explain([request], open_run(trained).config.generation)
    assert written.new_tokens


def test_a_forgotten_users_reviews_are_quoted_no_more(trained: Path, tmp_path: Path) -> None:
    run = open_run(shutil.copytree(trained, tmp_path / "run"))
    catalog = ExplanationGenerator.load(run.stage2).filler.catalog
    before = pq.read_table(run.stage2 / QUOTES_FILE)
    user = int(before["user"][0].as_py())
    forget_users(run, [catalog.user_id(user)])
    after = pq.read_table(run.stage2 / QUOTES_FILE)
    assert after.num_rows == before.num_rows - before["user"].to_pylist().count(user)
    assert user not in after["user"].to_pylist()


def test_missing_quotes_are_refused(trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained / "stage2", tmp_path / "stage2")
    (folder / QUOTES_FILE).unlink()
    with pytest.raises(InputError, match="missing file quotes"):
        ExplanationGenerator.load(folder)
