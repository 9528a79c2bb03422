"""The pairs that stage 1 reads: every epoch's order, sampled negatives and hidden ids, as functions of the seed.

The pairs are never in memory all at once. They stream from the dataset's files into buckets on disk, a random one for
each pair; a bucket is shuffled when it is read. That is a uniformly random order of all pairs, of which one bucket is
in memory (Rao 1961). Data that fit one bucket, about a million pairs, stay in memory throughout.

Nothing here depends on how many workers there are: they cut the same global batches into slices.
"""

import functools
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from gavamoe.data.dataset import Dataset, PairArrays
from gavamoe.errors import InputError, RunError

BUCKET_PAIRS = 2**20
"""Pairs of a bucket, on average."""
MAX_BUCKETS = 128
"""Number of buckets at most, each an open file; more data make larger buckets."""
_MEMORY_BYTES = 2**24
"""Bytes at most that all buckets of one kind keep in memory before they go to disk."""

_NEGATIVE_ROUNDS = 30
"""Rounds in which negatives that were observed are drawn again; a user who has seen nearly everything gets fewer."""

_PIECE = 2**20
"""Ids that are hidden at a time, since the random draws take twice their memory."""

_ORDER, _NEGATIVES, _HIDDEN, _HELD_OUT, _BUCKETS = range(5)  # one random stream each


class Pairs(NamedTuple):
    """N user-item pairs with their ratings."""

    user: np.ndarray
    """User indices: (N,) int32."""
    item: np.ndarray
    """Item indices: (N,) int32."""
    rating: np.ndarray
    """Ratings, for implicit data 1 for observed and 0 for sampled pairs: (N,) float32."""

    def take(self, rows: np.ndarray | slice) -> "Pairs":
        """The pairs of some rows."""
        return Pairs(self.user[rows], self.item[rows], self.rating[rows])

    @property
    def size(self) -> int:
        """N: number of pairs."""
        return len(self.user)

    @classmethod
    def join(cls, parts: Sequence["Pairs"]) -> "Pairs":
        """All pairs of one or more, in order."""
        return parts[0] if len(parts) == 1 else cls(*(np.concatenate(column) for column in zip(*parts, strict=True)))


class PairFile:
    """N pairs in a temporary file, which goes to disk only when it grows beyond `memory` bytes."""

    _RECORD = np.dtype([("user", np.int32), ("item", np.int32), ("rating", np.float32)])

    def __init__(self, memory: int = _MEMORY_BYTES) -> None:
        self.size = 0
        self._file = tempfile.SpooledTemporaryFile(max_size=memory)  # noqa: SIM115  # lives as long as this object

    def append(self, pairs: Pairs) -> None:
        """Add pairs at the end.

        Raises:
            RunError: no room in the folder of temporary files.
        """
        records = np.empty(pairs.size, self._RECORD)
        for name, column in pairs._asdict().items():
            records[name] = column
        try:
            self._file.seek(0, 2)
            self._file.write(records.tobytes())
        except OSError as error:
            raise RunError(
                f"{tempfile.gettempdir()}: {error.strerror}; stage 1 keeps {self._RECORD.itemsize} bytes a pair there:"
                " make room or set TMPDIR"
            ) from error
        self.size += pairs.size

    def take(self, rows: slice) -> Pairs:
        """The pairs of consecutive rows; those beyond the end are left out."""
        start, stop, _ = rows.indices(self.size)
        self._file.seek(start * self._RECORD.itemsize)
        records = np.frombuffer(self._file.read(max(stop - start, 0) * self._RECORD.itemsize), self._RECORD)
        return Pairs(*(records[name].copy() for name in self._RECORD.names or ()))

    def all(self) -> Pairs:
        """All pairs, in memory."""
        return self.take(slice(0, self.size))


class Epoch:
    """The N pairs of one training epoch in their order."""

    def __init__(self, buckets: Sequence[PairFile], arrange: Callable[[int, Pairs], Pairs]) -> None:
        self._buckets, self._arrange = buckets, arrange
        self._starts = [0, *itertools.accumulate(bucket.size for bucket in buckets)]
        self._loaded: tuple[int, Pairs] | None = None
        self.size = self._starts[-1]
        """N: number of pairs."""

    def take(self, rows: slice) -> Pairs:
        """The pairs of consecutive rows; quickest in rising order, for the last bucket read is kept."""
        start, stop, _ = rows.indices(self.size)
        parts = []
        for index, (first, end) in enumerate(itertools.pairwise(self._starts)):
            if max(first, start) < min(end, stop):
                parts.append(self._bucket(index).take(slice(max(first, start) - first, min(end, stop) - first)))
        return Pairs.join(parts) if parts else self._buckets[0].take(slice(0, 0))

    def _bucket(self, index: int) -> Pairs:
        if self._loaded is None or self._loaded[0] != index:
            self._loaded = None  # before the next one is made, not after
            self._loaded = (index, self._arrange(index, self._buckets[index].all()))
        return self._loaded[1]


class PairSource:
    """Training epochs and held-out pairs of a dataset.

    Args:
        negatives: sampled unobserved items per observed pair; used only for implicit data.
        unknown_rate: share of users, and of items, hidden behind the unknown id in training.

    Raises:
        InputError: the training split is empty.
    """

    def __init__(self, dataset: Dataset, *, negatives: int, unknown_rate: float, seed: int) -> None:
        self._dataset = dataset
        self._negatives = negatives if dataset.implicit else 0
        self._unknown_rate = unknown_rate
        self._seed = seed
        self._known = (dataset.catalog.known_users, dataset.catalog.known_items)
        self.size = dataset.size("train")
        """Observed training pairs."""
        if not self.size:
            raise InputError(
                f"{dataset.path}: the training split is empty; prepare the data with a larger share for it"
            )
        self._count = min(-(-self.size * (1 + self._negatives) // BUCKET_PAIRS), MAX_BUCKETS)
        self._by_user = self._split_by_user("train") if self._negatives else None

    def epoch(self, epoch: int) -> Epoch:
        """All pairs of one training epoch in their order: a function of (seed, epoch)."""
        # Two steps make one uniform shuffle of pairs that don't fit in memory: every pair goes to a random bucket
        # here, and `_arrange` permutes a bucket when it is read. Both draw from streams of their own, named by seed,
        # epoch and bucket, so that reading a bucket twice, or on another worker, gives the same order. With one bucket
        # there is nothing to draw, and the pairs stay in memory.
        buckets, random = self._new_buckets(), self._random(_BUCKETS, epoch)
        for pairs in self._with_negatives(epoch) if self._by_user else self.observed():
            if self._count == 1:
                buckets[0].append(pairs)
            else:
                _scatter(pairs, random.integers(self._count, size=pairs.size, dtype=np.uint8), buckets)
        return Epoch(buckets, functools.partial(self._arrange, epoch))

    def observed(self) -> Iterator[Pairs]:
        """The training pairs in row order, a batch at a time, without negatives."""
        return self._rows("train")

    def sample(self, count: int, random: np.random.Generator) -> Pairs:
        """At most `count` of the observed training pairs, drawn without replacement, in row order."""
        chosen = np.sort(random.choice(self.size, min(count, self.size), replace=False))
        parts, start = [], 0
        for pairs in self.observed():
            here = slice(*np.searchsorted(chosen, [start, start + pairs.size]))
            parts.append(pairs.take(chosen[here] - start))
            start += pairs.size
        return Pairs.join(parts)

    def held_out(self, split: str) -> PairFile:
        """A split's pairs in row order; implicit ones by user bucket, each followed by its negatives.

        Negatives are fixed, as many per pair as in training, and in neither `split` nor the training split.
        """
        held_out = PairFile()
        if self._by_user is None:
            for pairs in self._rows(split):
                held_out.append(pairs)
            return held_out
        for bucket, (file, train) in enumerate(zip(self._split_by_user(split), self._by_user, strict=True)):
            pairs = file.all()
            seen = np.union1d(self._keys(train.all()), self._keys(pairs))
            held_out.append(self._add_negatives(pairs, seen, self._random(_HELD_OUT, 0, bucket)))
        return held_out

    def _rows(self, split: str) -> Iterator[Pairs]:
        start = 0
        for arrays in self._dataset.pairs(split):
            yield self._checked(split, start, arrays)
            start += len(arrays.user)

    def _checked(self, split: str, start: int, arrays: PairArrays) -> Pairs:
        if self._dataset.implicit:
            return Pairs(arrays.user, arrays.item, np.ones(len(arrays.user), np.float32))
        if np.isnan(arrays.rating).any():
            row = start + int(np.isnan(arrays.rating).argmax())
            raise InputError(f"{self._dataset.path}: {split} row {row}: no rating, though other rows have one")
        return Pairs(*arrays)

    def _arrange(self, epoch: int, bucket: int, pairs: Pairs) -> Pairs:
        """A bucket's pairs in random order, some ids hidden."""
        pairs = pairs.take(self._random(_ORDER, epoch, bucket).permutation(pairs.size))
        random = self._random(_HIDDEN, epoch, bucket)
        for index, unknown in zip((pairs.user, pairs.item), self._known, strict=True):
            _hide(index, unknown, self._unknown_rate, random)
        return pairs

    def _new_buckets(self) -> list[PairFile]:
        return [PairFile(_MEMORY_BYTES // self._count) for _ in range(self._count)]

    def _split_by_user(self, split: str) -> list[PairFile]:
        """A split's pairs in buckets, all of a user in one."""
        # A negative is an item that its user has no pair with. With all pairs of a user in one bucket that can be
        # checked by reading this bucket alone, however large the data.
        buckets = self._new_buckets()
        for pairs in self._rows(split):
            _scatter(pairs, (pairs.user % self._count).astype(np.uint8), buckets)
        return buckets

    def _with_negatives(self, epoch: int) -> Iterator[Pairs]:
        for bucket, file in enumerate(self._by_user or ()):
            pairs = file.all()
            yield self._add_negatives(pairs, np.unique(self._keys(pairs)), self._random(_NEGATIVES, epoch, bucket))

    def _keys(self, pairs: Pairs) -> np.ndarray:
        return self._key(pairs.user, pairs.item)

    def _key(self, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        """One int64 per pair of ids."""
        return user.astype(np.int64) * self._dataset.catalog.n_items + item

    def _add_negatives(self, pairs: Pairs, observed: np.ndarray, random: np.random.Generator) -> Pairs:
        """Append items that the same users never interacted with, drawn uniformly, rated 0."""
        user = np.repeat(pairs.user, self._negatives)
        item = random.integers(self._known[1], size=len(user), dtype=np.int32)
        for _ in range(_NEGATIVE_ROUNDS):
            seen = _contains(observed, self._key(user, item))
            if not seen.any():
                break
            item[seen] = random.integers(self._known[1], size=int(seen.sum()), dtype=np.int32)
        unseen = ~_contains(observed, self._key(user, item))
        user, item = user[unseen], item[unseen]
        return Pairs.join([pairs, Pairs(user, item, np.zeros(len(user), np.float32))])

    def _random(self, stream: int, epoch: int, bucket: int = 0) -> np.random.Generator:
        return np.random.default_rng([self._seed, stream, epoch, bucket])


def global_batches(count: int, batch_size: int) -> Iterator[slice]:
    """Cut `count` rows into nearly equal batches of at most `batch_size`; no row is left out."""
    batches = -(-count // batch_size)
    for index in range(batches):
        yield slice(index * count // batches, (index + 1) * count // batches)


def worker_slices(rows: slice, world_size: int) -> list[slice]:
    """Cut a batch into one contiguous slice per worker; sizes differ by at most 1, and may be 0."""
    size = rows.stop - rows.start
    cuts = [rows.start + size * rank // world_size for rank in range(world_size + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(cuts)]


def _scatter(pairs: Pairs, bucket_N: np.ndarray, buckets: Sequence[PairFile]) -> None:
    """Append every pair to its bucket, in order."""
    ordered = pairs.take(np.argsort(bucket_N, kind="stable"))
    ends = np.cumsum(np.bincount(bucket_N, minlength=len(buckets)))
    for bucket, (start, end) in zip(buckets, itertools.pairwise([0, *ends.tolist()]), strict=True):
        if start < end:
            bucket.append(ordered.take(slice(start, end)))


def _hide(index: np.ndarray, unknown: int, rate: float, random: np.random.Generator) -> None:
    """Replace a share of the ids in place; piece by piece, for draws take twice the memory of the ids."""
    for start in range(0, len(index), _PIECE):
        piece = index[start : start + _PIECE]
        piece[random.random(len(piece)) < rate] = unknown


def _contains(sorted_keys: np.ndarray, keys: np.ndarray) -> np.ndarray:
    if not len(sorted_keys):
        return np.zeros(len(keys), bool)
    position = np.searchsorted(sorted_keys, keys).clip(max=len(sorted_keys) - 1)
    return sorted_keys[position] == keys
