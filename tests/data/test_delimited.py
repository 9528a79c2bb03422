"""Delimited files: no row is lost without being counted, however texts are quoted, escaped or broken over lines."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from helpers.reviews import refuse, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st

from gavamoe.data.dataset import open_dataset
from gavamoe.data.prepare import prepare
from gavamoe.data.readers import records
from gavamoe.data.readers.delimited import DelimitedFile
from gavamoe.data.readers.sources import SourceOptions
from gavamoe.data.summary import PrepareSummary

HEADER = ("user", "item", "rating", "title", "text")


def row(number: int, **changes: str) -> list[str]:
    values = {"user": f"u{number % 7}", "item": f"i{number}", "rating": str(1 + number % 5)}
    return list((values | {"title": f"Title {number}", "text": f"The room {number} was clean."} | changes).values())


def rows(count: int = 40, **changed: dict[int, str]) -> list[list[str]]:
    """Rows of a table; `text={3: "..."}` gives row 3 (from 1) another text."""
    return [
        row(number, **{name: values[number] for name, values in changed.items() if number in values})
        for number in range(1, count + 1)
    ]


def write(path: Path, table: list[list[str]], delimiter: str = "\t", header: tuple[str, ...] = HEADER) -> Path:
    """Written as databases do: values joined, nothing quoted."""
    path.write_text("".join(delimiter.join(values) + "\n" for values in [list(header), *table]), newline="")
    return path


def prepared(source: Path, **options: object) -> tuple[PrepareSummary, dict[str, dict[str, object]]]:
    """The summary and the rows by item; removes the dataset."""
    out = source.parent / f"{source.name}.out"
    summary = prepare(source, out, "table", **options)
    found = {str(one["item"]): one for one in rows_of(open_dataset(out))}
    rejected = [json.loads(line)["row"] for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert summary.read == summary.kept + summary.repeated_pairs + len(rejected)
    return summary, found


def read_back(path: Path, **options: object) -> tuple[list[list[str]], list[int]]:
    """All values that a reader finds, and the numbers of the rows that it rejects."""
    file = DelimitedFile(path, SourceOptions(**options))
    file.settle_dialect(file.header.index("rating") if "rating" in file.header else None)
    values: list[list[str]] = []
    numbers: list[int] = []
    rejected: list[int] = []
    for block in file.blocks(range(len(file.header))):
        columns = [[(value or b"").decode() for value in column.to_pylist()] for column in block.table.columns]
        values += [list(one) for one in zip(*columns, strict=True)]
        numbers += block.rows.tolist()
        rejected += [one.row for one in block.broken]
    assert sorted(numbers + rejected) == list(range(1, len(numbers) + len(rejected) + 1))
    return values, rejected


def test_a_table_without_quoting_keeps_all_its_rows(tmp_path: Path) -> None:
    """Titles that begin with a quote once swallowed all rows up to the next quote, and none was rejected."""
    table = rows(title={3: '"Five stars', 12: '"Great" place', 20: 'A 5" screen'})
    summary, found = prepared(write(tmp_path / "t.tsv", table))
    assert (summary.read, summary.kept, summary.rejected) == (40, 40, {})
    assert summary.notes == ["read without quoting, as --quoting none does, since 2 rows are broken with it"]
    catalog = open_dataset(tmp_path / "t.tsv.out").catalog
    assert catalog.item_title(catalog.item_index("i3")) == '"Five stars'
    assert found["i4"]["text"] == "The room 4 was clean."


@pytest.mark.parametrize("quoting", ["auto", "none"])
@pytest.mark.parametrize("closing", ['so called "', 'a 15"'])
def test_quotes_that_happen_to_pair_hide_no_rows(tmp_path: Path, quoting: str, closing: str) -> None:
    """Both quotes stand where quotes of values stand, and the number of values is right."""
    table = rows(title={3: '"Five stars', 9: closing})
    summary, found = prepared(write(tmp_path / "t.tsv", table), quoting=quoting)
    assert summary.kept == 40
    assert found["i5"]["text"] == "The room 5 was clean."


def test_rows_hidden_between_commas_are_told_from_prose_by_their_ratings(tmp_path: Path) -> None:
    table = rows(title={3: '"Five stars', 9: 'a 15"'})
    assert prepared(write(tmp_path / "t.csv", table, ","))[0].kept == 40
    prose = '"First line, which is short\nu1,it is,not,a row,at all\nlast, line"'
    table = rows(text={5: prose})
    summary, found = prepared(write(tmp_path / "p.csv", table, ","))
    assert (summary.kept, summary.notes) == (40, [])
    assert found["i5"]["text"] == "First line, which is short u1,it is,not,a row,at all last, line"


def test_quoting_as_told_is_not_second_guessed(tmp_path: Path) -> None:
    table = rows(title={3: '"Five stars', 9: 'a 15"'})
    summary, _ = prepared(write(tmp_path / "t.tsv", table), quoting="standard")
    assert summary.kept == 34


def test_a_stray_quote_in_a_quoted_table_costs_its_own_line_only(tmp_path: Path) -> None:
    quoted = [[f'"{value}"' for value in one] for one in rows()]
    quoted[6][4] = '"The "great" room"'
    quoted[20][3] = '"A title that never closes'
    summary, found = prepared(write(tmp_path / "t.csv", quoted, ","))
    assert (summary.read, summary.kept) == (40, 38)
    assert summary.rejected == {"a quoted value goes on after its closing quote": 2}
    assert "2 lines have stray quotes" in summary.notes[0]
    assert {"i6", "i8", "i20", "i22"} <= set(found)


def test_a_quote_that_never_closes_costs_its_own_line_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the file's last quote; it once took all lines after it as one value."""
    quoted = [[f'"{value}"' for value in one] for one in rows()]
    quoted[20] = ['"u1"', '"i21"', "4", "title", '"never closed']
    quoted[21:] = rows()[21:]
    source = write(tmp_path / "t.csv", quoted, ",")
    expected = (39, {"a quote that never closes": 1})
    summary, _ = prepared(source)
    assert (summary.kept, summary.rejected) == expected
    monkeypatch.setattr(records, "_BLOCK_BYTES", 100)
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 300)
    summary, _ = prepared(source.rename(tmp_path / "again.csv"))
    assert (summary.kept, summary.rejected) == expected


def test_inch_marks_are_text(tmp_path: Path) -> None:
    table = rows(text={number: f'a 5" screen {number}' for number in range(1, 41)})
    summary, found = prepared(write(tmp_path / "t.csv", table, ","))
    assert (summary.kept, summary.notes) == (40, [])
    assert found["i7"]["text"] == 'a 5" screen 7'


@pytest.mark.parametrize("options", [{}, {"escape": "\\"}])
def test_backslash_escapes_of_spark(tmp_path: Path, options: dict[str, str]) -> None:
    table = rows()
    for number, values in enumerate(table, start=1):
        values[4] = f'"The \\"room\\", {number} C:\\\\ \nwas great"'
    summary, found = prepared(write(tmp_path / "t.csv", table, ","), **options)
    assert summary.kept == 40
    assert found["i7"]["text"] == 'The "room", 7 C:\\ was great'
    assert summary.notes == (
        [] if options else ["read with \\ as escape character, since 40 rows are broken without it"]
    )


def test_escaped_nulls_and_line_ends_of_mysql(tmp_path: Path) -> None:
    table = rows(title={3: "\\N"}, text={4: "one\\\ntwo \\\t three"})
    summary, found = prepared(write(tmp_path / "t.tsv", table), quoting="none", escape="\\")
    assert (summary.kept, summary.titles) == (40, 39)
    assert found["i4"]["text"] == "one two three"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
def test_line_ends_and_delimiters_of_all_kinds(tmp_path: Path, end: str, delimiter: str) -> None:
    table = rows(text={2: f'"Quoted{delimiter} on{end}two lines"'})
    lines = [delimiter.join(values) for values in [list(HEADER), *table]]
    (tmp_path / "t.csv").write_bytes((end.join(lines) + end).encode())
    summary, found = prepared(tmp_path / "t.csv")
    assert (summary.read, summary.kept) == (40, 40)
    assert found["i2"]["text"] == " ".join(f"Quoted{delimiter} on two lines".split())


def test_excels_first_line_names_the_delimiter(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", rows(), ";")
    path.write_text("sep=;\n" + path.read_text())
    assert prepared(path)[0].kept == 40


def test_a_carriage_return_in_a_value_ends_no_row(tmp_path: Path) -> None:
    """pandas quotes line feeds, but not carriage returns."""
    summary, found = prepared(write(tmp_path / "t.csv", rows(text={2: "one\rtwo"}), ","))
    assert (summary.read, summary.kept) == (40, 40)
    assert found["i2"]["text"] == "one two"


def test_misshapen_rows_keep_their_numbers_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = rows(60)
    table[9] = ["only", "two"]
    table[30] = ["a", "b", "c", "d", "e", "f"]
    table[45][3] = '"stray" quote'
    table[50] = [""] * 0
    source = write(tmp_path / "t.csv", table, ",")
    expected = None
    for size in (80, 1000, 2**20):
        monkeypatch.setattr(records, "_BLOCK_BYTES", size)
        found = read_back(source, quoting="standard")
        assert found[1] == [10, 31, 46]
        assert expected in (None, found)
        expected = found
    assert len(expected[0]) == 56


def test_two_columns_of_one_name_are_refused_if_one_is_read(tmp_path: Path) -> None:
    table = rows()
    refuse(write(tmp_path / "t.csv", table, ",", ("user", "item", "rating", "text", "text")), "table",
           "2 columns are named 'text'; rename all but the text's")  # fmt: skip
    assert (
        prepared(write(tmp_path / "o.csv", [[*one, "x", "y"] for one in table], ",", (*HEADER, "x", "x")))[0].kept == 40
    )


@pytest.mark.parametrize(("name", "value"), [("quoting", "some"), ("escape", "ab"), ("escape", '"'), ("escape", "é")])
def test_unknown_ways_of_writing_are_refused(tmp_path: Path, name: str, value: str) -> None:
    refuse(write(tmp_path / "t.csv", rows(), ","), "table", f"{name}: ", **{name: value})


TEXT = st.text(st.sampled_from("ab,\t;|\"'\\\n\r é\u2028"), max_size=12)


def same(value: str) -> str:
    """A value but for its line ends, which are all one."""
    return value.replace("\r\n", "\n").replace("\r", "\n").replace("\u2028", "\n")


@pytest.mark.parametrize("block", [64, 2**20])
@settings(max_examples=150, deadline=None)
@given(
    table=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=12),
    delimiter=st.sampled_from(",\t;|"),
    end=st.sampled_from(["\n", "\r\n"]),
    everywhere=st.booleans(),
)
def test_what_a_csv_writer_writes_is_read_back_row_by_row(
    tmp_path_factory: pytest.TempPathFactory,
    block: int,
    table: list[tuple[str, str]],
    delimiter: str,
    end: str,
    everywhere: bool,
) -> None:
    """Quotes, delimiters and line ends of all kinds in texts: each row comes back, or is counted as rejected."""
    path = tmp_path_factory.mktemp("soak") / "t.csv"
    lines = [["user", "item", "rating", "title", "text"]]
    lines += [[f"u{n}", f"i{n}", "4", *(value.replace("\r", "") for value in pair)] for n, pair in enumerate(table)]
    stream = io.StringIO(newline="")
    quoting = csv.QUOTE_ALL if everywhere else csv.QUOTE_MINIMAL
    csv.writer(stream, delimiter=delimiter, lineterminator=end, quoting=quoting).writerows(lines)
    path.write_bytes(stream.getvalue().encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "_BLOCK_BYTES", block)
        found, rejected = read_back(path)
    assert rejected == []
    assert [[same(value) for value in one] for one in found] == [[same(value) for value in one] for one in lines[1:]]


@settings(max_examples=150, deadline=None)
@given(table=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=12), seed=st.integers(0, 1000))
def test_what_is_joined_without_quoting_loses_no_row_uncounted(
    tmp_path_factory: pytest.TempPathFactory, table: list[tuple[str, str]], seed: int
) -> None:
    """Every line is a row, read or rejected, whatever quotes stand in it."""
    path = tmp_path_factory.mktemp("soak") / "t.tsv"
    clean = str.maketrans("\t\n\r\u2028", "    ")
    lines = [[f"u{n}", f"i{n}", "4", *(value.translate(clean) for value in pair)] for n, pair in enumerate(table)]
    if np.random.default_rng(seed).random() < 0.3:
        lines[0].append("one too many")
    write(path, lines)
    for quoting in ("auto", "none"):
        found, rejected = read_back(path, quoting=quoting)
        assert len(found) + len(rejected) == len(lines)
        by_item = {one[1]: one for one in lines}
        for one in found:  # a value may have lost the quotes around it, but no row has another's values
            assert [value.strip('"').replace('""', '"') for value in one[:3]] == by_item[one[1]][:3]
            assert one[4].strip('"').replace('""', '"') == by_item[one[1]][4].strip('"').replace('""', '"')
