"""A soak of hostile files: valid ones, changed in every way that breaks parsers.

Whatever a file holds, it is read with every row accounted for, or refused with one line: never a traceback, 20 seconds
or gigabytes of memory. 10,000 files in the slow tests, 300 in the fast ones.
"""

import gzip
import json
import pickle
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.base_models import save_gguf
from helpers.mutations import mutated, time_limit
from helpers.reviews import amazon
from helpers.tiny import tiny_yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gavamoe.config.files import load_config, shipped
from gavamoe.config.yaml_reader import read_yaml
from gavamoe.data.dataset import SPLITS, open_dataset
from gavamoe.data.prepare import prepare
from gavamoe.errors import InputError, validated
from gavamoe.evaluation.human.results import read_sheet
from gavamoe.evaluation.human.study import read_key
from gavamoe.evaluation.score_files import score_files
from gavamoe.evaluation.text_tables import read_columns
from gavamoe.model.base_model import check_base
from gavamoe.serving.settings import ServeArgs
from gavamoe.tune.space import load_space, parse_space
from gavamoe.tune.study import STUDY_FILE, Study

FAST, SLOW = 300, 10_000
MOST_MEMORY = 2 * 2**30


def reviews(delimiter: str, quoted: bool, end: str = "\n") -> bytes:
    """Twelve reviews as a delimited file with quotes, delimiters and line ends in its texts."""
    mark = '"' if quoted else ""
    rows = [delimiter.join(("user", "item", "rating", "title", "text", "features", "time"))]
    for n in range(12):
        text = f'The ""room""{delimiter} {n}{end}was clean' if quoted else f'The 5" room {n} was clean'
        values = (
            f"u{n % 3}",
            f"i{n}",
            str(1 + n % 5),
            f"Title {n}",
            text,
            "['room', 'bed']",
            f"2020-01-{n + 1:02}T10:00Z",
        )
        rows.append(delimiter.join(f"{mark}{value}{mark}" for value in values))
    return (end.join(rows) + end).encode()


def json_lines() -> bytes:
    return "".join(json.dumps(record) + "\n" for record in amazon(12)).encode()


def parquet() -> bytes:
    columns = {"user": [f"u{n % 3}" for n in range(12)], "item": list(range(12)), "text": ["A clean room."] * 12}
    columns |= {"rating": [1.5] * 12, "features": [["room"]] * 12}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def records(protocol: int) -> bytes:
    template = ("room", "clean", "the room was clean", 1)
    return pickle.dumps(
        [{"user": f"u{n % 3}", "item": f"i{n}", "rating": 1 + n % 5, "template": template} for n in range(12)], protocol
    )


KEY = {
    "format": 1, "dataset": "f" * 64, "split": "test", "seed": 0, "systems": ["gavamoe", "peter"],
    "texts": [{"id": f"t{n:04}", "row": n, "systems": ["gavamoe"]} for n in range(6)],
}  # fmt: skip
SHEET = "id,text,personalization,quality,satisfaction\n" + "".join(f't{n:04},"a, b",3.5,4,5\n' for n in range(6))
SCORES = "prediction,reference,words\n" + "".join(f'"the room, {n}",the room was clean,room;bed\n' for n in range(8))


def prepares(format: str) -> Callable[[Path], None]:
    """Prepare a dataset from the file and account for its rows."""

    def check(path: Path) -> None:
        out = path.parent / "out"
        summary = prepare(path, out, format, max_rejected_share=1)
        rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
        assert summary.read == summary.kept + summary.repeated_pairs + len(rejected)
        assert sum(summary.rejected.values()) == len(rejected)
        numbers = [row["row"] for row in rejected]
        assert numbers == sorted(set(numbers))
        dataset = open_dataset(out)
        assert sum(dataset.size(split) for split in SPLITS) == summary.kept

    return check


def scores(path: Path) -> None:
    columns = read_columns(path)
    assert len({len(column) for column in columns.values()}) == 1
    found = score_files(path, resamples=0)
    assert found["counts"]["rows"] == len(next(iter(columns.values())))


def reads_sheet(path: Path) -> None:
    key = path.parent / "valid.key.json"
    key.write_text(json.dumps(KEY))
    read_sheet(path, read_key(key))


def reads_settings(path: Path) -> None:
    validated(ServeArgs, read_yaml(path), path, "usable settings")


def searched() -> bytes:
    """The storage of a search with two finished trials and one that runs."""
    with tempfile.TemporaryDirectory() as folder:
        study = open_study(Path(folder))
        for value in (0.5, 0.7):
            number, _ = study.next(lambda values: None) or (0, {})
            study.complete(number, {"stage1.rmse": [value]}, 1.0)
        study.next(lambda values: None)
        return (Path(folder) / STUDY_FILE).read_bytes()


def open_study(folder: Path) -> Study:
    beta = {"type": "float", "low": 0.0, "high": 1.0}
    values = {"stages": 1, "metric": "rmse", "budget": {"trials": 6}, "parameters": {"stage1.beta": beta}}
    return Study(folder, parse_space(values, "s.yaml"), {}, seed=0, name="s")


def reads_study(path: Path) -> None:
    study = open_study(path.parent)
    assert len(study.records) <= 6
    study.next(lambda values: None)


class Kind(NamedTuple):
    """A kind of file: its name, a valid one, and what reads it."""

    name: str
    valid: bytes
    check: Callable[[Path], object]


def gguf() -> bytes:
    """A base model of a few thousand weights in one file."""
    with tempfile.TemporaryDirectory() as folder:
        return save_gguf(Path(folder) / "model.gguf").read_bytes()


def checks_model(path: Path) -> None:
    check_base(str(path))


KINDS = [
    Kind("model.gguf", gguf(), checks_model),
    Kind("quoted.csv", reviews(",", True), prepares("table")),
    Kind("returns.csv", reviews(";", True, "\r"), prepares("table")),
    Kind("unquoted.tsv", reviews("\t", False), prepares("table")),
    Kind("escaped.csv", reviews(",", True).replace(b'""room""', b'\\"room\\"'), prepares("table")),
    Kind("reviews.json", json_lines(), prepares("amazon")),
    Kind("array.json", json.dumps({"reviews": amazon(12)}, indent=1).encode(), prepares("amazon")),
    Kind("reviews.csv.gz", gzip.compress(reviews(",", True)), prepares("table")),
    Kind("reviews.parquet", parquet(), prepares("table")),
    Kind("reviews.pickle", records(0), prepares("peter")),
    Kind("reviews.pickle", records(5), prepares("peter")),
    Kind("config.yaml", tiny_yaml().encode(), load_config),
    Kind("space.yaml", (shipped("tune_spaces") / "gates_beta.yaml").read_bytes(), load_space),
    Kind("study.key.json", json.dumps(KEY).encode(), read_key),
    Kind("ann.csv", SHEET.encode(), reads_sheet),
    Kind(STUDY_FILE, searched(), reads_study),
    Kind("serve.yaml", b"run: r\nlimits: {max_batch: 4}\ngenerator: {slots: 2}\npage: true\n", reads_settings),
    Kind("scores.csv", SCORES.encode(), scores),
    Kind("scores.jsonl", b'{"prediction": "a room", "reference": "the room"}\n' * 6, scores),
]


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp())
    yield path
    shutil.rmtree(path)


def soak(kind: Kind, folder: Path, count: int) -> None:
    """`count` hostile versions of a kind; the valid one is read."""
    (folder / kind.name).write_bytes(kind.valid)
    kind.check(folder / kind.name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(st.data())
    def check(data: st.DataObject) -> None:
        work = Path(tempfile.mkdtemp(dir=folder))
        path = work / kind.name
        path.write_bytes(data.draw(mutated(kind.valid)))
        refusal = None
        try:
            with time_limit():
                kind.check(path)
        except InputError as error:
            refusal = str(error)
        finally:
            left = (work / "out").exists()
            shutil.rmtree(work)
        if refusal is not None:
            assert "\n" not in refusal
            assert 0 < len(refusal) < 2000
            assert not left

    check()
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < MOST_MEMORY


@pytest.mark.parametrize("kind", KINDS, ids=[f"{number} {kind.name}" for number, kind in enumerate(KINDS)])
def test_hostile_files(kind: Kind, folder: Path) -> None:
    soak(kind, folder, -(-FAST // len(KINDS)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=[f"{number} {kind.name}" for number, kind in enumerate(KINDS)])
def test_ten_thousand_hostile_files(kind: Kind, folder: Path) -> None:
    soak(kind, folder, -(-SLOW // len(KINDS)))
