"""Bytes on one device: states by ZeRO stage, activations, buffers. Formulas, each checked against what runs.

Weights are float32 under fp32 and bf16 (autocast), so a trained number costs 4 bytes as weight, 4 as gradient, 8 as
AdamW's moments, and with ZeRO 4 more: DeepSpeed's optimizer works on a copy of its share. Under bf16_weights most are
bfloat16, 2 bytes; the optimizer's copies and the sums of gradients are float32 as ever.
"""

from dataclasses import dataclass, replace
from typing import Any

from gavamoe.config.schema import RunConfig
from gavamoe.model.decoders import GavamoeConfig, dense_width
from gavamoe.model.output_head import chunk_tokens
from gavamoe.plan.parameters import Blueprint
from gavamoe.stage2.engines.settings import LIVE_LAYERS

FLOAT, HALF, LONG = 4, 2, 8
"""Bytes of one number in float32, in bfloat16, and in int64."""
BUCKET = 2 * 10**8
"""Numbers that ZeRO reduces or gathers at once, at most, unless one parameter is larger (`deepspeed_config`)."""
USABLE = 0.9
"""Share of a device's memory that is planned with: the rest is for CUDA's context, kernels' workspace and gaps."""


@dataclass(frozen=True)
class Memory:
    """Memory in bytes on one device, by purpose, and in its host for what is offloaded."""

    weights: float
    """Bytes of the weights that the device holds."""
    gradients: float
    """Bytes of the gradients that the device holds."""
    optimizer: float
    """Bytes of the moments, and of the master weights where DeepSpeed keeps a copy."""
    buffers: float
    """Bytes of the reduction bucket and of gathered parameters."""
    activations: float
    """Bytes kept from the forward for the backward pass."""
    host: float = 0.0
    """Bytes in the host's memory."""
    late: bool = False
    """Whether the buffers are needed only when the activations are gone: ZeRO-0 reduces after the backward pass."""

    @property
    def device(self) -> float:
        """Bytes on the device at their peak."""
        passing = max(self.buffers, self.activations) if self.late else self.buffers + self.activations
        return self.weights + self.gradients + self.optimizer + passing


@dataclass(frozen=True)
class Scheme:
    """A way to distribute weights, gradients and optimizer states: one row of a plan's table."""

    zero_stage: int
    """DeepSpeed's ZeRO stage."""
    offload_optimizer: bool = False
    """Whether optimizer states lie in the host's memory."""
    offload_parameters: bool = False
    """Whether weights lie in the host's memory."""
    devices: int = 1
    """W: number of devices."""
    expert_parallel: int = 1
    """Number of devices that share the experts of a block."""
    precision: str = "fp32"
    """`stage2.precision`."""
    overlap: bool = False
    """Whether ZeRO 1 and 2 reduce gradients while the next ones are made, which takes a second bucket: on GPUs."""

    @property
    def halves(self) -> bool:
        """Whether weights are bfloat16."""
        return self.precision == "bf16_weights"

    @property
    def title(self) -> str:
        """Name of the scheme in tables."""
        name = f"ZeRO-{self.zero_stage}"
        if self.offload_parameters:
            return f"{name}, optimizer and weights on host"
        return f"{name}, optimizer on host" if self.offload_optimizer else name


def schemes(own: Scheme) -> list[Scheme]:
    """ZeRO 0-3, with and without offload, else as `own`; with shared experts or bfloat16 weights ZeRO 1 and 2 only,
    which alone support them."""
    plain = [(stage, False, False) for stage in range(4)]
    off = [(1, True, False), (2, True, False), (3, True, False), (3, True, True)]
    every = [
        replace(own, zero_stage=stage, offload_optimizer=optimizer, offload_parameters=parameters)
        for stage, optimizer, parameters in (*plain, *off)
    ]
    some_only = own.expert_parallel > 1 or own.halves
    return [scheme for scheme in every if scheme.zero_stage in (1, 2)] if some_only else every


def live_numbers(blueprint: Blueprint) -> int:
    """Numbers that ZeRO-3 holds whole at a time, at most."""
    return min(blueprint.whole.total, max(BUCKET, LIVE_LAYERS * blueprint.largest_layer, blueprint.largest_module))


def states(blueprint: Blueprint, scheme: Scheme) -> Memory:
    """Weights, gradients, optimizer states and DeepSpeed's buffers on one device."""
    model, experts = blueprint.whole, blueprint.parts.get("experts")
    away = 1 - 1 / scheme.expert_parallel  # share of the experts that other devices hold
    narrower, word = (FLOAT - HALF, HALF) if scheme.halves else (0, FLOAT)
    held = FLOAT * model.total - narrower * blueprint.halved.total - (word * experts.total * away if experts else 0)
    trained = model.trained - (experts.trained * away if experts else 0)
    # Experts are spread over W / expert_parallel devices that hold the same ones, the rest over W: both come to this.
    share = model.trained / scheme.devices
    stage = scheme.zero_stage
    weights = held if stage < 3 else FLOAT * model.total / scheme.devices
    # Of bfloat16 weights too: ZeRO-1 sums each whole gradient in float32, ZeRO-2 the device's share.
    gradients = FLOAT * (trained if stage < 2 else share)
    optimizer = FLOAT * (2 * trained if stage == 0 else 3 * share)
    bucket = FLOAT * min(model.trained, max(BUCKET, blueprint.largest))
    buffers = bucket * (2 if scheme.overlap and stage in (1, 2) else 1)
    if stage == 3:
        buffers += FLOAT * live_numbers(blueprint)
    host = 0.0
    if scheme.offload_optimizer:
        # The host takes master weights, moments and the averaged gradients.
        host += FLOAT * 4 * share
        optimizer, gradients = 0.0, gradients if stage == 1 else 0.0
    if scheme.offload_parameters:
        host, weights = host + weights, 0.0
    return Memory(weights, gradients, optimizer, buffers, 0.0, host, late=stage == 0)


@dataclass(frozen=True)
class Shape:
    """The size of one forward pass."""

    rows: int
    """B: number of rows."""
    tokens: int
    """T: tokens of a row, padding included."""
    scored: int
    """S: labeled tokens of a row, its answer's; they alone are scored."""

    @property
    def count(self) -> int:
        """M = B x T: number of tokens."""
        return self.rows * self.tokens


@dataclass(frozen=True)
class Head:
    """What the output head adds to a peak."""

    trained: bool = True
    """Whether it has a gradient, which comes while all activations are still there."""
    apart: bool = True
    """Whether that gradient is none of those that `states` counts: it stands beside an accumulated or a sharded one."""


@dataclass(frozen=True)
class Numbers:
    """What the arithmetic of a precision works on."""

    word: int
    """Bytes of a number in products: their inputs and outputs."""
    stream: int
    """Bytes of a number of the residual stream, between the layers."""
    casts: bool
    """Whether autocast copies weights and inputs for each product, in which the copies are kept."""


NUMBERS = {
    "fp32": Numbers(FLOAT, FLOAT, casts=False),
    "bf16": Numbers(HALF, FLOAT, casts=True),
    "bf16_weights": Numbers(HALF, HALF, casts=False),
}


def activations(
    config: GavamoeConfig, shape: Shape, precision: str, *, checkpointing: bool, head: Head = Head()
) -> float:
    """Bytes kept from the forward for the backward pass, at their peak.

    With checkpointing: each layer's input, and the inside of the one layer that is computed again.
    """
    layer = layer_activations(config, shape, precision)
    layers, hidden = config.text_config.num_hidden_layers, config.text_config.hidden_size
    inside = layers * layer
    if checkpointing:
        inside = layer + layers * NUMBERS[precision].stream * hidden * shape.count
    return inside + outer_activations(config, shape, precision, head)


def layer_activations(config: GavamoeConfig, shape: Shape, precision: str) -> float:
    """Bytes that one decoder layer keeps: its attention half and its feed-forward half, each after a norm."""
    text, numbers = config.text_config, NUMBERS[precision]
    norms = 2 * _norm(text, numbers)
    if config.experts_enabled:
        feed_forward = _moe(config, shape, numbers)
    else:
        feed_forward = _dense(text, dense_width(text), numbers) * shape.count
        norms += numbers.word * text.hidden_size if numbers.casts else 0
    kept = (norms + _attention(text, numbers)) * shape.count + feed_forward
    # Autocast's half-precision copies of the weights live as long as the graph does.
    return kept + (HALF * _cast_weights(config) if numbers.casts else 0)


def outer_activations(config: GavamoeConfig, shape: Shape, precision: str, head: Head = Head()) -> float:
    """Bytes that embedding, last norm, head and loss keep, and what stands beside them while head and loss work."""
    text, numbers = config.text_config, NUMBERS[precision]
    slot_word = numbers.word if numbers.casts else FLOAT  # slots are float32 weights
    slots = 2 * slot_word * config.slot_size + 3 * LONG
    per_token = slots + _norm(text, numbers, output=False)  # of its output the head keeps the labeled tokens alone
    cast = HALF * 2 * config.slot_size * text.hidden_size if numbers.casts else 0
    peak = head_peak(text.vocab_size, text.hidden_size, shape.rows * shape.scored, precision, head)
    return per_token * shape.count + cast + peak


def head_peak(
    vocabulary: int, hidden: int, scored: int, precision: str, head: Head = Head(), device: str = "cuda"
) -> float:
    """Bytes of the head and the loss of `scored` labeled tokens, at their peak (see `gavamoe.model.output_head`)."""
    numbers, weight = NUMBERS[precision], vocabulary * hidden
    word = numbers.word
    narrow = word if word == HALF else 0  # bytes of a number's copy in half precision, where there is one
    cast = HALF * weight if numbers.casts else 0
    # The weight's gradient in float32, and before that the product in bfloat16 that it is made of.
    gradient = FLOAT * weight if head.trained and head.apart else 0
    product = narrow * weight if head.trained else 0
    most = chunk_tokens(vocabulary, device)
    if scored <= most:
        # On the way back: the log-softmax with the gradients before and behind it; then the logits' with the weight's.
        logits = scored * vocabulary
        if not numbers.casts and narrow:  # a weight in half precision has its gradient so
            gradient = 0
        return word * hidden * scored + cast + max(3 * FLOAT * logits, word * logits + gradient + product)
    # Both gradients are made in the forward pass: the weight's whole, and the hidden states' beside these.
    logits = -(-scored // -(-scored // most)) * vocabulary  # of a chunk
    beside = (2 * FLOAT + narrow) * hidden * scored + gradient
    # In a chunk: logits and their log-softmax; then their gradient, in bfloat16 too, and the weight's product.
    slope = (FLOAT + narrow) * logits
    return beside + cast + max(2 * FLOAT * logits, slope + product)


def _norm(text: Any, numbers: Numbers, *, output: bool = True) -> float:
    """Bytes a token of one norm: its input, for LLaMA the normalized values too, and its output, which the product
    behind it keeps, if it reads it as it is."""
    kept = float(output and not numbers.casts) * numbers.word
    if text.model_type == "llama":
        kept += FLOAT + numbers.stream  # computed in float32, then weighed as the stream is
    else:
        kept += numbers.stream
    return kept * text.hidden_size + 2 * FLOAT


def _attention(text: Any, numbers: Numbers) -> float:
    """Bytes a token: queries, keys, values, mixed values, each head's log-sum; fused attention keeps no scores."""
    heads, word = text.num_attention_heads, numbers.word
    if text.model_type == "llama":
        size = getattr(text, "head_dim", None) or text.hidden_size // heads
        inner, shared = heads * size, (text.num_key_value_heads or heads) * size
        casts = 3 if numbers.casts else 0  # one of the input for each of the three projections
    else:
        inner = shared = text.hidden_size
        casts = 1 if numbers.casts else 0
    dropout = text.hidden_size if getattr(text, "resid_pdrop", 0) else 0  # a mask of one byte
    return word * (2 * inner + 2 * shared + casts * text.hidden_size) + FLOAT * heads + dropout


def _dense(text: Any, width: int, numbers: Numbers) -> float:
    """Bytes a token of a dense feed-forward network of this width."""
    if text.model_type == "llama":
        casts = text.hidden_size if numbers.casts else 0  # its input, a second time
        return numbers.word * (4 * width + casts)
    return numbers.word * GELU_TENSORS * width + (text.hidden_size if text.resid_pdrop else 0)


GELU_TENSORS = 5
"""Tensors that GPT-2's GELU keeps for the backward pass, its output included: transformers writes it out in Python."""


def _moe(config: GavamoeConfig, shape: Shape, numbers: Numbers) -> float:
    """Bytes of a GaVaMoE block."""
    text, word = config.text_config, numbers.word
    chosen, hidden = config.experts_per_token, text.hidden_size
    routed = _lora_experts(config, word) if config.expert_lora_rank else _expert_networks(config, word)
    router = (FLOAT * hidden if word == HALF else 0) + FLOAT * config.n_experts
    if config.renormalise:
        router += FLOAT * chosen
    if config.soft_routes:  # all gates' logits, their softmax, the mixture and its sum
        router += FLOAT * (4 * config.n_gates * config.n_experts + 2 * config.n_experts)
    shared = 0.0
    if config.shared_width:
        shared = _dense(text, config.shared_width, numbers) + (word * hidden if numbers.casts else 0)
    one_gate = config.n_gates == 1 or config.soft_routes
    gates = 0 if one_gate else FLOAT * shape.rows * config.n_experts * hidden
    return (routed + router + shared) * shape.count + gates


def _expert_networks(config: GavamoeConfig, word: int) -> float:
    """Bytes a token of the experts that are feed-forward networks, sorting by expert included."""
    text, size = config.text_config, config.expert_size
    inner = 4 * size if text.model_type == "llama" else GELU_TENSORS * size
    return config.experts_per_token * (word * (2 * text.hidden_size + inner) + FLOAT + 6 * LONG)


def _lora_experts(config: GavamoeConfig, word: int) -> float:
    """Bytes a token of the experts that are low-rank additions: what is read, its products with the gate values."""
    mixed = config.n_experts * config.expert_lora_rank
    return word * (config.expert_lora_rank + mixed) + FLOAT * config.n_experts + LONG * config.experts_per_token


def _cast_weights(config: GavamoeConfig) -> float:
    """Weights of one layer that autocast copies to bf16: attention, all experts, the dense network where there is
    one."""
    text = config.text_config
    hidden = text.hidden_size
    if text.model_type == "llama":
        size = getattr(text, "head_dim", None) or hidden // text.num_attention_heads
        shared = (text.num_key_value_heads or text.num_attention_heads) * size
        attention = hidden * (2 * text.num_attention_heads * size + 2 * shared)
        matrices = 3
    else:
        attention, matrices = 4 * hidden * hidden, 2
    width = config.shared_width if config.experts_enabled else dense_width(text)
    if config.experts_enabled and not config.expert_lora_rank:
        width += config.n_experts * config.expert_size
    return attention + matrices * hidden * width


def run_shape(config: RunConfig) -> Shape:
    """The largest batch that is possible in a run: every prompt and answer as long as allowed."""
    prompt = config.stage2.prompt
    tokens = prompt.max_tokens + prompt.max_explanation_tokens
    return Shape(config.stage2.batch_size, tokens, prompt.max_explanation_tokens)
