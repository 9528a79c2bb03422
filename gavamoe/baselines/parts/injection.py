"""Vectors that are added to queries, keys and values of some positions, in every layer of a language model.

XRec adds the same vector, as wide as the model, to all three, after their projections and before they are split into
heads and rotated. Where several query heads share a key and value head, keys and values are narrower than queries: then
the mean over the heads that share one is added (ours; it is the vector itself where none share).

Shapes: B rows, S positions, K positions that get a vector, D width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from gavamoe.errors import InputError


def check_width(config: PreTrainedConfig) -> None:
    """Raise InputError unless queries are as wide as the model, so that one vector fits both."""
    width, heads = config.hidden_size, config.num_attention_heads
    queries = heads * (getattr(config, "head_dim", None) or width // heads)
    if queries != width:
        raise InputError(
            f"stage2.base_model: its queries are {queries} wide and its states {width}, and XRec adds one vector to"
            " both; give another base model"
        )


def folded(vectors: Tensor, heads: int, shared_heads: int) -> Tensor:
    """The mean over the query heads that share a key and value head: (..., D) to (..., D * shared_heads / heads)."""
    split = vectors.unflatten(-1, (shared_heads, heads // shared_heads, -1))
    return split.mean(dim=-2).flatten(-2)


@contextmanager
def injected(model: PreTrainedModel, vectors_BKD: Tensor, places_BK: Tensor, positions: int) -> Iterator[None]:
    """Inside, calls that read `positions` positions at once add vectors at the places; other calls, which continue from
    a cache, do not: they see them in its keys and values.

    Args:
        positions: length of the input, padding included; more than 1.
        places_BK: positions in that input.
    """
    handles = []
    try:
        for module, added_BKD in _projections(model, vectors_BKD):
            handles.append(module.register_forward_hook(_adding(added_BKD, places_BK, positions)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _projections(model: PreTrainedModel, vectors_BKD: Tensor) -> Iterator[tuple[nn.Module, Tensor]]:
    """The projections of all layers, with what is added to the output of each."""
    config = model.config
    heads = config.num_attention_heads
    narrow = folded(vectors_BKD, heads, getattr(config, "num_key_value_heads", None) or heads)
    added = {
        ".self_attn.q_proj": vectors_BKD,
        ".self_attn.k_proj": narrow,
        ".self_attn.v_proj": narrow,
        ".attn.c_attn": vectors_BKD.repeat(1, 1, 3),  # GPT-2: queries, keys and values side by side
    }
    for name, module in model.named_modules():
        for end, vectors in added.items():
            if name.endswith(end):
                yield module, vectors


def _adding(added_BKD: Tensor, places_BK: Tensor, positions: int) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """A forward hook."""
    rows_B1 = torch.arange(len(places_BK), device=places_BK.device)[:, None]

    def add(module: nn.Module, inputs: Any, output_BSD: Tensor) -> Tensor:
        del module, inputs
        if output_BSD.shape[1] != positions:
            return output_BSD
        return output_BSD.index_put((rows_B1, places_BK), added_BKD.to(output_BSD.dtype), accumulate=True)

    return add
