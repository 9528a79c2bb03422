"""A sharded table's own parts: initial values, ranges of rows, and lookups between workers, here in one process."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gavamoe.model.tables import embedding
from gavamoe.model.tables.embedding import Table
from gavamoe.stage1.sharding import row_ranges, sharded_table
from gavamoe.stage1.sharding.row_ranges import RowRanges
from gavamoe.stage1.sharding.sharded_table import ShardedTable


@pytest.mark.parametrize(("ids", "size", "workers"), [(99, 16, 1), (99, 5, 3), (1000, 7, 2), (3, 2, 2), (64, 3, 8)])
def test_shards_start_as_a_whole_table_does(ids: int, size: int, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, drawn in small parts, and the random state after it is the same."""
    monkeypatch.setattr(sharded_table, "_DRAWN", 160)
    torch.manual_seed(5)
    whole, after = Table(ids, size, 0.02), torch.rand(1)
    parts = []
    for rank in range(workers):
        torch.manual_seed(5)
        table = ShardedTable(ids, size, 0.02, rank, workers, "cpu")
        assert torch.equal(torch.rand(1), after)
        parts.append(table.shard.detach())
    assert torch.equal(torch.cat(parts), whole.weight)


def test_ranges_are_even_and_cover_all_rows() -> None:
    for rows, workers in ((10, 3), (2, 5), (64, 1)):
        ranges = [RowRanges(rows, workers, rank, "cpu").own for rank in range(workers)]
        assert [row for part in ranges for row in range(part.start, part.stop)] == list(range(rows))
        assert max(part.stop - part.start for part in ranges) - min(part.stop - part.start for part in ranges) <= 1


def test_one_worker_looks_up_and_collects_as_a_whole_table_does() -> None:
    torch.manual_seed(0)
    whole = Table(30, 4, 0.02)
    torch.manual_seed(0)
    sharded = ShardedTable(30, 4, 0.02, 0, 1, "cpu")
    ids = torch.tensor([[4, 30, 4], [0, 29, 77]])
    factor = torch.randn(2, 3, 4)
    found = sharded(ids)
    assert torch.equal(found, whole(ids.clamp(max=30)))
    (whole(ids.clamp(max=30)) * factor).sum().backward()
    (found * factor).sum().backward()
    sharded.collect_gradients()
    assert sharded.shard.grad is not None
    assert whole.weight.grad is not None
    torch.testing.assert_close(sharded.shard.grad.to_dense(), whole.weight.grad)
    sharded.eval()
    assert not sharded(ids).requires_grad
    assert not sharded.state_dict()


class Queues:
    """What workers send each other, kept until it is received: one process plays them one after the other."""

    def __init__(self) -> None:
        self.sent: dict[int, list[Tensor]] = {}
        self.rank = 0

    def send(self, values: Tensor, to: int) -> None:
        assert to != self.rank
        self.sent.setdefault(to, []).append(values.clone())

    def recv(self, values: Tensor, _from: int) -> None:
        values.copy_(self.sent[self.rank].pop(0))


@pytest.fixture
def queues(monkeypatch: pytest.MonkeyPatch) -> Iterator[Queues]:
    made = Queues()
    monkeypatch.setattr(dist, "send", made.send)
    monkeypatch.setattr(dist, "recv", made.recv)
    monkeypatch.setattr(row_ranges, "BLOCK", 4)
    monkeypatch.setattr(embedding, "BLOCK", 3)
    yield made
    assert not any(made.sent.values())


@pytest.mark.parametrize("directions", [None, np.random.default_rng(1).normal(size=(2, 5))])
def test_values_of_rank_0_reach_the_rows_wherever_they_are(
    queues: Queues, monkeypatch: pytest.MonkeyPatch, directions: np.ndarray | None
) -> None:
    ids, size, workers = 30, 5, 3
    values = np.random.default_rng(0).normal(size=(ids, 2))
    monkeypatch.setattr(dist, "broadcast", lambda tensor, src: tensor.fill_(2))
    torch.manual_seed(0)
    whole = Table(ids, size, 0.02)
    whole.add(values, directions)
    shards: list[Any] = []
    for queues.rank in range(workers):
        torch.manual_seed(0)
        shards.append(ShardedTable(ids, size, 0.02, queues.rank, workers, "cpu"))
        shards[-1].add(values if queues.rank == 0 else None, directions)
    torch.testing.assert_close(torch.cat([table.shard.detach() for table in shards]), whole.weight.detach())
    known = torch.cat([block for table in shards for block in table.blocks()])
    torch.testing.assert_close(known, whole.weight.detach()[:-1])

    for queues.rank in (1, 2, 0):  # the others send before rank 0 takes
        table = shards[queues.rank]
        gathered = list(table.ranges.to_rank_0(table.rows, table.shard))
    assert max(map(len, gathered)) <= 4
    torch.testing.assert_close(torch.cat(gathered), whole.weight.detach())
