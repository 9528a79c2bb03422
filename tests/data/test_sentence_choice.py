"""Which sentence of a review becomes its explanation: 50 made-up reviews with marked sentences, and the parts of the
rule one by one.

fixtures/marked_reviews.json was written, and its sentences marked best, ok (would do) or no, before there was a rule.
"""

import json
import statistics
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers.reviews import rows_of, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st

from gavamoe.data.dataset import open_dataset
from gavamoe.data.prepare import prepare
from gavamoe.data.ratings import RatingScale
from gavamoe.data.summary import Quartiles
from gavamoe.data.text import lexicon
from gavamoe.data.text.cleaning import clean_review, sentences
from gavamoe.data.text.features import Chosen, SentenceRule, Vocabulary, WordCounts, count_words

REVIEWS = json.loads((Path(__file__).parent.parent / "fixtures" / "marked_reviews.json").read_text(encoding="utf-8"))
ROOM = Vocabulary(["room", "bed", "pool", "staff", "view"])


def text_of(review: dict[str, list[list[str]]]) -> str:
    """Its sentences with blanks between; after one without a stop, a line end."""
    return "".join(text + (" " if text[-1] in ".!?)" else "\n") for _, text in review["sentences"])


def choose(texts: list[str], rule: SentenceRule, leaning: list[int] | None = None, known: Vocabulary = ROOM) -> Chosen:
    sentence, row = sentences(clean_review(pa.array(texts, pa.string())))
    return known.choose(sentence, row, len(texts), rule, None if leaning is None else np.array(leaning))


@pytest.fixture(scope="module")
def marked() -> tuple[list[str], list[int], Vocabulary]:
    """The marked reviews, the sentiments of their ratings, and the features that are found in them."""
    texts = [text_of(review) for review in REVIEWS]
    counts = WordCounts()
    counts.add(count_words(pa.array(texts * 10)))  # as if of 500 reviews, or most words were too rare
    return texts, [int(np.sign(review["rating"] - 3)) for review in REVIEWS], Vocabulary.from_counts(counts)


def test_most_marked_reviews_get_a_sentence_that_a_person_would_choose(
    marked: tuple[list[str], list[int], Vocabulary],
) -> None:
    texts, leaning, known = marked
    found: dict[str, list[str]] = {}
    rules: tuple[SentenceRule, ...] = ("frequent", "best")
    for rule in rules:
        chosen = choose(texts, rule, leaning, known).text.to_pylist()
        marks = [{text: mark for mark, text in review["sentences"]} for review in REVIEWS]
        found[rule] = [of_review[text] for of_review, text in zip(marks, chosen, strict=True)]
    assert len(REVIEWS) == 50
    acceptable = {rule: 50 - marks.count("no") for rule, marks in found.items()}
    assert acceptable["best"] >= 45, "docs/data.md says 49"
    assert acceptable["frequent"] <= acceptable["best"] - 10
    assert found["best"].count("best") >= 42
    assert 12 <= statistics.median(len(text.split()) for text in chosen) <= 25


def test_the_choice_does_not_depend_on_batches(marked: tuple[list[str], list[int], Vocabulary]) -> None:
    """Whatever stands before and after a review, and where a batch ends."""
    texts, leaning, known = marked
    whole = choose(texts, "best", leaning, known)
    order = np.random.default_rng(0).permutation(len(texts)).tolist()
    for rows in ([[row] for row in order], [order[:7], order[7:31], order[31:]]):
        for part in rows:
            alone = choose([texts[row] for row in part], "best", [leaning[row] for row in part], known)
            assert alone.text.to_pylist() == [whole.text[row].as_py() for row in part]
            assert alone.features.to_pylist() == [whole.features[row].as_py() for row in part]


PARTS = {
    "length": ("The room has a soft carpet, a long desk and a window to the yard.", "The room has a carpet."),
    "no fragment": ("The lamp near the bed hums.", "Nice room."),
    "not endless": (
        "The room has a soft carpet, a long desk and a window to the yard.",
        "The room " + "has a carpet and a desk and a lamp and a chair and " * 5 + "has a door.",
    ),
    "features": ("The room and the view were as shown.", "The room and the rest were as shown."),
    "end": ("The room has a carpet and a desk.", "The room has a carpet and a desk"),
    "start": ("The room has a carpet and a desk.", "the room has a carpet and a desk."),
    "no trailing off": ("The room has a carpet and a desk.", "The room has a carpet and a desk..."),
    "no question": ("The room has a carpet and a desk", "The room has a carpet and a desk?"),
    "no header": ("The room has a carpet and a desk", "The room has a carpet and a desk:"),
    "no link": ("The room has a carpet and a desk.", "The room has a carpet, see www.rooms.example."),
    "no shouting": ("The room has a carpet and a desk.", "THE ROOM HAS A CARPET AND A DESK!"),
    "no connective": ("One room has a carpet and a desk.", "But the room has a carpet and desk."),
    "no story": ("The room had a carpet and a desk.", "The room had my wife and our son."),
    "no writer first": ("Each room had my bags on a desk.", "My room had bags on each desk too."),
    "the item first": ("The room had bags on each desk.", "Each room had bags on the desk."),
    "opinion, no story": ("I really like the room with its carpet.", "I opened up the room with its carpet."),
    "judgement": ("The room has a lovely carpet.", "The room has a woolen carpet."),
}


@pytest.mark.parametrize("swapped", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("part", PARTS)
def test_each_part_decides_between_sentences_alike_in_the_rest(part: str, swapped: bool) -> None:
    better, worse = PARTS[part]
    review = "\n".join((worse, better) if swapped else (better, worse))
    assert choose([review], "best").text.to_pylist() == [better]


@pytest.mark.parametrize(
    ("praise", "blame"),
    [
        ("The room is lovely and bright.", "The room is ugly and bright."),
        ("The room was not bad at all.", "The room was not good at all."),
        ("The room has no problem with noise.", "The room has a problem with noise."),
        ("The room was not only good but huge.", "The room was neither good nor huge."),
        ("The room has a view too.", "The room has too many lamps."),
        ("The room isn't bad by any means.", "The room isn't great by any means."),
    ],
)
def test_praise_goes_with_good_ratings_and_blame_with_bad_ones(praise: str, blame: str) -> None:
    for review in (f"{praise} {blame}", f"{blame} {praise}"):
        chosen = choose([review, review, review], "best", [1, -1, 0]).text.to_pylist()
        assert chosen[:2] == [praise, blame]
        assert chosen[2:] == choose([review], "best").text.to_pylist(), "neutral is as without a rating"


def test_what_agrees_goes_before_what_says_both() -> None:
    review = "The room is lovely but ugly. The room is lovely to see. The room is ugly to see."
    assert choose([review] * 3, "best", [0, 1, -1]).text.to_pylist() == [
        "The room is lovely but ugly.",
        "The room is lovely to see.",
        "The room is ugly to see.",
    ]


def test_of_equals_the_first_is_chosen_and_what_has_a_feature_goes_before_what_has_none() -> None:
    texts = [
        "The room was a room. The room was a room!",
        "We found the sea, a lovely beach and a friendly town, all in easy reach. Room.",
        "Oh. We came by train. We came by the night train with a lot of very good food and drink.",
        "Fine.",
        "",
    ]
    chosen = choose(texts, "best")
    assert chosen.text.to_pylist() == ["The room was a room.", "Room.", "We came by train.", "Fine.", ""]
    assert chosen.features.to_pylist() == [["room"], ["room"], [], [], []]


WORDS = "room bed I love like not only too good bad wife www OK été 4.5 “x”".split()
TEXTS = st.lists(st.sampled_from([*WORDS, ". ", "! ", "? ", "... ", ": ", ", ", "\n", "\u2028"]), max_size=30)
ROWS = st.lists(st.tuples(TEXTS.map(" ".join), st.sampled_from([-1, 0, 1])), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(ROWS)
def test_the_choice_is_one_of_the_sentences_with_the_features_in_it(rows: list[tuple[str, int]]) -> None:
    texts, leaning = [text for text, _ in rows], [sentiment for _, sentiment in rows]
    chosen = choose(texts, "best", leaning)
    split, row = sentences(clean_review(pa.array(texts)))
    of_row: dict[int, list[str]] = {number: [] for number in range(len(texts))}
    for number, sentence in zip(row.tolist(), split.to_pylist(), strict=True):
        of_row[number].append(sentence)
    for number, (sentence, features) in enumerate(zip(*(column.to_pylist() for column in chosen), strict=True)):
        assert sentence in (of_row[number] or [""])
        assert set(features) == {word for word in ("room", "bed") if word in sentence.split()}
        assert bool(features) == any(word in texts[number].split() for word in ("room", "bed"))
    assert choose(texts[-1:], "best", leaning[-1:]).text[0] == chosen.text[-1]


def test_lists_of_praise_and_blame_exclude_each_other_and_hold_whole_words() -> None:
    assert not lexicon.POSITIVE & lexicon.NEGATIVE
    for listed in (lexicon.POSITIVE, lexicon.NEGATIVE, lexicon.STORY_WORDS, lexicon.OPINION_VERBS, lexicon.CONNECTIVES):
        assert all(word.isascii() and word.isalpha() and word.islower() for word in listed)


REVIEW = "Great room. We slept well. The room has a lovely view, a soft bed and a desk, but a loud pool. Bye!"


def test_the_rule_is_an_option_stands_in_the_dataset_and_words_are_counted(tmp_path: Path) -> None:
    records = [{"user": f"u{n}", "item": "i", "rating": 5, "text": REVIEW} for n in range(9)]
    records.append({"user": "u9", "item": "i", "rating": 5, "text": "The room was dry."})
    source = write_lines(tmp_path / "t.jsonl", records)
    best = prepare(source, tmp_path / "best", "table", text_mode="review")
    named = prepare(source, tmp_path / "named", "table", text_mode="review", sentence="best")
    frequent = prepare(source, tmp_path / "frequent", "table", text_mode="review", sentence="frequent")
    whole = prepare(source, tmp_path / "whole", "table")
    texts = {
        name: {row["text"] for row in rows_of(open_dataset(tmp_path / name))} for name in ("best", "frequent", "whole")
    }
    assert texts["best"] == {"The room has a lovely view, a soft bed and a desk, but a loud pool.", "The room was dry."}
    assert texts["frequent"] == {"Great room.", "The room was dry."}
    assert texts["whole"] == {REVIEW, "The room was dry."}
    kept = [open_dataset(tmp_path / name).meta.sentence for name in ("best", "frequent", "whole")]
    assert kept == [best.sentence, frequent.sentence, whole.sentence] == ["best", "frequent", None]
    assert best.fingerprint == named.fingerprint != frequent.fingerprint
    assert best.words == Quartiles(low=16, median=16, high=16)
    assert frequent.words == Quartiles(low=2, median=2, high=2)
    pairs = [{key: record[key] for key in ("user", "item", "rating")} for record in records]
    without = prepare(write_lines(tmp_path / "p.jsonl", pairs), tmp_path / "p", "table", text_mode="none")
    assert without.words is None


def test_datasets_from_before_there_was_a_choice_are_read(tmp_path: Path) -> None:
    records = [{"user": f"u{n}", "item": "i", "rating": 5, "text": REVIEW} for n in range(10)]
    prepare(write_lines(tmp_path / "t.jsonl", records), tmp_path / "out", "table", text_mode="review")
    path = tmp_path / "out" / "meta.json"
    meta = json.loads(path.read_text())
    assert meta.pop("sentence") == "best"
    path.write_text(json.dumps(meta))
    assert open_dataset(tmp_path / "out").meta.sentence is None


def test_ratings_count_by_their_scale(tmp_path: Path) -> None:
    """6 of 10 is good and 4 bad, whatever the range that a source's ratings have."""
    text = "The room was lovely. The room was horrible."
    records = [{"user": f"u{n}", "item": "i", "rating": 4 if n % 2 else 6, "text": text} for n in range(10)]
    source = write_lines(tmp_path / "t.jsonl", records)
    prepare(source, tmp_path / "out", "table", text_mode="review", rating_scale=(0, 10))
    found = {(row["rating"], row["text"]) for row in rows_of(open_dataset(tmp_path / "out"))}
    assert found == {(6, "The room was lovely."), (4, "The room was horrible.")}


def test_a_dataset_is_the_same_whatever_its_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marked: tuple[list[str], list[int], Vocabulary]
) -> None:
    texts, leaning, _ = marked
    records = [
        {"user": f"u{n % 40}", "item": f"i{n}", "rating": 3 + leaning[n % 50], "text": texts[n % 50]}
        for n in range(150)
    ]
    source = write_lines(tmp_path / "t.jsonl", records)
    whole = prepare(source, tmp_path / "whole", "table", text_mode="review")
    monkeypatch.setattr("gavamoe.data.readers.batches.BATCH_ROWS", 7)
    parts = prepare(source, tmp_path / "parts", "table", text_mode="review")
    assert parts.words == whole.words
    for split in ("train", "valid", "test"):
        assert open_dataset(tmp_path / "parts").table(split) == open_dataset(tmp_path / "whole").table(split)


@pytest.mark.parametrize("scale", [RatingScale(low=1, high=5, values=(1, 2, 3, 4, 5)), RatingScale(low=0.5, high=5)])
def test_leanings_are_sentiments(scale: RatingScale) -> None:
    ratings = np.linspace(scale.low, scale.high, 41)
    named = [("negative", "neutral", "positive")[1 + value] for value in scale.leaning(ratings).tolist()]
    assert named == [scale.sentiment(rating) for rating in ratings.tolist()]
    assert len(set(named)) == 3
    assert scale.leaning(np.array([np.nan])).tolist() == [0]


@pytest.mark.parametrize(
    ("counts", "quartiles"), [([0, 1], (1, 1, 1)), ([1, 1, 1, 1], (0, 1, 2)), ([0, 0, 9, 1], (2, 2, 2))]
)
def test_quartiles_of_a_histogram(counts: list[int], quartiles: tuple[int, int, int]) -> None:
    found = Quartiles.of_counts(np.array(counts))
    assert found is not None
    assert (found.low, found.median, found.high) == quartiles
    assert Quartiles.of_counts(np.zeros(3, dtype=int)) is None
