"""Cache of tokenized training rows, made once and read by every run with the same tokenizer, prompts and data.

    DATASET/tokens/KEY/   part-00000.parquet ...   row int64, prompt list<int32>, answer list<int32>
                          tokens.json              format version, rows, every part's SHA-256

KEY is a hash of everything that decides the ids: tokenizer, prompt settings, rating scale, slot ids, dataset. The cache
lies beside the data that it is made from, so that all runs and trials on them share it. It is written aside and
renamed: of two runs that make it at once, one wins and both continue with the same rows. A damaged cache is not read
but made again. The `KEPT` caches used last are kept. Deleting `tokens/` is always safe.

Tokenizing is a pure function of its arguments; `pipeline` gives it Ray tasks.
"""

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from gavamoe.artifacts.checksums import FileEntry, find_damage, list_files
from gavamoe.artifacts.files import read_json, write_json
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import Dataset, open_dataset
from gavamoe.errors import InputError, validated
from gavamoe.generation.prompts import PromptBuilder, template_texts
from gavamoe.runtime.context import Context
from gavamoe.stage2.batches import Ragged, TextRows
from gavamoe.stage2.tokenized_rows import encode_rows, prompt_builder, rows_with_text

FOLDER = "tokens"
VERSION = 1
"""Version of the cache's content; raise it when the same settings come to give other ids."""
KEPT = 8
"""Caches of a dataset that are kept, those used last."""
PART_ROWS = 50_000
"""Rows of one part of a cache, which one task tokenizes."""
WORTHWHILE = 100_000
"""Training rows from which on a cache is made: fewer are tokenized in the time that it takes to look for it."""
_ABANDONED = 24 * 3600
"""Seconds after which a half-written cache counts as abandoned, and is removed."""
_BEYOND = 2**40
"""An index that no user or item has: its slot is the unknown one."""
_MANIFEST = "tokens.json"
_SCHEMA = pa.schema([("row", pa.int64()), ("prompt", pa.list_(pa.int32())), ("answer", pa.list_(pa.int32()))])

RunJobs = Callable[[Callable[..., Any], list[dict[str, Any]]], list[Any]]
"""Calls a function with each job's arguments, side by side or not; returns the results in order."""


class _Manifest(BaseModel):
    """Content of `tokens.json`."""

    version: int
    rows: int
    files: dict[str, str]
    """SHA-256 of each part, by its name."""


def fill_cache(config: RunConfig, dataset: Path, run_jobs: RunJobs) -> Path | None:
    """Make the cache of a run's training rows, unless it is there and whole; returns its folder.

    Nothing is made of fewer than `WORTHWHILE` rows, nor in a dataset folder that can't be written to: None.
    """
    data = open_dataset(dataset)
    if data.size("train") < WORTHWHILE:
        return None
    rows = rows_with_text(data, "train")
    builder = prompt_builder(config, data)
    folder = cache_folder(data, builder)
    if _is_whole(folder, len(rows)):
        _touch(folder)
        return folder
    aside = folder.with_name(f".{folder.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        aside.mkdir(parents=True)
    except OSError:
        return None
    try:
        starts = range(0, len(rows), PART_ROWS)
        files = [aside / f"part-{number:05d}.parquet" for number in range(len(starts))]
        jobs = [
            {"builder": builder, "dataset": data.path.absolute(), "rows": rows[start : start + PART_ROWS], "out": file}
            for start, file in zip(starts, files, strict=True)
        ]
        run_jobs(encode_part, jobs)
        hashes = {name: entry.sha256 for name, entry in list_files(aside).items()}
        write_json(aside / _MANIFEST, _Manifest(version=VERSION, rows=len(rows), files=hashes).model_dump(mode="json"))
        _publish(aside, folder, len(rows))
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _forget_old(folder.parent)
    return folder


def encode_part(context: Context, builder: PromptBuilder, dataset: Path, rows: np.ndarray, out: Path) -> None:
    """Tokenize some training rows (ascending) into the file `out`."""
    del context  # every task gets one; this one does not need it
    encoded = encode_rows(builder, open_dataset(dataset), "train", rows)
    columns = [pa.array(rows, pa.int64()), *map(_to_arrow, (encoded.prompts, encoded.answers))]
    pq.write_table(pa.Table.from_arrays(columns, schema=_SCHEMA), out, compression="zstd")


def read_cache(data: Dataset, builder: PromptBuilder, rows: np.ndarray) -> TextRows | None:
    """The given training rows (ascending) from the cache; None where it is damaged, or lacks one of them."""
    if data.size("train") < WORTHWHILE:
        return None
    folder = cache_folder(data, builder)
    try:
        files = _check(folder)
        tables = [pq.read_table(folder / name, schema=_SCHEMA) for name in files]
    except (OSError, InputError, pa.ArrowException):
        return None
    table = pa.concat_tables(tables)
    cached = table["row"].to_numpy()
    places = np.searchsorted(cached, rows)
    if len(rows) > len(cached) or not np.array_equal(cached[np.minimum(places, len(cached) - 1)], rows):
        return None
    _touch(folder)
    prompts, answers = (_from_arrow(table[name]) for name in ("prompt", "answer"))
    whole = TextRows(prompts, answers)
    return whole if len(rows) == len(cached) else TextRows(prompts.take(places), answers.take(places))


def cache_folder(data: Dataset, builder: PromptBuilder) -> Path:
    """Folder of the cache for the rows of this dataset, tokenized by this builder."""
    tokenizer, slots = builder.tokenizer, builder.slots
    decides = {
        "version": VERSION,
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id],
        "prompt": builder.config.model_dump(mode="json"),
        "template": template_texts(builder.config),
        "scale": builder.scale.model_dump(mode="json") if builder.scale else None,
        "slots": [token(index) for token in (slots.user_token, slots.item_token) for index in (0, _BEYOND)],
        "dataset": data.fingerprint,
    }
    key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    return data.path / FOLDER / key[:32]


def _is_whole(folder: Path, rows: int) -> bool:
    try:
        _check(folder, rows)
    except (OSError, InputError):
        return False
    return True


def _check(folder: Path, rows: int | None = None) -> Sequence[str]:
    """Names of the parts, in order, each of the content that was written; `rows` None: of any number of rows.

    Raises:
        InputError, OSError: something is missing, damaged, or of another version.
    """
    path = folder / _MANIFEST
    manifest = validated(_Manifest, read_json(path), path, "the list of a token cache")
    if manifest.version != VERSION or rows not in (None, manifest.rows):
        raise InputError(f"{path}: belongs to another version or to other rows")
    damage = find_damage(folder, {name: FileEntry(sha256=recorded) for name, recorded in manifest.files.items()})
    if damage is not None:
        raise InputError(f"{folder}: damaged ({damage.text})")
    return sorted(manifest.files)


def _publish(aside: Path, folder: Path, rows: int) -> None:
    """Give a finished folder its name; what another run has put there meanwhile stays, if it is whole."""
    with suppress(OSError):
        aside.rename(folder)
        return
    if not _is_whole(folder, rows):
        damaged = folder.with_name(f".{folder.name}.damaged-{uuid.uuid4().hex[:8]}")
        with suppress(OSError):  # two runs may repair it at once: the second finds nothing to move, or a whole folder
            folder.rename(damaged)
            aside.rename(folder)
        shutil.rmtree(damaged, ignore_errors=True)


def _forget_old(parent: Path) -> None:
    """Remove all but the `KEPT` caches used last, and what runs that were killed have left half-written."""
    newest = sorted(parent.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    old = [path for path in newest if not path.name.startswith(".")][KEPT:]
    old += [path for path in newest if path.name.startswith(".") and time.time() - path.stat().st_mtime > _ABANDONED]
    for path in old:
        shutil.rmtree(path, ignore_errors=True)


def _touch(folder: Path) -> None:
    with suppress(OSError):  # a dataset that can't be written to can still be read
        os.utime(folder)


def _to_arrow(rows: Ragged) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(rows.offsets, pa.int32()), pa.array(rows.values, pa.int32()))


def _from_arrow(column: pa.ChunkedArray) -> Ragged:
    return Ragged.join([_ragged(chunk) for chunk in column.chunks])


def _ragged(lists: pa.ListArray) -> Ragged:
    lengths = lists.value_lengths().to_numpy().astype(np.int64)
    return Ragged(lists.flatten().to_numpy(), np.concatenate([np.zeros(1, np.int64), lengths.cumsum()]))
