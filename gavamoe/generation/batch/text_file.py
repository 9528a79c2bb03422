"""The texts of a file of requests, as a file of the same order: Parquet, JSON lines or CSV, by its name's end.

Texts are written a block of rows at a time. Each block that is done lies beside the output, in OUT.parts/; when all are
there they become the output, and the folder goes. What was interrupted goes on behind its last whole block; sampled
texts draw by seed and row, so that they are the ones that an undisturbed command writes.
"""

import csv
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gavamoe.artifacts.files import read_json, sha256, write_file, write_json
from gavamoe.artifacts.lock import locked_folder
from gavamoe.config.schema import GenerationConfig
from gavamoe.errors import InputError, RunError, listed
from gavamoe.generation.batch.blocks import SCHEMA, Blocks, WriteBlocks, to_rows
from gavamoe.generation.batch.request_file import RequestFile, RequestRow, form_of
from gavamoe.generation.generator import Explanation
from gavamoe.generation.request import ExplanationRequest

BLOCK_ROWS = 512
_WORK = "work.json"
_SCHEMA = pa.schema(
    [("user", pa.string()), ("item", pa.string()), *(field for field in SCHEMA if field.name != "responsibilities")]
)
Count = Callable[[int, int], None]


@dataclass(frozen=True)
class Work:
    """All that decides the texts; a folder of parts belongs to one of these."""

    requests: str
    """SHA-256 of the file of requests."""
    model: str
    """Fingerprint of the artifact that writes."""
    generation: dict[str, Any]
    seed: int
    block_rows: int


def output_form(out: Path) -> str:
    """The form of an output that is not there yet.

    Raises:
        InputError: its name says no form, or it exists.
    """
    form = form_of(out, "the output")
    if out.exists():
        raise InputError(f"{out}: already exists; choose another name or remove it first")
    return form


def write_texts(
    source: RequestFile,
    out: Path,
    write: WriteBlocks,
    to_request: Callable[[RequestRow], ExplanationRequest],
    generation: GenerationConfig,
    *,
    model: str,
    seed: int = 0,
    resume: bool = False,
    block_rows: int = BLOCK_ROWS,
    on_progress: Count | None = None,
) -> int:
    """Write the texts of all requests into `out`; returns how many rows were there already from an earlier command.

    Args:
        write: `written_here` or `written_by`.
        to_request: a row by index, as `as_request` makes it.
        model: fingerprint of the artifact that writes.
        resume: go on with the parts that an interrupted command left.
        on_progress: called with rows done and rows in all.

    Raises:
        InputError: `out` exists; parts of an interrupted command are there and `resume` is False, or they are of other
            requests, another model, or other settings.
        RunError: the disk is full, or blocks were given up; the parts stay.
    """
    form = output_form(out)
    settings = generation.model_dump(mode="json", exclude={"choose", "batch_size"})
    work = Work(sha256(source.path), model, settings, seed, block_rows)
    parts = out.with_name(f"{out.name}.parts")
    with locked_folder(parts):
        _claim(parts, work, resume=resume)
        blocks = -(-source.rows // block_rows)
        left = {number for number in range(blocks) if not _part(parts, number).is_file()}
        before = done = source.rows - sum(_rows_of(source, number, block_rows) for number in left)
        rows_of: dict[int, list[RequestRow]] = {}

        def jobs() -> Blocks:
            first = min(left, default=blocks)
            for number, rows in enumerate(source.blocks(block_rows, first), start=first):
                if number in left:
                    rows_of[number] = rows
                    yield number, [to_request(row) for row in rows], seed + number * block_rows

        given_up: dict[int, str] = {}
        for number, found in write(jobs(), generation):
            rows = rows_of.pop(number)
            if isinstance(found, str):
                given_up[number] = found
                continue
            _write_part(_part(parts, number), rows, found)
            done += len(rows)
            if on_progress is not None:
                on_progress(done, source.rows)
        if given_up:
            raise RunError(f"{parts}: {_named(given_up, source.rows, block_rows)}; all others are there, --resume tries"
                           " these again")  # fmt: skip
        with write_file(out) as aside:
            _JOIN[form]([_part(parts, number) for number in range(blocks)], aside)
        shutil.rmtree(parts)
    return before


def _rows_of(source: RequestFile, number: int, block_rows: int) -> int:
    """Rows of a block."""
    return min(block_rows, source.rows - number * block_rows)


def _named(given_up: dict[int, str], rows: int, block_rows: int) -> str:
    """Which requests were given up, counted from 1, and why the first of them."""
    ranges = [f"{n * block_rows + 1} to {min((n + 1) * block_rows, rows)}" for n in sorted(given_up)]
    return f"requests {listed(ranges, most=5)} failed each time they were tried ({given_up[min(given_up)]})"


def _claim(parts: Path, work: Work, *, resume: bool) -> None:
    known = parts / _WORK
    if not known.is_file():
        write_json(known, asdict(work))
        return
    if not resume:
        raise InputError(f"{parts}: holds the texts of an interrupted command; --resume goes on, or remove it")
    found = read_json(known)
    for name, value in asdict(work).items():
        if not isinstance(found, dict) or found.get(name) != value:
            what = {"requests": "other requests", "model": "another model"}.get(name, f"another {name}")
            raise InputError(f"{parts}: holds texts of {what}; remove it, or name another output")


def _part(parts: Path, number: int) -> Path:
    return parts / f"{number:06d}.parquet"


def _write_part(path: Path, rows: list[RequestRow], found: list[Explanation]) -> None:
    values = [{"user": row.user, "item": row.item} | text for row, text in zip(rows, to_rows(found), strict=True)]
    with write_file(path) as aside:
        pq.write_table(pa.Table.from_pylist(values, _SCHEMA), aside)


def _join_parquet(parts: list[Path], out: Path) -> None:
    with pq.ParquetWriter(out, _SCHEMA) as file:
        for part in parts:
            file.write_table(pq.read_table(part))


def _join_json_lines(parts: list[Path], out: Path) -> None:
    with out.open("w", encoding="utf-8") as file:
        for row in _rows(parts):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _join_csv(parts: list[Path], out: Path) -> None:
    with out.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, _SCHEMA.names)
        table.writeheader()
        table.writerows(row | {"features": ",".join(row["features"])} for row in _rows(parts))


def _rows(parts: list[Path]) -> Iterator[dict[str, Any]]:
    for part in parts:
        yield from pq.read_table(part).to_pylist()


_JOIN: dict[str, Callable[[list[Path], Path], None]] = {
    "parquet": _join_parquet,
    "jsonl": _join_json_lines,
    "csv": _join_csv,
}
