"""Explanations that their user wrote before: found by their words, taken out of reviews, counted."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers.reviews import rows_of, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st

from gavamoe.data.dataset import open_dataset
from gavamoe.data.prepare import prepare
from gavamoe.data.text.repeats import REPEATED_SHARE, SEQUENCE, repeated_texts, word_sequences
from gavamoe.errors import InputError

SAME = "The strings sound warm and bright, and stay in tune."


def found(texts: list[str], users: list[int], batch: int = 3, rows_at_a_time: int = 10**6) -> list[bool]:
    batches = [pa.array(texts[start : start + batch], pa.string()) for start in range(0, len(texts), batch)]
    return repeated_texts(
        lambda: map(word_sequences, batches), np.array(users, dtype=np.int32), rows_at_a_time
    ).tolist()


@pytest.mark.parametrize(
    ("second", "repeated"),
    [
        (SAME, True),
        (SAME.upper().replace(",", " -"), True),
        ("Once more: the strings sound warm and bright.", True),  # 3 of 5 sequences
        ("They sound warm and bright, and that is all I say.", False),  # 2 of 8
        ("A case of good size with a strong lock.", False),
        ("", False),
    ],
)
def test_a_text_repeats_when_half_of_its_sequences_stand_in_earlier_ones(second: str, repeated: bool) -> None:
    assert found([SAME, second], [0, 0]) == [False, repeated]
    assert found([SAME, second], [0, 1]) == [False, False], "what others wrote is no repeat"


def test_earlier_texts_count_together_and_short_texts_whole() -> None:
    parts = ["the strings sound warm", "and stay in tune"]
    assert found([*parts, "the strings sound warm and stay in tune"], [4, 4, 4]) == [False, False, False], "2 of 5"
    assert found([*parts, "the strings sound warm", "tune in stay and"], [4] * 4) == [False, False, True, False]
    assert found(["Good beer.", "good, beer", "good beer again"], [1, 1, 1]) == [False, True, False]
    assert found([], []) == []


def by_definition(texts: list[str], users: list[int]) -> list[bool]:
    seen: set[tuple[int, tuple[str, ...]]] = set()
    result = []
    for text, user in zip(texts, users, strict=True):
        words = re.findall(r"\w+", text.lower())
        size = min(SEQUENCE, len(words))
        sequences = [(user, tuple(words[at : at + size])) for at in range(len(words) - size + 1)] if words else []
        known = sum(sequence in seen for sequence in sequences)
        result.append(bool(sequences) and known >= REPEATED_SHARE * len(sequences))
        seen.update(sequences)
    return result


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.lists(st.sampled_from("ab"), max_size=9).map(" ".join), st.integers(0, 3)), max_size=20),
    st.integers(1, 7),
    st.integers(1, 9),
)
def test_the_arrays_say_what_the_definition_says(rows: list[tuple[str, int]], batch: int, at_a_time: int) -> None:
    """Within one text a sequence that comes twice is not its own repeat; passes by users change nothing."""
    texts, users = [text for text, _ in rows], [user for _, user in rows]
    assert found(texts, users, batch, at_a_time) == by_definition(texts, users)


def reviews() -> list[dict[str, object]]:
    texts = [f"The room of hotel number {n} in town {n} has a view of lake {n}." for n in range(30)]
    rows: list[dict[str, object]] = [
        {"user": f"u{n % 3}", "item": f"i{n}", "rating": 4, "text": text} for n, text in enumerate(texts)
    ]
    rows[12] |= {"text": texts[9]}  # u0's own
    rows[13] |= {"text": texts[9]}  # u1 wrote none like it
    return rows


def test_such_rows_of_reviews_keep_their_rating_alone_and_are_counted(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "r.jsonl", reviews())
    result = prepare(source, tmp_path / "d", "table", text_mode="review")
    rows = {row["item"]: row for row in rows_of(open_dataset(tmp_path / "d"))}
    assert (result.kept, result.repeated_texts, len(rows)) == (30, 1, 30)
    assert (rows["i12"]["text"], rows["i12"]["features"], rows["i12"]["rating"]) == ("", [], 4)
    assert all(rows[f"i{n}"]["text"] for n in range(30) if n != 12)
    assert open_dataset(tmp_path / "d").meta.preparation["repeated_texts"] == 1
    kept = prepare(source, tmp_path / "k", "table", text_mode="review", keep_repeated_texts=True)
    assert kept.repeated_texts == 0
    assert all(row["text"] for row in rows_of(open_dataset(tmp_path / "k")))
    splits = {row["item"]: row["split"] for row in rows_of(open_dataset(tmp_path / "k"))}
    assert splits == {item: row["split"] for item, row in rows.items()}, "no row moves"
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == sorted(
        path.name for path in (tmp_path / "k").iterdir()
    ), "nothing of the second pass is left"


def test_given_explanations_stay_as_they_are(tmp_path: Path) -> None:
    result = prepare(write_lines(tmp_path / "r.jsonl", reviews()), tmp_path / "d", "table")
    assert result.repeated_texts == 0
    assert all(row["text"] for row in rows_of(open_dataset(tmp_path / "d")))


def test_a_row_that_a_later_one_replaces_repeats_nothing(tmp_path: Path) -> None:
    rows = reviews()
    rows.append(dict(rows[4]) | {"text": rows[4]["text"]})  # u1's pair again: only the later row stays
    result = prepare(write_lines(tmp_path / "r.jsonl", rows), tmp_path / "d", "table", text_mode="review")
    assert (result.repeated_pairs, result.repeated_texts) == (1, 1)
    assert {row["item"] for row in rows_of(open_dataset(tmp_path / "d")) if not row["text"]} == {"i12"}


def test_keeping_them_is_refused_where_none_are_taken_out(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "r.jsonl", reviews())
    with pytest.raises(InputError, match="keep_repeated_texts: text mode explanation takes none out"):
        prepare(source, tmp_path / "d", "table", keep_repeated_texts=True)
