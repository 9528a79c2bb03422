"""`data prepare` on good input: every format, mapping, splits, repeated pairs, titles, counts."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.reviews import (
    AMAZON_2018,
    MAPPING,
    TABLE,
    amazon,
    peter_folder,
    rows_of,
    write_index,
    write_lines,
    write_table,
)

from gavamoe.data.dataset import SPLITS, open_dataset
from gavamoe.data.prepare import prepare
from gavamoe.data.readers.batches import RawBatch, batch_records
from gavamoe.data.readers.formats import FORMATS, Format
from gavamoe.data.readers.json_lines import read_objects
from gavamoe.data.readers.sources import SourceOptions
from gavamoe.errors import InputError


def test_amazon_2018(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "reviews.json", amazon())
    summary = prepare(source, tmp_path / "out", "amazon")
    dataset = open_dataset(tmp_path / "out")
    assert (summary.read, summary.kept, summary.rejected) == (20, 20, {})
    assert summary.rows == {"train": 16, "valid": 2, "test": 2}
    assert dataset.rating_values == (1, 2, 3, 4, 5)
    assert dataset.meta.source == "reviews.json"
    found = {(row["user"], row["item"], row["rating"]) for row in rows_of(dataset)}
    assert found == {(record["reviewerID"], record["asin"], record["overall"]) for record in amazon()}
    assert sorted(row["features"] for row in rows_of(dataset)) == [[]] * 13 + [["room"]] * 7, "a text once a user"
    assert summary.repeated_texts == 13
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "items.parquet", "meta.json", "rejected.jsonl", "test.parquet", "train.parquet", "users.parquet",
        "valid.parquet",
    ]  # fmt: skip


def test_amazon_2023_fields_and_parent_items(tmp_path: Path) -> None:
    records = [
        {"user_id": f"u{n}", "asin": f"child{n}", "parent_asin": "p", "rating": 4, "text": "Fine.", "timestamp": n}
        for n in range(10)
    ]
    prepare(write_lines(tmp_path / "r.jsonl", records), tmp_path / "out", "amazon")
    dataset = open_dataset(tmp_path / "out")
    assert dataset.catalog.n_items == 1
    assert dataset.catalog.item_id(0) == "p"


def test_amazon_titles_of_json_and_of_python_literals(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "r.json", amazon())
    meta = tmp_path / "meta.json.gz"
    lines = ['{"asin": "i0", "title": "Tom &amp; Jerry\\n Card"}', "{'asin': 'i1', 'title': 'It\\'s'}", "garbage", "3"]
    meta.write_bytes(gzip.compress("\n".join([*lines, '{"asin": "unseen", "title": "x"}']).encode()))
    summary = prepare(source, tmp_path / "out", "amazon", titles=meta)
    catalog = open_dataset(tmp_path / "out").catalog
    assert summary.titles == 2
    assert catalog.item_title(catalog.item_index("i0")) == "Tom & Jerry Card"
    assert catalog.item_title(catalog.item_index("i1")) == "It's"
    assert catalog.item_title(catalog.item_index("i2")) is None


def test_yelp_takes_titles_from_the_business_file_beside_it(tmp_path: Path) -> None:
    records = [
        {"user_id": f"u{n}", "business_id": "b", "stars": 3.0, "text": "Ok.", "date": "2018-07-07 22:09:11"}
        for n in range(10)
    ]
    write_lines(tmp_path / "yelp_academic_dataset_business.json", [{"business_id": "b", "name": "Joe's"}])
    prepare(write_lines(tmp_path / "yelp_academic_dataset_review.json", records), tmp_path / "out", "yelp")
    assert open_dataset(tmp_path / "out").catalog.item_title(0) == "Joe's"


def test_peter_with_index_files(tmp_path: Path) -> None:
    folder = peter_folder(tmp_path)
    index = write_index(folder / "1", " ".join(map(str, range(3, 15))), "15 16", "17\n0\n")
    summary = prepare(folder, tmp_path / "out", "peter", index_dir=index)
    dataset = open_dataset(tmp_path / "out")
    assert summary.rows == {"train": 12, "valid": 2, "test": 2}
    assert (summary.kept, summary.in_no_index) == (16, 4)
    assert dataset.meta.split == "1"
    texts = {split: set(dataset.table(split)["text"].to_pylist()) for split in SPLITS}
    assert texts["valid"] == {"the room 15 was nice", "the room 16 was nice"}
    assert texts["test"] == {"the room 17 was nice", "the room 0 was nice"}
    assert {tuple(row["features"]) for row in rows_of(dataset)} == {("room",)}
    assert summary.vocabulary == 0


def test_given_splits_keep_repeated_pairs(tmp_path: Path) -> None:
    folder = peter_folder(tmp_path, count=60)  # 6 users x 5 items: every pair twice
    index = write_index(folder / "1", " ".join(map(str, range(40))), "40 41 42", "50 51")
    assert prepare(folder, tmp_path / "out", "peter", index_dir=index).kept == 45
    assert prepare(folder, tmp_path / "drawn", "peter").repeated_pairs == 30


def test_index_positions_count_rejected_rows(tmp_path: Path) -> None:
    records = amazon(20)
    records[3]["reviewText"] = ""
    source = write_lines(tmp_path / "r.json", records)
    (tmp_path / "split").mkdir()
    index = write_index(tmp_path / "split", " ".join(map(str, range(2, 18))), "18 0", "19 1")
    prepare(source, tmp_path / "out", "amazon", index_dir=index)
    dataset = open_dataset(tmp_path / "out")
    assert {row["item"] for row in rows_of(dataset) if row["split"] == "test"} == {"i19", "i1"}
    assert dataset.size("train") == 15


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.csv.gz", "t.jsonl", "t.json", "t.parquet"])
def test_tables_of_every_kind_give_the_same_dataset(tmp_path: Path, name: str) -> None:
    source = write_table(tmp_path / name, TABLE)
    prepare(source, tmp_path / "out", "table", columns=MAPPING)
    dataset = open_dataset(tmp_path / "out")
    rows = sorted(rows_of(dataset), key=lambda row: int(row["user"]))
    assert [row["user"] for row in rows] == [str(value) for value in TABLE["uid"]]
    assert [row["text"] for row in rows] == TABLE["words"]
    assert [row["rating"] for row in rows] == TABLE["stars"]
    assert all(row["features"] == ["tea", "cake"] for row in rows)
    assert dataset.rating_values == (0, 2.5, 5, 7.5, 10), "inferred from what is observed"
    assert dataset.catalog.item_title(0) == "Title"


def test_columns_named_like_fields_need_no_mapping(tmp_path: Path) -> None:
    columns = {"user": TABLE["uid"], "item": TABLE["iid"], "text": TABLE["words"], "other": TABLE["uid"]}
    prepare(write_table(tmp_path / "t.parquet", columns), tmp_path / "out", "table")
    dataset = open_dataset(tmp_path / "out")
    assert dataset.implicit
    assert dataset.rating_values is None
    assert len(rows_of(dataset)) == 10


def test_pairs_without_text(tmp_path: Path) -> None:
    source = write_table(tmp_path / "t.parquet", {"user": TABLE["uid"], "item": TABLE["iid"]})
    with pytest.raises(InputError, match=r"no text column; name it with --column text=NAME.*--text-mode none"):
        prepare(source, tmp_path / "out", "table")
    summary = prepare(source, tmp_path / "out", "table", text_mode="none")
    dataset = open_dataset(tmp_path / "out")
    assert summary.without_feature == 10
    assert {(row["text"], tuple(row["features"])) for row in rows_of(dataset)} == {("", ())}
    assert dataset.meta.text_mode == "none"


def test_ids_that_pandas_made_floats_are_whole_again(tmp_path: Path) -> None:
    columns = {"user": [1.0, None, *range(3, 12)], "item": TABLE["iid"] + ["x"], "text": ["A word"] * 11}
    summary = prepare(write_table(tmp_path / "t.parquet", columns), tmp_path / "out", "table")
    assert summary.rejected == {"user missing": 1}
    assert {row["user"] for row in rows_of(open_dataset(tmp_path / "out"))} == {"1", *map(str, range(3, 12))}


def test_a_given_scale_bounds_a_tables_ratings(tmp_path: Path) -> None:
    source = write_table(tmp_path / "t.csv", TABLE)
    with pytest.raises(InputError, match=r"2 of 10 rows rejected.*rating off scale 2"):
        prepare(source, tmp_path / "out", "table", columns=MAPPING, rating_scale=(1, 9))
    prepare(source, tmp_path / "out", "table", columns=MAPPING, rating_scale=(1, 9), max_rejected_share=0.5)
    assert open_dataset(tmp_path / "out").rating_range == (1, 9)


def test_csv_values_may_hold_line_ends_and_quotes(tmp_path: Path) -> None:
    rows = "".join(f'u{n},i{n},"He said ""hi"",\nthen left {n}"\n' for n in range(10))
    (tmp_path / "t.csv").write_text("user,item,text\n" + rows)
    prepare(tmp_path / "t.csv", tmp_path / "out", "table")
    texts = {row["text"] for row in rows_of(open_dataset(tmp_path / "out"))}
    assert texts == {f'He said "hi", then left {n}' for n in range(10)}


def test_the_last_of_repeated_pairs_stays(tmp_path: Path) -> None:
    records = amazon(10)
    records.append(AMAZON_2018 | {"reviewerID": "u0", "asin": "i0", "reviewText": "Older text", "unixReviewTime": 0})
    records.append(AMAZON_2018 | {"reviewerID": "u1", "asin": "i1", "reviewText": "Newer text", "unixReviewTime": 9})
    summary = prepare(write_lines(tmp_path / "r.json", records), tmp_path / "out", "amazon")
    texts = {(row["user"], row["item"]): row["text"] for row in rows_of(open_dataset(tmp_path / "out"))}
    assert (summary.kept, summary.repeated_pairs, summary.rejected) == (10, 2, {})
    assert texts["u0", "i0"] == "The room was clean."
    assert texts["u1", "i1"] == "Newer text"


def test_a_review_becomes_the_sentence_with_the_feature_and_a_table_text_stays_whole(tmp_path: Path) -> None:
    text = "We came by train. The room was clean! Bye for now."
    records = [{"user": f"u{n}", "item": "i", "text": text} for n in range(10)]
    source = write_lines(tmp_path / "t.jsonl", records)
    prepare(source, tmp_path / "review", "table", text_mode="review")
    prepare(source, tmp_path / "explanation", "table")
    review, explanation = (rows_of(open_dataset(tmp_path / name))[0] for name in ("review", "explanation"))
    assert (review["text"], review["features"]) == ("The room was clean!", ["room"])
    assert (explanation["text"], explanation["features"]) == (text, ["room"])


def test_one_word_texts_are_kept_and_empty_ones_are_not(tmp_path: Path) -> None:
    records = amazon(20)
    records[0]["reviewText"] = "Great"
    records[1]["reviewText"] = " \n\x00 "
    del records[2]["reviewText"]
    summary = prepare(write_lines(tmp_path / "r.json", records), tmp_path / "out", "amazon")
    assert summary.rejected == {"text missing": 2}
    assert "Great" in {row["text"] for row in rows_of(open_dataset(tmp_path / "out"))}
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(row["row"], row["reason"]) for row in rejected] == [(2, "text missing"), (3, "text missing")]


def test_the_seed_draws_the_split(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "r.json", amazon(50))
    prints = [
        prepare(source, tmp_path / f"out{n}", "amazon", seed=seed).fingerprint for n, seed in enumerate((1, 1, 2))
    ]
    assert prints[0] == prints[1] != prints[2]
    rows = prepare(source, tmp_path / "thirds", "amazon", split=(1, 1, 1)).rows
    assert rows == {"train": 17, "valid": 16, "test": 17}


def test_many_batches_are_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = amazon(200)
    for number in range(0, 200, 40):
        records[number]["overall"] = 9
    source = write_lines(tmp_path / "r.json", records)
    whole = prepare(source, tmp_path / "whole", "amazon")
    monkeypatch.setattr("gavamoe.data.readers.batches.BATCH_ROWS", 7)
    seen: list[tuple[str, int]] = []
    parts = prepare(source, tmp_path / "parts", "amazon", progress=lambda phase, rows: seen.append((phase, rows)))
    assert parts.model_dump(exclude={"fingerprint"}) == whole.model_dump(exclude={"fingerprint"})
    for split in SPLITS:
        assert open_dataset(tmp_path / "parts").table(split) == open_dataset(tmp_path / "whole").table(split)
    assert (tmp_path / "parts" / "rejected.jsonl").read_text() == (tmp_path / "whole" / "rejected.jsonl").read_text()
    assert ("read", 200) in seen
    assert ("write", 195) in seen


def test_meta_says_what_happened_and_nothing_of_this_machine(tmp_path: Path) -> None:
    prepare(write_lines(tmp_path / "r.json", [*amazon(19), {"asin": "x"}]), tmp_path / "out", "amazon")
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["preparation"]["read"] == 20
    assert meta["preparation"]["rejected: user missing"] == 1
    assert str(tmp_path) not in json.dumps(meta)


def test_half_stars_make_a_finer_scale(tmp_path: Path) -> None:
    records = amazon(20)
    records[0]["overall"] = 3.5
    prepare(write_lines(tmp_path / "r.json", records), tmp_path / "out", "amazon")
    assert open_dataset(tmp_path / "out").rating_values == tuple(np.arange(1, 5.5, 0.5))


def test_a_new_format_is_a_row_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of docs/extend.md."""
    fields = {"user": ("user_id",), "item": ("book_id",), "rating": ("rating",), "text": ("review_text",)}

    def read(source: Path, options: SourceOptions) -> Iterator[RawBatch]:
        return batch_records(source, read_objects(source, options.encoding), fields)

    monkeypatch.setitem(FORMATS, "goodreads", Format(read, (0, 5), "review", (("book_id",), "title")))
    records = [{"user_id": n, "book_id": n % 3, "rating": n % 6, "review_text": "The plot is thin."} for n in range(12)]
    titles = write_lines(tmp_path / "books.json", [{"book_id": "1", "title": "Emma"}])
    prepare(write_lines(tmp_path / "r.json", records), tmp_path / "out", "goodreads", titles=titles)
    dataset = open_dataset(tmp_path / "out")
    assert dataset.rating_values == (0, 1, 2, 3, 4, 5)
    assert dataset.catalog.item_title(dataset.catalog.item_index("1")) == "Emma"
    assert {tuple(row["features"]) for row in rows_of(dataset)} == {("plot",)}
