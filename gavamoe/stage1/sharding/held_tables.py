"""The tables in stage 1's training: what differs between those that every worker holds whole and sharded ones.

The trainer asks for optimizer, gradients, the users' points, the best state, checkpoints and the artifact's tables, and
does not know which kind it has. Ranges of rows never come together but on their way into files.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from gavamoe.config.schema import Stage1Config
from gavamoe.model.tables.embedding import BLOCK, EmbeddingTable, Table
from gavamoe.model.tables.layout import MakeTable
from gavamoe.model.tables.mapped import MappedTable
from gavamoe.model.tables.row_files import FILE_BYTES, open_rows, write_table
from gavamoe.runtime.context import Context
from gavamoe.stage1.mixture_init import principal_points
from gavamoe.stage1.sharding.shard_files import SavedShards, save_shards, shard_file
from gavamoe.stage1.sharding.sharded_table import ShardedTable
from gavamoe.stage1.sparse_adam import RowAdam
from gavamoe.stage1.vae_gmm import VaeGmm

_STATES = ("first", "second", "steps")
"""RowAdam's states of a row."""
_NOW, _BEST = "tables", "best-tables"
"""What the files of a checkpoint are called: the rows now, and those of the best state."""


class HeldTables:
    """Tables that every worker holds whole, replicated or hashed."""

    def __init__(self, model: VaeGmm, config: Stage1Config) -> None:
        self._model = model
        tables = [table for table in (model.user_embedding, model.item_embedding) if isinstance(table, Table)]
        for table in tables:
            table.sparse = True
        self.parameters: list[Tensor] = [table.weight for table in tables]
        """The rows that this worker's row-wise optimizer changes."""
        self.shared = self.parameters
        """Those whose gradients are exchanged by the trainer, each worker having all rows."""
        self.lookups = [table.lookups for table in tables]
        self.optimizer = RowAdam(self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.over_workers: Callable[[Tensor], Tensor] | None = None
        """Sums the squares of the tables' gradients over the workers; None: every worker has all of them."""

    def collect_gradients(self) -> None:
        """Bring the gradients to where their rows are: here they are already."""

    def user_points(self, clusters: int, rank: int) -> np.ndarray | None:
        """The users' principal points, on rank 0."""
        model = self._model
        if rank:
            return None
        shape = (model.n_users, model.config.embedding_size)
        return principal_points(model.user_embedding.blocks, shape, clusters)

    @torch.no_grad()
    def keep_best(self, before: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """A copy of the model's present state, in the memory of the one before: tables may be large."""
        state = self._model.state_dict()
        if before is None:
            return {name: tensor.detach().clone() for name, tensor in state.items()}
        for name, tensor in state.items():
            before[name].copy_(tensor)
        return before

    def restore_best(self, state: dict[str, Tensor]) -> None:
        """Take a state that was kept."""
        self._model.load_state_dict(state)

    def save(self, folder: Path, *, best: bool) -> dict[str, Any] | None:
        """Add the rows to a checkpoint; returns the optimizer's state where it goes with the trainer's own."""
        del folder, best
        return self.optimizer.state_dict()

    def load(self, folder: Path, optimizer: dict[str, Any] | None, *, best: bool) -> None:
        """Take over what `save` left."""
        del folder, best
        assert optimizer is not None
        self.optimizer.load_state_dict(optimizer)

    def publish(self, folder: Path | None) -> None:
        """Put the rows into an artifact beside the model's other weights; here they are among those."""


class ShardedTables(HeldTables):
    """Tables of which each worker holds a range of rows.

    The best state is a file among the temporary ones, not a copy in memory.
    """

    def __init__(self, model: VaeGmm, config: Stage1Config, dataset: str) -> None:
        self._model, self._dataset = model, dataset
        tables = {"user_embedding": model.user_embedding, "item_embedding": model.item_embedding}
        self._tables = {name: table for name, table in tables.items() if isinstance(table, ShardedTable)}
        self.parameters = [table.shard for table in self._tables.values()]
        self.shared, self.lookups = [], []
        self.optimizer = RowAdam(self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        self._ranges = next(iter(self._tables.values())).ranges
        self.over_workers = self._summed if self._ranges.workers > 1 else None
        self._folder = tempfile.TemporaryDirectory(prefix="gavamoe-tables-")

    def collect_gradients(self) -> None:
        """Send the gradients of this worker's batch to the holders of the rows."""
        for table in self._tables.values():
            table.collect_gradients()

    def user_points(self, clusters: int, rank: int) -> np.ndarray | None:
        """Each worker's users give their part of the moments; rank 0 gets all points."""
        table, model = self._tables["user_embedding"], self._model
        shape = (model.n_users, model.config.embedding_size)
        own = principal_points(table.blocks, shape, clusters, self._summed_array)
        first = table.ranges.own.start

        def of(block: slice) -> Tensor:
            values = torch.zeros(block.stop - block.start, own.shape[1], dtype=torch.float64)
            found = torch.from_numpy(own[block.start - first : block.stop - first])
            values[: len(found)] = found  # what is left is the unknown user's
            return values.to(table.ranges.device)

        like = torch.empty(0, own.shape[1], dtype=torch.float64)
        parts = [part.cpu().numpy() for part in table.ranges.to_rank_0(of, like)]
        return None if rank else np.concatenate(parts)[: model.n_users]

    def keep_best(self, before: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """Write this worker's rows into its file, and copy the rest."""
        weights = {f"{name}.weight": table.shard for name, table in self._tables.items()}
        save_shards(self._best, weights, self._dataset, self._ranges)
        return super().keep_best(before)

    def restore_best(self, state: dict[str, Tensor]) -> None:
        """Read the rows back too."""
        super().restore_best(state)
        kept = open_rows(self._best).tensors
        for name, table in self._tables.items():
            weight = kept[f"{name}.weight"]
            _fill(table.shard, (weight[start : start + BLOCK] for start in range(0, len(weight), BLOCK)))

    def save(self, folder: Path, *, best: bool) -> None:
        """Write this worker's rows and their states; its file of the best state joins them."""
        shards = {f"{name}.weight": table.shard for name, table in self._tables.items()}
        for name, table in self._tables.items():
            state = self.optimizer.state[table.shard]
            shards |= {f"{name}.{each}": state[each] for each in _STATES if each in state}
        save_shards(shard_file(folder, _NOW, self._ranges.rank), shards, self._dataset, self._ranges)
        if best:
            shutil.copyfile(self._best, folder / self._best.name)

    def load(self, folder: Path, optimizer: dict[str, Any] | None, *, best: bool) -> None:
        """Read this worker's ranges from the files of all workers, of whatever number.

        Raises:
            InputError: files are missing, damaged, or of another dataset.
        """
        del optimizer
        saved = SavedShards(folder, _NOW, self._dataset, self._rows)
        for name, table in self._tables.items():
            state = self.optimizer.state[table.shard]
            _fill(table.shard, saved.rows(f"{name}.weight", table.ranges.own).blocks)
            for each in _STATES:
                if f"{name}.{each}" in saved.names:
                    rows = saved.rows(f"{name}.{each}", table.ranges.own)
                    state[each] = torch.empty(rows.shape, device=table.shard.device)
                    _fill(state[each], rows.blocks)
        if best:
            own = {f"{name}.weight": table.ranges.own for name, table in self._tables.items()}
            kept = SavedShards(folder, _BEST, self._dataset, self._rows)
            kept.write(self._best, own, self._dataset, self._ranges)

    def publish(self, folder: Path | None) -> None:
        """Send all rows to rank 0, which writes them into the files of an artifact and reads them there from now on.

        Args:
            folder: the artifact, on rank 0; None on the others, whose model has no tables to look up in any more.
        """
        for name, table in self._tables.items():
            rows = (block.float().cpu().numpy() for block in table.ranges.to_rank_0(table.rows, table.shard))
            if folder is None:
                for _ in rows:  # none: to run it is to send them
                    pass
                continue
            shape = (table.ids + 1, table.embedding_dim)
            write_table(folder, name, shape, rows, self._dataset, FILE_BYTES)
            mapped = MappedTable(name, table.ids, table.embedding_dim)
            mapped.attach(folder)
            setattr(self._model, name, mapped)

    @property
    def _best(self) -> Path:
        return shard_file(Path(self._folder.name), _BEST, self._ranges.rank)

    @property
    def _rows(self) -> dict[str, int]:
        return {name: table.ids + 1 for name, table in self._tables.items()}

    def _summed(self, values: Tensor) -> Tensor:
        dist.all_reduce(values)
        return values

    def _summed_array(self, values: np.ndarray) -> np.ndarray:
        if self._ranges.workers == 1:
            return values
        return self._summed(torch.from_numpy(values).to(self._ranges.device)).cpu().numpy()


def table_maker(config: Stage1Config, context: Context) -> MakeTable | None:
    """What makes the tables of a model that is trained; None: the layout does, as for any other."""
    if config.tables != "sharded":
        return None

    def make(of: str, ids: int, size: int, std: float | None = None) -> EmbeddingTable:
        del of
        assert std is not None
        return ShardedTable(ids, size, std, context.rank, context.world_size, context.device)

    return make


def hold(model: VaeGmm, config: Stage1Config, dataset: str) -> HeldTables:
    """The tables of a model in training.

    Args:
        dataset: fingerprint of the dataset, which files of shards are marked with.
    """
    return ShardedTables(model, config, dataset) if config.tables == "sharded" else HeldTables(model, config)


@torch.no_grad()
def _fill(target: Tensor, blocks: Iterable[np.ndarray]) -> None:
    """Copy rows from files, a block at a time."""
    start = 0
    for block in blocks:
        target[start : start + len(block)] = torch.from_numpy(np.array(block)).to(target)
        start += len(block)
