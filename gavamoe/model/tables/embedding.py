"""What all embedding tables can do (`EmbeddingTable`), and the plain one, a row for each id (`Table`)."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

BLOCK = 2**16
"""Ids whose vectors are in memory at a time where all are passed over."""


class EmbeddingTable(nn.Module):
    """Vectors of `ids` known ids, and one vector more, which all ids from `ids` on share: strangers are nobody else."""

    ids: int
    """N: known ids."""
    embedding_dim: int
    """E: size of a vector."""
    lookups: int
    """Rows that one id reads."""

    def blocks(self) -> Iterator[Tensor]:
        """The vectors of the known ids that this worker holds, all of them unless they are sharded, in their order and
        some at a time: (b, E) each."""
        for start in range(0, self.ids, BLOCK):
            with torch.no_grad():
                yield self(torch.arange(start, min(start + BLOCK, self.ids)))

    def add(self, values_NC: np.ndarray | None, directions_CE: np.ndarray | None = None) -> None:
        """Add values_NC @ directions_CE to the known ids' vectors; without directions, to their leading C columns.

        Args:
            values_NC: the values, None where there are none; of a sharded table rank 0's count, for all ranks.
        """
        raise NotImplementedError


class Table(nn.Embedding, EmbeddingTable):
    """A row for each known id and one, the last, for all others, in memory: weight (N + 1, E).

    Args:
        std: standard deviation of the initial values; None: as `nn.Embedding` draws them.
        rows: rows without the last; None: as many as `ids`.
    """

    lookups = 1

    def __init__(self, ids: int, size: int, std: float | None = None, *, rows: int | None = None) -> None:
        super().__init__((ids if rows is None else rows) + 1, size)
        self.ids = ids
        if std is not None:
            nn.init.normal_(self.weight, std=std)

    def blocks(self) -> Iterator[Tensor]:
        """All known ids' vectors."""
        for start in range(0, self.ids, BLOCK):
            with torch.no_grad():
                yield self(torch.arange(start, min(start + BLOCK, self.ids), device=self.weight.device))

    @torch.no_grad()
    def add(self, values_NC: np.ndarray | None, directions_CE: np.ndarray | None = None) -> None:
        """Add to the rows of the known ids."""
        if values_NC is not None:
            add_to_rows(self.weight[:-1], values_NC, directions_CE)


def add_to_rows(rows_NE: Tensor, values_NC: np.ndarray, directions_CE: np.ndarray | None) -> None:
    """Add values (at the directions) to rows, in place, some at a time."""
    for start in range(0, len(values_NC), BLOCK):
        values = values_NC[start : start + BLOCK]
        added = torch.from_numpy(values if directions_CE is None else values @ directions_CE).to(rows_NE)
        rows_NE[start : start + len(added), : added.shape[1]] += added
