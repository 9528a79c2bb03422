"""What the baseline XRec reads: profiles of users and items, and the prompts around them."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from helpers.xrec_models import columns_of, config_of, reader_of, xrec

from gavamoe.baselines.frame import Columns, Reader
from gavamoe.baselines.parts.profiles import FeatureCounts, Profiles
from gavamoe.baselines.training import train_baseline
from gavamoe.baselines.writing import BaselineWriter
from gavamoe.baselines.xrec import Xrec
from gavamoe.data.dataset import Dataset
from gavamoe.errors import InputError
from gavamoe.runtime.context import LocalContext

ROWS = [(0, 0, ["plot", "cast"]), (0, 1, ["plot"]), (0, 2, ["music", "plot"]), (1, 0, ["cast"]), (1, 1, None)]


def counts(column: int) -> FeatureCounts:
    return FeatureCounts.of([row[column] for row in ROWS], [row[2] for row in ROWS])


def test_a_profile_leaves_out_the_rows_own_features() -> None:
    users = counts(0)
    assert users.most_frequent(0, 10) == ["plot", "cast", "music"]
    assert users.most_frequent(0, 10, ["plot", "cast"]) == ["plot", "music"]
    assert users.most_frequent(0, 1, ["plot"]) == ["plot"]
    assert users.most_frequent(1, 10, ["cast"]) == []  # its only row with a feature
    assert users.most_frequent(9, 10) == []
    tie = FeatureCounts({(0, "a"): 3, (0, "b"): 2, (0, "c"): 2})
    assert tie.most_frequent(0, 1, ["a"]) == ["a"]
    assert tie.most_frequent(0, 2, ["b"]) == ["a", "c"]


def test_profiles_are_kept(tmp_path: Path) -> None:
    Profiles(counts(0), counts(1)).save(tmp_path)
    kept = Profiles.load(tmp_path)
    for index in range(3):
        assert kept.users.most_frequent(index, 5) == counts(0).most_frequent(index, 5)
        assert kept.items.most_frequent(index, 5) == counts(1).most_frequent(index, 5)


def said(model: Xrec, columns: Columns, reader: Reader) -> list[str]:
    user, item = model.prompts.slots
    rows = model.prefixes(columns, reader)
    assert all((row.count(user), row.count(item)) == (1, 1) for row in rows)
    return [reader.tokenizer.decode([token for token in row if token < user]) for row in rows]


def test_prompts_of_training_rows_hold_nothing_of_the_rows_own(planted: Dataset) -> None:
    model, reader = xrec(planted), reader_of(planted, config_of())
    model.profiles = Profiles(counts(0), counts(1))
    request = columns_of([("plot", "cast")], titles=["Night Train"])
    [asked] = said(model, request, reader)
    assert asked.endswith(
        "Title: Night Train\nUser profile: often mentions plot, cast, music\nItem profile: known for cast, plot"
        "\nExplanation:\n"
    )
    [trained] = said(model, dataclasses.replace(request, rows=np.array([0])), reader)
    assert "often mentions plot, music\nItem profile: known for cast\n" in trained
    [empty] = said(model, columns_of([("cast",)], users=np.array([1]), rows=np.array([3])), reader)
    assert "User profile" not in empty
    unknown = columns_of([()], users=np.array([model.spec.n_users]), items=np.array([model.spec.n_items]))
    assert "profile" not in said(model, unknown, reader)[0]


def test_profiles_can_be_left_out(planted: Dataset, tmp_path: Path) -> None:
    config = config_of("baselines.xrec.profile_features=0", "baselines.xrec.experts=1", "stage2.max_steps=2")
    train_baseline(config, planted.path, tmp_path / "baseline", LocalContext())
    writer = BaselineWriter.load(tmp_path / "baseline")
    assert isinstance(writer.model, Xrec)
    assert not list((tmp_path / "baseline").glob("*profiles*"))
    assert "profile" not in said(writer.model, columns_of([("battles",)]), writer.reader)[0]
    assert writer.model.users.weight.shape[0] == 1


def test_the_form_with_features_names_them_and_the_sentiment(planted: Dataset) -> None:
    model, reader = xrec(planted, features=True), reader_of(planted, config_of())
    ratings = np.array([5, 1, np.nan], np.float32)
    good, bad, unrated = said(model, columns_of([("battles",)] * 2 + [("battles", "story")], ratings=ratings), reader)
    assert good.endswith("\nRating: positive\nFeatures: battles\nExplanation:\n")
    assert bad.endswith("\nRating: negative\nFeatures: battles\nExplanation:\n")
    assert unrated.endswith("\nFeatures: battles, story\nExplanation:\n")
    assert "Rating" not in unrated
    plain = said(xrec(planted), columns_of([("battles",)], ratings=ratings[:1]), reader)[0]
    assert "Rating" not in plain
    assert "Features" not in plain


def test_prompts_in_marks(planted: Dataset) -> None:
    config = config_of("stage2.prompt.instruction=false")
    model, reader = xrec(planted, features=True), reader_of(planted, config)
    ratings = np.array([5, np.nan], np.float32)
    rated, bare = said(model, columns_of([("battles", "story"), ()], ratings=ratings), reader)
    assert rated.endswith(", positive; battles, story\n")
    assert "Explain" not in rated
    assert ";" not in bare


def test_a_prompt_that_is_too_long_loses_profiles_first(planted: Dataset) -> None:
    model, config = xrec(planted, features=True), config_of()
    model.profiles = Profiles(counts(0), counts(1))
    columns = columns_of([("plot",)], titles=["Night Train"], ratings=np.array([5], np.float32))
    texts, lengths = {}, {}
    for most in range(30, 97):
        reader = reader_of(planted, config)
        reader.prompt = reader.prompt.model_copy(update={"max_tokens": most})
        try:
            [prefix] = model.prefixes(columns, reader)
        except InputError:
            continue
        texts[most], lengths[most] = said(model, columns, reader)[0], len(prefix)
    assert all(length <= most for most, length in lengths.items())
    assert all(text.endswith("\nExplanation:\n") for text in texts.values())
    order = [" Features: plot", "Title: Night Train", "plot, cast, music", "known for cast, plot"]
    first = [min(most for most, text in texts.items() if part.strip() in text) for part in order]
    assert first == sorted(first)
    reader.prompt = config.stage2.prompt.model_copy(update={"max_tokens": 16})
    with pytest.raises(InputError, match=r"max_tokens: 16 is below the \d+ tokens of XRec's prompt"):
        model.prefixes(columns, reader)


def test_no_text_forges_a_slot(planted: Dataset) -> None:
    model, reader = xrec(planted, features=True), reader_of(planted, config_of())
    special = reader.tokenizer.eos_token
    [prefix] = model.prefixes(columns_of([(special,)], titles=[f"{special} [slot]"]), reader)
    assert reader.end not in prefix
    assert sorted(token for token in prefix if token >= model.prompts.slots[0]) == list(model.prompts.slots)
    assert model.prompts.slots[0] == model.lm.config.vocab_size
