"""`data prepare` on bad input: one clear line, nothing half-written."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.reviews import TABLE, amazon, peter_folder, refuse, rows_of, write_index, write_lines, write_table
from pydantic import ValidationError

from gavamoe.data.dataset import open_dataset
from gavamoe.data.prepare import prepare
from gavamoe.data.readers import json_lines
from gavamoe.errors import InputError
from gavamoe.serving.schema import ExplainRequest


def amazon_with(tmp_path: Path, *bad: object, good: int = 30) -> Path:
    return write_lines(tmp_path / "reviews.json", [*amazon(good), *bad])


@pytest.mark.parametrize("format", ["amazon", "yelp", "peter", "table"])
def test_missing_and_empty_files(tmp_path: Path, format: str) -> None:
    refuse(tmp_path / "none.json", format, r"none\.json: no such file")
    (tmp_path / "empty.json").write_text("")
    refuse(tmp_path / "empty.json", format, r"empty\.json: the file is empty")


@pytest.mark.parametrize("name", ["empty.csv", "empty.parquet"])
def test_empty_tables(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    refuse(tmp_path / name, "table", "the file is empty")


def test_files_without_rows(tmp_path: Path) -> None:
    (tmp_path / "blank.json").write_text("\n\n \n")
    refuse(tmp_path / "blank.json", "amazon", "holds no rows")
    (tmp_path / "list.json").write_text(" [ ] ")
    refuse(tmp_path / "list.json", "amazon", "holds no rows")
    (tmp_path / "head.csv").write_text("user,item,text\n")
    refuse(tmp_path / "head.csv", "table", "holds no rows")
    pq.write_table(pa.table({"user": pa.array([], pa.int32()), "item": pa.array([], pa.int32()),
                             "text": pa.array([], pa.string())}), tmp_path / "none.parquet")  # fmt: skip
    refuse(tmp_path / "none.parquet", "table", "holds no rows")


def test_a_folder_where_a_file_is_expected(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    refuse(tmp_path / "folder", "amazon", "folder: not a file")
    refuse(tmp_path / "folder", "peter", r"reviews\.pickle: no such file")


@pytest.mark.parametrize(("name", "format"), [("r.json.gz", "amazon"), ("t.csv.gz", "table"), ("t.jsonl.gz", "table")])
def test_truncated_and_damaged_gzip(tmp_path: Path, name: str, format: str) -> None:
    rng = np.random.default_rng(0)
    lines = ["user,item,text\n"] if ".csv" in name else []
    noise = [rng.bytes(30).hex() for _ in range(5000)]
    template = '{{"user":"u","item":"{0}","text":"{0}","reviewerID":"u","asin":"{0}","overall":5,"reviewText":"{0}"}}\n'
    lines += [f"u,{word},{word}\n" if ".csv" in name else template.format(word) for word in noise]
    packed = gzip.compress("".join(lines).encode())
    (tmp_path / name).write_bytes(packed[: len(packed) // 2])
    refuse(tmp_path / name, format, "the compressed file is cut off before its end")
    (tmp_path / name).write_bytes(packed[: len(packed) // 2] + b"\xff" * 100 + packed[len(packed) // 2 + 100 :])
    refuse(tmp_path / name, format, "the compressed file is damaged")


def test_broken_lines_are_counted_kept_and_bounded(tmp_path: Path) -> None:
    good = [json.dumps(record) for record in amazon(60)]
    broken = ["{not json", "[" * 100_000, "7", '{"a": 1e', "x" * 5000, '{"n": ' + "9" * 5000 + "}"]
    lines = [*good[:30], *broken, "", *good[30:]]
    (tmp_path / "r.json").write_bytes("\n".join(lines).encode() + b'\n{"reviewerID": "\xff"}\n')
    summary = prepare(tmp_path / "r.json", tmp_path / "out", "amazon", max_rejected_share=0.2)
    assert summary.kept == 60
    assert summary.rejected == {"not valid JSON": 5, "not a JSON object": 1, "not valid UTF-8": 1}
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rejected] == [31, 32, 33, 34, 35, 36, 68], "blank lines count as lines"
    assert all(len(row["raw"]) <= 300 for row in rejected)


def test_an_endless_line_is_one_rejected_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "MAX_RECORD_BYTES", 1000)
    good = [json.dumps(record) for record in amazon(60)]
    (tmp_path / "r.json").write_text("\n".join([*good[:30], "{" + " " * 5_000_000, *good[30:], '"' + "x" * 3000]))
    summary = prepare(tmp_path / "r.json", tmp_path / "out", "amazon")
    assert (summary.kept, summary.rejected) == (60, {"line too long": 2})


def test_a_json_array_is_read_however_it_is_laid_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [*amazon(40), {"reviewText": 'né, ] } \\ " [ \U0001f600'}]
    expected = None
    for chunk in (7, 64, 2**20):
        for indent in (None, 2):
            monkeypatch.setattr(json_lines, "_CHUNK_BYTES", chunk)
            name = f"array{chunk}{indent}"
            (tmp_path / f"{name}.json").write_text(json.dumps(records, ensure_ascii=False, indent=indent))
            summary = prepare(tmp_path / f"{name}.json", tmp_path / name, "amazon")
            assert (summary.kept, summary.rejected) == (40, {"user missing": 1})
            rows = sorted(map(str, rows_of(open_dataset(tmp_path / name))))
            assert expected in (None, rows)
            expected = rows


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b'[{"reviewerID": "u"}, {"asin": ', "element 2 of the JSON array is not valid JSON or is cut off"),
        (b'[{"reviewerID": "u"} nonsense]', "element 2 of the JSON array"),
        (b'[{"reviewerID": "u"}', "element 2 of the JSON array"),
        (b'[{"reviewerID": "\xff"}]', "not valid UTF-8"),
        (b"[" * 200_000, "element 1 of the JSON array is nested too deeply"),
    ],
)
def test_a_broken_json_array(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "r.json").write_bytes(content)
    refuse(tmp_path / "r.json", "amazon", match)


def test_a_missing_column_is_named_with_what_there_is_and_the_nearest(tmp_path: Path) -> None:
    for name in ("t.csv", "t.parquet", "t.jsonl"):
        source = write_table(tmp_path / name, TABLE)
        refuse(source, "table", r"no column 'item' for the item.*it has .*iid.*--column item=NAME",
               columns={"user": "uid"})  # fmt: skip
        refuse(source, "table", r"no column 'Iidd' for the item \(nearest: iid\); it has uid, iid, words",
               columns={"user": "uid", "item": "Iidd"})  # fmt: skip
        refuse(source, "table", r"no column 'word' for the text \(nearest: words\)",
               columns={"user": "uid", "item": "iid", "text": "word"})  # fmt: skip
        source.unlink()


def test_another_formats_file_names_the_fields_that_were_expected(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "r.json", [{"user": "u", "item": "i"}] * 5)
    refuse(source, "amazon", "no column 'reviewerID' or 'user_id' for the user.*it has user, item")
    refuse(source, "yelp", "no column 'user_id' for the user")


def test_columns_are_checked(tmp_path: Path) -> None:
    source = write_table(tmp_path / "t.csv", TABLE)
    refuse(source, "table", "unknown field 'usr'; known are user, item.*did you mean user", columns={"usr": "uid"})
    refuse(source, "amazon", "only format table takes a mapping", columns={"user": "uid"})


def test_an_unknown_format_names_the_nearest(tmp_path: Path) -> None:
    source = write_table(tmp_path / "t.csv", TABLE)
    refuse(source, "amazn", "unknown value 'amazn'; known are amazon, yelp, peter, table; did you mean amazon")
    refuse(source, "zzz", "known are amazon, yelp, peter, table$")
    (tmp_path / "t.xlsx").write_text("x")
    refuse(tmp_path / "t.xlsx", "table", r"a table is .csv .*not '.xlsx'")


@pytest.mark.parametrize(
    ("rating", "reason"),
    [
        (9, "rating off scale"),
        (0, "rating off scale"),
        (-1.5, "rating off scale"),
        (float("nan"), "rating not a number"),
        (float("inf"), "rating not a number"),
        ("five", "rating not a number"),
        ("1e999", "rating not a number"),
        ("nan", "rating not a number"),
        (10**400, "rating not a number"),
        (True, "rating not a number"),
        ([5], "rating not a number"),
        (None, "rating missing"),
        ("", "rating missing"),
        ("6", "rating off scale"),
    ],
)
def test_bad_ratings_are_rejected_with_their_reason(tmp_path: Path, rating: object, reason: str) -> None:
    bad = amazon(1)[0] | {"reviewerID": "bad", "overall": rating}
    summary = prepare(amazon_with(tmp_path, bad), tmp_path / "out", "amazon")
    assert (summary.kept, summary.rejected) == (30, {reason: 1})
    (row,) = map(json.loads, (tmp_path / "out" / "rejected.jsonl").read_text().splitlines())
    assert (row["row"], row["reason"]) == (31, reason)
    assert "'reviewerID': 'bad'" in row["raw"]


def test_numbers_as_text_are_numbers(tmp_path: Path) -> None:
    odd = [
        amazon(1)[0] | {"reviewerID": f"x{n}", "overall": value} for n, value in enumerate((" 4 ", "4.0", "+4", "4e0"))
    ]
    prepare(amazon_with(tmp_path, *odd), tmp_path / "out", "amazon")
    rows = rows_of(open_dataset(tmp_path / "out"))
    assert [row["rating"] for row in rows if str(row["user"]).startswith("x")] == [4.0] * 4


def test_bad_ratings_of_tables(tmp_path: Path) -> None:
    ratings = ["5", "five", "nan", "", "3", "4", "4", "2", "1", "5"]
    for name in ("t.csv", "t.jsonl", "t.parquet"):
        source = write_table(tmp_path / name, TABLE | {"stars": ratings})
        columns = {"user": "uid", "item": "iid", "text": "words", "rating": "stars"}
        summary = prepare(source, tmp_path / f"{name}.out", "table", columns=columns, max_rejected_share=0.5)
        assert summary.rejected == {"rating not a number": 2, "rating missing": 1}
        assert open_dataset(tmp_path / f"{name}.out").rating_values == (1, 2, 3, 4, 5)


def test_too_many_rejected_rows_fail_with_counts_the_first_and_the_way_out(tmp_path: Path) -> None:
    bad = [amazon(1)[0] | {"overall": "five"}] * 3 + [{"asin": "i"}] * 2
    source = amazon_with(tmp_path, *bad)
    refuse(
        source,
        "amazon",
        r"5 of 35 rows rejected \(14\.3%, at most 10% are allowed\): rating not a number 3, user missing 2; "
        r"first: row 31, rating not a number: \{.*'five'.*--max-rejected-share 0\.15",
    )
    assert prepare(source, tmp_path / "out", "amazon", max_rejected_share=0.15).kept == 30
    refuse(amazon_with(tmp_path, *bad, good=0), "amazon", "5 of 5 rows rejected", max_rejected_share=1)


def test_ids_that_no_one_could_have_meant(tmp_path: Path) -> None:
    bad = [
        {"reviewerID": value, "asin": "i", "overall": 5, "reviewText": "x y z"}
        for value in ("", "  ", None, {"a": 1}, True, "x" * 257, "a\x00b", float("nan"), 10**400)
    ]
    summary = prepare(amazon_with(tmp_path, *bad, good=100), tmp_path / "out", "amazon")
    assert summary.rejected == {"user missing": 7, "user id longer than 256 characters": 1, "user id malformed": 1}


def test_half_a_surrogate_pair_does_not_stop_the_rest(tmp_path: Path) -> None:
    bad = json.dumps(amazon(1)[0] | {"reviewerID": "x", "reviewText": "a \ud83d b"})
    source = amazon_with(tmp_path)
    source.write_text(source.read_text() + bad + "\n")
    prepare(source, tmp_path / "out", "amazon")
    assert "a \ufffd b" in {row["text"] for row in rows_of(open_dataset(tmp_path / "out"))}


@pytest.mark.parametrize("mode", ["review", "explanation"])
def test_a_very_long_text_is_cut_and_counted(tmp_path: Path, mode: str) -> None:
    long = amazon(1)[0] | {"reviewerID": "long", "reviewText": "word " * 20_000}
    solid = amazon(1)[0] | {"reviewerID": "solid", "reviewText": "x" * 100_000}
    summary = prepare(amazon_with(tmp_path, long, solid), tmp_path / "out", "amazon", text_mode=mode)
    texts = {row["user"]: str(row["text"]) for row in rows_of(open_dataset(tmp_path / "out"))}
    assert summary.texts_cut == 2
    assert texts["long"].startswith("word word")
    assert texts["long"].endswith("word")
    assert 250 <= len(texts["long"]) <= 2000
    assert 250 <= len(texts["solid"]) <= 2000


def test_special_tokens_in_texts_stay_text(tmp_path: Path) -> None:
    text = "The <|endoftext|> </s> [INST] room was clean."
    source = amazon_with(tmp_path, amazon(1)[0] | {"reviewerID": "odd", "reviewText": text})
    prepare(source, tmp_path / "out", "amazon")
    (row,) = [row for row in rows_of(open_dataset(tmp_path / "out")) if row["user"] == "odd"]
    assert (row["text"], row["features"]) == (text, ["room"])


def test_existing_output_is_left_alone(tmp_path: Path) -> None:
    source = amazon_with(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(InputError, match="out: already exists"):
        prepare(source, tmp_path / "out", "amazon")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_misshapen_csv(tmp_path: Path) -> None:
    rows = [f"u{n},i{n},text {n}" for n in range(30)]
    rows[3] = "only,two"
    rows[20] = "a,b,c,d"
    content = "user,item,text\n" + "\n".join(rows) + "\n"
    (tmp_path / "t.csv").write_bytes(content.encode() + b"u,i,\xff\xfe\n")
    summary = prepare(tmp_path / "t.csv", tmp_path / "out", "table")
    assert summary.kept == 28
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(row["row"], row["reason"]) for row in rejected] == [
        (4, "2 values instead of 3"),
        (21, "4 values instead of 3"),
        (31, "not valid UTF-8"),
    ]


def test_a_misshapen_row_that_is_not_utf8_and_has_commas_in_its_last_value(tmp_path: Path) -> None:
    """Once met: the comma inside made its values as many as the header's, and Arrow's error went through."""
    rows = [f'u{n},i{n},4,"text, {n}"' for n in range(30)]
    content = "user,item,rating,text\n" + "\n".join(rows) + "\n"
    (tmp_path / "t.csv").write_bytes(content.encode() + b'u,i,"a, \xff\xfe"\n')
    summary = prepare(tmp_path / "t.csv", tmp_path / "out", "table")
    assert (summary.kept, summary.rejected) == (30, {"3 values instead of 4": 1})


def test_bytes_that_a_parquet_file_calls_text(tmp_path: Path) -> None:
    good = ["text"] * 30
    spoilt = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 2], dtype=np.int32)), pa.py_buffer(b"\xff\xfe"))
    texts = pa.concat_arrays([pa.array(good), spoilt])
    columns = {"user": [f"u{n}" for n in range(31)], "item": ["i"] * 31, "text": texts}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    summary = prepare(tmp_path / "t.parquet", tmp_path / "out", "table")
    assert (summary.kept, summary.rejected) == (30, {"not valid UTF-8": 1})
    lists = pa.ListArray.from_arrays(pa.array(range(32), pa.int32()), texts)
    pq.write_table(pa.table(columns | {"text": good + good[:1], "features": lists}), tmp_path / "f.parquet")
    refuse(tmp_path / "f.parquet", "table", "column 'features' holds text that is not valid UTF-8")


def test_what_is_no_parquet_file(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_text("PAR1 but no more")
    refuse(tmp_path / "t.parquet", "table", "not a readable Parquet file")
    pq.write_table(pa.table({"user": ["u"], "item": [[1]], "text": ["t"]}), tmp_path / "t.parquet")
    refuse(tmp_path / "t.parquet", "table", r"column 'item' is of type list.*which can't be the item")


@pytest.mark.parametrize(
    ("train", "valid", "test", "match"),
    [
        ("0 1 2 3", "4 5", "5 6", r"test\.index: names row 5, which validation\.index names too"),
        ("0 1 1", "4", "5", r"train\.index: names row 1 twice"),
        ("0 1", "4", "5 20", r"test\.index: entry 2 is '20', but the source has the rows 0\.\.19 only"),
        ("0 1", "-4", "5", r"validation\.index: entry 1 is '-4'"),
        ("0 1.5", "4", "5", r"train\.index: entry 2 is '1\.5'"),
        ("0 one", "4", "5", r"train\.index: entry 2 is 'one'"),
        ("0 ²", "4", "5", r"train\.index: entry 2 is '²'"),
        ("0 " + "9" * 30, "4", "5", r"train\.index: entry 2 is '9+'"),
        ("0 1", "", "5", "2 usable rows leave the valid split empty|leave the valid split empty"),
    ],
)
def test_bad_index_files(tmp_path: Path, train: str, valid: str, test: str, match: str) -> None:
    folder = peter_folder(tmp_path)
    refuse(folder, "peter", match, index_dir=write_index(folder / "1", train, valid, test))


def test_a_missing_index_file_is_named(tmp_path: Path) -> None:
    folder = peter_folder(tmp_path)
    refuse(folder, "peter", r"train\.index: no such index file for the train split", index_dir=folder / "1")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"split": (8, 1)}, "split: 8:1 is not three positive numbers"),
        ({"split": (8, 1, 0)}, "split: 8:1:0 is not three"),
        ({"split": (8, 1, float("nan"))}, "split: 8:1:nan is not three"),
        ({"text_mode": "whole"}, "text_mode: unknown value 'whole'; known are explanation, review, none"),
        ({"sentence": "longest"}, "sentence: unknown value 'longest'; known are best, frequent"),
        ({"sentence": "best", "text_mode": "explanation"}, "sentence: text mode explanation chooses no sentences"),
        ({"sentence": "frequent", "text_mode": "none"}, "sentence: text mode none chooses no sentences"),
        ({"max_rejected_share": 1.5}, r"max_rejected_share: 1\.5 is outside 0\.\.1"),
        ({"rating_scale": (5, 1)}, r"rating_scale: 5\.\.1 is not a valid range"),
        ({"titles": Path("missing.json")}, "missing.json: no such file"),
    ],
)
def test_bad_arguments(tmp_path: Path, options: dict[str, object], match: str) -> None:
    refuse(amazon_with(tmp_path), "amazon", match, **options)


def test_titles_for_a_format_without_a_title_file(tmp_path: Path) -> None:
    refuse(write_table(tmp_path / "t.csv", TABLE), "table", "titles: format table has no title file",
           titles=tmp_path / "x", columns={"user": "uid", "item": "iid"})  # fmt: skip


def test_features_and_sentence_choice_exclude_each_other(tmp_path: Path) -> None:
    source = write_table(tmp_path / "t.csv", TABLE)
    columns = {"user": "uid", "item": "iid", "text": "words", "features": "tags"}
    refuse(source, "table", "text mode review chooses a sentence by the features it finds", columns=columns,
           text_mode="review")  # fmt: skip


def test_too_few_rows_for_three_splits(tmp_path: Path) -> None:
    refuse(amazon_with(tmp_path, good=2), "amazon", "leave the .* split empty; give more rows")
    assert prepare(amazon_with(tmp_path, good=3), tmp_path / "out", "amazon").kept == 3


def test_what_is_kept_can_be_asked_for_and_what_cannot_is_rejected(tmp_path: Path) -> None:
    """An id of 220 characters was once trained and then refused by the service."""
    lines = ["user,item,rating,text,features"]
    lines += [f"u{n},i{n % 7},4,a fine text,wifi" for n in range(60)]
    kept_user, kept_feature = "u" * 220, "f" * 64
    lines += [
        f"{kept_user},i1,4,a fine text,{kept_feature}",
        f"{'u' * 257},i1,4,a fine text,wifi",
        f"u1,{'i' * 257},4,a fine text,wifi",
        f"u2,i2,4,a fine text,wifi;{'f' * 65}",
    ]
    (tmp_path / "long.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    columns = {name: name for name in ("user", "item", "rating", "text", "features")}
    summary = prepare(tmp_path / "long.csv", tmp_path / "out", "table", columns=columns)
    assert summary.rejected == {
        "user id longer than 256 characters": 1,
        "item id longer than 256 characters": 1,
        "feature longer than 64 characters": 1,
    }
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [line["row"] for line in rejected] == [62, 63, 64]
    catalog = open_dataset(tmp_path / "out").catalog
    for index in range(catalog.n_users):
        ExplainRequest(user=catalog.user_id(index), item=catalog.item_id(0), features=[kept_feature])
    assert catalog.user_index(kept_user) is not None
    with pytest.raises(ValidationError):
        ExplainRequest(user="u" * 257, item="i")
