"""Training texts that exactly one user wrote, as hashes: by them a service withholds a text that repeats another user's
words, and evaluation counts how often that happens.

`single_author_texts.parquet` in a stage-2 artifact has a row for each such text: the hash of its words and the user's
index, in the order of the hashes. It tells nobody a text, but who has a text can tell whether it is in there. Users
taken out by `forget` become NOBODY: their texts stay withheld, from everyone.
"""

import hashlib
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gavamoe.artifacts.files import write_file
from gavamoe.errors import InputError, one_line

AUTHORS_FILE = "single_author_texts.parquet"
NOBODY = -1
"""The author of texts whose user was taken out of the run."""

_SCHEMA = pa.schema([("words", pa.uint64()), ("user", pa.int32())])
_WORD = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    """The words of a text in order: case, punctuation, white space and ways to encode a character don't count."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def hash_of(words: Iterable[str]) -> int:
    """A 64-bit hash of words in order: among a million texts two share one with a probability below 1e-7."""
    return int.from_bytes(hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest(), "little")


class SingleAuthors:
    """An index over M texts that were written by exactly one user each."""

    def __init__(self, hashes: np.ndarray, users: np.ndarray) -> None:
        """`hashes`: uint64 (M,), ascending without repetition. `users`: int32 (M,), the index of each text's author."""
        self._hashes, self._users = hashes, users

    def __len__(self) -> int:
        return len(self._hashes)

    @classmethod
    def of_texts(cls, texts: Iterable[str], users: Iterable[int]) -> "SingleAuthors":
        """The index of N texts and the users who wrote them; a text without words is nobody's."""
        pairs = ((hash_of(words), user) for text, user in zip(texts, users, strict=True) if (words := words_of(text)))
        columns = np.fromiter(pairs, dtype=[("words", np.uint64), ("user", np.int32)])
        written = np.unique(columns)  # each author of a text once
        _, first, authors = np.unique(written["words"], return_index=True, return_counts=True)
        alone = written[first[authors == 1]]
        return cls(alone["words"].copy(), alone["user"].copy())

    @classmethod
    def load(cls, folder: Path) -> "SingleAuthors":
        """Read a stage-2 artifact's.

        Raises:
            InputError: the artifact has none, as those written before this index existed, or a damaged one.
        """
        path = Path(folder) / AUTHORS_FILE
        if not path.is_file():
            raise InputError(
                f"{path}: missing, so nothing is known of who wrote the training texts (the run is older than that):"
                " train it again, or serve it with withhold.single_author false"
            )
        try:
            table = pq.read_table(path, schema=_SCHEMA)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path}: can't be read ({one_line(error)})") from error
        hashes, users = (table[name].to_numpy() for name in _SCHEMA.names)
        if table.num_rows > 1 and not (hashes[1:] > hashes[:-1]).all():
            raise InputError(f"{path}: its hashes are not in ascending order; the artifact is damaged")
        return cls(hashes, users)

    def save(self, folder: Path) -> None:
        """Write the artifact's file."""
        with write_file(Path(folder) / AUTHORS_FILE) as path:
            pq.write_table(pa.table([self._hashes, self._users], schema=_SCHEMA), path, compression="zstd")

    def without(self, users: Iterable[int]) -> "SingleAuthors":
        """The same with NOBODY in place of some users."""
        gone = np.isin(self._users, np.fromiter(users, dtype=np.int64))
        return SingleAuthors(self._hashes, np.where(gone, NOBODY, self._users).astype(np.int32))

    def another_wrote(self, text: str, user: int, least_words: int = 1) -> bool:
        """Whether a text of at least `least_words` words is, word for word, one that a single user other than `user`
        wrote; `user` may be the index of an unknown one."""
        words = words_of(text)
        if len(words) < max(least_words, 1):
            return False
        wanted = np.uint64(hash_of(words))
        place = int(np.searchsorted(self._hashes, wanted))
        found = place < len(self._hashes) and self._hashes[place] == wanted
        return bool(found and self._users[place] != user)
