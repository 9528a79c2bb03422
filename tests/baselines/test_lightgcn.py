"""LightGCN, whose vectors XRec reads: propagation and loss by hand, its edges, its training."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from gavamoe.baselines.parts.lightgcn import Graph, learn_vectors, propagate, ranking_loss
from gavamoe.config.schema import LightGcnConfig
from gavamoe.data.dataset import Dataset, open_dataset

SIZE = LightGcnConfig(vector_size=4, layers=2, epochs=6, batch_size=8, learning_rate=0.05)


def graph(*pairs: tuple[int, int], users: int = 6, items: int = 5) -> Graph:
    return Graph.of(*np.array(pairs).T, users, items)


TWO_GROUPS = [(u, i) for u in range(6) for i in range(4) if u % 2 == i % 2 and (u, i) != (0, 2)]


def test_one_edge_by_hand() -> None:
    adjacency = graph((0, 0), users=1, items=1).adjacency()
    first = torch.tensor([[1.0], [0.0]])
    assert propagate(adjacency, first, 2, "sum").flatten().tolist() == [2, 1]
    assert propagate(adjacency, first, 2, "mean").flatten().tolist() == pytest.approx([2 / 3, 1 / 3])


def test_a_neighbor_counts_by_both_degrees() -> None:
    adjacency = graph((0, 0), (0, 1), (1, 1), users=2, items=2).adjacency()
    passed = propagate(adjacency, torch.tensor([[0.0], [0], [3], [5]]), 1, "sum")
    assert passed[:2].flatten().tolist() == pytest.approx([3 / math.sqrt(2) + 5 / 2, 5 / math.sqrt(2)])


def test_ranking_loss_by_hand() -> None:
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    assert float(ranking_loss(one, one, zero)) == pytest.approx(math.log(1 + math.exp(-1)))
    assert float(ranking_loss(one, one, one)) == pytest.approx(math.log(2))
    assert float(ranking_loss(one, zero, 200 * one)) == pytest.approx(200)  # finite, where log(sigmoid) is not


def test_edges_are_distinct_training_pairs_above_the_middle(planted: Dataset) -> None:
    pairs, found = planted.arrays("train"), Graph.read(planted)
    wanted = {(int(u), int(i)) for u, i, rating in zip(*pairs, strict=True) if rating > 3}
    assert {*zip(found.users.tolist(), found.items.tolist(), strict=True)} == wanted
    assert len(found) == len(wanted) < len(pairs.user)


def test_every_pair_of_data_without_ratings_is_an_edge(implicit_dataset: Path) -> None:
    data = open_dataset(implicit_dataset)
    assert len(Graph.read(data)) == data.size("train")


def test_pairs_that_come_twice_and_pairs_of_the_test_change_no_vector(
    planted: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = learn_vectors(graph(*TWO_GROUPS), SIZE, seed=0)
    again = learn_vectors(graph(*TWO_GROUPS, *TWO_GROUPS[:5]), SIZE, seed=0)
    assert all(torch.equal(one, other) for one, other in zip(before, again, strict=True))
    read: list[str] = []
    table = Dataset.table
    monkeypatch.setattr(Dataset, "table", lambda self, split, *rest: read.append(split) or table(self, split, *rest))
    Graph.read(planted)
    assert read == ["train"]


def test_training_tells_own_items_from_others_and_gives_zeros_to_ids_without_edges() -> None:
    size = SIZE.model_copy(update={"epochs": 60})
    users, items = learn_vectors(graph(*TWO_GROUPS), size, seed=0)
    assert users.shape == (6, 4)
    assert items.shape == (5, 4)
    assert not items[4].any()
    scores = users @ items[:4].T
    same = torch.tensor([[u % 2 == i % 2 for i in range(4)] for u in range(6)])
    assert scores[same].min() > scores[~same].max()
    assert scores[0, 2] > scores[0, 1]  # a pair it never saw, of two that share neighbors
    assert not torch.equal(users, learn_vectors(graph(*TWO_GROUPS), size, seed=1)[0])


def test_training_stops_by_the_edges_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """After `patience` epochs without a lower loss, with the state of the lowest one."""
    losses = iter([3.0, 1.0, 2.0, 2.0, 0.0])
    epochs = 0

    def loss(*vectors: torch.Tensor) -> torch.Tensor:
        nonlocal epochs
        if torch.is_grad_enabled():
            epochs += 1
            return sum((vector.sum() for vector in vectors), torch.zeros(()))
        return torch.tensor(next(losses))

    monkeypatch.setattr("gavamoe.baselines.parts.lightgcn.ranking_loss", loss)
    size = SIZE.model_copy(update={"held_out": 0.2, "patience": 2, "batch_size": 100})
    stopped = learn_vectors(graph(*TWO_GROUPS), size, seed=0)
    assert epochs == 4
    losses = iter([3.0, 1.0])
    two = learn_vectors(graph(*TWO_GROUPS), size.model_copy(update={"epochs": 2}), seed=0)
    assert all(torch.equal(one, other) for one, other in zip(stopped, two, strict=True))


def test_edges_held_out_leave_every_id_one() -> None:
    whole = graph(*TWO_GROUPS, (5, 4))
    kept, held = whole.split(0.5, np.random.default_rng(0))
    assert len(held) > 0
    assert sorted([*kept.keys, *held.keys]) == whole.keys.tolist()
    assert ((kept.degrees > 0) == (whole.degrees > 0)).all()


def test_negatives_are_items_of_others() -> None:
    own = graph(*TWO_GROUPS)
    users = np.repeat(own.users, 50)
    drawn = own.negatives(users, np.random.default_rng(0))
    assert not np.isin(users * own.n_items + drawn, own.keys).any()
    assert set(drawn[users == 1].tolist()) == {0, 2, 4}
    everything = graph((0, 0), (0, 1), users=1, items=2)
    assert set(everything.negatives(np.zeros(20, np.int64), np.random.default_rng(0)).tolist()) <= {0, 1}


def test_vectors_do_not_depend_on_who_has_which_index() -> None:
    first = torch.randn(11, 4, generator=torch.Generator().manual_seed(0))
    order = np.array([3, 0, 5, 1, 4, 2])
    moved = graph(*((int(np.flatnonzero(order == u)[0]), i) for u, i in TWO_GROUPS))
    whole = torch.from_numpy(np.concatenate([order, np.arange(6, 11)]))
    before = propagate(graph(*TWO_GROUPS).adjacency(), first, 3, "sum")
    torch.testing.assert_close(propagate(moved.adjacency(), first[whole], 3, "sum"), before[whole])
