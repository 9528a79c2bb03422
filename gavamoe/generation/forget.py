"""Taking a user out of a trained run: what is this user's alone is removed, what was learned from everybody stays.

Removed: the id, the features and their counts (catalog, `pair_features`), all the user's pairs (routes), the reviews
that prompts might quote (`quotes`), the rows
written for the user (evaluation), the report, and the user's row in every table of users, which becomes the unknown
user's. Staying: the weights that all users share, as the user's reviews shaped them among all others', the counts and
scores of everybody, hashes of the user's texts as nobody's, by which a service goes on withholding them
(`authorship`), and the dataset, which is prepared again with `--drop-users`.

Such a run is served and explains; it is not evaluated or resumed on its dataset any more, whose rows it lacks.
"""

import json
import os
import shutil
import struct
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gavamoe.artifacts.checksums import list_files
from gavamoe.artifacts.files import write_file, write_folder, write_json
from gavamoe.artifacts.manifest import MANIFEST, Kind, Manifest, read_manifest
from gavamoe.artifacts.run import Run
from gavamoe.data.catalog import Catalog
from gavamoe.errors import InputError, did_you_mean
from gavamoe.generation.artifact import CATALOG_FOLDER
from gavamoe.generation.authorship import AUTHORS_FILE, SingleAuthors
from gavamoe.generation.evidence.pair_features import FEATURES_FILE
from gavamoe.generation.evidence.quotes import QUOTES_FILE
from gavamoe.model.tables.row_files import table_files
from gavamoe.stage1.artifact import layout_of
from gavamoe.stage1.routes import ROUTES_FILE

USER_TABLES = ("user_embedding.weight", "user_bias")
"""Parameters with a row for each user, the unknown one's last."""
_NO_REPORT = """<!doctype html>
<meta charset="utf-8"><title>Report removed</title>
<p>This report showed reviews of a user whom the run has forgotten. <code>gavamoe report RUN</code> writes it again.</p>
"""
_MAX_HEADER_BYTES = 100 * 2**20
_FLOAT_BYTES = 4


class Forgotten(NamedTuple):
    """What `forget_users` took out of a run."""

    users: int
    pairs: int
    """Rows of stage 1's routes."""
    texts: int
    """Rows of the evaluation."""
    tables: int
    """Tables of users in which their rows were replaced."""


def forget_users(run: Run, users: Sequence[str]) -> Forgotten:
    """Take users out of a run's artifacts. All new folders are written before the first old one is replaced.

    Raises:
        InputError: the run has no finished stage 2, hashed tables, whose rows are nobody's own, checkpoints that hold
            the users' rows, or a user it doesn't know.
    """
    if run.checkpoints("stage1").is_dir() and any((run.path / "checkpoints").glob("*/*")):
        raise InputError(f"{run.path / 'checkpoints'}: checkpoints hold users' rows too; finish the run or remove them")
    catalog = Catalog.load(run.stage2 / CATALOG_FOLDER)
    _refuse_hashed(run.stage2)
    indices = [_index(catalog, user) for user in users]
    counts = dict.fromkeys(("pairs", "texts", "tables"), 0)
    fingerprints: dict[str, str] = {}
    kinds: list[Kind] = ["stage1", "stage2", "evaluation"]
    with ExitStack() as replacing:  # on the way out all folders take their places
        for kind in kinds:
            folder = run.path / kind
            if not folder.is_dir():
                continue
            manifest = read_manifest(folder, kind)
            aside = replacing.enter_context(write_folder(folder, replace=True))
            shutil.copytree(folder, aside, dirs_exist_ok=True)
            counts["tables"] += _blank_mapped(aside, indices)
            for path in sorted(aside.rglob("*")):
                if path.suffix == ".safetensors":
                    counts["tables"] += _blank_rows(path, indices)
                elif path.name == ROUTES_FILE:
                    dropped = _drop_rows(path, indices)
                    counts["pairs"] += dropped if kind == "stage1" else 0
                elif kind == "evaluation" and path.suffix == ".parquet":
                    dropped = _drop_rows(path, users)
                    counts["texts"] += dropped if path.name.startswith("generations") else 0
                elif path.parent.name == CATALOG_FOLDER and path.name == "users.parquet":
                    _blank_users(path, indices)
                elif path.name == FEATURES_FILE:
                    _drop_features(path, indices)
                elif path.name == QUOTES_FILE:
                    _drop_rows(path, indices)
                elif path.name == AUTHORS_FILE:
                    SingleAuthors.load(aside).without(indices).save(aside)
            fingerprints[kind] = _describe(aside, manifest, fingerprints, len(users))
    shutil.rmtree(run.texts_under_way, ignore_errors=True)
    if run.report.is_file():  # replaced, not deleted: at a URI a file that is missing here would stay as it was
        with write_file(run.report) as aside:
            aside.write_text(_NO_REPORT, encoding="utf-8")
    return Forgotten(len(users), **counts)


def _refuse_hashed(stage2: Path) -> None:
    if layout_of(stage2).kind == "hashed":
        raise InputError(
            f"{stage2}: stage1.tables is hashed: users share the rows that their vectors are sums of, so none can be"
            " taken out without changing others; prepare the data with --drop-users and train again"
        )


def _index(catalog: Catalog, user: str) -> int:
    index = catalog.user_index(user)
    if index is None:
        known = [catalog.user_id(at) for at in range(min(catalog.n_users, 10_000))]
        raise InputError(f"--user {user}: the run knows no such user{did_you_mean(user, known, 0.8)}")
    return index


def _drop_rows(path: Path, users: Sequence[int] | Sequence[str]) -> int:
    """Rewrite a table without the rows of some users, group by group; returns how many there were."""
    dropped = 0
    aside = path.with_name(f".{path.name}.partial")
    with pq.ParquetFile(path) as file:
        kind = file.schema_arrow.field("user").type
        gone = pa.array(list(users), kind)
        with pq.ParquetWriter(aside, file.schema_arrow, compression="zstd") as writer:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                kept = table.filter(pc.invert(pc.is_in(table["user"], value_set=gone)))
                dropped += len(table) - len(kept)
                writer.write_table(kept)
    os.replace(aside, path)
    return dropped


def _drop_features(path: Path, indices: Sequence[int]) -> None:
    """Rewrite the counts of features without the users' own."""
    table = pq.read_table(path)
    theirs = pc.and_(pc.equal(table["of"], "user"), pc.is_in(table["index"], value_set=pa.array(indices, pa.int32())))
    pq.write_table(table.filter(pc.invert(theirs)), path, compression="zstd")


def _blank_users(path: Path, indices: Sequence[int]) -> None:
    """Give users' rows of the catalog ids that nobody has, and nothing else."""
    table = pq.read_table(path)
    columns = table.to_pydict()
    for index in indices:
        columns["id"][index] = f"forgotten {os.urandom(8).hex()}"
        columns["count"][index], columns["features"][index] = 0, []
    pq.write_table(pa.table(columns, schema=table.schema), path)


def _blank_rows(path: Path, indices: Sequence[int]) -> int:
    """Overwrite users' rows of the tables in a safetensors file with the unknown user's, which is the last; in place,
    since a model's file may be larger than memory. Returns how many tables there were."""
    with path.open("r+b") as file:
        header = _header(file)
        data = file.tell()
        tables = [header[name] for name in USER_TABLES if name in header]
        for table in tables:
            rows = table["shape"][0]
            start, end = table["data_offsets"]
            size = (end - start) // rows
            first = data + start
            file.seek(first + (rows - 1) * size)
            unknown = file.read(size)
            for index in np.unique(indices).tolist():
                if index < rows - 1:  # users without training rows have no row of their own
                    file.seek(first + index * size)
                    file.write(unknown)
    return len(tables)


def _blank_mapped(folder: Path, indices: Sequence[int]) -> int:
    """The same for a sharded table, whose rows are in several files; returns how many there were, 0 or 1."""
    paths = table_files(folder, "user_embedding")
    unknown, last = b"", 0
    for path in reversed(paths):
        with path.open("r+b") as file:
            header = _header(file)
            data, first = file.tell(), int(header["__metadata__"]["first_row"])
            rows, size = header["weight"]["shape"]
            size *= _FLOAT_BYTES
            if not unknown:  # the last row of the last file
                last = first + rows - 1
                file.seek(data + (rows - 1) * size)
                unknown = file.read(size)
            for index in np.unique(indices).tolist():
                if first <= index < min(first + rows, last):
                    file.seek(data + (index - first) * size)
                    file.write(unknown)
    return min(len(paths), 1)


def _header(file: BinaryIO) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file; leaves the file at the first byte of its data."""
    (length,) = struct.unpack("<Q", file.read(8))
    if length > _MAX_HEADER_BYTES:
        raise InputError(f"{file.name}: not a safetensors file")
    header: dict[str, dict[str, Any]] = json.loads(file.read(length))
    return header


def _describe(folder: Path, manifest: Manifest, fingerprints: dict[str, str], users: int) -> str:
    """Write the manifest of the changed content: new hashes, and those of what it was made from; returns its own."""
    details = manifest.details | {"forgotten_users": int(manifest.details.get("forgotten_users", 0)) + users}
    inputs = {name: fingerprints.get(name, value) for name, value in manifest.inputs.items()}
    (folder / MANIFEST).unlink()
    changed = manifest.model_copy(update={"files": list_files(folder), "details": details, "inputs": inputs})
    write_json(folder / MANIFEST, changed.model_dump(mode="json"))
    return changed.fingerprint
