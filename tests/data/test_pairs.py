"""Pairs without text: counted, split beside the texts' rows, trained on by stage 1, and asked of nobody else."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from gavamoe.data.dataset import SPLITS, Dataset, open_dataset
from gavamoe.data.prepare import prepare
from gavamoe.data.summary import PrepareSummary
from gavamoe.errors import InputError
from gavamoe.evaluation.rows import select_rows
from gavamoe.stage2.tokenized_rows import rows_with_text


def write_csv(path: Path, header: str, rows: list[tuple[object, ...]]) -> Path:
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def rows_of(data: Dataset) -> dict[tuple[str, str], tuple[str, str, object]]:
    """(user, item) -> split, text, rating."""
    found = {}
    for split in SPLITS:
        for row in data.table(split).to_pylist():
            pair = data.catalog.user_id(row["user"]), data.catalog.item_id(row["item"])
            assert pair not in found
            found[pair] = split, row["text"], row["rating"]
    return found


TEXTS = [(f"u{n % 7}", f"i{n % 11}", f"text {n}") for n in range(40)]
"""40 rows, no pair twice."""


def prepared(folder: Path, name: str, **options: object) -> tuple[PrepareSummary, Dataset]:
    source = write_csv(folder / "texts.csv", "user,item,text", TEXTS)
    result = prepare(source, folder / name, "table", **options)  # type: ignore[arg-type]
    return result, open_dataset(folder / name)


def test_a_file_of_pairs_adds_rows_without_text_and_moves_no_other(tmp_path: Path) -> None:
    more = [(f"u{n % 9}", f"i{n % 13}") for n in range(90)] + [("", "i1"), ("u1", "i1")]
    pairs = write_csv(tmp_path / "pairs.csv", "uid,item", more)
    _, alone = prepared(tmp_path, "alone")
    result, data = prepared(tmp_path, "both", pairs=pairs, pairs_columns={"user": "uid"})
    found, before = rows_of(data), rows_of(alone)
    assert {pair: row for pair, row in found.items() if row[1]} == before, "texts stay where they are"
    bare = {pair for pair in more if pair[0]} - before.keys()
    assert {pair for pair, row in found.items() if not row[1]} == bare
    assert result.read == 40 + 92
    assert result.rejected == {"pairs: user missing": 1}
    assert result.read == result.kept + result.repeated_pairs + 1
    assert (result.without_text, result.kept) == (len(bare), 40 + len(bare))
    splits = [row[0] for row in found.values() if not row[1]]
    assert [splits.count(split) for split in SPLITS] == [46, 6, 6], "8:1:1 of 58"
    assert json.loads((data.path / "rejected.jsonl").read_text())["reason"] == "pairs: user missing"
    assert json.loads((data.path / "meta.json").read_text())["source"] == "texts.csv + pairs.csv"


def test_a_text_is_kept_before_a_later_pair(tmp_path: Path) -> None:
    pairs = write_csv(tmp_path / "pairs.csv", "user,item,time", [("u0", "i0", 2_000_000_000), ("u0", "i12", 1)])
    _, data = prepared(tmp_path, "both", pairs=pairs)
    assert rows_of(data)["u0", "i0"][1] == "text 0"
    assert rows_of(data)["u0", "i12"][1] == ""


def test_rows_without_text_are_kept_by_choice(tmp_path: Path) -> None:
    rows = [(*row, 1 + n % 5) for n, row in enumerate(TEXTS)] + [("u0", "i9", "", 3), ("u1", "i9", " ", 2)]
    source = write_csv(tmp_path / "rows.csv", "user,item,text,rating", rows)
    rejected = prepare(source, tmp_path / "out", "table")
    assert (rejected.rejected, rejected.without_text) == ({"text missing": 2}, 0)
    for mode in ("explanation", "review"):
        kept = prepare(source, tmp_path / mode, "table", keep_textless=True, text_mode=mode)  # type: ignore[arg-type]
        assert (kept.rejected, kept.without_text, kept.kept) == ({}, 2, 42)
        assert {row[2] for row in rows_of(open_dataset(tmp_path / mode)).values() if not row[1]} == {2.0, 3.0}


def test_pairs_of_rated_data_have_ratings_and_others_none(tmp_path: Path) -> None:
    pairs = write_csv(
        tmp_path / "pairs.csv", "user,item,rating", [("u0", "i12", 4), ("u1", "i12", ""), ("u2", "i12", 9)]
    )
    _, data = prepared(tmp_path, "implicit", pairs=pairs)
    assert data.implicit
    rated = write_csv(
        tmp_path / "rated.csv", "user,item,text,rating", [(*row, 1 + n % 5) for n, row in enumerate(TEXTS)]
    )
    result = prepare(rated, tmp_path / "rated", "table", pairs=pairs, rating_scale=(1, 5))
    assert result.rejected == {"pairs: rating missing": 1, "pairs: rating off scale": 1}
    assert rows_of(open_dataset(tmp_path / "rated"))["u0", "i12"][2] == 4.0


def test_texts_alone_are_learned_and_evaluated(tmp_path: Path) -> None:
    pairs = write_csv(tmp_path / "pairs.csv", "user,item", [(f"u{n % 9}", f"i{n % 13}") for n in range(100)])
    _, data = prepared(tmp_path, "both", pairs=pairs)
    train = data.table("train", ["text"])["text"].to_pylist()
    assert rows_with_text(data, "train").tolist() == [at for at, text in enumerate(train) if text]
    chosen = select_rows(data, "test", 0, 0)
    assert len(chosen.references) == 4
    assert all(chosen.references)
    assert select_rows(data, "test", 2, 0).index.tolist() == sorted(select_rows(data, "test", 2, 0).index.tolist())
    assert len(np.unique(pq.read_table(data.path / "test.parquet")["user"])) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": "missing.csv"}, "missing.csv: no such file"),
        ({"pairs": "texts.csv", "index_dir": "."}, "leave out --pairs or --index-dir"),
        ({"pairs_columns": {"user": "uid"}}, "there is no file of pairs"),
        ({"pairs": "texts.csv", "pairs_columns": {"text": "t"}}, "a pair has no text"),
        ({"pairs": "texts.csv", "pairs_columns": {"user": "uid"}}, "--pairs-column user=NAME"),
    ],
)
def test_wrong_pairs_are_one_line(
    options: dict[str, object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = {name: Path(value) if isinstance(value, str) else value for name, value in options.items()}
    with pytest.raises(InputError) as caught:
        prepared(tmp_path, "out", **options)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()
