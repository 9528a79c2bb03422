"""Jobs as Ray tasks: in order, few at a time, side by side; and `data prepare --workers`, equal byte for byte."""

import copy
import gzip
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.cli import Runner

from gavamoe.data.judging import run_here
from gavamoe.data.prepare import prepare
from gavamoe.data.readers import batches, delimited, tables
from gavamoe.data.readers.sources import SourceOptions
from gavamoe.data.synthetic.generator import synthesize
from gavamoe.errors import InputError, RunError
from gavamoe.runtime.ordered_tasks import OrderedTasks, _apart

pytestmark = pytest.mark.usefixtures("ray_two_workers")


def slow_square(power: int, number: int, fault: str = "") -> tuple[int, int]:
    time.sleep(0.3 if number % 2 == 0 else 0.0)  # later jobs end first
    if fault == "refuses":
        raise InputError("row 7: rating missing")
    if fault == "fails":
        raise ValueError("no such thing")
    return number**power, os.getpid()


def test_results_come_in_the_order_of_the_jobs_by_several_processes() -> None:
    found = list(OrderedTasks(2)(slow_square, (2,), ((number,) for number in range(8))))
    assert [result for result, _ in found] == [number**2 for number in range(8)]
    assert len({process for _, process in found}) == 2
    assert list(OrderedTasks(2)(slow_square, (2,), ())) == []


def test_few_jobs_are_taken_ahead() -> None:
    taken: list[int] = []

    def endless() -> Iterator[tuple[int]]:
        while True:
            taken.append(1)
            yield (len(taken),)

    results = OrderedTasks(2)(slow_square, (1,), endless())
    for _ in range(3):
        next(results)
    assert len(taken) <= 3 + 4


def busy_from_to(seconds: float) -> tuple[float, float]:
    start = time.time()
    time.sleep(seconds)
    return start, time.time()


def test_no_more_jobs_run_at_a_time_than_there_are_workers() -> None:
    """The cluster has room for two."""
    spans = list(OrderedTasks(1)(busy_from_to, (), [(0.1,)] * 6))
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


@pytest.mark.parametrize(("fault", "kind", "text"), [("refuses", InputError, "row 7"), ("fails", RunError, "no such")])
def test_a_job_that_fails_ends_all(fault: str, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        list(OrderedTasks(2)(slow_square, (2,), [(1,), (3, fault), (5,)]))


def dying_once(folder: Path, number: int) -> int:
    mark = folder / str(number)
    if number == 2 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_job_whose_process_is_killed_is_done_again_in_its_place(tmp_path: Path) -> None:
    assert list(OrderedTasks(2)(dying_once, (tmp_path,), ((number,) for number in range(6)))) == list(range(6))
    assert (tmp_path / "2").exists()


def test_slices_are_sent_without_what_they_are_slices_of() -> None:
    whole = pa.array([str(number) * 10 for number in range(10_000)])
    sent = _apart({"text": whole.slice(50, 3), "parts": pa.chunked_array([whole.slice(0, 1), whole.slice(7, 2)])})
    assert sent["text"].to_pylist() == whole.slice(50, 3).to_pylist()
    assert sent["parts"].to_pylist() == [whole[0].as_py(), whole[7].as_py(), whole[8].as_py()]
    assert len(pickle.dumps(sent)) < 1000
    assert _apart(pa.array([], pa.string())).to_pylist() == []
    assert _apart(7) == 7


def test_rows_of_a_table_are_sent_without_the_rest_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "BATCH_ROWS", 20)
    texts = [f"text number {number}" for number in range(5_000)]
    pq.write_table(pa.table({"user": texts, "item": texts, "text": texts}), tmp_path / "r.parquet")
    found = list(tables.read_parquet(tmp_path / "r.parquet", SourceOptions()))
    sent = [pickle.dumps(batch) for batch in found]
    assert len(sent) == 250
    assert max(map(len, sent)) < 6_000
    rows = [copy.deepcopy(batch).read() for batch in found]
    assert [text for batch in rows for text in batch.columns["text"].to_pylist()] == texts
    assert rows[-1].row[-1] == found[-1].last_row == 5_000


def reviews(folder: Path) -> Path:
    """A few hundred reviews of several sentences, some rows wrong."""
    from gavamoe.data.dataset import open_dataset

    data = open_dataset(synthesize(folder / "planted", users=60, items=40, ratings=900, groups=3, seed=0))
    rows = data.table("train").to_pylist()
    lines = ["user,item,rating,text"]
    for number, row in enumerate(rows):
        other = rows[number * 7 % len(rows)]["text"]
        rating = "none" if number % 97 == 5 else row["rating"]
        lines.append(f'u{row["user"]},i{row["item"]},{rating},"{row["text"]}. {other}. Bought in {number}."')
    path = folder / "reviews.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_datasets_are_equal_byte_for_byte(gavamoe: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delimited, "BATCH_ROWS", 100)
    source = reviews(tmp_path)
    found: list[dict[str, bytes]] = []
    for name, options in (("one", []), ("two", ["--workers", "2"])):
        arguments: list[Any] = [source, tmp_path / name, "--format", "table", "--text-mode", "review", *options]
        result = gavamoe("data", "prepare", *arguments)
        assert result.code == 0, result.err
        found.append({path.name: path.read_bytes() for path in sorted((tmp_path / name).iterdir())})
    assert found[0] == found[1]
    assert len(found[0]["rejected.jsonl"].splitlines()) > 5


def review_lines(count: int) -> list[str]:
    """Reviews by thirty people of forty items, with titles now and then, some rows wrong, some texts written twice."""
    nouns = ("strings", "case", "sound", "neck", "bridge", "pedal")
    lines = []
    for number in range(count):
        noun, other = nouns[number % 6], nouns[number * 5 % 6]
        text = f"The {noun} of this one is good, and the {other} holds number {number // 9}. I bought it in May."
        row: dict[str, object] = {"user": f"u{number * 7 % 30}", "item": f"i{number * 11 % 40}", "text": text}
        row |= {"rating": "much" if number == 140 else 1 + number % 5, "time": "yesterday" if number == 77 else number}
        lines.append(json.dumps(row | ({"title": f"Item {number}"} if number % 9 == 4 else {})))
    lines[150], lines[151] = '{"user": broken', ""
    return lines


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("form", ["lines", "crlf, no end", "gzip", "several", "pairs", "users", "parquet", "array"])
def test_whoever_reads_the_rows_the_dataset_is_the_same(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 16 rows, parsed by the workers where a line is a record or a table's; else read by the command."""
    monkeypatch.setattr(batches, "BATCH_ROWS", 16)
    monkeypatch.setattr(tables, "BATCH_ROWS", 16)
    lines, path = review_lines(300), tmp_path / "r.jsonl"
    sources, options = [path], dict[str, Any](max_rejected_share=0.05, text_mode="review")
    path.write_text("\n".join(lines) + "\n")
    wrong = [141, 151]
    if form == "crlf, no end":
        path.write_bytes("\r\n".join(lines).encode())
    elif form == "gzip":
        sources = [tmp_path / "r.jsonl.gz"]
        sources[0].write_bytes(gzip.compress(path.read_bytes()))
    elif form == "several":
        sources = [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]
        sources[0].write_text("\n".join(lines[:100]) + "\n\n")
        sources[1].write_text("\n".join(lines[100:]))
    elif form == "pairs":
        (tmp_path / "p.jsonl").write_text("\n".join(f'{{"user": "u{n}", "item": "i{n}"}}' for n in range(90)))
        options |= {"pairs": tmp_path / "p.jsonl", "max_rejected_share": 0.5}
    elif form == "users":
        (tmp_path / "drop").write_text("u3\nu4\nnobody\n")
        (tmp_path / "key").write_text("0123456789abcdef" * 2)
        options |= {"drop_users": tmp_path / "drop", "hash_users": tmp_path / "key"}
    elif form == "array":
        good = [json.loads(line) for line in lines if line.endswith("}")]
        path.write_text(json.dumps(good, indent=1))
        wrong = [141]
    elif form == "parquet":
        sources, wrong = [tmp_path / "r.parquet"], [141]
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        table = pa.Table.from_pylist([row | {"rating": str(row["rating"]), "time": str(row["time"])} for row in rows])
        pq.write_table(table, sources[0], row_group_size=37)
    found = [
        prepare(sources, tmp_path / name, "table", run=run, **options)
        for name, run in (("one", run_here), ("two", OrderedTasks(2)))
    ]
    assert found[0] == found[1]
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")
    rejected = [json.loads(line) for line in (tmp_path / "two" / "rejected.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rejected][:2] == wrong
    assert found[1].repeated_texts > 0
    assert found[1].unknown_times == 1
    if form == "users":
        assert found[1].dropped > 0
        assert all(row["raw"] == "" for row in rejected)
        assert "1 of the users to leave out have no row" in found[1].notes


def test_what_workers_run_needs_no_torch() -> None:
    """Every worker would spend seconds and 200 MiB on it."""
    code = "import sys, gavamoe.data.judging, gavamoe.data.text.choosing; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_column_that_only_later_rows_have_is_the_same_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "BATCH_ROWS", 16)
    rows = [{"user": f"u{n}", "item": f"i{n % 7}", "text": f"The sound is number {n}."} for n in range(200)]
    rows[133]["rating"] = "4"
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for run in (run_here, OrderedTasks(2)):
        with pytest.raises(InputError, match="row 129: the first rows have no rating and later rows do"):
            prepare(tmp_path / "r.jsonl", tmp_path / "out", "table", run=run)
    (tmp_path / "other.jsonl").write_text("\n".join(f'{{"who": "u{n}", "item": "i{n}"}}' for n in range(40)))
    del rows[133]["rating"]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for run in (run_here, OrderedTasks(2)):
        with pytest.raises(InputError, match=r"other\.jsonl: no column 'user' for the user"):
            prepare([tmp_path / "r.jsonl", tmp_path / "other.jsonl"], tmp_path / "out", "table", run=run)
    assert not (tmp_path / "out").exists()
