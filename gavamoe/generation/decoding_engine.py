"""Continuous batching: rows of different clusters, lengths and ages share each pass through the explainer.

`step()` reads the prompts of rows that wait (prefill), as far as slots are free, and writes one more token of every
row (decode). What all prompts begin with is read once a gate. A row joins while others are in the middle of their text
and leaves with its last token; its slot is free at the next step. A row's text depends on its own prompt, cluster and
seed alone (but for float rounding).

Why not transformers' continuous batching: it was tried (5.23). It packs all rows into one row of tokens and hands the
model a fixed set of arguments, so a cluster id per request cannot reach the router (every request fails there), and its
sampling has one generator for all rows.

Shape letters: B rows, T tokens, L read length of the cache, P tokens that all prompts begin with, X experts,
V vocabulary.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gavamoe.generation.graphed_step import decoding_pass
from gavamoe.generation.kv_cache import SlotCache
from gavamoe.generation.sampling import Choice, Sampling, choose_tokens
from gavamoe.model.explainer import GavamoeForCausalLM
from gavamoe.model.router import MultiGateRouter


class EngineFull(Exception):
    """No room to wait: as many rows wait as may."""


class Timings(NamedTuple):
    """Seconds of a finished row."""

    queue: float
    """From its arrival to the start of its prefill."""
    prefill: float
    """To its first token."""
    decode: float
    """From its first token to its last."""


@dataclass(eq=False)
class Row:
    """One text being written. The fields from `tokens` on are the engine's."""

    prompt: Sequence[int]
    route: int | tuple[float, ...]
    """Cluster, or for a model with soft routes the responsibilities (K,); the same kind in all rows of an engine."""
    sampling: Sampling
    trace: bool = False
    """Count which experts the row's tokens take."""
    tokens: list[int] = field(default_factory=list)
    """Written so far, the end of text included."""
    done: bool = False
    expert_use: Tensor | None = None
    """(layers, X): how many of the row's tokens took each expert."""
    arrived: float = field(default_factory=time.monotonic)
    started: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0

    @property
    def timings(self) -> Timings:
        """Seconds of a row that is done, by what they were spent on."""
        return Timings(
            self.started - self.arrived, self.first_token - self.started, max(self.finished - self.first_token, 0.0)
        )


class Engine:
    """A scheduler over one cache. Not thread-safe: `engine_thread.EngineThread` drives it."""

    def __init__(
        self,
        model: GavamoeForCausalLM,
        end: int,
        forbidden: Sequence[int],
        *,
        slots: int = 16,
        capacity: int = 256,
        max_waiting: int = 64,
        prefill_rows: int = 8,
        join_rows: int = 1,
        prefix: Sequence[int] = (),
    ) -> None:
        """
        Args:
            end: the token that ends a text.
            forbidden: tokens that are never written.
            slots: rows that are written at the same time, at most.
            capacity: longest prompt and text together, in tokens.
            max_waiting: rows that may wait for a slot.
            prefill_rows: new rows a step, at most: bounds how long the others wait for their next token.
            join_rows: slots that must be free before new rows join those being written. A prefill costs a pass of its
                own, so where nobody waits for a text, many together are cheaper.
            prefix: what prompts begin with. Its keys and values depend on a row's gate alone, so that they are computed
                once a gate and copied; a prompt without it is read whole.
        """
        self.model, self.end = model.eval(), end
        self.device = str(model.device)
        self.forbidden = torch.tensor(sorted(forbidden), dtype=torch.long, device=self.device)
        self.max_waiting, self.prefill_rows, self.join_rows = max_waiting, prefill_rows, join_rows
        self.capacity = min(capacity, model.config.text_config.max_position_embeddings)
        self.cache = SlotCache(model.config.text_config, slots, self.capacity, model.dtype, self.device)
        self.prefix = tuple(prefix)
        self._prefixes: SlotCache | None = None
        self.step_pass = decoding_pass(self.model, self.cache)
        """Decodes in fewer operations than the model's own forward pass; None where only that can."""
        self.waiting: deque[Row] = deque()
        self.active: list[Row] = []
        self._choices: list[Choice] = []
        self._lengths: list[int] = []

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.waiting or self.active)

    def submit(self, row: Row) -> None:
        """Let a row wait for its turn.

        Raises:
            EngineFull: too many wait.
            ValueError: prompt and text cannot fit into a slot.
        """
        if len(self.waiting) >= self.max_waiting:
            raise EngineFull(f"{len(self.waiting)} texts are waiting to be written")
        needed = len(row.prompt) + row.sampling.max_new_tokens
        if needed > self.capacity or not row.prompt:
            raise ValueError(f"{len(row.prompt)} prompt and {row.sampling.max_new_tokens} new tokens; at most"
                             f" {self.capacity} together fit")  # fmt: skip
        self.waiting.append(row)

    def cancel(self, row: Row) -> None:
        """Forget a row, whatever its state; its slot is free from now on."""
        if row in self.active:
            self._leave(self.active.index(row))
        elif row in self.waiting:
            self.waiting.remove(row)

    @torch.inference_mode()
    def step(self) -> list[Row]:
        """Prefill what may join, decode what is there; returns the rows that got a token, `done` with their last."""
        touched: dict[int, Row] = {}
        decoding = list(self.active)
        joining = self._admit()
        if joining:
            self._prefill(joining)
            touched |= {id(row): row for row in joining}
        if decoding:
            self._decode(decoding)
            touched |= {id(row): row for row in decoding}
        for slot in reversed(range(len(self.active))):
            if self.active[slot].done:
                self._leave(slot)
        return list(touched.values())

    def abandon(self) -> list[Row]:
        """Forget all rows, after an error; returns them."""
        rows = [*self.active, *self.waiting]
        self.waiting.clear()
        self.active.clear()
        self._choices.clear()
        self._lengths.clear()
        return rows

    def _admit(self) -> list[Row]:
        """Give waiting rows the free slots, which follow those in use."""
        free = self.cache.slots - len(self.active)
        if self.active and free < min(self.join_rows, len(self.waiting)):
            return []
        rows = [self.waiting.popleft() for _ in range(min(free, self.prefill_rows, len(self.waiting)))]
        self.active += rows
        self._choices += [Choice(row.sampling, list(row.prompt), self.end) for row in rows]
        self._lengths += [len(row.prompt) for row in rows]
        return rows

    def _prefill(self, rows: list[Row]) -> None:
        """Read the rows' prompts and write their first tokens."""
        started = time.monotonic()
        first = len(self.active) - len(rows)
        known = self._copy_prefixes(rows, first)
        unread = [row.prompt[known:] for row in rows]
        lengths = [len(prompt) for prompt in unread]
        width = max(lengths)
        # Padding is on the right, where causal attention of the tokens before never looks.
        ids_BT = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in unread], device=self.device)
        last_B = torch.tensor(lengths, device=self.device) - 1
        needed, place_B = torch.unique(last_B, return_inverse=True)
        for row in rows:
            row.started = started
        output = self._read(ids_BT, self.cache, first, known, needed, **self._inputs(rows))
        logits_BV = output.logits[torch.arange(len(rows), device=self.device), place_B]
        self._count_experts(rows, output.router_logits, lengths)
        self._write(slice(first, first + len(rows)), logits_BV)

    def _read(self, ids_BT: Tensor, cache: SlotCache, first: int, known: int, needed: Any, **inputs: Any) -> Any:
        """The model's forward pass over tokens of the rows in the slots from `first` on, which hold `known` before."""
        rows, width = ids_BT.shape
        return self.model(
            input_ids=ids_BT,
            position_ids=torch.arange(known, known + width, device=self.device)[None],
            attention_mask=_causal_mask(width, known, self.device),
            past_key_values=cache.prefill(first, rows, known),
            logits_to_keep=needed,
            **inputs,
        )

    def _copy_prefixes(self, rows: list[Row], first: int) -> int:
        """Put the prefix into the slots of new rows, if it is that of all; returns how many tokens they hold then.

        A row whose experts are counted reads its whole prompt, and so does one of soft routes, which shares its mixture
        of gates with no other.
        """
        size = len(self.prefix)
        if not size or not all(_begins_with(row, self.prefix) for row in rows):
            return 0
        if self._prefixes is None:
            self._prefixes = self._read_prefixes()
        one = self._prefixes.slots == 1
        gates = torch.tensor([0 if one else row.route for row in rows], device=self.device)
        self.cache.copy(self._prefixes, gates, first, size)
        return size

    def _read_prefixes(self) -> SlotCache:
        """The prefix as each gate reads it, a slot a gate."""
        routers = (module for module in self.model.modules() if isinstance(module, MultiGateRouter))
        gates = max((router.weight.shape[0] for router in routers), default=1)
        read = SlotCache(self.model.config.text_config, gates, len(self.prefix), self.model.dtype, self.device)
        ids_KP = torch.tensor([self.prefix] * gates, device=self.device)
        self._read(ids_KP, read, 0, 0, 1, cluster_ids=torch.arange(gates, device=self.device), use_cache=True)
        return read

    def _decode(self, rows: list[Row]) -> None:
        """Read each row's last token and write the next; `rows` are those in the slots 0..B-1."""
        count = len(rows)
        longest = max(self._lengths[:count]) + 1
        position_B = torch.tensor(self._lengths[:count], device=self.device)
        ids_B = torch.tensor([row.tokens[-1] for row in rows], device=self.device)
        inputs = self._inputs(rows)
        if self.step_pass is not None and not inputs["output_router_logits"]:
            logits_BV = self.step_pass(ids_B, position_B, inputs["cluster_ids"], self.cache, longest)
        else:
            seen_BL = torch.arange(longest, device=self.device)[None] <= position_B[:, None]
            output = self.model(
                input_ids=ids_B[:, None],
                position_ids=position_B[:, None],
                attention_mask=seen_BL[:, None, None],
                past_key_values=self.cache.decode(position_B, longest),
                **inputs,
            )
            self._count_experts(rows, output.router_logits, [1] * count)
            logits_BV = output.logits[:, -1]
        for slot in range(count):
            self._lengths[slot] += 1
        self._write(slice(0, count), logits_BV)

    def _inputs(self, rows: list[Row]) -> dict[str, Any]:
        return {
            "cluster_ids": torch.tensor([row.route for row in rows], device=self.device),
            "output_router_logits": any(row.trace for row in rows),
            "use_cache": True,
        }

    def _write(self, slots: slice, logits_BV: Tensor) -> None:
        rows = self.active[slots]
        tokens = choose_tokens(logits_BV, self._choices[slots], self.forbidden)
        now = time.monotonic()
        for row, token in zip(rows, tokens, strict=True):
            row.tokens.append(token)
            row.first_token = row.first_token or now
            if token == self.end or len(row.tokens) == row.sampling.max_new_tokens:
                row.done, row.finished = True, now

    def _count_experts(self, rows: list[Row], router_logits: tuple[Tensor, ...] | None, lengths: list[int]) -> None:
        if router_logits is None:
            return
        top_k = self.model.config.experts_per_token
        for at, row in enumerate(rows):
            if not row.trace:
                continue
            taken = [logits_BTX[at, : lengths[at]].topk(top_k, dim=-1).indices for logits_BTX in router_logits]
            experts = router_logits[0].shape[-1]
            counts = torch.stack([torch.bincount(indices.flatten(), minlength=experts) for indices in taken])
            row.expert_use = counts if row.expert_use is None else row.expert_use + counts

    def _leave(self, slot: int) -> None:
        """Free a slot; the last row takes it, so that the slots in use stay together."""
        last = len(self.active) - 1
        if slot != last:
            self.cache.move(last, slot, self._lengths[last])
        for column in (self.active, self._choices, self._lengths):
            values: list[Any] = column
            values[slot] = values[last]
            values.pop()


def _begins_with(row: Row, prefix: tuple[int, ...]) -> bool:
    """Whether a row can take over what was read of the prefix."""
    whole = row.trace or not isinstance(row.route, int)
    return not whole and len(row.prompt) > len(prefix) and tuple(row.prompt[: len(prefix)]) == prefix


def _causal_mask(width: int, known: int, device: str) -> Tensor:
    """(1, 1, T, known + T): a token sees all that was known before, and no later one."""
    return torch.ones(1, 1, width, known + width, dtype=torch.bool, device=device).tril(known)
