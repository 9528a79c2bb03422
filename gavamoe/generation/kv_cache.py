"""The keys and values of every row that is being written, in one block of memory per layer.

A row owns a slot; slots 0..n-1 are in use, so a forward pass over all rows reads a plain slice, without copies.
A row's token at position p is stored at index p of its slot, so rows of different lengths need no padding: what lies
behind a row's length is masked. When a row leaves, the last row moves into its slot.

Shape letters: S slots, C capacity in tokens, H key-value heads, F head size, B rows of a pass, T its tokens a row.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class SlotCache:
    """Keys and values, (S, H, C, F) per layer."""

    def __init__(self, text_config: Any, slots: int, capacity: int, dtype: torch.dtype, device: str) -> None:
        """`text_config` is the decoder's own, LLaMA's or GPT-2's."""
        heads = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
        head_size = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
        self.slots, self.capacity = slots, capacity
        shape = (text_config.num_hidden_layers, slots, heads, capacity, head_size)
        # Zeros, not empty: a masked weight of 0 times an uninitialized NaN would be NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def prefill(self, first: int, rows: int, known: int = 0) -> "PrefillWindow":
        """For a pass over the prompts of `rows` new rows, which take the slots from `first` on and hold the first
        `known` tokens already."""
        return PrefillWindow(self, first, rows, known)

    def decode(self, position_B: Tensor, longest: int) -> "DecodeWindow":
        """For a pass over one more token of each of the rows 0..B-1, the token of row b at `position_B[b]`.

        `longest` is one more than the largest position: how much of the slots is read.
        """
        return DecodeWindow(self, position_B, longest)

    def copy(self, source: "SlotCache", slot_B: Tensor, first: int, length: int) -> None:
        """Fill the first `length` places of B slots, from `first` on, from slots of another cache."""
        slots = slice(first, first + len(slot_B))
        self.keys[:, slots, :, :length] = source.keys[:, :, :, :length].index_select(1, slot_B)
        self.values[:, slots, :, :length] = source.values[:, :, :, :length].index_select(1, slot_B)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot to another."""
        self.keys[:, target, :, :length] = self.keys[:, source, :, :length]
        self.values[:, target, :, :length] = self.values[:, source, :, :length]


@dataclass(frozen=True)
class PrefillWindow:
    """What attention sees as its cache while prompts are read: what the slots hold, and the tokens of the pass."""

    cache: SlotCache
    first: int
    rows: int
    known: int

    def update(self, keys_BHTF: Tensor, values_BHTF: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store the pass's keys and values, and return them behind those before, (B, H, known + T, F)."""
        slots, end = slice(self.first, self.first + self.rows), self.known + keys_BHTF.shape[2]
        keys_BHCF, values_BHCF = self.cache.keys[layer, slots], self.cache.values[layer, slots]
        keys_BHCF[:, :, self.known : end] = keys_BHTF
        values_BHCF[:, :, self.known : end] = values_BHTF
        if not self.known:
            return keys_BHTF, values_BHTF
        return keys_BHCF[:, :, :end], values_BHCF[:, :, :end]


@dataclass(frozen=True)
class DecodeWindow:
    """What attention sees as its cache while each row reads one token."""

    cache: SlotCache
    position_B: Tensor
    longest: int

    def update(self, keys_BH1F: Tensor, values_BH1F: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store one token of each row and return all that the rows have stored, (B, H, longest, F)."""
        rows = self.position_B.shape[0]
        row_B = torch.arange(rows, device=self.position_B.device)
        keys_SHCF, values_SHCF = self.cache.keys[layer], self.cache.values[layer]
        keys_SHCF[row_B, :, self.position_B] = keys_BH1F[:, :, 0]
        values_SHCF[row_B, :, self.position_B] = values_BH1F[:, :, 0]
        return keys_SHCF[:rows, :, : self.longest], values_SHCF[:rows, :, : self.longest]
