"""Which texts one single user wrote: counted by author and not by row, compared by words, kept in an artifact."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gavamoe.errors import InputError
from gavamoe.generation.authorship import AUTHORS_FILE, NOBODY, SingleAuthors

TEXTS = [
    "Keys stick after rain.",
    "Good value!",
    "keys  STICK, after rain",
    "Good value",
    "Nobody's own words",
    "",
    "?!",
]
USERS = [4, 1, 4, 2, 7, 5, 6]
STRANGER = 99


@pytest.fixture
def authors() -> SingleAuthors:
    return SingleAuthors.of_texts(TEXTS, USERS)


@pytest.mark.parametrize(
    ("text", "user", "expected"),
    [
        ("Keys stick after rain.", 1, True),
        ("keys stick — after rain", STRANGER, True),
        ("\uff2beys stick after rain", 1, True),  # a full-width K
        ("Keys stick after rain.", 4, False),  # the author's own
        ("Keys stick after the rain.", 1, False),
        ("Keys stick after", 1, False),
        ("Good value", 3, False),  # two users wrote it
        ("Nobody's own words", 4, True),
        ("", 3, False),
        ("?!", 3, False),  # no words: nobody's
    ],
)
def test_a_text_of_exactly_one_other_user(authors: SingleAuthors, text: str, user: int, expected: bool) -> None:
    assert authors.another_wrote(text, user) is expected


def test_short_texts_may_pass(authors: SingleAuthors) -> None:
    assert authors.another_wrote("Keys stick after rain", 1, least_words=4)
    assert not authors.another_wrote("Keys stick after rain", 1, least_words=5)


def test_a_file_gives_the_same_answers_and_no_texts(authors: SingleAuthors, tmp_path: Path) -> None:
    authors.save(tmp_path)
    assert len(SingleAuthors.load(tmp_path)) == len(authors) == 2
    assert SingleAuthors.load(tmp_path).another_wrote(TEXTS[0], 1)
    assert b"stick" not in (tmp_path / AUTHORS_FILE).read_bytes().lower()


def test_texts_of_a_user_taken_out_are_nobodys(authors: SingleAuthors) -> None:
    left = authors.without([4])
    assert left.another_wrote(TEXTS[0], 4)
    assert left.another_wrote(TEXTS[0], STRANGER)
    assert left.another_wrote("nobody s own words", 1)
    assert left.another_wrote(TEXTS[4], NOBODY)


def test_no_texts_at_all(tmp_path: Path) -> None:
    SingleAuthors.of_texts([], []).save(tmp_path)
    assert not SingleAuthors.load(tmp_path).another_wrote("anything", 0)


def test_missing_and_damaged_files_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"{AUTHORS_FILE}: missing, .*train it again, or serve it with withhold"):
        SingleAuthors.load(tmp_path)
    (tmp_path / AUTHORS_FILE).write_bytes(b"PAR1")
    with pytest.raises(InputError, match=rf"{AUTHORS_FILE}: can't be read \("):
        SingleAuthors.load(tmp_path)
    schema = pa.schema([("words", pa.uint64()), ("user", pa.int32())])
    table = pa.table([np.array([3, 2], np.uint64), np.array([0, 1], np.int32)], schema=schema)
    pq.write_table(table, tmp_path / AUTHORS_FILE)
    with pytest.raises(InputError, match="not in ascending order"):
        SingleAuthors.load(tmp_path)
