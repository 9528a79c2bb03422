"""Stage 2's batches: tokenized rows in memory, their order, and the tensors of a batch.

Purpose: rows -> batches whose order is a function of (seed, epoch) alone, so that a resumed run and a run on
another number of workers see the same ones. Cluster ids travel with the rows, as a column.
Inputs: token ids from `generation.prompts`. Outputs: dicts of tensors for `joint_model.JointModel`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
import torch
from torch import Tensor

from gavamoe.model.explainer import IGNORED
from gavamoe.model.slots import SlotIds
from gavamoe.stage1.pair_stream import Epoch, Pairs, PairSource

WINDOW_STEPS = 64
"""Steps whose shuffled rows are sorted by length together, at most: under 2 % of padding, and still mixed."""

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Ragged:
    """N sequences of different length in one array."""

    values: np.ndarray
    """All sequences one after the other: int32."""
    offsets: np.ndarray
    """Where each sequence begins in `values`, and where the last one ends: int64 (N + 1,)."""

    @classmethod
    def pack(cls, sequences: Sequence[Sequence[int]]) -> "Ragged":
        """Copy lists into one array."""
        lengths = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences))
        offsets = np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])
        values = np.fromiter(chain.from_iterable(sequences), dtype=np.int32, count=int(offsets[-1]))
        return cls(values, offsets)

    @classmethod
    def join(cls, parts: Sequence["Ragged"]) -> "Ragged":
        """All sequences of several, in order."""
        lengths = np.concatenate([part.lengths for part in parts])
        values = np.concatenate([part.values for part in parts])
        return cls(values, np.concatenate([np.zeros(1, np.int64), lengths.cumsum()]))

    def take(self, rows: np.ndarray) -> "Ragged":
        """Copies of the given sequences, in that order."""
        return Ragged.pack([self[int(row)].tolist() for row in rows])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        sequence: np.ndarray = self.values[self.offsets[row] : self.offsets[row + 1]]
        return sequence

    @property
    def lengths(self) -> np.ndarray:
        """Length of each sequence: int64 (N,)."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class TextRows:
    """Prompts and answers of a split, in its row order."""

    prompts: Ragged
    answers: Ragged

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, prompt and answer: int64 (N,)."""
        return self.prompts.lengths + self.answers.lengths

    def collate(self, rows: np.ndarray, clusters: np.ndarray, pad: int) -> Batch:
        """Tensors of the given rows, padded on the right; only answers carry labels.

        Args:
            clusters: of all rows, whole numbers (N,), or responsibilities, float32 (N, K).

        Returns:
            input_ids, attention_mask, labels: int64 (B, T); cluster_ids: int64 (B,) or float32 (B, K).
        """
        pieces = [(self.prompts[row], self.answers[row]) for row in rows]
        width = max(len(prompt) + len(answer) for prompt, answer in pieces)
        ids_BT = np.full((len(rows), width), pad, dtype=np.int64)
        mask_BT = np.zeros_like(ids_BT)
        labels_BT = np.full_like(ids_BT, IGNORED)
        for index, (prompt, answer) in enumerate(pieces):
            start, end = len(prompt), len(prompt) + len(answer)
            ids_BT[index, :start] = prompt
            ids_BT[index, start:end] = labels_BT[index, start:end] = answer
            mask_BT[index, :end] = 1
        return {
            "input_ids": torch.from_numpy(ids_BT),
            "attention_mask": torch.from_numpy(mask_BT),
            "labels": torch.from_numpy(labels_BT),
            "cluster_ids": torch.from_numpy(clusters[rows].astype(np.int64 if clusters.ndim == 1 else np.float32)),
        }


@dataclass(frozen=True)
class IdDropout:
    """Id dropout: replaces some users and items by the unknown ones, so that users never seen can be served."""

    users: float
    """Share of the rows whose user is replaced."""
    items: float
    """Share of the rows whose item is replaced."""
    slots: SlotIds

    def apply(self, input_ids_BT: Tensor, random: np.random.Generator) -> Tensor:
        """The same ids with the user, the item or both replaced in a random share of the rows: int64 (B, T)."""
        hidden_B2 = torch.from_numpy(random.random((len(input_ids_BT), 2)) < (self.users, self.items))
        slots = self.slots
        is_item = (input_ids_BT >= slots.first_item) & (input_ids_BT <= slots.unknown_item)
        is_user = (input_ids_BT >= slots.vocabulary) & (input_ids_BT < slots.first_item)
        ids_BT = input_ids_BT.masked_fill(is_user & hidden_B2[:, :1], slots.unknown_user)
        return ids_BT.masked_fill(is_item & hidden_B2[:, 1:], slots.unknown_item)


@dataclass(frozen=True)
class GateDropout:
    """Gate dropout: some rows get the clusters' shares for their responsibilities, as users have of whom nothing is
    known, so that the mixture of all gates is trained too."""

    rate: float
    """Share of the rows whose responsibilities are replaced."""
    prior_K: Tensor
    """Shares of the clusters: float32 (K,)."""

    def apply(self, share_BK: Tensor, random: np.random.Generator) -> Tensor:
        """The same responsibilities, replaced in a random share of the rows: float32 (B, K)."""
        dropped_B = torch.from_numpy(random.random(len(share_BK)) < self.rate)
        return torch.where(dropped_B[:, None], self.prior_K, share_BK)


class BatchPlan:
    """Which rows which worker takes at which step.

    The rows of a step depend on the seed, the epoch and the product A x W x B alone, so that one worker
    with twice the accumulation takes the same steps as two workers. An epoch's last step is filled up from
    the epoch's beginning: every worker always has a full batch.
    """

    def __init__(
        self,
        length_N: np.ndarray,
        batch_size: int,
        world_size: int,
        accumulation: int,
        seed: int,
        window_steps: int = WINDOW_STEPS,
    ) -> None:
        if not len(length_N):
            raise ValueError("no rows to make batches of")
        self._length_N, self._seed, self._window_steps = length_N, seed, window_steps
        self._shape = (accumulation, world_size, batch_size)
        self._rows = accumulation * world_size * batch_size
        self.steps_per_epoch = -(-len(length_N) // self._rows)
        self._order: tuple[int, np.ndarray] | None = None

    def rows(self, step: int) -> np.ndarray:
        """Row numbers of optimizer step `step`, counted from 0 over all epochs: int64 (A, W, B)."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self._epoch_order(epoch))
        rows_AWB: np.ndarray = self._order[1][index].reshape(self._shape)
        return rows_AWB

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """All rows in the epoch's order: (steps, rows of a step)."""
        random = np.random.default_rng([self._seed, epoch])
        # A batch is padded to its longest row, so a random batch is padded a lot. Sorting all rows by length would
        # avoid that, but hold the same rows together in every epoch. So rows are shuffled first and sorted within
        # windows only: a batch holds rows of like length, drawn from a random window. Windows are equal (to a step): a
        # short one at the end would be padded more. Where the last step lacks rows, `resize` takes them from the
        # permutation's beginning.
        shuffled = np.resize(random.permutation(len(self._length_N)), self.steps_per_epoch * self._rows)
        windows = -(-self.steps_per_epoch // self._window_steps)
        cuts = np.arange(windows + 1) * self.steps_per_epoch // windows * self._rows
        for start, end in pairwise(cuts):
            rows = shuffled[start:end]
            shuffled[start:end] = rows[np.argsort(self._length_N[rows], kind="stable")]
        # Sorted windows would train short texts first and long ones last, again and again: the steps are shuffled too.
        steps = shuffled.reshape(self.steps_per_epoch, self._rows)
        ordered: np.ndarray = steps[random.permutation(self.steps_per_epoch)]
        return ordered


class PairBatches:
    """Stage-1 pairs for the ELBO, in stage 1's own seeded order: epoch after epoch, without their last odd pairs."""

    def __init__(self, source: PairSource, pairs_per_step: int) -> None:
        self._source, self._size = source, pairs_per_step
        self._start()

    def step(self, step: int) -> Pairs:
        """The pairs of optimizer step `step` for all workers, (pairs_per_step,); too few pairs are repeated."""
        if step < self._first:
            self._start()
        while step >= self._first + self._steps:
            self._turn(self._epoch + 1, self._first + self._steps)
        index = step - self._first
        return self._pairs.take(slice(index * self._size, (index + 1) * self._size))

    def _start(self) -> None:
        self._turn(0, 0)

    def _turn(self, epoch: int, first_step: int) -> None:
        """Load an epoch, whose length may differ from the last one's where negatives are sampled."""
        pairs: Epoch | Pairs = self._source.epoch(epoch)
        if pairs.size < self._size:
            pairs = pairs.take(slice(0, pairs.size)).take(np.resize(np.arange(pairs.size), self._size))
        self._epoch, self._first, self._pairs = epoch, first_step, pairs
        self._steps = pairs.size // self._size
