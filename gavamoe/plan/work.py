"""Arithmetic and traffic of a run: FLOPs, time at a utilization, bytes between devices by ZeRO stage.

FLOPs count a multiply-add as two, and attention scores in full, as torch's counter does. Bytes are those that one
device sends with ring algorithms: of G bytes over W devices, (W - 1) / W x G for an all-gather or a reduce-scatter,
twice that for an all-reduce. Counted on two workers: DeepSpeed 0.19 all-reduces gradients at ZeRO 0, 1 and 2, and
reduce-scatters them at ZeRO 3 alone.
"""

import functools
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from gavamoe.config.schema import Stage1Config
from gavamoe.plan.memory import BUCKET, FLOAT, HALF, Scheme, Shape
from gavamoe.plan.parameters import Blueprint, draw_stage1
from gavamoe.stage2.engines.settings import LIVE_LAYERS, sends_bf16

TRACED_PAIRS = 64
"""Pairs of the batch that is traced to count stage 1's cost."""
FLOAT32_SHARE = 1 / 16
"""Share of the bf16 peak that float32 arithmetic reaches: 19.5 of 312 TFLOP/s on an A100, 67 of 989 on an H100."""


@dataclass(frozen=True)
class Flops:
    """FLOPs of one training row, a prompt and its answer."""

    forward: float
    """FLOPs of the forward pass."""
    backward: float
    """FLOPs of the backward pass."""
    recomputed: float
    """FLOPs of forward passes that gradient checkpointing repeats."""

    @property
    def total(self) -> float:
        """FLOPs of all passes."""
        return self.forward + self.backward + self.recomputed


def row_flops(blueprint: Blueprint, shape: Shape, *, checkpointing: bool) -> Flops:
    """Matrix products of one row of `shape.tokens` tokens of which `shape.scored` go through the output head."""
    text, parts = blueprint.config.text_config, blueprint.parts
    products = [parts[name] for name in _PRODUCTS if name in parts]
    inside = 2.0 * sum(part.multiplied for part in products) * shape.tokens
    trained = 2.0 * sum(part.multiplied * part.trained / part.total for part in products) * shape.tokens
    heads = text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    scores = 4.0 * shape.tokens**2 * width * text.num_hidden_layers
    slots = 2.0 * parts["slot projections"].total * shape.tokens
    head = 2.0 * text.vocab_size * text.hidden_size * shape.scored
    layers = inside + scores
    # Going back, every product has a gradient of its input, and one of its weight where that is trained. The slots'
    # inputs are table rows, which need theirs as well.
    backward = inside + trained + 2 * scores + 2 * slots + head * (1 + head_trained(blueprint))
    return Flops(layers + slots + head, backward, layers if checkpointing else 0.0)


_PRODUCTS = ("attention", "dense feed-forward", "experts", "gates", "adapters")


def head_trained(blueprint: Blueprint) -> bool:
    """Whether the output head gets a gradient."""
    part = blueprint.parts.get("output head") or blueprint.parts["word embeddings"]
    return part.trained > 0


@dataclass(frozen=True)
class PairCost:
    """Cost of one user-item pair in stage 1's ELBO, counted by running stage 1's own code on the meta device."""

    flops: float
    """FLOPs of the forward and the backward pass."""
    activations: float
    """Bytes kept from the forward for the backward pass."""


@functools.lru_cache(maxsize=8)
def pair_cost(config: Stage1Config) -> PairCost:
    """The cost of a pair, from a traced batch without weights or data; the numbers of users and items don't matter."""
    model = draw_stage1(config, 1, 1)
    model.train()
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
            alive.append(storage)
        return tensor

    alive: list[torch.UntypedStorage] = []
    ids = torch.zeros(TRACED_PAIRS, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model.elbo(ids, ids, ids.float(), config.beta).loss
        loss.backward()
    return PairCost(counter.get_total_flops() / TRACED_PAIRS, sum(kept.values()) / TRACED_PAIRS)


@dataclass(frozen=True)
class Traffic:
    """Bytes that one device sends per optimizer step, by purpose."""

    gradients: float
    """Bytes of gradients that are reduced."""
    weights: float
    """Bytes of weights that are gathered."""
    tokens: float
    """Bytes of hidden states that go to experts on other devices and back."""

    @property
    def total(self) -> float:
        """Bytes for all purposes."""
        return self.gradients + self.weights + self.tokens


def step_traffic(blueprint: Blueprint, scheme: Scheme, accumulation: int, shape: Shape, checkpointing: bool) -> Traffic:
    """Traffic of one optimizer step of `accumulation` forward and backward passes, at the scheme's ZeRO stage."""
    devices, stage = scheme.devices, scheme.zero_stage
    ring = (devices - 1) / devices
    total = FLOAT * blueprint.whole.total
    sent = HALF if sends_bf16(scheme.precision, devices) else FLOAT
    trained = sent * blueprint.whole.trained
    if stage == 0:
        return Traffic(2 * ring * trained, 0.0, 0.0)
    experts = blueprint.parts.get("experts")
    if stage == 3:
        whole_again = FLOAT * blueprint.small
        gathered = total - whole_again
        # Weights that fit among those kept live are gathered once for the forward and the backward pass, and so
        # is the head, with which the backward pass begins.
        live = max(BUCKET, LIVE_LAYERS * blueprint.largest_layer)
        head = blueprint.parts["output head"].total if "output head" in blueprint.parts else 0
        once = blueprint.whole.total <= live
        again = 0.0 if once else max(0.0, gathered - FLOAT * head)
        return Traffic(accumulation * ring * trained, ring * (accumulation * (gathered + again) + whole_again), 0.0)
    shared = scheme.expert_parallel
    replicas = devices // shared
    expert_ring = (replicas - 1) / replicas
    apart = experts.trained if experts and shared > 1 else 0  # numbers reduced among fewer workers
    numbers = ring * (blueprint.whole.trained - apart) + expert_ring * apart / shared
    # After the step weights are gathered, as what they are stored.
    narrower = (FLOAT - HALF) if scheme.halves else 0
    after = ring * (FLOAT * (blueprint.whole.trained - apart) - narrower * (blueprint.halved.trained - apart))
    after += expert_ring * (FLOAT - narrower) * apart / shared
    passes = accumulation if stage == 2 else 1
    tokens = 0.0
    if shared > 1:
        word = FLOAT if scheme.precision == "fp32" else HALF
        tokens = accumulation * word * _tokens_sent(blueprint, shape, shared, checkpointing)
    return Traffic(2 * passes * sent * numbers, after, tokens)


def _tokens_sent(blueprint: Blueprint, shape: Shape, shared: int, checkpointing: bool) -> float:
    """Numbers of tokens that go to their top_k experts and back, in every layer, forward and backward: 4 all-to-alls, 6
    where the forward pass is done twice. With experts shared by `shared` devices, 1 / `shared` of it stays where it
    is."""
    config = blueprint.config
    text = config.text_config
    once = shape.count * config.experts_per_token * text.hidden_size * (shared - 1) / shared
    return once * text.num_hidden_layers * (6 if checkpointing else 4)


@dataclass(frozen=True)
class WeightTraffic:
    """Bytes that a device's own memory moves for each weight of a pass forward and backward, whatever the batch is.

    Counted from what runs, with ZeRO's copy of each gradient into a bucket. Measured on one H100: a layer of 231
    million weights under bf16, without recomputation, 64 tokens, took 2.3 ms; 26 bytes each at 2.95 TB/s are 2.0.
    """

    used: int
    """A forward pass."""
    again: int
    """The same when it is done again (gradient checkpointing)."""
    back: int
    """The gradient of its input."""
    gradient: int
    """Its own gradient, made and copied; for those that are trained."""


WEIGHT_TRAFFIC = {
    "fp32": WeightTraffic(used=4, again=4, back=4, gradient=4 + 8),
    "bf16": WeightTraffic(used=6 + 2, again=6 + 2, back=2, gradient=2 + 6 + 8),  # cast, then read; cast back
    "bf16_weights": WeightTraffic(used=2, again=2, back=2, gradient=2 + 6),
}
UPDATE_TRAFFIC = 32
"""Bytes that an optimizer step moves for each trained weight of a device's share: gradient, copy, two moments."""


def memory_traffic(blueprint: Blueprint, scheme: Scheme, accumulation: int, checkpointing: bool) -> float:
    """Bytes of weights, gradients and optimizer states that a device reads and writes in one optimizer step."""
    cost, part = WEIGHT_TRAFFIC[scheme.precision], blueprint.whole
    tables = sum((blueprint.parts[name].total for name in ("slot tables", "stage 1") if name in blueprint.parts), 0)
    each = (part.total - tables) * (cost.used + cost.back + (cost.again if checkpointing else 0))
    share = 1 if scheme.zero_stage == 0 else scheme.devices
    return accumulation * (each + part.trained * cost.gradient) + UPDATE_TRAFFIC * part.trained / share
