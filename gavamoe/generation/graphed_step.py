"""The decoding pass with its inputs at fixed places: on a GPU recorded once a size as a CUDA graph and replayed.

A decoding step of a large model is some hundred kernels of a few microseconds each, and launching them one by one from
Python takes longer than they do. A CUDA graph launches them all at once, with the sizes and addresses that they were
recorded with. So rows and read length are rounded up here to a few sizes, and what a step reads is copied to tensors
that stay. Rows that fill up a size write to the last place of the slots behind, which no text ever reaches.

Elsewhere than on a GPU (tests) the same inputs go through the same pass, without recording.

Shape letters: B rows, V vocabulary.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gavamoe.generation.kv_cache import SlotCache
from gavamoe.generation.llama_step import LlamaStep
from gavamoe.model.explainer import GavamoeForCausalLM

_log = logging.getLogger(__name__)
_LENGTHS = 64
"""Read lengths are multiples of this."""
_WARM_UPS = 2
"""Passes before one is recorded: libraries choose their kernels and make their workspaces in the first ones."""


def decoding_pass(model: GavamoeForCausalLM, cache: SlotCache) -> "GraphedStep | LlamaStep | None":
    """The fastest decoding pass of a model on its device; None where only its own forward pass decodes it."""
    step = LlamaStep.of(model, cache.capacity)
    return GraphedStep(step, cache) if step is not None and cache.keys.device.type == "cuda" else step


class GraphedStep:
    """A `LlamaStep` over one cache, of a few sizes."""

    def __init__(self, step: LlamaStep, cache: SlotCache) -> None:
        self.plain, self._cache = step, cache
        self._records = cache.keys.device.type == "cuda"
        self._ids, self._positions, self._clusters = (
            torch.zeros(cache.slots, dtype=torch.long, device=cache.keys.device) for _ in range(3)
        )
        self._replays: dict[tuple[int, int], Callable[[], Tensor]] = {}
        self._pool: Any = None

    def __call__(self, ids_B: Tensor, position_B: Tensor, clusters_B: Tensor, cache: SlotCache, longest: int) -> Tensor:
        """As `LlamaStep`'s: logits (B, V). `cache` is the one that was given at the start."""
        assert cache is self._cache
        count = len(ids_B)
        rows, length = self.size(count, longest)
        for kept, given in ((self._ids, ids_B), (self._positions, position_B), (self._clusters, clusters_B)):
            kept[:count] = given
        # A text's last token is written, but never read: place `capacity` - 1 stays free. The slots behind may hold
        # prompts that were read in this very step.
        self._positions[count:rows] = cache.capacity - 1
        return self._replay(rows, length)()[:count]

    def size(self, rows: int, longest: int) -> tuple[int, int]:
        """The rows and the read length that a step of these sizes has: rows a power of two, or all."""
        return (
            min(1 << (rows - 1).bit_length(), self._cache.slots),
            min(-(-longest // _LENGTHS) * _LENGTHS, self._cache.capacity),
        )

    def _replay(self, rows: int, length: int) -> Callable[[], Tensor]:
        size = (rows, length)
        if size not in self._replays:
            self._replays[size] = self._recorded(rows, length) if self._records else self._passed(rows, length)
        return self._replays[size]

    def _passed(self, rows: int, length: int) -> Callable[[], Tensor]:
        """The pass itself. Clusters are copied, since the pass compares them with those of the step before."""
        return lambda: self.plain(
            self._ids[:rows], self._positions[:rows], self._clusters[:rows].clone(), self._cache, length
        )

    def _recorded(self, rows: int, length: int) -> Callable[[], Tensor]:
        """The pass as a graph; the pass itself where it can't be recorded."""
        run = self._passed(rows, length)
        try:
            beside = torch.cuda.Stream()
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                for _ in range(_WARM_UPS):
                    run()
            torch.cuda.current_stream().wait_stream(beside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                logits_BV = run()
        except RuntimeError:
            _log.warning(
                "the decoding pass can't be recorded as a CUDA graph; texts are the same, slower", exc_info=True
            )
            self._records = False
            return run
        self._pool = self._pool or graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return logits_BV

        return replay
