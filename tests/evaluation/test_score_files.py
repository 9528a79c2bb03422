"""Scores from files: every format, bad files, columns, a second system."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.texts import CANDIDATES, REFERENCES, scores

from gavamoe.errors import InputError
from gavamoe.evaluation.score_files import Reading, score_files
from gavamoe.evaluation.text_tables import read_columns

KNOWN = {"bleu_1": 65.0000, "bleu_4": 37.5412, "rouge_1": 59.7436, "rouge_l": 59.7436}


def write_pairs(folder: Path) -> dict[str, Path]:
    """The same four pairs in every format."""
    rows = [{"prediction": said, "reference": meant} for said, meant in zip(CANDIDATES, REFERENCES, strict=True)]
    paths = {name: folder / f"pairs.{name}" for name in ("jsonl", "json", "csv", "parquet")}
    paths["jsonl"].write_text("\n".join(map(json.dumps, rows)) + "\n")
    paths["json"].write_text(json.dumps(rows))
    lines = [f'"{row["prediction"]}","{row["reference"]}"' for row in rows]
    paths["csv"].write_text("\n".join(["prediction,reference", *lines]))
    pq.write_table(pa.Table.from_pylist(rows), paths["parquet"])
    return paths


def test_every_format_gives_the_same_scores(tmp_path: Path) -> None:
    (tmp_path / "said.txt").write_text("\n".join(CANDIDATES) + "\n")
    (tmp_path / "meant.txt").write_text("\r\n".join(REFERENCES) + "\r\n")
    expected = score_files(tmp_path / "said.txt", tmp_path / "meant.txt", resamples=0)
    assert expected["counts"]["rows"] == 4
    assert expected["metrics"] == pytest.approx(scores(CANDIDATES, REFERENCES))
    for path in write_pairs(tmp_path).values():
        assert score_files(path, path, resamples=0)["metrics"] == expected["metrics"], path
        assert score_files(path, resamples=0)["metrics"] == expected["metrics"], path


def test_known_values_of_sacrebleu_and_rouge_score(tmp_path: Path) -> None:
    """Computed once with sacrebleu 2.6.0 and rouge-score 0.1.2, by their own corpus calls."""
    path = write_pairs(tmp_path)["parquet"]
    found = score_files(path, resamples=50)
    assert found["metrics"]["bleu_4"] == pytest.approx(KNOWN["bleu_4"], abs=5e-5)
    assert found["metrics"]["bleu_1"] == pytest.approx(KNOWN["bleu_1"], abs=5e-5)
    assert found["metrics"]["rouge_1"] == pytest.approx(KNOWN["rouge_1"], abs=5e-5)
    assert found["metrics"]["rouge_l"] == pytest.approx(KNOWN["rouge_l"], abs=5e-5)
    assert found["bertscore"] is None
    json.dumps(found, allow_nan=False)


def test_line_separators_inside_a_text_do_not_split_rows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\u2028still one\x0b\x85\ntwo\n\n", encoding="utf-8")
    assert read_columns(tmp_path / "a.txt") == {"": ["one\u2028still one\x0b\x85", "two", ""]}


def test_features_column_gives_fmr(tmp_path: Path) -> None:
    rows = [
        {"generated": "a clean pool", "text": "pool", "features": ["pool", "staff"]},
        {"generated": None, "text": "b", "features": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = score_files(tmp_path / "rows.parquet", reading=Reading(features="features"), resamples=0)
    assert found["metrics"]["fmr"] == 50.0
    assert found["metrics"]["fcr"] == 50.0
    assert found["counts"]["empty_generations"] == 1
    (tmp_path / "rows.csv").write_text('generated,text,words\na pool,b,"pool,staff"\n')
    assert score_files(tmp_path / "rows.csv", reading=Reading(features="words"), resamples=0)["metrics"]["fmr"] == 50.0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "the file is empty"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8 text"),
        ("a.jsonl", b'{"prediction": "a"}\n{"predic', "line 2: not valid JSON"),
        ("a.jsonl", b'{"prediction": "a"}\n3\n', "row 2: expected an object with fields, found int"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.csv", b"prediction,reference\na,b,c\n", "row 1: 3 values instead of 2"),
        ("a.csv", b"prediction,prediction\na,b\n", "two columns of one name"),
        ("a.csv", b"prediction,reference\n", "no rows"),
        ("a.parquet", b"PAR1 this is no Parquet", "not a readable Parquet file"),
        ("a.jsonl", b'{"prediction": 3, "reference": "a"}\n', "row 1, prediction: expected text, found int"),
        ("a.jsonl", b'{"predictions": "a", "references": "b"}\n', "no column named prediction or generated"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        score_files(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_counts_columns_and_paths_are_named(tmp_path: Path) -> None:
    (tmp_path / "said.txt").write_text("a\nb\n")
    (tmp_path / "meant.txt").write_text("a\n")
    with pytest.raises(InputError, match=r"said.txt has 2 rows, .*meant.txt has 1"):
        score_files(tmp_path / "said.txt", tmp_path / "meant.txt")
    with pytest.raises(InputError, match="no such file"):
        score_files(tmp_path / "nowhere.txt", tmp_path / "meant.txt")
    path = write_pairs(tmp_path)["csv"]
    with pytest.raises(InputError, match=r"no column referense; did you mean reference\?"):
        score_files(path, reading=Reading(reference="referense"))
    with pytest.raises(InputError, match="no column zzz; it has prediction, reference"):
        score_files(path, reading=Reading(features="zzz"))


def test_a_second_system_is_compared_row_by_row(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("\n".join(REFERENCES * 5) + "\n")
    (tmp_path / "two.txt").write_text("\n".join(CANDIDATES * 5) + "\n")
    (tmp_path / "meant.txt").write_text("\n".join(REFERENCES * 5) + "\n")
    found = score_files(
        tmp_path / "one.txt", tmp_path / "meant.txt", against=tmp_path / "two.txt", style="both", resamples=100
    )
    json.dumps(found, allow_nan=False)
    other = found["against"]
    assert other["metrics"]["bleu_4"] == pytest.approx(KNOWN["bleu_4"], abs=5e-5)
    gap = other["differences"]["bleu_4"]
    assert gap["difference"] == pytest.approx(100 - KNOWN["bleu_4"], abs=1e-4)
    assert gap["p"] == pytest.approx(1 / 101)
    assert "peter_rouge_l" in other["differences"]
    assert "usr" not in other["differences"]


def test_a_second_system_of_other_rows_is_refused(tmp_path: Path) -> None:
    path = write_pairs(tmp_path)["jsonl"]
    (tmp_path / "short.txt").write_text("a\n")
    with pytest.raises(InputError, match=r"has 1 rows, .* has 4; compare the same rows"):
        score_files(path, against=tmp_path / "short.txt")
    other = [{"generated": "a", "reference": text} for text in [*REFERENCES[:3], "something else"]]
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, other)))
    with pytest.raises(InputError, match=r"other.jsonl, row 4: another reference than in"):
        score_files(path, against=tmp_path / "other.jsonl")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "one text\nanother\n"),
        ("a.csv", "prediction\none text\n"),
        ("a.jsonl", '{"prediction": "one text"}\n'),
        ("a.json", '["one text", "another"]'),
    ],
)
def test_a_file_is_never_scored_against_itself(tmp_path: Path, name: str, content: str) -> None:
    """BLEU 100 came out where the references had been forgotten."""
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match="one column only; give the references' file as second argument"):
        score_files(tmp_path / name)
    (tmp_path / "two.csv").write_text("prediction,reference\na,b\n")
    with pytest.raises(InputError, match="column prediction can't be both prediction and reference"):
        score_files(tmp_path / "two.csv", reading=Reading(reference="prediction"))


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_the_delimiter_of_a_table_is_found(tmp_path: Path, delimiter: str) -> None:
    (tmp_path / "a.csv").write_text(f"prediction{delimiter}reference\nthe room, was nice{delimiter}bad pool\n")
    assert read_columns(tmp_path / "a.csv") == {"prediction": ["the room, was nice"], "reference": ["bad pool"]}
    assert score_files(tmp_path / "a.csv", resamples=0)["metrics"]["bleu_1"] < 1


def test_a_carriage_return_in_a_text_splits_no_row(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\rstill one\r\ntwo\n")
    assert read_columns(tmp_path / "a.txt") == {"": ["one\rstill one", "two"]}


def test_a_missing_text_is_empty_in_every_format(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text('["a", null, "c"]')
    (tmp_path / "rows.jsonl").write_text('{"prediction": "a"}\n{"prediction": null}\n{"prediction": "c"}\n')
    (tmp_path / "rows.csv").write_text("prediction\na\n\nc\n")
    pq.write_table(pa.table({"prediction": ["a", None, "c"]}), tmp_path / "rows.parquet")
    (tmp_path / "meant.txt").write_text("a\nb\nc\n")
    for name in ("list.json", "rows.jsonl", "rows.csv", "rows.parquet"):
        assert score_files(tmp_path / name, tmp_path / "meant.txt", resamples=0)["counts"]["empty_generations"] == 1


def test_compressed_and_utf_16_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "said.txt.gz").write_bytes(gzip.compress(b"the room\n"))
    (tmp_path / "meant.txt").write_text("the room\n", encoding="utf-16")
    assert score_files(tmp_path / "said.txt.gz", tmp_path / "meant.txt", resamples=0)["counts"]["rows"] == 1


def test_features_of_one_string_are_split_as_in_data_prepare(tmp_path: Path) -> None:
    rows = "generated,text,words\na room and pool,b,room;pool\na pool and bar,b,\"['pool', 'bar']\"\n"
    (tmp_path / "rows.csv").write_text(rows)
    assert score_files(tmp_path / "rows.csv", reading=Reading(features="words"), resamples=0)["metrics"]["fmr"] == 100
    (tmp_path / "rows.csv").write_text("generated,text,words\na room,b,[room\n")
    with pytest.raises(InputError, match=r"row 1, words: expected a list of words, found \[room"):
        score_files(tmp_path / "rows.csv", reading=Reading(features="words"))
