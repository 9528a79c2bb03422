"""How the tables of users and items are laid out: the one description, for stage 1's model and for the explainer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gavamoe.config.schema import Stage1Config
from gavamoe.model.tables.embedding import EmbeddingTable, Table
from gavamoe.model.tables.hashed import HashedTable
from gavamoe.model.tables.mapped import MappedTable

Of = Literal["user", "item"]
MakeTable = Callable[[Of, int, int, float], EmbeddingTable]
"""Makes a table: of users or items, of how many known ids, of what size, and the deviation of its initial values."""
_STREAMS: dict[Of, int] = {"user": 0, "item": 1}
"""Users and items are hashed by different functions."""
_SAMPLED = 10**5
"""Vectors by which the scale of a table is judged."""


@dataclass(frozen=True)
class TableLayout:
    """The kind of both tables (`stage1.tables`), and the size of hashed ones."""

    kind: str = "replicated"
    user_rows: int = 0
    """M: rows of a hashed table of users, without the unknown one's."""
    item_rows: int = 0
    """M: rows of a hashed table of items, without the unknown one's."""
    hashes: int = 2
    """k: rows that a known id's vector is the sum of."""
    seed: int = 0
    """Seed of the hash functions."""

    @classmethod
    def of(cls, config: Stage1Config, users: int, items: int, seed: int = 0) -> "TableLayout":
        """The layout that settings ask for; a hashed table has at most as many rows as there are known ids."""
        if config.tables != "hashed":
            return cls(config.tables)
        rows = [
            max(1, min(most, ids)) for most, ids in ((config.user_hash_rows, users), (config.item_hash_rows, items))
        ]
        return cls(config.tables, rows[0], rows[1], config.hashes, seed)

    def make(self, of: Of, ids: int, size: int, std: float | None = None) -> EmbeddingTable:
        """The table of `ids` known users or items; of sharded ones that which is read, stage 1's trainer makes its own.

        Args:
            std: standard deviation of the initial vectors; None: any values.
        """
        if self.kind == "hashed":
            rows = self.user_rows if of == "user" else self.item_rows
            return HashedTable(ids, size, std, rows=rows, hashes=self.hashes, seed=(self.seed, _STREAMS[of]))
        if self.kind == "sharded":
            return MappedTable(f"{of}_embedding", ids, size)
        return Table(ids, size, std)


def some_vectors(table: nn.Module, ids: int) -> Tensor:
    """Vectors by which the scale of a table is judged: (n, E), all of a small one, evenly spaced ones of a large one.

    Args:
        ids: known ids; the unknown one's vector counts too.

    Returns none of a mapped table without files yet.
    """
    if isinstance(table, nn.Embedding) and not isinstance(table, HashedTable):
        return table.weight
    if isinstance(table, MappedTable) and table.folder is None:
        return torch.empty(0, table.embedding_dim)
    with torch.no_grad():
        vectors: Tensor = table(torch.linspace(0, ids, min(ids + 1, _SAMPLED), dtype=torch.float64).long())
    return vectors


def mapped_tables(model: nn.Module) -> list[MappedTable]:
    """The tables of a model that are looked up in files."""
    return [module for module in model.children() if isinstance(module, MappedTable)]
