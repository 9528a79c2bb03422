"""The pairs that stage 1 reads: every epoch's order, sampled negatives and hidden ids, as functions of the seed.

Nothing here depends on how many workers there are: they cut the same global batches into slices.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from gavamoe.dataset import Dataset
from gavamoe.errors import InputError

_NEGATIVE_ROUNDS = 30
"""Rounds of drawing again what was observed; a user who has seen nearly everything gets fewer negatives."""

_PIECE = 2**20

_ORDER, _NEGATIVES, _HIDDEN, _HELD_OUT = range(4)  # one random stream each


class Pairs(NamedTuple):
    """N user-item pairs; ratings are 1 and 0 for implicit data."""

    user: np.ndarray
    """(N,) int32"""
    item: np.ndarray
    """(N,) int32"""
    rating: np.ndarray
    """(N,) float32"""

    def take(self, rows: np.ndarray | slice) -> "Pairs":
        """The pairs of some rows."""
        return Pairs(self.user[rows], self.item[rows], self.rating[rows])

    @property
    def size(self) -> int:
        """N."""
        return len(self.user)


class PairSource:
    """Training epochs and held-out pairs of a dataset.

    Args:
        negatives: sampled unobserved items per observed pair; used only for implicit data.
        unknown_rate: share of users, and of items, hidden behind the unknown id in training.
    """

    def __init__(self, dataset: Dataset, *, negatives: int, unknown_rate: float, seed: int) -> None:
        self._dataset = dataset
        self._negatives = negatives if dataset.implicit else 0
        self._unknown_rate = unknown_rate
        self._seed = seed
        self._known = (dataset.catalog.known_users, dataset.catalog.known_items)
        self._train = self._observed("train")
        if not self._train.size:
            raise InputError(
                f"{dataset.path}: the training split is empty; prepare the data with a larger share for it"
            )
        self._train_keys = self._keys("train") if self._negatives else None

    def epoch(self, epoch: int) -> Pairs:
        """All pairs of one training epoch in their order: a function of (seed, epoch)."""
        pairs = self._train
        if self._train_keys is not None:
            pairs = self._with_negatives(pairs, self._train_keys, self._random(_NEGATIVES, epoch))
        pairs = pairs.take(self._random(_ORDER, epoch).permutation(pairs.size))
        random = self._random(_HIDDEN, epoch)
        for index, unknown in zip((pairs.user, pairs.item), self._known, strict=True):
            _hide(index, unknown, self._unknown_rate, random)
        return pairs

    def observed(self) -> Pairs:
        """The training pairs in row order, without negatives."""
        return self._train

    def held_out(self, split: str) -> Pairs:
        """A split's pairs in row order; for implicit data then fixed negatives, as many per pair as in training."""
        pairs = self._observed(split)
        if not self._negatives:
            return pairs
        keys = np.union1d(self._keys("train"), self._keys(split))
        return self._with_negatives(pairs, keys, self._random(_HELD_OUT, 0))

    def _observed(self, split: str) -> Pairs:
        arrays = self._dataset.arrays(split)
        rating = np.ones(len(arrays.user), np.float32) if self._dataset.implicit else arrays.rating
        if np.isnan(rating).any():
            row = int(np.isnan(rating).argmax())
            raise InputError(f"{self._dataset.path}: {split} row {row}: no rating, though other rows have one")
        return Pairs(arrays.user, arrays.item, rating)

    def _keys(self, split: str) -> np.ndarray:
        arrays = self._dataset.arrays(split)
        return np.unique(self._key(arrays.user, arrays.item))

    def _key(self, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        """One int64 per pair of ids."""
        return user.astype(np.int64) * self._dataset.catalog.n_items + item

    def _with_negatives(self, pairs: Pairs, observed: np.ndarray, random: np.random.Generator) -> Pairs:
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
        rating = np.concatenate([pairs.rating, np.zeros(len(user), np.float32)])
        return Pairs(np.concatenate([pairs.user, user]), np.concatenate([pairs.item, item]), rating)

    def _random(self, stream: int, epoch: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, stream, epoch])


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


def _hide(index: np.ndarray, unknown: int, rate: float, random: np.random.Generator) -> None:
    """Replace a share of the ids in place; piece by piece, for draws take twice the memory of the ids."""
    for start in range(0, len(index), _PIECE):
        piece = index[start : start + _PIECE]
        piece[random.random(len(piece)) < rate] = unknown


def _contains(sorted_keys: np.ndarray, keys: np.ndarray) -> np.ndarray:
    if not len(sorted_keys):
        return np.zeros(len(keys), bool)
    place = np.searchsorted(sorted_keys, keys).clip(max=len(sorted_keys) - 1)
    return sorted_keys[place] == keys
