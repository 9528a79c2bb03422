"""Jobs as Ray tasks: in order, few at a time, side by side; and `data prepare --workers`, equal byte for byte."""

import os
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from helpers.cli import Runner

from gavamoe.data.readers import delimited
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


@pytest.mark.parametrize(("fault", "kind", "text"), [("refuses", InputError, "row 7"), ("fails", RunError, "no such")])
def test_a_job_that_fails_ends_all(fault: str, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        list(OrderedTasks(2)(slow_square, (2,), [(1,), (3, fault), (5,)]))


def test_slices_are_sent_without_what_they_are_slices_of() -> None:
    whole = pa.array([str(number) * 10 for number in range(10_000)])
    sent = _apart({"text": whole.slice(50, 3), "parts": pa.chunked_array([whole.slice(0, 1), whole.slice(7, 2)])})
    assert sent["text"].to_pylist() == whole.slice(50, 3).to_pylist()
    assert sent["parts"].to_pylist() == [whole[0].as_py(), whole[7].as_py(), whole[8].as_py()]
    assert len(pickle.dumps(sent)) < 1000
    assert _apart(pa.array([], pa.string())).to_pylist() == []
    assert _apart(7) == 7


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
