"""Source files for `data prepare`: good ones of every format, and the check that a bad one is refused."""

import gzip
import json
import pickle
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gavamoe.data.dataset import SPLITS, Dataset
from gavamoe.data.prepare import prepare
from gavamoe.errors import InputError

AMAZON_2018 = {"reviewerID": "u", "asin": "i", "overall": 5.0, "reviewText": "The room was clean.", "unixReviewTime": 1}


def write_lines(path: Path, records: Iterable[object]) -> Path:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def amazon(count: int = 20, **changes: object) -> list[dict[str, object]]:
    """Reviews as Amazon's files have them: seven users, an item each, all ratings; `changes` go into every record."""
    return [AMAZON_2018 | {"reviewerID": f"u{n % 7}", "asin": f"i{n}", "overall": float(1 + n % 5)} | changes
            for n in range(count)]  # fmt: skip


def rows_of(dataset: Dataset) -> list[dict[str, object]]:
    """All rows with raw ids, in no particular order."""
    return [
        row
        | {"user": dataset.catalog.user_id(row["user"]), "item": dataset.catalog.item_id(row["item"]), "split": split}
        for split in SPLITS
        for row in dataset.table(split).to_pylist()
    ]


def peter_folder(tmp_path: Path, count: int = 20) -> Path:
    """A folder as the PETER line of papers ships one, its index files not yet written."""
    folder = tmp_path / "TripAdvisor"
    (folder / "1").mkdir(parents=True)
    records = [
        {
            "user": f"u{n % 6}",
            "item": f"i{n % 5}",
            "rating": 1 + n % 5,
            "template": ("Room", "nice", f"the room {n} was nice", 1),
            "predicted": "pool",
        }
        for n in range(count)
    ]
    (folder / "reviews.pickle").write_bytes(pickle.dumps(records))
    return folder


def write_index(folder: Path, train: str, valid: str, test: str) -> Path:
    """The index files of the three splits: row numbers as text."""
    for name, content in (("train", train), ("validation", valid), ("test", test)):
        (folder / f"{name}.index").write_text(content)
    return folder


TABLE = {
    "uid": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10],
    "iid": [f"i{n}" for n in range(10)],
    "words": [f"Text number {n}, with a comma" for n in range(10)],
    "tags": ["Tea, Cake"] * 10,
    "stars": [0.0, 2.5, 10, 5, 5, 7.5, 5, 5, 5, 5],
    "name": ["Title"] * 10,
}

MAPPING = {"user": "uid", "item": "iid", "text": "words", "features": "tags", "rating": "stars", "title": "name"}


def write_table(path: Path, columns: dict[str, list[object]]) -> Path:
    """The same table in the format that the file's ending names."""
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".jsonl":
        write_lines(path, table.to_pylist())
    elif path.suffix == ".json":
        path.write_text("\ufeff  " + json.dumps(table.to_pylist(), indent=1))
    else:
        tab = "\t" if path.suffix == ".tsv" else ","
        rows = [[f'"{value}"' for value in row.values()] for row in table.to_pylist()]
        text = "\n".join(tab.join(row) for row in [table.column_names, *rows]) + "\n"
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def refuse(source: Path, format: str, match: str, **options: object) -> None:
    """Preparing fails with one line that matches, and leaves nothing behind."""
    out = source.parent / "refused"
    before = sorted(source.parent.iterdir())
    with pytest.raises(InputError, match=match) as caught:
        prepare(source, out, format, **options)
    assert "\n" not in str(caught.value)
    assert sorted(source.parent.iterdir()) == before
