"""LightGCN, whose vectors XRec reads: He et al., "LightGCN: Simplifying and Powering Graph Convolution Network for
Recommendation", SIGIR 2020.

Each user and item has a vector; what is passed along the graph of their pairs, again and again, is the mean of the
neighbors' vectors, E^{k+1} = D^{-1/2} A D^{-1/2} E^k (Eq. 3 there), and the result adds up all E^k. They are trained so
that a user's product with an item of its own exceeds that with another one (BPR), and then stay as they are.

Edges are the training pairs rated above the middle of the scale (XRec's data have more than 3 stars only); all pairs
of data without ratings. As XRec's code has it: the sum of the layers, where LightGCN's paper takes their mean; Adam;
the weight of the norms. Ours: negatives are drawn anew in each epoch, not once; training stops by the loss of edges
held out, not by a recall; users and items without an edge get zeros, not the noise that they started from.

Shapes: U users, I items, N nodes (users, then items), E edges, D vector size.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gavamoe.config.schema import LightGcnConfig
from gavamoe.data.dataset import Dataset

_DRAWS = 10
"""Draws of a negative at most; a user who has nearly all items may then get one of its own."""
_WATCHED = 8
"""Negatives of each edge held out, the same ones after every epoch."""


@dataclass(frozen=True)
class Graph:
    """Pairs of users and items; a pair that comes twice is one edge."""

    n_users: int
    n_items: int
    keys: np.ndarray
    """user * I + item of each edge, ascending: int64 (E,)."""

    @classmethod
    def of(cls, users: np.ndarray, items: np.ndarray, n_users: int, n_items: int) -> "Graph":
        """The graph of pairs, given by column."""
        return cls(n_users, n_items, np.unique(users.astype(np.int64) * n_items + items))

    @classmethod
    def read(cls, data: Dataset) -> "Graph":
        """The graph of a dataset's training rows; it has no edge where no rating is above the middle."""
        pairs, scale = data.arrays("train"), data.rating_range
        liked = np.full(len(pairs.user), True) if scale is None else pairs.rating > sum(scale) / 2
        return cls.of(pairs.user[liked], pairs.item[liked], data.catalog.known_users, data.catalog.known_items)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def users(self) -> np.ndarray:
        """The user of each edge, int64 (E,)."""
        users: np.ndarray = self.keys // self.n_items
        return users

    @property
    def items(self) -> np.ndarray:
        """The item of each edge, int64 (E,)."""
        items: np.ndarray = self.keys % self.n_items
        return items

    @cached_property
    def degrees(self) -> np.ndarray:
        """Edges of each node, int64 (N,)."""
        of_users = np.bincount(self.users, minlength=self.n_users)
        return np.concatenate([of_users, np.bincount(self.items, minlength=self.n_items)])

    def adjacency(self) -> Tensor:
        """D^{-1/2} A D^{-1/2}, sparse (N, N)."""
        user_E, item_E = self.users, self.items + self.n_users
        weight_E = 1 / np.sqrt(self.degrees[user_E] * self.degrees[item_E])
        places_2M = np.stack([np.concatenate([user_E, item_E]), np.concatenate([item_E, user_E])])
        values_M = torch.from_numpy(np.tile(weight_E, 2)).float()
        shape = (self.n_users + self.n_items,) * 2
        return torch.sparse_coo_tensor(torch.from_numpy(places_2M), values_M, shape, check_invariants=True).coalesce()

    def negatives(self, users: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """For each of some users an item that it has no edge to, as good as ever."""
        items = random.integers(self.n_items, size=len(users))
        for _ in range(_DRAWS):
            keys = users * self.n_items + items
            found = self.keys[np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)] == keys
            if not found.any():
                break
            items[found] = random.integers(self.n_items, size=int(found.sum()))
        return items

    def split(self, share: float, random: np.random.Generator) -> "tuple[Graph, Graph]":
        """A graph without about a share of the edges, and these; every node keeps an edge that it had."""
        degrees, held = self.degrees.copy(), []
        for edge in random.permutation(len(self))[: round(share * len(self))]:
            user, item = int(self.keys[edge]) // self.n_items, self.n_users + int(self.keys[edge]) % self.n_items
            if degrees[user] > 1 and degrees[item] > 1:
                degrees[user] -= 1
                degrees[item] -= 1
                held.append(edge)
        apart = np.zeros(len(self), dtype=bool)
        apart[np.array(held, dtype=np.int64)] = True
        return Graph(self.n_users, self.n_items, self.keys[~apart]), Graph(self.n_users, self.n_items, self.keys[apart])


def propagate(adjacency_NN: Tensor, first_ND: Tensor, layers: int, pooling: Literal["sum", "mean"]) -> Tensor:
    """The sum or mean of E^0 to E^layers, (N, D)."""
    total_ND = layer_ND = first_ND
    for _ in range(layers):
        layer_ND = torch.sparse.mm(adjacency_NN, layer_ND)
        total_ND = total_ND + layer_ND
    return total_ND / (layers + 1) if pooling == "mean" else total_ND


def ranking_loss(user_BD: Tensor, liked_BD: Tensor, other_BD: Tensor) -> Tensor:
    """BPR: mean of -log sigmoid(user . liked - user . other)."""
    return -F.logsigmoid((user_BD * liked_BD).sum(dim=-1) - (user_BD * other_BD).sum(dim=-1)).mean()


def learn_vectors(graph: Graph, size: LightGcnConfig, seed: int) -> tuple[Tensor, Tensor]:
    """Vectors of users (U, D) and items (I, D), learned on the CPU; equal graphs and seeds give equal vectors."""
    random = np.random.default_rng([seed, len(graph)])
    first_ND = _first(graph, size, seed)
    kept, held = graph.split(size.held_out, random)
    watched_E = np.repeat(held.users, _WATCHED)
    watched = (watched_E, np.repeat(held.items, _WATCHED), graph.negatives(watched_E, random))
    adjacency_NN = kept.adjacency()
    optimizer = torch.optim.Adam([first_ND], lr=size.learning_rate)
    best, lowest, worse = first_ND.detach().clone(), math.inf, 0
    for _ in range(size.epochs):
        for batch in _batches(kept, graph, size.batch_size, random):
            vectors_ND = propagate(adjacency_NN, first_ND, size.layers, size.pooling)
            looked_up = _looked_up(vectors_ND, batch, graph.n_users)
            norms = torch.stack([vectors.square().sum() for vectors in looked_up]).sum()
            optimizer.zero_grad()
            (ranking_loss(*looked_up) + size.norm_weight * norms).backward()
            optimizer.step()
        if len(held):
            with torch.no_grad():
                vectors_ND = propagate(adjacency_NN, first_ND, size.layers, size.pooling)
                loss = float(ranking_loss(*_looked_up(vectors_ND, watched, graph.n_users)))
            worse = 0 if loss < lowest else worse + 1
            if worse >= size.patience:
                break
            lowest = min(loss, lowest)
        if not worse:
            best = first_ND.detach().clone()
    vectors_ND = propagate(graph.adjacency(), best, size.layers, size.pooling)
    vectors_ND[torch.from_numpy(graph.degrees == 0)] = 0
    return vectors_ND[: graph.n_users], vectors_ND[graph.n_users :]


def _first(graph: Graph, size: LightGcnConfig, seed: int) -> nn.Parameter:
    """E^0 before training (N, D): Xavier, uniform, users and items apart."""
    generator = torch.Generator().manual_seed(seed)
    tables = [torch.empty(nodes, size.vector_size) for nodes in (graph.n_users, graph.n_items)]
    for table in tables:
        nn.init.xavier_uniform_(table, generator=generator)
    return nn.Parameter(torch.cat(tables))


def _batches(
    kept: Graph, graph: Graph, size: int, random: np.random.Generator
) -> Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """All kept edges in a new order with a new negative each: users, their items, items of others, `size` at a time."""
    order = random.permutation(len(kept))
    users, items = kept.users[order], kept.items[order]
    others = graph.negatives(users, random)
    for start in range(0, len(order), size):
        part = slice(start, start + size)
        yield users[part], items[part], others[part]


def _looked_up(
    vectors_ND: Tensor, batch: tuple[np.ndarray, np.ndarray, np.ndarray], n_users: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The vectors of a batch's users, their items and the other items."""
    user_B, liked_B, other_B = (torch.from_numpy(index) for index in batch)
    return vectors_ND[user_B], vectors_ND[n_users + liked_B], vectors_ND[n_users + other_B]
