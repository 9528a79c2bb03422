"""From a dense decoder to GaVaMoE blocks: the explainer's sizes, and the weights of a block's experts.

Three ways (`stage2.experts.conversion`): random (the paper's), split (slices of the dense network) and shared (the
dense network stays, experts add to it).
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from gavamoe.config.schema import ExpertsConfig, RunConfig
from gavamoe.errors import InputError
from gavamoe.model.block import MultiGateMoe
from gavamoe.model.decoders import DECODERS, GavamoeConfig

SPLIT_ROUTER_STD = 1e-4
"""Standard deviation of the router's weights after `split`: every gate value starts near 1/N, which the scale of the
slices assumes."""
ALIGNMENT = 8
"""Sizes of experts must be multiples of this many numbers: grouped_mm reads rows in steps of 16 bytes, 8 numbers in
bfloat16."""


@dataclass(frozen=True)
class ExplainerSizes:
    """The sizes of an explainer that the data and stage 1 decide, not the base model."""

    users: int
    """Known users; their embedding table gets one row more, for all others."""
    items: int
    """Known items; their embedding table gets one row more, for all others."""
    slot_size: int
    """E: width of the user and item embeddings, which is stage 1's `embedding_size`."""
    gates: int
    """K: gates of each router, one per cluster, or 1 without multi-gating."""


def explainer_config(config: RunConfig, base: PreTrainedConfig, sizes: ExplainerSizes) -> GavamoeConfig:
    """The explainer's config for a dense base model's config, a run's settings, and `sizes`.

    Raises:
        InputError: an unsupported architecture, or experts whose sizes don't fit it.
    """
    if base.model_type not in DECODERS:
        supported = ", ".join(DECODERS)
        raise InputError(f"base_model: architecture {base.model_type!r} is not supported; supported: {supported}")
    experts = config.stage2.experts
    width = base.intermediate_size if base.model_type == "llama" else base.n_inner or 4 * base.hidden_size
    size = experts.intermediate_size or _default_expert_size(width, experts.count)
    if experts.enabled:
        _check_experts(base, experts, size, width)
    return GavamoeConfig(
        text_config=copy.deepcopy(base),
        n_users=sizes.users,
        n_items=sizes.items,
        slot_size=sizes.slot_size,
        n_gates=sizes.gates,
        experts_enabled=experts.enabled,
        n_experts=experts.count,
        experts_per_token=experts.top_k,
        expert_size=size,
        conversion=experts.conversion,
        renormalise=experts.renormalise,
        load_balance_weight=experts.load_balance_weight,
        router_z_weight=experts.router_z_weight,
        expert_kernel=experts.implementation,
        tie_word_embeddings=base.tie_word_embeddings,
        bos_token_id=base.bos_token_id,
        eos_token_id=base.eos_token_id,
        pad_token_id=base.pad_token_id,
    )


def _default_expert_size(width: int, count: int) -> int:
    """`width / count` where that is whole, else its nearest multiple of `ALIGNMENT`."""
    if width % count == 0:
        return width // count
    return max(1, round(width / count / ALIGNMENT)) * ALIGNMENT


def _check_experts(base: PreTrainedConfig, experts: ExpertsConfig, size: int, width: int) -> None:
    count = experts.count
    if experts.conversion == "split" and count * size != width:
        raise InputError(
            f"stage2.experts: split cuts the dense width {width} into equal slices, but {count} x {size} ="
            f" {count * size}; choose a count that divides {width} and intermediate_size 0, or another conversion"
        )
    if experts.conversion == "split" and getattr(base, "mlp_bias", False):
        raise InputError("stage2.experts: split can't keep the feed-forward biases of this base model; use shared")
    if experts.implementation in ("auto", "grouped_mm") and (size % ALIGNMENT or base.hidden_size % ALIGNMENT):
        raise InputError(
            f"stage2.experts: grouped_mm needs multiples of {ALIGNMENT}, not experts of {size} at hidden size"
            f" {base.hidden_size}; change intermediate_size or set implementation eager"
        )


@torch.no_grad()
def convert_block(block: MultiGateMoe, dense: nn.Module, experts: ExpertsConfig) -> None:
    """Fill a block's experts from the dense feed-forward network that it stands for.

    random: the block keeps the weights it was drawn with (the paper's). split: see `load_slices`; by importance, the
    dense network's neurons are put in order first. shared: the dense network becomes the shared expert and routed
    experts start at zero output, so the block starts as the dense one.
    """
    if experts.conversion == "shared" and block.shared_expert is not None:
        block.shared_expert.load_state_dict(dense.state_dict(), assign=True)
        block.experts.down_proj.zero_()  # the bias of GPT-2's experts is zero from the start
    elif experts.conversion == "split":
        if experts.split_by == "importance":
            sort_neurons(dense)
        block.experts.load_slices(dense)
        block.router.weight.mul_(SPLIT_ROUTER_STD / block.router.weight.std())


@torch.no_grad()
def sort_neurons(dense: Any) -> None:
    """Put a dense feed-forward network's neurons in falling order of importance, in place; its function is unchanged.

    A neuron's importance is the product of the norms of its weights, in and out: it scales what the neuron can add to
    the output. Slices by position hold neurons of every importance; after sorting the first slice holds the strongest.
    """
    gated = hasattr(dense, "gate_proj")
    # Each matrix with the dimension that counts neurons; GPT-2 stores (in, out).
    matrices = (
        [(dense.gate_proj.weight, 0), (dense.up_proj.weight, 0), (dense.down_proj.weight, 1)]
        if gated
        else [(dense.c_fc.weight, 1), (dense.c_proj.weight, 0)]
    )
    importance_I = torch.stack([weight.float().norm(dim=1 - neurons) for weight, neurons in matrices]).prod(dim=0)
    order_I = importance_I.argsort(descending=True, stable=True)
    for weight, neurons in matrices:
        weight.copy_(weight.index_select(neurons, order_I))
    if not gated:
        dense.c_fc.bias.copy_(dense.c_fc.bias[order_I])
