"""The feature extractor: what counts as a feature, which sentence is chosen, and that features are clean words."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gavamoe.data.bounds import MAX_FEATURE_CHARS
from gavamoe.data.text import features as module
from gavamoe.data.text.cleaning import clean, clean_id, clean_review, cut, sentences, unmarked
from gavamoe.data.text.features import (
    MAX_ROW_FEATURES,
    Vocabulary,
    WordCounts,
    count_words,
    given_features,
    split_features,
)
from gavamoe.data.text.lexicon import NEVER_FEATURES


def vocabulary(texts: list[str], repeat: int = 10) -> list[str]:
    counts = WordCounts()
    counts.add(count_words(pa.array(texts * repeat)))
    return Vocabulary.from_counts(counts).features


def test_nouns_are_found_and_other_words_are_not() -> None:
    found = vocabulary(
        [
            "The room was spotless and my bed is soft.",
            "We arrived late, but the room has a huge balcony.",
            "I unpack in the room. They unpack quickly too.",
            "A beautiful garden, friendly staff and the garden.",
        ]
    )
    assert found[0] == "room", "most frequent first"
    assert set(found) == {"room", "bed", "balcony", "garden", "staff"}


def test_compounds_end_in_a_noun() -> None:
    assert "card" in vocabulary(["A gift card.", "I like the gift card, it works.", "Great gift for all."])


def test_words_of_judgement_and_time_are_never_features() -> None:
    found = vocabulary(["The great was the day.", "A love is a love.", "The people are the best of the year."])
    assert found == []
    assert not {"good", "terrible", "the", "day", "people"} - NEVER_FEATURES


def test_a_word_of_two_texts_is_too_rare() -> None:
    texts = ["The balcony was closed."] * 2 + ["The room was open."] * 3
    assert vocabulary(texts, repeat=1) == ["room"]


def test_the_vocabulary_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["The room was open. The bed was open. The desk was open."] * 3 + ["The room was open."] * 3
    monkeypatch.setattr(module, "MAX_VOCABULARY", 2)
    assert vocabulary(texts) == ["room", "bed"]


def test_counting_forgets_rare_words_but_stays_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_COUNTED_WORDS", 30)
    counts = WordCounts()
    for number in range(40):
        letters = "".join(chr(97 + int(digit)) for digit in str(number))
        counts.add(count_words(pa.array([f"The room was big. The q{letters}x was big.", "The room is here."])))
    assert Vocabulary.from_counts(counts).features == ["room"]
    assert len(counts.items()) <= 31


def test_counts_do_not_depend_on_batches() -> None:
    texts = ["The room, the café and my bed.", "", "It's the hotel's lobby!", "Room? THE ROOM.", "…", "über der Tür."]
    whole, parts = WordCounts(), WordCounts()
    whole.add(count_words(pa.array(texts)))
    for text in texts:
        parts.add(count_words(pa.array([text])))
    assert sorted(whole.items()) == sorted(parts.items())


def test_the_sentence_with_the_most_frequent_feature_is_chosen_first_of_equals() -> None:
    texts = [
        "Nothing here at all. The bed was soft. I liked the room. Another room.",
        "Oh. We came by train again.",
        "Fine.",
        "",
    ]
    sentence, row = sentences(clean_review(pa.array(texts)))
    chosen = Vocabulary(["room", "bed"]).choose(sentence, row, len(texts))
    assert chosen.text.to_pylist() == ["I liked the room.", "We came by train again.", "Fine.", ""]
    assert chosen.features.to_pylist() == [["room"], [], [], []]


def test_features_of_a_text_come_most_frequent_first_without_repetition_and_bounded() -> None:
    names = ["room", "bed", "desk", "lamp", "sink", "door", "wall"]
    text = "The wall, door, sink, lamp, desk, Bed, BED and room."
    chosen = Vocabulary(names).choose(pa.array([text]), np.array([0]), 1)
    assert chosen.features.to_pylist() == [names[:MAX_ROW_FEATURES]]
    assert chosen.text.to_pylist() == [text]


def test_part_of_a_word_is_no_feature() -> None:
    chosen = Vocabulary(["room", "bed"]).choose(pa.array(["Bedrooms and roomy."]), np.array([0]), 1)
    assert chosen.features.to_pylist() == [[]]


def test_an_empty_vocabulary_chooses_the_first_real_sentence() -> None:
    sentence, row = sentences(clean_review(pa.array(["Hm. One two three. Four five six."])))
    chosen = Vocabulary([]).choose(sentence, row, 1)
    assert chosen.text.to_pylist() == ["One two three."]
    assert chosen.features.to_pylist() == [[]]


def test_given_features_are_cleaned() -> None:
    found, too_long, no_list = given_features(
        pa.array(["Room Service, wifi ;WiFi|  ", None, "a\x00b\n c", "x" * 65 + ",ok"])
    )
    assert found.to_pylist() == [["room service", "wifi"], [], ["a b c"], ["ok"]]
    assert too_long.to_pylist() == [False, False, False, True]
    assert not any(no_list.to_pylist())
    lists = pa.array([["b", "a", "b", None], None, [str(number) for number in range(9)]], pa.list_(pa.string()))
    assert given_features(lists)[0].to_pylist() == [["b", "a"], [], ["0", "1", "2", "3", "4"]]


@pytest.mark.parametrize(
    ("text", "features"),
    [
        ("['room', 'swimming pool']", ["room", "swimming pool"]),
        ('["room", "caf\\u00e9"]', ["room", "café"]),
        ("['room' 'swimming pool']", ["room", "swimming pool"]),
        ("['room'\n 'pool, big']", ["room", "pool, big"]),
        ("('room', 'pool')", ["room", "pool"]),
        ("{'room', 'pool'}", ["pool", "room"]),
        ("['don\\'t', \"it's\"]", ["don't", "it's"]),
        ("[1, None, 2]", ["1", "2"]),
        ("[]", []),
        ("room;pool|bar, grill", ["room", "pool", "bar", " grill"]),
        ("(wifi)", ["(wifi)"]),
        ("{wifi", ["{wifi"]),
    ],
)
def test_lists_that_programs_print_are_lists(text: str, features: list[str]) -> None:
    assert split_features(text) == features


@pytest.mark.parametrize("text", ["[room", "['a', ['b']]", "[a, b]", "[" * 9_000, "['" + "a" * 10_000 + "']", "[f()]"])
def test_what_begins_like_a_list_and_is_none_is_known_as_such(text: str) -> None:
    assert split_features(text) is None
    assert given_features(pa.array(["a", text]))[2].to_pylist() == [False, True]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=60), max_size=8))
def test_any_text_goes_through(texts: list[str]) -> None:
    array = pa.array([text.encode("utf-8", "replace").decode() for text in texts], pa.string())
    counts = WordCounts()
    counts.add(count_words(array))
    cleaned = clean_review(array)
    sentence, row = sentences(cleaned)
    chosen = Vocabulary(["room"]).choose(sentence, row, len(texts))
    assert len(chosen.text) == len(chosen.features) == len(texts)
    assert all(text.as_py() == "" or text.as_py().isprintable() for text in clean(array, 100) if text.as_py().isascii())
    for words in given_features(array)[0].to_pylist():
        assert len(words) <= MAX_ROW_FEATURES
        assert all(0 < len(word) <= MAX_FEATURE_CHARS and word == word.strip() for word in words)


def test_clean_removes_control_characters_and_folds_blanks() -> None:
    dirty = pa.array(["  a\x00\tb\u00a0\u2028c\r\n\r\nd \u202egood", None, "\x07"])
    assert clean(dirty, 100).to_pylist() == ["a b c d good", None, ""]


def test_special_tokens_in_a_text_are_left_to_the_tokenizer() -> None:
    text = "<|endoftext|> <s> [INST] {user} </s>"
    assert clean(pa.array([text]), 100).to_pylist() == [text]


def test_cut_never_parts_a_word_unless_it_alone_is_too_long() -> None:
    found = cut(pa.array(["one two three", "one two", "abcdefghij", "été été"]), 7).to_pylist()
    assert found == ["one two", "one two", "abcdefg", "été été"]


def test_sentences() -> None:
    text = 'Dr. Smith paid 3.50 for it. "Great!" he said... J. R. agreed\nand a wrapped line\n- A list\n\nEnd'
    sentence, row = sentences(clean_review(pa.array([text, "Solo"])))
    assert sentence.to_pylist() == [
        "Dr. Smith paid 3.50 for it.",
        '"Great!"',
        "he said...",
        "J. R. agreed and a wrapped line",
        "- A list",
        "End",
        "Solo",
    ]
    assert row.tolist() == [0] * 6 + [1]


@pytest.mark.parametrize(
    "whole",
    [
        "We paid 4.50 for 12 oz. bottles, chips etc. and soda.",
        "Open at 7 a.m. and again at 9 p.m. on Sundays.",
        "Songs of the 70s, e.g. Mr. Lee and Prof. Day, in vol. 2 and no. 9.",
        "See example.com or v1.2 for more.",
        "He came, saw ...",
    ],
)
def test_abbreviations_and_numbers_end_no_sentence(whole: str) -> None:
    sentence, _ = sentences(clean_review(pa.array([whole + " Then we left."])))
    assert sentence.to_pylist() == [whole, "Then we left."]


def test_sentences_that_lost_the_blank_between_them_are_parted() -> None:
    text = 'It hums.The strap (red).I like it!It\'s fine...And "good".Bye, etc. Then J.R.R. Tolkien and Node.js.'
    sentence, _ = sentences(clean_review(pa.array([text])))
    assert sentence.to_pylist() == [
        "It hums.",
        "The strap (red).",
        "I like it!",
        "It's fine...",
        'And "good".',
        "Bye, etc.",
        "Then J.R.R. Tolkien and Node.js.",
    ]


def test_markup_of_web_pages_is_removed() -> None:
    assert unmarked(pa.array(["A &amp; B<br />C &#34;d&#34;", "a < b <br> c", None])).to_pylist() == [
        'A & B\nC "d"',
        "a < b \n c",
        None,
    ]


def test_ids_are_trimmed_and_judged() -> None:
    ids, missing, long, malformed = clean_id(pa.array([" u1 ", "", None, "  ", "x" * 257, "a\x00b", "ü 2"]))
    assert ids.to_pylist()[0] == "u1"
    assert missing.to_pylist() == [False, True, True, True, False, False, False]
    assert long.to_pylist() == [False, False, False, False, True, False, False]
    assert malformed.to_pylist() == [False, False, False, False, False, True, False]
