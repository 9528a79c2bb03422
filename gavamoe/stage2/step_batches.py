"""A worker's batches of each optimizer step, made one step ahead of the training.

Inputs: the config, the set-up, a worker's place, the rows' clusters. Output: for each step its accumulated batches and
the tokens of all workers' rows. A step's batches are a function of (seed, step, worker, clusters) alone, so that which
thread makes them, and when, changes nothing.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gavamoe.config.schema import RunConfig
from gavamoe.runtime.context import Context
from gavamoe.stage2.batches import Batch, BatchPlan, GateDropout, IdDropout, PairBatches
from gavamoe.stage2.setup import Setup


@dataclass(frozen=True)
class Step:
    """What a worker trains on in one optimizer step."""

    batches: list[Batch]
    """The worker's accumulated batches, A of them."""
    tokens: int
    """Tokens of all workers' rows, padding not counted."""


class StepBatches:
    """Makes a worker's batches: rows with their clusters, hidden ids and gates, stage-1 pairs."""

    def __init__(self, config: RunConfig, setup: Setup, context: Context) -> None:
        stage2 = config.stage2
        self._config, self._setup, self._context = config, setup, context
        self.plan = BatchPlan(
            setup.train.lengths, stage2.batch_size, context.world_size, stage2.gradient_accumulation, config.seed
        )
        self.clusters_N: np.ndarray = setup.clusters["train"]
        """Clusters of all training rows, (N,), or their responsibilities, (N, K); replaced where routes are renewed."""
        # Each of the accumulated batches gets an equal share of the step's pairs.
        self._pairs_per_batch = -(-stage2.elbo_batch_size // stage2.gradient_accumulation)
        pairs_per_step = self._pairs_per_batch * stage2.gradient_accumulation * context.world_size
        self._pairs = PairBatches(setup.pairs, pairs_per_step) if stage2.alpha > 0 else None
        unknown = config.stage1.unknown_id_rate
        self._id_dropout = IdDropout(max(unknown, stage2.slot_dropout), unknown, setup.model.explainer.slots)
        self._gate_dropout: GateDropout | None = None
        if stage2.gate_dropout:
            prior_K = torch.from_numpy(setup.clusters["train"].mean(axis=0))
            self._gate_dropout = GateDropout(stage2.gate_dropout, prior_K)

    def make(self, step: int) -> Step:
        """Those of optimizer step `step`, counted from 0; in pinned memory where they go to a GPU."""
        train, rank = self._setup.train, self._context.rank
        rows_AWB = self.plan.rows(step)
        accumulated, workers, _ = rows_AWB.shape
        # Tokens count alike wherever they are: each batch's sum is divided by the mean label count of all batches.
        labels = int(train.answers.lengths[rows_AWB].sum()) / (accumulated * workers)
        random = np.random.default_rng([self._config.seed, step, rank])
        pairs = self._worker_pairs(step, accumulated)
        batches = []
        for index, rows_WB in enumerate(rows_AWB):
            batch: Batch = {}
            if self._config.stage2.alpha < 1:
                batch = train.collate(rows_WB[rank], self.clusters_N, self._setup.pad)
                batch["input_ids"] = self._id_dropout.apply(batch["input_ids"], random)
                if self._gate_dropout is not None:
                    batch["cluster_ids"] = self._gate_dropout.apply(batch["cluster_ids"], random)
                batch["label_count"] = torch.tensor(labels)
            if pairs is not None:
                batch |= {name: values[index] for name, values in pairs.items()}
            batches.append(batch)
        if torch.device(self._context.device).type == "cuda":
            # From pinned memory the copy to the GPU runs beside the host and the GPU's arithmetic. The device is named,
            # or this thread's first use of CUDA would take memory on the first one.
            with torch.cuda.device(self._context.device):
                batches = [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in batches]
        return Step(batches, int(train.lengths[rows_AWB].sum()))

    def _worker_pairs(self, step: int, accumulated: int) -> dict[str, Tensor] | None:
        """This worker's stage-1 pairs of a step, each (A, P)."""
        if self._pairs is None:
            return None
        count, rank = self._pairs_per_batch * accumulated, self._context.rank
        pairs = self._pairs.step(step).take(slice(rank * count, (rank + 1) * count))
        columns = {"users": pairs.user, "items": pairs.item, "ratings": pairs.rating}
        return {name: torch.from_numpy(column).view(accumulated, -1) for name, column in columns.items()}


class OneAhead:
    """Makes what step after step asks for on a thread, one step before it is asked for."""

    def __init__(self, make: Callable[[int], Step]) -> None:
        self._make = make
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._made: tuple[int, Future[Step]] | None = None

    def take(self, step: int, *, ahead: bool) -> Step:
        """What `make` returns for this step; an error of it is raised here.

        Args:
            ahead: begin with the next step's. False where it depends on something that is still to come.
        """
        made, self._made = self._made, None
        found = made[1].result() if made else None  # never two at once: `make` need not bear it
        if made is None or made[0] != step:
            found = self._make(step)
        assert found is not None
        if ahead:
            self._made = step + 1, self._thread.submit(self._make, step + 1)
        return found

    def close(self) -> None:
        """End the thread; what it has made is dropped."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._made = None
