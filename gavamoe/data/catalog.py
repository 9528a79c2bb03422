"""The users and items of a dataset: raw id <-> index, titles, the features each is usually praised or blamed for.

A catalog is part of a dataset folder and of a stage-2 artifact, so that a trained model serves raw ids on its own.
Known users (with at least one training row) hold the indices 0..known_users-1, the others follow; items likewise.
Models clamp any index >= known_users to their unknown-id row, so indices may be passed as they are.
"""

import functools
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gavamoe.artifacts.files import read_json, write_json
from gavamoe.errors import InputError

MAX_USUAL_FEATURES = 10

USERS_SCHEMA = pa.schema(
    [("index", pa.int32()), ("id", pa.string()), ("count", pa.int32()), ("features", pa.list_(pa.string()))]
)
ITEMS_SCHEMA = pa.schema(
    [
        ("index", pa.int32()),
        ("id", pa.string()),
        ("title", pa.string()),
        ("count", pa.int32()),
        ("features", pa.list_(pa.string())),
    ]
)


class Catalog:
    """Users and items by raw id and by index."""

    def __init__(self, folder: Path, known_users: int, known_items: int) -> None:
        """Read `users.parquet` and `items.parquet` of `folder`.

        Raises:
            InputError: a file is missing, damaged, or has fewer rows than the number of known users or items.
        """
        self._folder = Path(folder)
        self._users = read_table(self._folder / "users.parquet", USERS_SCHEMA)
        self._items = read_table(self._folder / "items.parquet", ITEMS_SCHEMA)
        self.known_users = known_users
        self.known_items = known_items
        self.n_users: int = self._users.num_rows
        self.n_items: int = self._items.num_rows
        for name, known, rows in (("users", known_users, self.n_users), ("items", known_items, self.n_items)):
            if not 0 <= known <= rows:
                raise InputError(f"{self._folder}: says {known} known {name}, but {name}.parquet has {rows} rows")

    def user_index(self, raw: str) -> int | None:
        """Index of the user with this raw id; None when the dataset never saw it."""
        return self._user_index.get(raw)

    def item_index(self, raw: str) -> int | None:
        """Index of the item with this raw id; None when the dataset never saw it."""
        return self._item_index.get(raw)

    def user_or_unknown(self, raw: str) -> int:
        """Index of the user with this raw id; `n_users`, which stands for the unknown user, if there is none."""
        return self._user_index.get(raw, self.n_users)

    def item_or_unknown(self, raw: str) -> int:
        """Index of the item with this raw id; `n_items`, which stands for the unknown item, if there is none."""
        return self._item_index.get(raw, self.n_items)

    def user_id(self, index: int) -> str:
        """Raw id of the user at `index`; IndexError outside 0..n_users-1."""
        return str(self._users["id"][index].as_py())

    def item_id(self, index: int) -> str:
        """Raw id of the item at `index`; IndexError outside 0..n_items-1."""
        return str(self._items["id"][index].as_py())

    def item_title(self, index: int) -> str | None:
        """Title of the item at `index`, None where there is none (as for an index outside 0..n_items-1)."""
        if not 0 <= index < self.n_items:
            return None
        title: str | None = self._items["title"][index].as_py()
        return title

    def training_rows(self) -> np.ndarray:
        """Training rows of each known user: int64 (known_users,)."""
        return self._users["count"].to_numpy()[: self.known_users].astype(np.int64)

    def item_features(self) -> pa.ListArray:
        """The usual features of every item, by index: list<string> (n_items,)."""
        column = self._items["features"].combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
        return column

    def usual_features(self, user: int | None, item: int | None, k: int) -> tuple[str, ...]:
        """At most `k` features for a pair whose features are not given.

        The item's most used training features, those that the user uses too first; without any, the
        user's own; without those, none. None and indices outside the catalog count as unknown.
        """
        of_user = _features_at(self._users, user)
        of_item = _features_at(self._items, item)
        if not of_item:
            return of_user[:k]
        shared = [feature for feature in of_item if feature in of_user]
        return tuple(shared + [feature for feature in of_item if feature not in of_user])[:k]

    def save(self, folder: Path) -> None:
        """Copy the two tables into the existing or new `folder`, beside `catalog.json` with the known counts."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("users.parquet", "items.parquet"):
            shutil.copyfile(self._folder / name, folder / name)
        write_json(folder / "catalog.json", {"known_users": self.known_users, "known_items": self.known_items})

    @classmethod
    def load(cls, folder: Path) -> "Catalog":
        """Read the catalog that `save` wrote into `folder`."""
        folder = Path(folder)
        known = read_json(folder / "catalog.json")
        try:
            return cls(folder, int(known["known_users"]), int(known["known_items"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{folder / 'catalog.json'}: known_users and known_items must be whole numbers") from error

    @functools.cached_property
    def _user_index(self) -> dict[str, int]:
        return {raw: index for index, raw in enumerate(self._users["id"].to_pylist())}

    @functools.cached_property
    def _item_index(self) -> dict[str, int]:
        return {raw: index for index, raw in enumerate(self._items["id"].to_pylist())}


def read_table(path: Path, schema: pa.Schema, columns: list[str] | None = None) -> pa.Table:
    """Read a Parquet file whose schema must be `schema`.

    Raises:
        InputError: the file is missing, not Parquet, or has other columns.
    """
    check_parquet(path, schema)
    try:
        return pq.read_table(path, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: damaged ({_first_line(error)}); prepare the dataset again") from error


def check_parquet(path: Path, schema: pa.Schema) -> int:
    """Check a Parquet file's schema by its footer alone and return its number of rows; raises like `read_table`."""
    try:
        footer = pq.read_metadata(path)
        actual = footer.schema.to_arrow_schema()
    except FileNotFoundError as error:
        raise InputError(f"{path}: missing; prepare the dataset again") from error
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: damaged ({_first_line(error)}); prepare the dataset again") from error
    # names and types only: Parquet renames the inner field of a list
    if [(f.name, _kind(f.type)) for f in actual] != [(f.name, _kind(f.type)) for f in schema]:
        raise InputError(f"{path}: has the columns {actual.names}, not {schema.names}; prepare the dataset again")
    return int(footer.num_rows)


def _kind(kind: pa.DataType) -> str:
    return f"list<{kind.value_type}>" if pa.types.is_list(kind) else str(kind)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _features_at(table: pa.Table, index: int | None) -> tuple[str, ...]:
    if index is None or not 0 <= index < table.num_rows:
        return ()
    return tuple(table["features"][index].as_py() or ())
