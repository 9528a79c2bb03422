"""A table whose rows are spread over the workers: each holds a range of them, with gradients and moments, and no other.

A lookup asks the workers that hold a batch's rows, by all-to-all, for each different row once. Gradients go back the
same way, one for each id of the batch: their holder sums the same numbers that one worker would, so that training
equals that of whole tables but for the order of sums.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gavamoe.model.tables.embedding import BLOCK, EmbeddingTable, add_to_rows
from gavamoe.stage1.sharding.row_ranges import RowRanges

_DRAWN = 2**20
"""Numbers that are drawn at a time, about; a multiple of 16."""
_GROUP = 16
"""Numbers that torch draws together: parts of whole groups are drawn as the whole is."""


class ShardedTable(EmbeddingTable):
    """This worker's part of a table; every worker calls `forward`, `collect_gradients` and `add` equally often.

    Args:
        std: standard deviation of the initial values, which are those of a `Table` drawn from the same random state.
    """

    lookups = 1

    def __init__(self, ids: int, size: int, std: float, rank: int, workers: int, device: str) -> None:
        super().__init__()
        self.ids, self.embedding_dim = ids, size
        self.ranges = RowRanges(ids + 1, workers, rank, device)
        self.shard = nn.Parameter(_drawn(ids + 1, size, std, self.ranges.own))
        """Rows `ranges.own`; in no state_dict, since no worker has them all."""
        self._read: list[tuple[Tensor, Tensor]] = []

    def forward(self, input: Tensor) -> Tensor:
        """Vectors of ids, (..., E), asked of the workers that hold them.

        In training they are leaves of the graph, whose gradients `collect_gradients` sends back.
        """
        ids_B = input.reshape(-1).long().clamp(max=self.ids)
        rows_R, place_B = ids_B.unique(return_inverse=True)
        sent_W = self._counts(rows_R)
        arriving_W = self._exchanged_counts(sent_W)
        wanted = self._exchange(rows_R, sent_W, arriving_W)
        found = self.shard.detach()[wanted - self.ranges.own.start]
        vectors_BE = self._exchange(found, arriving_W, sent_W)[place_B]
        if self.training and torch.is_grad_enabled():
            vectors_BE.requires_grad_()
            self._read.append((ids_B, vectors_BE))
        return vectors_BE.view(*input.shape, self.embedding_dim)

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """After the backward pass: give `shard` the gradient of its rows, sparse and coalesced, from all workers."""
        ids = torch.cat([ids_B for ids_B, _ in self._read])
        gradients = torch.cat([torch.zeros_like(v) if v.grad is None else v.grad for _, v in self._read])
        self._read.clear()
        rows_B, order_B = ids.sort(stable=True)
        sent_W = self._counts(rows_B)
        arriving_W = self._exchanged_counts(sent_W)
        rows = self._exchange(rows_B, sent_W, arriving_W) - self.ranges.own.start
        values = self._exchange(gradients[order_B], sent_W, arriving_W)
        gradient = torch.sparse_coo_tensor(rows.unsqueeze(0), values, self.shard.shape, check_invariants=False)
        self.shard.grad = gradient.coalesce()

    def blocks(self) -> Iterator[Tensor]:
        """The vectors of the known ids that this worker holds."""
        known = max(0, min(self.ranges.own.stop, self.ids) - self.ranges.own.start)
        yield from self.shard.detach()[:known].split(BLOCK)

    @torch.no_grad()
    def add(self, values_NC: np.ndarray | None, directions_CE: np.ndarray | None = None) -> None:
        """Add rank 0's values to the known ids' rows, wherever these are; no values: nothing is added."""
        columns = torch.tensor([0 if values_NC is None else values_NC.shape[1]], device=self.ranges.device)
        if self.ranges.workers > 1:
            dist.broadcast(columns, src=0)
        if not columns:
            return
        like = torch.empty(0, int(columns), dtype=torch.float64)

        def whole(block: slice) -> Tensor:
            assert values_NC is not None
            values = torch.zeros(block.stop - block.start, int(columns), dtype=torch.float64)
            known = torch.from_numpy(np.ascontiguousarray(values_NC[block], dtype=np.float64))
            values[: len(known)] = known  # what is left is the unknown row's: zero
            return values

        for block, values in self.ranges.from_rank_0(whole if self.ranges.rank == 0 else None, like):
            start = block.start - self.ranges.own.start
            add_to_rows(self.shard[start : start + len(values)], values.cpu().numpy(), directions_CE)

    def rows(self, block: slice) -> Tensor:
        """Some of this worker's rows, by their place in the whole table."""
        start = self.ranges.own.start
        return self.shard.detach()[block.start - start : block.stop - start]

    def _counts(self, sorted_rows: Tensor) -> list[int]:
        """How many of the rows each worker holds."""
        bounds = torch.tensor(self.ranges.bounds, device=sorted_rows.device)
        return torch.searchsorted(sorted_rows, bounds).diff().tolist()

    def _exchanged_counts(self, sent_W: list[int]) -> list[int]:
        """How many each worker sends to this one."""
        if self.ranges.workers == 1:
            return sent_W
        sent = torch.tensor(sent_W, device=self.ranges.device)
        arriving = torch.empty_like(sent)
        dist.all_to_all_single(arriving, sent)
        return arriving.tolist()

    def _exchange(self, values: Tensor, sent_W: list[int], arriving_W: list[int]) -> Tensor:
        """All-to-all: the first values go to the first worker, and so on; what arrives, in the workers' order."""
        if self.ranges.workers == 1:
            return values
        arrived = values.new_empty(sum(arriving_W), *values.shape[1:])
        dist.all_to_all_single(arrived, values.contiguous(), arriving_W, sent_W)
        return arrived

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        """Nothing: `held_tables` writes the rows into files of their own."""

    def _load_from_state_dict(self, *_: object) -> None:
        """Nothing, as above."""


def _drawn(rows: int, size: int, std: float, own: slice) -> Tensor:
    """Some rows of a new table, which is drawn whole, a part at a time, and not kept: the same random numbers as for a
    `Table`, before and after it."""
    each = max(_GROUP, _DRAWN // size // _GROUP * _GROUP)
    starts = list(range(0, rows, each))
    if len(starts) > 1 and (rows - starts[-1]) * size < _GROUP:
        starts.pop()  # fewer would be drawn otherwise than as the end of more
    shard = torch.empty(own.stop - own.start, size)
    for kept in (False, True):  # nn.Embedding draws once before
        for start, stop in zip(starts, [*starts[1:], rows], strict=True):
            part = torch.empty(stop - start, size).normal_(std=std)
            first, last = max(start, own.start), min(stop, own.stop)
            if kept and first < last:
                shard[first - own.start : last - own.start] = part[first - start : last - start]
    return shard
