"""`explain --requests`: texts in the order of their requests, the same however often the command was interrupted."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.cli import Runner
from helpers.exported_runs import run, trained

from gavamoe.config.files import override_config
from gavamoe.config.schema import GenerationConfig
from gavamoe.errors import InputError, RunError
from gavamoe.generation.batch.blocks import SCHEMA, from_table, to_rows, written_here
from gavamoe.generation.batch.request_file import RequestFile, RequestRow, as_request
from gavamoe.generation.batch.text_file import write_texts
from gavamoe.generation.generator import ExplanationGenerator

ROWS = 23


def requests_file(folder: Path, rows: int = ROWS) -> Path:
    lines = []
    for number in range(rows):
        row: dict[str, Any] = {"user": f"U{number % 50:06d}", "item": f"I{number % 37:06d}"}
        if number % 3 == 0:
            row["rating"] = 1 + number % 5
        if number % 4 == 0:
            row["features"] = ["acting", "plot"][: 1 + number % 2]
        if number % 11 == 10:
            row |= {"user": "nobody", "history": [{"item": "I000003", "rating": 2}]}
        lines.append(json.dumps(row))
    path = folder / "requests.jsonl"
    path.write_text("\n".join(lines))
    return path


class Interrupted(Exception):
    pass


class Work:
    """A generator and all that `write_texts` needs beside it."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.generator = ExplanationGenerator.load(run().stage2)
        self.source = RequestFile.open(
            requests_file(folder), lambda row: self.generator.filler.check(self.request(row))
        )
        self.generation = override_config(run().config, ["generation.max_new_tokens=8", *overrides]).generation

    def request(self, row: RequestRow) -> Any:
        return as_request(row, self.generator.catalog, self.generator.filler.history)

    def write(self, out: Path, **options: Any) -> int:
        found = {"model": "m", "block_rows": 5} | options
        write = found.pop("write", None) or written_here(self.generator)
        return write_texts(self.source, out, write, self.request, self.generation, **found)


def texts(path: Path) -> list[str]:
    found: list[str] = pq.read_table(path)["text"].to_pylist()
    return found


@pytest.mark.parametrize("sampling", [(), ("generation.temperature=1",)])
def test_an_interrupted_command_goes_on_and_writes_what_an_undisturbed_one_does(
    sampling: tuple[str, ...], tmp_path: Path
) -> None:
    work = Work(tmp_path, *sampling)
    assert work.write(tmp_path / "whole.parquet") == 0

    def stop(done: int, total: int) -> None:
        assert total == ROWS
        if done == 15:
            raise Interrupted

    with pytest.raises(Interrupted):
        work.write(tmp_path / "out.parquet", on_progress=stop)
    assert not (tmp_path / "out.parquet").exists()
    with pytest.raises(InputError, match="interrupted command; --resume goes on"):
        work.write(tmp_path / "out.parquet")
    (tmp_path / "out.parquet.parts" / "000001.parquet").unlink()
    assert work.write(tmp_path / "out.parquet", resume=True) == 10
    assert pq.read_table(tmp_path / "out.parquet").equals(pq.read_table(tmp_path / "whole.parquet"))
    assert not (tmp_path / "out.parquet.parts").exists()
    assert len(set(texts(tmp_path / "out.parquet"))) > 5


def test_texts_are_those_that_each_request_gets_alone(tmp_path: Path) -> None:
    work = Work(tmp_path)
    work.write(tmp_path / "out.parquet")
    rows = [row for block in work.source.blocks(100) for row in block]
    alone = [work.generator.explain([work.request(row)], work.generation)[0] for row in rows]
    assert texts(tmp_path / "out.parquet") == [found.text for found in alone]
    table = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["cluster"] for row in table] == [found.cluster for found in alone]
    assert [row["user"] for row in table] == [row.user for row in rows]
    assert from_table(pa.Table.from_pylist(to_rows(alone), SCHEMA)) == alone


@pytest.mark.parametrize(
    ("options", "problem"),
    [({"model": "other"}, "texts of another model"), ({"seed": 3}, "texts of another seed")],
)
def test_parts_of_other_work_are_refused(options: dict[str, Any], problem: str, tmp_path: Path) -> None:
    work = Work(tmp_path)

    def stop(done: int, total: int) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        work.write(tmp_path / "out.csv", on_progress=stop)
    with pytest.raises(InputError, match=problem):
        work.write(tmp_path / "out.csv", resume=True, **options)
    requests_file(tmp_path, rows=30)
    with pytest.raises(InputError, match="texts of other requests"):
        work.write(tmp_path / "out.csv", resume=True)


def test_the_command_writes_all_forms_alike(gavamoe: Runner, tmp_path: Path) -> None:
    source = requests_file(tmp_path)
    found = []
    for name in ("t.parquet", "t.jsonl", "t.csv"):
        result = gavamoe(
            "explain", trained(), "--requests", source, "--out", tmp_path / name, "--json",
            "--set", "generation.max_new_tokens=8",
        )  # fmt: skip
        assert result.code == 0, result.err
        assert json.loads(result.out)["rows"] == ROWS
        found.append(tmp_path / name)
    parquet = texts(found[0])
    lines = [json.loads(line) for line in found[1].read_text().splitlines()]
    with found[2].open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["text"] for row in lines] == [row["text"] for row in table] == parquet
    assert lines[10]["user"] == "nobody"
    assert lines[4]["features"] == ["acting"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ([], "explain needs --item, or --requests FILE"),
        (["--requests", "{r}"], "--requests needs --out FILE"),
        (["--requests", "{r}", "--out", "{t}/x.txt"], "the output is Parquet, JSON lines or CSV"),
        (["--requests", "{r}", "--out", "{t}/x.csv", "--user", "U"], "--requests has --user in its file's rows"),
        (["--item", "I", "--user", "U", "--resume"], "--out, --resume and --workers belong to --requests"),
        (["--requests", "{t}/bad.csv", "--out", "{t}/x.csv"], "row 2: rating 9: outside this dataset's scale, 1 to 5"),
        (["--requests", "{t}/known.jsonl", "--out", "{t}/x.csv"], "row 1: history: the user is known"),
    ],
)
def test_wrong_use_is_one_line_and_writes_nothing(
    options: list[str], problem: str, gavamoe: Runner, tmp_path: Path
) -> None:
    source = requests_file(tmp_path)
    (tmp_path / "bad.csv").write_text("user,item,rating\nU000001,I000001,9\n")
    (tmp_path / "known.jsonl").write_text('{"user": "U000001", "item": "I000001", "history": [{"rating": 2}]}')
    before = sorted(tmp_path.iterdir())
    result = gavamoe("explain", trained(), *(option.format(r=source, t=tmp_path) for option in options))
    assert result.code == 2
    assert problem in result.err
    assert sorted(tmp_path.iterdir()) == before


def test_blocks_that_were_given_up_are_named_and_tried_again(tmp_path: Path) -> None:
    work = Work(tmp_path)

    def write(blocks: Any, generation: GenerationConfig) -> Any:
        for number, requests, seed in blocks:
            yield number, "out of memory" if number == 2 else work.generator.explain(requests, generation, seed)

    with pytest.raises(RunError, match=r"requests 11 to 15 failed each time .*out of memory.*--resume"):
        work.write(tmp_path / "out.parquet", write=write)
    assert not (tmp_path / "out.parquet").exists()
    assert work.write(tmp_path / "out.parquet", resume=True) == ROWS - 5
    work.write(tmp_path / "whole.parquet")
    assert pq.read_table(tmp_path / "out.parquet").equals(pq.read_table(tmp_path / "whole.parquet"))


@pytest.mark.usefixtures("ray_two_workers")
def test_workers_write_what_one_process_writes(gavamoe: Runner, tmp_path: Path) -> None:
    source = requests_file(tmp_path, rows=1100)  # three blocks
    found = []
    for name, options in (("one.parquet", []), ("two.parquet", ["--workers", "2"])):
        result = gavamoe(
            "explain", trained(), "--requests", source, "--out", tmp_path / name, *options,
            "--set", "generation.max_new_tokens=4",
        )  # fmt: skip
        assert result.code == 0, result.err
        found.append(pq.read_table(tmp_path / name))
    assert found[0].equals(found[1])
    result = gavamoe("explain", trained(), "--requests", source, "--out", tmp_path / "x.csv", "--workers", "99")
    assert result.code == 2
    assert "--workers 99: the cluster has room for" in result.err
