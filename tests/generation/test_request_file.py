"""Files of requests: the three forms, what rows may leave out, and what is refused before a text is written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gavamoe.errors import InputError
from gavamoe.generation.batch.request_file import RequestFile, RequestRow

ROWS: list[dict[str, Any]] = [
    {"user": "U1", "item": "I1"},
    {"user": "U2", "item": "I 2, new", "rating": 4.5, "features": ["sound", "build quality"]},
    {"user": "nobody", "item": "I3", "history": [{"item": "I1", "rating": 2.0}, {"text": 'Short "and" witty.'}]},
]


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(
        pa.Table.from_pylist([{"rating": None, "features": None, "history": None} | row for row in rows]), path
    )


def as_json_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\ufeff" + "\n\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")


def as_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    import csv

    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, ["note", "history", "features", "rating", "item", "user"])
        table.writeheader()
        for row in rows:
            texts = {"features": ", ".join(row.get("features", [])), "history": json.dumps(row.get("history", []))}
            table.writerow(row | texts | {"note": "two\nlines"})


FORMS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    "requests.parquet": as_parquet, "requests.jsonl": as_json_lines, "requests.csv": as_csv,
}  # fmt: skip


def read(path: Path) -> list[RequestRow]:
    source = RequestFile.open(path, lambda row: None)
    rows = [row for block in source.blocks(2) for row in block]
    assert len(rows) == source.rows
    return rows


@pytest.mark.parametrize("name", FORMS)
def test_the_forms_say_the_same(name: str, tmp_path: Path) -> None:
    FORMS[name](tmp_path / name, ROWS)
    assert read(tmp_path / name) == [RequestRow.model_validate(row) for row in ROWS]


@pytest.mark.parametrize("name", FORMS)
def test_blocks_go_on_where_they_are_told_to(name: str, tmp_path: Path) -> None:
    rows = [{"user": f"U{number}", "item": "I"} for number in range(7)]
    FORMS[name](tmp_path / name, rows)
    source = RequestFile.open(tmp_path / name, lambda row: None)
    assert [[row.user for row in block] for block in source.blocks(3, first=1)] == [["U3", "U4", "U5"], ["U6"]]


def test_ids_that_are_whole_numbers_are_their_digits(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"user": 17, "item": 8, "features": "sound,, size ", "rating": 3}')
    [row] = read(tmp_path / "r.jsonl")
    assert (row.user, row.item, row.features, row.rating) == ("17", "8", ["sound", "size"], 3.0)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("r.txt", "", r"r\.txt: a file of requests is Parquet, JSON lines or CSV"),
        ("r.jsonl", "", "has no rows"),
        ("r.csv", "user,item\n", "has no rows"),
        ("r.csv", "user,product\nU,I\n", "needs one column item; it has user, product"),
        ("r.csv", "user,item,item\nU,I,I\n", "needs one column item"),
        ("r.csv", "user,item\nU,I\nU,I,J\n", "row 3: has 3 values, the header 2"),
        ("r.csv", "user,item,rating\nU,I,\nU,I,good\n", "row 3: rating 'good': Input should be a valid number"),
        ("r.csv", "user,item\nU,\n", "row 2: item '': .*at least 1"),
        ("r.jsonl", '{"user": "U", "item": "I"}\n{"user": "U"}\n', "row 2: item: missing"),
        ("r.jsonl", '{"user": "U", "item": "I", "rating": true}\n', "row 1: rating True: Input should be a number"),
        ("r.jsonl", '{"user": "U", "item": "I", "rating": NaN}\n', "row 1: rating nan: Input should be a finite"),
        ("r.jsonl", "[1, 2]\n", "row 1: is no JSON object"),
        ("r.jsonl", "{", "row 1: is no JSON"),
        ("r.jsonl", '{"user": "U", "item": "I", "history": [{}]}\n', "row 1: history.0 .*needs an item, a rating or a"),
        ("r.csv", 'user,item,history\nU,I,"[1"\n', "row 2: history .*is no JSON list"),
        ("r.parquet", "no parquet", r"r\.parquet: can't be read"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_by_row_and_field(name: str, content: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=problem) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_not_utf_8_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes("user,item\nJosé,I\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin\.csv: can't be read"):
        read(tmp_path / "latin.csv")


def test_a_row_that_the_run_can_t_serve_is_named(tmp_path: Path) -> None:
    def check(row: RequestRow) -> None:
        if row.rating is not None:
            raise InputError("rating 9: outside this dataset's scale, 1 to 5")

    (tmp_path / "r.csv").write_text("user,item,rating\nU,I,\nU,I,9\n")
    with pytest.raises(InputError, match=r"r\.csv: row 3: rating 9: outside this dataset's scale"):
        RequestFile.open(tmp_path / "r.csv", check)
