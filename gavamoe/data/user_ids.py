"""What becomes of users' ids when a dataset is prepared: some users are left out, or all ids are replaced by hashes.

For requests to be forgotten, and for datasets that shall name nobody. With either, `rejected.jsonl` keeps row numbers
and reasons only, since a rejected row holds what its user wrote.
"""

import hashlib
import hmac
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gavamoe.data.readers.batches import RawBatch
from gavamoe.data.text.cleaning import clean_id
from gavamoe.errors import InputError

MAX_IDS_BYTES = 2**30
MAX_KEY_BYTES = 4096
MIN_KEY_CHARS = 16
HASH_CHARS = 32
"""Hex digits of a hashed id: 128 bits, by which no two of 10^9 users meet."""


class UserIds:
    """What is done with the users of a source's rows.

    Args:
        dropped: ids of users whose rows are left out.
        key: secret by which ids are hashed; None: they stay.
    """

    def __init__(self, dropped: Collection[str] = (), key: bytes | None = None) -> None:
        self._dropped = pa.array(sorted(dropped), pa.string())
        self._key = key
        self._hashes: dict[str, str] = {}
        self._found = np.zeros(len(self._dropped), dtype=bool)
        self.rows_dropped = 0
        """Rows left out so far."""

    @property
    def active(self) -> bool:
        """Whether anything is done at all."""
        return len(self._dropped) > 0 or self._key is not None

    @property
    def not_found(self) -> int:
        """Ids to leave out that no row has had so far."""
        return int((~self._found).sum())

    def apply(self, batch: RawBatch) -> tuple[RawBatch, np.ndarray]:
        """The batch without the rows of dropped users, with hashed ids, and without the text of rejected rows.

        Returns:
            the batch and, of each row that was left out, the place of its user among the dropped ones, which
            `count` takes: int64.
        """
        if not self.active:
            return batch, np.empty(0, dtype=np.int64)
        broken = [rejection._replace(raw="") for rejection in batch.broken]
        ids, *_ = clean_id(batch.columns["user"]) if len(batch.row) else (pa.array([], pa.string()),)
        places = pc.index_in(ids, value_set=self._dropped).to_numpy(zero_copy_only=False)
        kept = np.isnan(places.astype(float))
        mask = pa.array(kept)
        columns = {name: column.filter(mask) for name, column in batch.columns.items()}
        if self._key is not None and len(batch.row):
            columns["user"] = self._hashed(ids.filter(mask))
        left = RawBatch(batch.row[kept], columns, lambda index: "", broken, batch.notes)
        return left, places[~kept].astype(np.int64)

    def count(self, places: np.ndarray) -> None:
        """Count rows that `apply`, perhaps in another process, has left out."""
        self._found[places] = True
        self.rows_dropped += len(places)

    def _hashed(self, ids: pa.Array) -> pa.Array:
        assert self._key is not None
        encoded = ids.dictionary_encode()
        for value in encoded.dictionary.to_pylist():
            if value and value not in self._hashes:  # a missing id stays missing
                self._hashes[value] = hash_id(value, self._key)
        known = [self._hashes.get(value, value) for value in encoded.dictionary.to_pylist()]
        return pa.array(known, pa.string()).take(encoded.indices)


def hash_id(user: str, key: bytes) -> str:
    """The hash of an id: HMAC-SHA256 with the key, 32 hex digits. Without the key it can't be found by trying ids."""
    return hmac.new(key, user.strip().encode(), hashlib.sha256).hexdigest()[:HASH_CHARS]


def read_ids(path: Path) -> frozenset[str]:
    """The ids in a file, one a line.

    Raises:
        InputError: the file is missing, too large, not UTF-8, or empty.
    """
    ids = frozenset(line.strip() for line in _read(path, MAX_IDS_BYTES).splitlines()) - {""}
    if not ids:
        raise InputError(f"{path}: names no user; expected an id a line")
    return ids


def read_hash_key(path: Path) -> bytes:
    """The secret in a file, without the line end.

    Raises:
        InputError: the file is missing, too large, not UTF-8, or the secret is too short to withstand guessing.
    """
    key = _read(path, MAX_KEY_BYTES).strip()
    if len(key) < MIN_KEY_CHARS:
        raise InputError(f"{path}: {len(key)} characters of at least {MIN_KEY_CHARS}; try openssl rand -hex 32")
    return key.encode()


def _read(path: Path, most: int) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise InputError(f"{path}: more than the {most} bytes that such a file may have")
        return data.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from error
