"""From a dense decoder to GaVaMoE blocks: the explainer's sizes, and the weights of a block's experts.

Five ways (`stage2.experts.conversion`): random (the paper's), split (slices of the dense network), shared (the dense
network stays, experts add to it), upcycle (its strongest neurons become N experts) and lora (it stays frozen, low-rank
experts add to it).

Why `shared` starts from copies and is scaled: a routed expert of new, small weights, beside a trained network, has an
output so small that its down projection, which starts at zero, moves thousands of times slower than the dense one
(SwiGLU is quadratic in its input). Under Adam each weight moves by the learning rate, so an output moves by that times
the sum of its inputs' sizes: for neurons of the dense kind, I of N x I of them with gate values that add up to 1,
1/N as fast as the dense layer, which `scale` makes up for.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from gavamoe.config.schema import ExpertsConfig, RunConfig
from gavamoe.errors import InputError
from gavamoe.model.block import MultiGateMoe
from gavamoe.model.decoders import DECODERS, GavamoeConfig, dense_width
from gavamoe.model.slots import RATING_PLACES
from gavamoe.model.tables.layout import TableLayout

SPLIT_ROUTER_STD = 1e-4
"""Standard deviation of the router's weights after `split`: every gate value starts near 1/N, which the scale of the
slices assumes."""
UPCYCLE_NOISE = 0.01
"""Noise on the copies of `upcycle`, relative to the weights' root mean square: of equal experts no gate could prefer
one, since its gradient is the difference of their outputs."""
LORA_SCALE = 16.0
"""Factor on the output of `lora`'s experts."""
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
    tables: TableLayout = field(default_factory=TableLayout)
    """How stage 1 keeps the embedding tables."""
    rating_spread: float = 0.0
    """Standard deviation of ratings around stage 1's expectation, as a share of the scale's range, for soft ratings."""


def explainer_config(config: RunConfig, base: PreTrainedConfig, sizes: ExplainerSizes) -> GavamoeConfig:
    """The explainer's config for a dense base model's config, a run's settings, and `sizes`.

    Raises:
        InputError: an unsupported architecture, or experts whose sizes don't fit it.
    """
    if base.model_type not in DECODERS:
        supported = ", ".join(DECODERS)
        raise InputError(f"base_model: architecture {base.model_type!r} is not supported; supported: {supported}")
    experts = config.stage2.experts
    width, size = dense_width(base), expert_width(experts, base)
    if experts.enabled:
        _check_experts(base, experts, size, width)
    text = copy.deepcopy(base)
    if config.stage2.extra_width:
        setattr(
            text, "intermediate_size" if base.model_type == "llama" else "n_inner", width + config.stage2.extra_width
        )
    return GavamoeConfig(
        text_config=text,
        n_users=sizes.users,
        n_items=sizes.items,
        slot_size=sizes.slot_size,
        table_kind=sizes.tables.kind,
        user_table_rows=sizes.tables.user_rows,
        item_table_rows=sizes.tables.item_rows,
        table_hashes=sizes.tables.hashes,
        table_seed=sizes.tables.seed,
        n_gates=sizes.gates,
        experts_enabled=experts.enabled,
        n_experts=experts.count,
        experts_per_token=experts.top_k,
        expert_size=size,
        conversion=experts.conversion,
        expert_lora_rank=experts.lora_rank if experts.conversion == "lora" else 0,
        renormalise=experts.renormalised,
        expert_scale=experts.scale or _default_scale(experts, size, width),
        gate_bias=experts.gate_bias,
        soft_routes=config.stage2.soft_routes,
        n_cluster_slots=config.stage1.clusters if config.stage2.prompt.cluster else 0,
        rating_places=RATING_PLACES if config.stage2.prompt.soft_rating else 0,
        rating_spread=sizes.rating_spread,
        load_balance_weight=experts.load_balance_weight,
        router_z_weight=experts.router_z_weight,
        expert_kernel=experts.implementation,
        tie_word_embeddings=base.tie_word_embeddings,
        bos_token_id=base.bos_token_id,
        eos_token_id=base.eos_token_id,
        pad_token_id=base.pad_token_id,
    )


def expert_width(experts: ExpertsConfig, base: PreTrainedConfig) -> int:
    """Width of one expert: as set, else the dense width by their number where that is whole, else the nearest multiple
    of `ALIGNMENT` to it."""
    width, count = dense_width(base), experts.count
    if experts.intermediate_size:
        return experts.intermediate_size
    if width % count == 0:
        return width // count
    return max(1, round(width / count / ALIGNMENT)) * ALIGNMENT


def _default_scale(experts: ExpertsConfig, size: int, width: int) -> float:
    return {"shared": width / size, "lora": LORA_SCALE}.get(experts.conversion, 1.0)


def _check_experts(base: PreTrainedConfig, experts: ExpertsConfig, size: int, width: int) -> None:
    count = experts.count
    if experts.conversion == "split" and count * size != width:
        raise InputError(
            f"stage2.experts: split cuts the dense width {width} into equal slices, but {count} x {size} ="
            f" {count * size}; choose a count that divides {width} and intermediate_size 0, or another conversion"
        )
    if experts.conversion == "split" and getattr(base, "mlp_bias", False):
        raise InputError("stage2.experts: split can't keep the feed-forward biases of this base model; use shared")
    if experts.conversion == "upcycle" and size >= width:
        raise InputError(
            f"stage2.experts: upcycle copies the {size} strongest of the dense layer's {width} neurons and keeps the"
            " rest; choose a smaller intermediate_size"
        )
    if experts.conversion == "upcycle" and getattr(base, "mlp_bias", False):
        raise InputError("stage2.experts: upcycle can't keep the feed-forward biases of this base model; use shared")
    if experts.conversion == "lora":
        return  # such experts have no width
    if experts.implementation in ("auto", "grouped_mm") and (size % ALIGNMENT or base.hidden_size % ALIGNMENT):
        raise InputError(
            f"stage2.experts: grouped_mm needs multiples of {ALIGNMENT}, not experts of {size} at hidden size"
            f" {base.hidden_size}; change intermediate_size or set implementation eager"
        )


@torch.no_grad()
def convert_block(block: MultiGateMoe, dense: nn.Module, experts: ExpertsConfig) -> None:
    """Fill a block's experts from the dense feed-forward network that it stands for.

    random: the block keeps the weights it was drawn with (the paper's). split: see `load_slices`; by importance, the
    dense network's neurons are put in order first. shared: the dense network becomes the shared expert; its neurons are
    dealt to the routed experts, whose output starts at zero, so the block starts as the dense one, bit for bit.
    upcycle: the strongest neurons leave the shared expert, and every routed expert is a copy of them: with gate values
    that add up to 1 the block starts as the dense one, but for `UPCYCLE_NOISE` and rounding. lora: the dense network
    stays.
    """
    routed: Any = block.experts
    if experts.conversion == "split":
        if experts.split_by == "importance":
            sort_neurons(dense)
        routed.load_slices(dense)
        block.router.weight.mul_(SPLIT_ROUTER_STD / block.router.weight.std())
        return
    if block.shared_expert is None:
        return
    if experts.conversion == "upcycle":
        _upcycle(routed, block.shared_expert, dense)
        return
    block.shared_expert.load_state_dict(dense.state_dict(), assign=True)
    if experts.conversion == "shared":
        routed.load_neurons(dense, _dealt(importance(dense), routed))
        routed.down_proj.zero_()


def _dealt(importance_I: Tensor, experts: Any) -> Tensor:
    """Neurons for each expert, dealt by falling importance like cards, again from the top where there are too few:
    int64 (N, experts' width)."""
    order_I = importance_I.argsort(descending=True, stable=True)
    wanted = experts.num_experts * experts.intermediate_dim
    return order_I[torch.arange(wanted) % len(order_I)].view(experts.intermediate_dim, experts.num_experts).T


def _upcycle(experts: Any, shared: nn.Module, dense: Any) -> None:
    sort_neurons(dense)
    drawn = {name: parameter.clone() for name, parameter in experts.named_parameters()}
    copied = torch.arange(experts.intermediate_dim).expand(experts.num_experts, -1)
    experts.load_neurons(dense, copied)
    for name, parameter in experts.named_parameters():
        noise = drawn[name]
        if not name.endswith("bias"):
            parameter.add_(noise * (UPCYCLE_NOISE * parameter.square().mean().sqrt() / noise.std()))
    for name, tensor in dense.state_dict().items():
        if name in _NEURONS:
            rest = tensor.shape[_NEURONS[name]] - experts.intermediate_dim
            tensor = tensor.narrow(_NEURONS[name], experts.intermediate_dim, rest)
        shared.get_parameter(name).copy_(tensor)


@torch.no_grad()
def widen(dense: Any, extra: int) -> None:
    """Add neurons to a dense feed-forward network: copies of its strongest, with zero output, so that its function is
    unchanged."""
    order_I = importance(dense).argsort(descending=True, stable=True)
    copied = order_I[torch.arange(extra, device=order_I.device) % len(order_I)]
    for name, parameter in dense.named_parameters():
        if name in _NEURONS:
            added = parameter.index_select(_NEURONS[name], copied)
            added = torch.zeros_like(added) if name in _OUTPUTS else added
            parameter.data = torch.cat([parameter.data, added], dim=_NEURONS[name])


_OUTPUTS = ("down_proj.weight", "c_proj.weight")
_NEURONS = {"gate_proj.weight": 0, "up_proj.weight": 0, "down_proj.weight": 1, "c_fc.weight": 1, "c_fc.bias": 0,
            "c_proj.weight": 0, "gate_proj.bias": 0, "up_proj.bias": 0}  # fmt: skip
"""Parameter of a dense feed-forward network -> its dimension that counts neurons; GPT-2 stores (in, out)."""


def importance(dense: Any) -> Tensor:
    """Importance of each neuron of a dense feed-forward network: the product of the norms of its weights, in and out,
    which scales what it can add to the output; float32 (I,)."""
    norms = [
        weight.float().norm(dim=1 - _NEURONS[name])
        for name, weight in dense.state_dict().items()
        if name in _NEURONS and weight.ndim == 2
    ]
    return torch.stack(norms).prod(dim=0)


@torch.no_grad()
def sort_neurons(dense: Any) -> None:
    """Put a dense feed-forward network's neurons in falling order of importance, in place; its function is unchanged.

    Slices by position hold neurons of every importance; after sorting the first slice holds the strongest.
    """
    order_I = importance(dense).argsort(descending=True, stable=True)
    for name, parameter in dense.named_parameters():
        if name in _NEURONS:
            parameter.copy_(parameter.index_select(_NEURONS[name], order_I))
