"""Which worker holds which rows, and all rows to and from rank 0, some at a time: nobody needs them all in memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gavamoe.model.tables.embedding import BLOCK


@dataclass(frozen=True)
class RowRanges:
    """Rows 0 to `rows`, shared out over `workers` in consecutive ranges of nearly equal size; this one is `rank`."""

    rows: int
    workers: int
    rank: int
    device: str

    @property
    def bounds(self) -> list[int]:
        """Where the workers' ranges begin, and the end of the last: W + 1."""
        return [self.rows * worker // self.workers for worker in range(self.workers + 1)]

    @property
    def own(self) -> slice:
        """This worker's rows."""
        return slice(self.bounds[self.rank], self.bounds[self.rank + 1])

    def to_rank_0(self, own: Callable[[slice], Tensor], like: Tensor) -> Iterator[Tensor]:
        """On rank 0 all rows in order, some at a time; on other ranks nothing. Every rank runs it to its end.

        Args:
            own: values of some of this worker's rows, (b, ...).
            like: a tensor of their type and, but for the first dimension, their shape.
        """
        for worker, block in self._blocks():
            if worker == self.rank:
                values = own(block)
                if self.rank == 0:
                    yield values
                else:
                    dist.send(values.contiguous(), 0)
            elif self.rank == 0:
                values = torch.empty(block.stop - block.start, *like.shape[1:], dtype=like.dtype, device=self.device)
                dist.recv(values, worker)
                yield values

    def from_rank_0(self, whole: Callable[[slice], Tensor] | None, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """This worker's rows, some at a time, with their values as rank 0 has them. Every rank runs it to its end.

        Args:
            whole: on rank 0 the values of some rows.
            like: as in `to_rank_0`.
        """
        for worker, block in self._blocks():
            if self.rank == 0:
                assert whole is not None
                values = whole(block).to(self.device)
                if worker == 0:
                    yield block, values
                else:
                    dist.send(values.contiguous(), worker)
            elif worker == self.rank:
                values = torch.empty(block.stop - block.start, *like.shape[1:], dtype=like.dtype, device=self.device)
                dist.recv(values, 0)
                yield block, values

    def _blocks(self) -> Iterator[tuple[int, slice]]:
        """All workers' rows in order, some at a time, each with its worker."""
        bounds = self.bounds
        for worker in range(self.workers):
            for start in range(bounds[worker], bounds[worker + 1], BLOCK):
                yield worker, slice(start, min(start + BLOCK, bounds[worker + 1]))
