"""Several files as one source: the dataset of their rows one after the other; at URIs too."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from helpers.cli import Runner

from gavamoe.artifacts.source_files import local_files
from gavamoe.data.prepare import prepare
from gavamoe.errors import InputError


def rows(first: int, count: int) -> list[str]:
    lines = []
    for number in range(first, first + count):
        rating = "much" if number % 40 == 7 else 1 + number % 5
        row = {"user": f"u{number % 9}", "item": f"i{number}", "rating": rating, "text": f"a text number {number}"}
        lines.append(json.dumps(row))
    return lines


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """100 rows in three files, the first with blank lines at its end, and the same in one file."""
    for name, lines in (("a", rows(0, 40)), ("b", rows(40, 35)), ("c", rows(75, 25)), ("all", rows(0, 100))):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + ("\n\n\n" if name == "a" else "\n"))
    return [tmp_path / f"{name}.jsonl" for name in "abc"]


def content(folder: Path) -> dict[str, list[dict[str, object]]]:
    """Rows of every table; they are stored in groups of the batches that were read."""
    return {path.name: pq.read_table(path).to_pylist() for path in folder.iterdir() if path.suffix == ".parquet"}


def test_the_dataset_is_that_of_the_rows_one_after_the_other(parts: list[Path], tmp_path: Path) -> None:
    several = prepare(parts, tmp_path / "several", "table")
    whole = prepare(tmp_path / "all.jsonl", tmp_path / "whole", "table")
    assert several.kept == whole.kept == 97
    assert content(tmp_path / "several") == content(tmp_path / "whole")
    assert json.loads((tmp_path / "several" / "meta.json").read_text())["source"] == "a.jsonl + b.jsonl + c.jsonl"
    rejected = [json.loads(line)["row"] for line in (tmp_path / "several" / "rejected.jsonl").read_text().splitlines()]
    assert rejected == [8, 48, 88]


def test_files_at_uris_are_fetched_and_removed(
    parts: list[Path], tmp_path: Path, gavamoe: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GAVAMOE_CACHE", str(tmp_path / "cache"))
    uris = [parts[0], f"file://{parts[1]}", f"file://{parts[2]}"]
    result = gavamoe("data", "prepare", *uris, tmp_path / "out", "--format", "table")
    assert result.code == 0, result.err
    prepare(parts, tmp_path / "local", "table")
    assert content(tmp_path / "out") == content(tmp_path / "local")
    assert not list((tmp_path / "cache").glob("sources-*"))


def test_a_folder_at_a_uri_is_fetched_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GAVAMOE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "folder").mkdir()
    for name in ("1.parquet", "2.parquet"):
        (tmp_path / "folder" / name).write_text(name)
    with local_files([f"file://{tmp_path}/folder"]) as [folder]:
        assert folder.name == "folder"
        assert {path.name: path.read_text() for path in folder.iterdir()} == {
            "1.parquet": "1.parquet",
            "2.parquet": "2.parquet",
        }
    assert not folder.exists()


def test_wrong_sources_are_one_line_and_write_nothing(
    parts: list[Path], tmp_path: Path, gavamoe: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GAVAMOE_CACHE", str(tmp_path / "cache"))
    cases = [
        ([parts[0], tmp_path / "none.jsonl"], "table", "none.jsonl: no such file"),
        ([parts[0], parts[1], parts[0]], "table", "a.jsonl: named twice"),
        ([parts[0], f"file://{tmp_path}/none.jsonl"], "table", "none.jsonl: no such file, nor a folder"),
        ([tmp_path, parts[0]], "peter", "format peter: is one folder"),
    ]
    for sources, kind, problem in cases:
        result = gavamoe("data", "prepare", *sources, tmp_path / "out", "--format", kind)
        assert result.code == 2
        assert problem in result.err
        assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="names no source"):
        prepare([], tmp_path / "out", "table")
