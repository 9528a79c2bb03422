"""A prepared dataset: the folder that `data prepare` and `data synthesize` write and every later step reads.

meta.json                     DatasetMeta: counts, rating scale, seed, source, fingerprint
users.parquet items.parquet   the Catalog: index, raw id, title, training rows, usual features
train|valid|test.parquet      user int32, item int32, rating float32 or null, text, features list<string>
truth.json truth_users.parquet   only synthetic data: what was planted
rejected.jsonl                rejected rows, with the reason
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from gavamoe.artifacts.files import read_json
from gavamoe.artifacts.run import Run
from gavamoe.data.catalog import Catalog, check_parquet, read_table
from gavamoe.errors import InputError, validated

SCHEMA_VERSION = 1
SPLITS = ("train", "valid", "test")
DATA_FILES = ("users.parquet", "items.parquet", "train.parquet", "valid.parquet", "test.parquet")
ROW_GROUP_ROWS = 65_536
MAX_SCALE_VALUES = 20
_PAIR_COLUMNS = ("user", "item", "rating")

ROWS_SCHEMA = pa.schema(
    [
        ("user", pa.int32()),
        ("item", pa.int32()),
        ("rating", pa.float32()),
        ("text", pa.string()),
        ("features", pa.list_(pa.string())),
    ]
)
TRUTH_SCHEMA = pa.schema([("user", pa.int32()), ("group", pa.int32())])


class DatasetMeta(BaseModel):
    """Content of `meta.json`. Nothing in it depends on when or where the dataset was made."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    schema_version: int
    """Version of the dataset folder's format."""
    source: str
    """Name of the source file or folder, or "synthetic"."""
    format: str
    """Format of the source."""
    text_mode: str
    """How texts were chosen. explanation: as they came; review: the sentence that has a feature; none: there are
    none."""
    sentence: str | None = None
    """Rule that chose each review's sentence as its explanation. best: the one that scores highest; frequent: the one
    with the most frequent feature; None: none was chosen, or, in datasets of earlier versions, frequent."""
    seed: int
    """Seed of the split, or of the synthetic data."""
    split: str
    """Ratio of the splits, such as "8:1:1", or the name of the folder of index files."""
    users: int
    """Number of users."""
    items: int
    """Number of items."""
    known_users: int
    """Number of users with a training row."""
    known_items: int
    """Number of items with a training row."""
    rows: dict[str, int]
    """Number of rows by split."""
    implicit: bool
    """Whether there are no ratings, so that a row means that the user chose the item."""
    rating_values: tuple[float, ...] | None
    """All ratings of a finite scale, ascending; None where ratings are continuous or absent."""
    rating_range: tuple[float, float] | None
    """Lowest and highest rating; None without ratings."""
    preparation: dict[str, int]
    """Number of the source's rows by what became of them."""
    files: dict[str, str]
    """SHA-256 of each data file."""
    fingerprint: str
    """SHA-256 over the data files' names and hashes."""


class PairArrays(NamedTuple):
    """The pairs of one split."""

    user: np.ndarray
    """User indices: int32 (N,)."""
    item: np.ndarray
    """Item indices: int32 (N,)."""
    rating: np.ndarray
    """Ratings, NaN where there is none: float32 (N,)."""


@dataclass(frozen=True)
class Truth:
    """What the synthetic generator planted."""

    group: np.ndarray
    """int32 (U,): each user's group, by user index."""
    groups: int
    seed: int
    gap: float
    noise: float
    """Standard deviation of the rating noise before rounding and clipping."""
    noise_floor_rmse: float
    """RMSE of the expected rating given group, genre and offsets, over all ratings."""
    oracle_rmse: float
    """The same over the test split: no model can do better but by luck."""
    bias_rmse: float
    """RMSE on the test split of a user + item bias model fitted to the training split."""
    sentiment_words: dict[str, list[str]]
    """positive, neutral, negative: disjoint word lists that the explanations draw on."""


class Dataset:
    """A dataset folder opened for reading. Made by `open_dataset`."""

    def __init__(self, path: Path, meta: DatasetMeta, catalog: Catalog) -> None:
        self.path = path
        self.meta = meta
        self.catalog = catalog
        self.fingerprint = meta.fingerprint
        self.implicit = meta.implicit
        self.rating_values = meta.rating_values
        """The finite rating scale in rising order; None when ratings are continuous or absent."""
        self.rating_range = meta.rating_range

    def size(self, split: str) -> int:
        """Rows of `split`."""
        self._file(split)
        return self.meta.rows[split]

    def table(self, split: str, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of `split`, all columns or the named ones."""
        return read_table(self._file(split), ROWS_SCHEMA, list(columns) if columns is not None else None)

    def batches(
        self, split: str, columns: Sequence[str] | None = None, size: int = ROW_GROUP_ROWS
    ) -> Iterator[pa.RecordBatch]:
        """The rows of `split` in file order, at most `size` at a time, without holding the file in memory."""
        wanted = list(columns) if columns is not None else None
        with pq.ParquetFile(self._file(split)) as file:
            for group in range(file.num_row_groups):  # iter_batches keeps 7 bytes a row until its end
                yield from file.read_row_group(group, wanted).to_batches(max_chunksize=size)

    def arrays(self, split: str) -> PairArrays:
        """Users, items and ratings of `split` as numpy arrays.

        Raises:
            InputError: the split's file is damaged or names users or items that the catalog lacks.
        """
        return self._pair_arrays(split, self.table(split, _PAIR_COLUMNS))

    def pairs(self, split: str, size: int = ROW_GROUP_ROWS) -> Iterator[PairArrays]:
        """`arrays`, at most `size` rows at a time, without holding the split in memory; raises like it."""
        try:
            for batch in self.batches(split, _PAIR_COLUMNS, size):
                yield self._pair_arrays(split, pa.Table.from_batches([batch]))
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{self._file(split)}: damaged ({error}); prepare the dataset again") from error

    def _pair_arrays(self, split: str, table: pa.Table) -> PairArrays:
        user, item = (table[name].to_numpy() for name in ("user", "item"))
        for name, index, count in (("user", user, self.catalog.n_users), ("item", item, self.catalog.n_items)):
            if len(index) and not (index.min() >= 0 and index.max() < count):
                raise InputError(f"{self._file(split)}: a {name} index outside 0..{count - 1}; prepare it again")
        rating = table["rating"].to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
        return PairArrays(user, item, rating)

    def truth(self) -> Truth | None:
        """The planted truth of a synthetic dataset; None for any other."""
        path = self.path / "truth.json"
        if not path.exists():
            return None
        group = read_table(self.path / "truth_users.parquet", TRUTH_SCHEMA)["group"].to_numpy()
        try:
            return Truth(group=group, **read_json(path))
        except TypeError as error:
            raise InputError(f"{path}: damaged ({error}); synthesize the dataset again") from error

    def _file(self, split: str) -> Path:
        if split not in SPLITS:
            raise InputError(f"split: unknown value {split!r}; known are {', '.join(SPLITS)}")
        return self.path / f"{split}.parquet"


def open_dataset(path: Path) -> Dataset:
    """Open the dataset folder `path`.

    Raises:
        InputError: it is missing, not a dataset, of a newer schema version, or damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: no such dataset folder; make one with `gavamoe data prepare` or `data synthesize`")
    if not (path / "meta.json").exists():
        raise InputError(f"{path}: not a dataset (no meta.json); make one with `gavamoe data prepare`")
    meta = _read_meta(path / "meta.json")
    for split in SPLITS:
        rows = check_parquet(path / f"{split}.parquet", ROWS_SCHEMA)
        if rows != meta.rows.get(split):
            raise InputError(f"{path}: {split}.parquet has {rows} rows, meta.json says {meta.rows.get(split)}")
    catalog = Catalog(path, meta.known_users, meta.known_items)
    if (catalog.n_users, catalog.n_items) != (meta.users, meta.items):
        raise InputError(
            f"{path}: {catalog.n_users} users and {catalog.n_items} items, meta.json says {meta.users} and {meta.items}"
        )
    return Dataset(path, meta, catalog)


def dataset_of_run(run: Run, moved_to: Path | None = None) -> Dataset:
    """Open the dataset that a run was trained on.

    Args:
        moved_to: where it lies now, if that is not where the run was started with it, or is a URI.

    Raises:
        InputError: it is not there, damaged, or not the one of the run; or it is a URI and `moved_to` is missing.
    """
    dataset = open_dataset(run.dataset if moved_to is None else Path(moved_to))
    recorded = run.reference.fingerprint
    if dataset.fingerprint != recorded:
        raise InputError(
            f"{dataset.path}: not the dataset of {run.path} (fingerprint {dataset.fingerprint[:12]}, the run has"
            f" {recorded[:12]}); name the right one with --dataset"
        )
    return dataset


def fingerprint(files: dict[str, str]) -> str:
    """SHA-256 over the data files' names and hashes."""
    lines = json.dumps(sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _read_meta(path: Path) -> DatasetMeta:
    value: Any = read_json(path)
    version = value.get("schema_version") if isinstance(value, dict) else None
    if not isinstance(version, int):
        raise InputError(f"{path}: not a dataset's meta.json (no schema_version)")
    if version > SCHEMA_VERSION:
        raise InputError(
            f"{path}: schema version {version} is newer than {SCHEMA_VERSION}, the newest that this gavamoe reads; "
            "upgrade gavamoe or prepare the dataset again"
        )
    return validated(DatasetMeta, value, path, "a usable dataset (prepare it again)")
