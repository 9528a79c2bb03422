"""Embedding tables of fewer rows than ids: an id's vector is the sum of k rows, which others share (Svenstrup et al.
2017)."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gavamoe.model.tables.embedding import BLOCK, Table, add_to_rows

_SOLVER_STEPS = 30
"""Steps of conjugate gradients; on random graphs of ids and rows the residual has stopped falling after some 20."""
_SOLVED = 1e-6
_MIXERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_POSITIVE = 2**63 - 1


class Collisions(NamedTuple):
    """How many ids a hashed table can't tell apart, as shares of the known ids."""

    rows: int
    """M: rows of the table."""
    all: float
    """Share of ids that another id has all rows in common with: both have the same vector, whatever is learned."""
    any: float
    """Share of ids that have a row in common with another id."""


class HashedTable(Table):
    """`rows` rows for any number of ids: a known id's vector is the sum of those that `hashes` functions name.

    Rows are integer mixes of id and salts (SplitMix64; Steele et al. 2014), the salts a function of the seed, so that
    rows are the same on every device and in every process.
    """

    def __init__(
        self, ids: int, size: int, std: float | None, *, rows: int, hashes: int, seed: tuple[int, ...]
    ) -> None:
        # A sum of k independent rows has k times their variance.
        super().__init__(ids, size, None if std is None else std / hashes**0.5, rows=rows)
        self.rows, self.lookups = rows, hashes
        salts = np.random.SeedSequence(seed).generate_state(hashes, np.uint64)
        self._salts = tuple(int(salt) for salt in salts.astype(np.int64))

    def rows_of(self, index: Tensor) -> Tensor:
        """The rows of ids, (..., k) int64; k times the last one for unknown ids."""
        mixed = torch.stack([_mixed(index.long() ^ salt) for salt in self._salts], dim=-1)
        known = (index < self.ids).unsqueeze(-1)
        return torch.where(known, (mixed & _POSITIVE) % self.rows, self.rows)

    def forward(self, input: Tensor) -> Tensor:
        """Vectors of ids, (..., E)."""
        vectors = super().forward(self.rows_of(input))
        if self.lookups == 1:
            return vectors.squeeze(-2)
        # The unknown row counts once, not k times.
        known = (input < self.ids).unsqueeze(-1).to(vectors.dtype)
        return vectors[..., 0, :] + known * vectors[..., 1:, :].sum(dim=-2)

    @torch.no_grad()
    def add(self, values_NC: np.ndarray | None, directions_CE: np.ndarray | None = None) -> None:
        """Add to the rows what brings the ids' vectors nearest, by least squares, to theirs plus the values."""
        if values_NC is not None:
            add_to_rows(self.weight[:-1], self._solved(values_NC), directions_CE)

    @torch.no_grad()
    def collisions(self) -> Collisions:
        """Count the ids that share rows; exact, in memory of some 40 bytes an id."""
        rows_Nk = np.sort(self._known_rows(), axis=1)
        uses_M = np.bincount(rows_Nk.ravel(), minlength=self.rows)
        own_Nk = sum((rows_Nk == rows_Nk[:, [other]]).astype(np.int8) for other in range(self.lookups))
        order = np.lexsort(rows_Nk.T)
        equal = (rows_Nk[order[1:]] == rows_Nk[order[:-1]]).all(axis=1)
        twins = np.append(equal, False) | np.append(False, equal)
        return Collisions(self.rows, float(twins.mean()), float((uses_M[rows_Nk] > own_Nk).any(axis=1).mean()))

    def _known_rows(self) -> np.ndarray:
        """int32 (N, k)."""
        starts = range(0, self.ids, BLOCK)
        parts = [self.rows_of(torch.arange(start, min(start + BLOCK, self.ids))).int() for start in starts]
        return torch.cat(parts).numpy()

    def _solved(self, values_NC: np.ndarray) -> np.ndarray:
        """The rows (M, C) whose sums are nearest to the values, by conjugate gradients, a column at a time."""
        import scipy.sparse  # type: ignore[import-untyped]  # comes with scikit-learn, without stubs

        rows_Nk = self._known_rows()
        starts = np.arange(0, rows_Nk.size + 1, self.lookups)
        matrix = scipy.sparse.csr_matrix(
            (np.ones(rows_Nk.size), rows_Nk.ravel(), starts), shape=(self.ids, self.rows), dtype=np.float64
        )
        return np.stack([_least_squares(matrix, column) for column in values_NC.T], axis=1)


def _least_squares(matrix: Any, wanted_N: np.ndarray) -> np.ndarray:
    """x with |matrix x - wanted| least, by conjugate gradients on the normal equations (CGLS; Hestenes, Stiefel
    1952)."""
    found_M, left_N = np.zeros(matrix.shape[1]), wanted_N.astype(np.float64)
    slope_M = matrix.T @ left_N
    direction_M, size = slope_M, float(slope_M @ slope_M)
    enough = _SOLVED**2 * size
    for _ in range(_SOLVER_STEPS):
        if size <= enough:
            break
        moved_N = matrix @ direction_M
        step = size / float(moved_N @ moved_N)
        found_M, left_N = found_M + step * direction_M, left_N - step * moved_N
        slope_M = matrix.T @ left_N
        before, size = size, float(slope_M @ slope_M)
        direction_M = slope_M + size / before * direction_M
    return found_M


def _mixed(value: Tensor) -> Tensor:
    """The mixing function of SplitMix64 on int64, whose products wrap around."""
    for shift, mixer in zip((30, 27), _MIXERS, strict=True):
        value = (value ^ _shifted(value, shift)) * mixer
    return value ^ _shifted(value, 31)


def _shifted(value: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in; torch's own shift repeats the sign."""
    return (value >> bits) & (2 ** (64 - bits) - 1)
