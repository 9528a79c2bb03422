"""An explainer with its gate fixed, as a model of a public architecture.

    dense                                  LLaMA, GPT-2
    shared, upcycle                        GraniteMoeShared: routed experts and a dense one, gate values renormalized
    split, random; renormalized            Mixtral
    split, random; as Eq. 11 has it        Qwen2-MoE, whose shared expert is empty

Qwen2-MoE could hold `shared` and `upcycle` as well, but llama.cpp never renormalizes its gate values.

Shape letters: K gates, N experts, D hidden size, I width of an expert.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GraniteMoeSharedConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
)

from gavamoe.errors import InputError
from gavamoe.export.slot_tokens import SlotRows
from gavamoe.model.decoders import GavamoeConfig
from gavamoe.model.explainer import GavamoeForCausalLM
from gavamoe.model.slots import SLOT_MODULES

State = dict[str, Tensor]

EMPTY_WIDTH = 32
"""Width of a Qwen2-MoE's empty shared expert: one block of the quantized types."""
NEARLY_ZERO = 1e-6
"""Weights of its sigmoid gate: llama.cpp computes a sigmoid as silu(x) / x, which is no number at 0."""


def check_exportable(config: GavamoeConfig) -> None:
    """Refuse what no public architecture holds.

    Raises:
        InputError: with the reason, and what would fit.
    """
    if not config.experts_enabled:
        return
    problem = ""
    if config.text_config.model_type != "llama":
        problem = "routed experts in GPT-2 have no public architecture; a LLaMA base has"
    elif config.conversion == "lora":
        problem = "experts that are low-rank additions have no public architecture; conversion shared or upcycle has"
    elif config.gate_bias:
        problem = "gates with biases have no public architecture (GraniteMoe, Mixtral and Qwen2-MoE have none in their"
        problem += " routers); train with stage2.experts.gate_bias=0"
    elif config.soft_routes:
        problem = "soft routes mix all gates for each pair, and an exported model has one; train with soft_routes=false"
    elif config.text_config.mlp_bias or config.text_config.attention_bias:
        problem = "biases in attention or feed-forward layers have no place beside experts; a base without them has"
    if problem:
        raise InputError(f"export: {problem}")


def plain_model(model: GavamoeForCausalLM, gate: int, slots: SlotRows) -> PreTrainedModel:
    """The model that `gate` makes of an explainer; its vocabulary goes on with users and items, as `slots` has them.

    Weights are shared with `model` where they are the same; float32 or wider ones stay as they are.
    """
    config = model.config
    check_exportable(config)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(_SLOT_WEIGHTS)}
    text = config.text_config.to_dict()
    text |= {"vocab_size": slots.size, "tie_word_embeddings": False} | _special_ids(config)
    table = "model.embed_tokens.weight"
    if config.text_config.model_type == "gpt2":
        state = {name.replace("model.", "transformer.", 1): tensor for name, tensor in state.items()}
        table = "transformer.wte.weight"
    state[table] = slots.extended_table(state[table])
    state["lm_head.weight"] = slots.extended_head(model.lm_head.weight.detach())
    if not config.experts_enabled:
        return _filled(type(config.text_config)(**text), state)
    return _filled(*_with_experts(config, text, state, gate))


_SLOT_WEIGHTS = tuple(f"{name}." for name in SLOT_MODULES)
_COMMON = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act",
    "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
"""Fields of LlamaConfig that the architectures with experts have as well."""


def _special_ids(config: GavamoeConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _filled(config: PreTrainedConfig, state: State) -> PreTrainedModel:
    """A model around these weights, all of them and no other."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(state, strict=True, assign=True)
    for module in model.modules():  # buffers that are in no state
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, None)
    return _with_buffers(model, config)


def _with_buffers(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """Rotary frequencies, which were left out on the meta device, computed."""
    for name, module in list(model.named_modules()):
        if name.endswith("rotary_emb"):
            model.set_submodule(name, type(module)(config=config))
    return model.eval()


def _with_experts(
    config: GavamoeConfig, text: dict[str, Any], state: State, gate: int
) -> tuple[PreTrainedConfig, State]:
    sizes = {name: text[name] for name in _COMMON}
    head = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    if head * text["num_attention_heads"] != text["hidden_size"] and config.shared_width:
        raise InputError("export: heads that are not as wide together as the hidden size have no place in GraniteMoe")
    blocks = {
        number: {name.removeprefix(prefix): state.pop(name) for name in list(state) if name.startswith(prefix)}
        for number in range(text["num_hidden_layers"])
        for prefix in [f"model.layers.{number}.mlp."]
    }
    for block in blocks.values():
        block["router"] = block.pop("router.weight")[gate]
        block["experts.down_proj"] = block["experts.down_proj"] * config.expert_scale
    experts, top_k, size = config.n_experts, config.experts_per_token, config.expert_size
    if config.shared_width:
        made: PreTrainedConfig = GraniteMoeSharedConfig(
            **sizes,
            intermediate_size=size,
            shared_intermediate_size=config.shared_width,
            num_local_experts=experts,
            num_experts_per_tok=top_k,
            attention_multiplier=head**-0.5,
        )
        rename = _granite
    elif config.renormalise:
        made = MixtralConfig(
            **sizes, intermediate_size=size, num_local_experts=experts, num_experts_per_tok=top_k, head_dim=head
        )
        rename = _mixtral
    else:
        made = Qwen2MoeConfig(
            **sizes,
            moe_intermediate_size=size,
            intermediate_size=size,
            shared_expert_intermediate_size=EMPTY_WIDTH,
            num_experts=experts,
            num_experts_per_tok=top_k,
            norm_topk_prob=False,
            qkv_bias=False,
            head_dim=head,
        )
        rename = _qwen
    for number, block in blocks.items():
        state |= {f"model.layers.{number}.{name}": tensor for name, tensor in rename(block).items()}
    return made, state


def _granite(block: State) -> State:
    shared = [block[f"shared_expert.{name}_proj.weight"] for name in ("gate", "up", "down")]
    return {
        "block_sparse_moe.router.weight": block["router"],
        "block_sparse_moe.experts.gate_up_proj": block["experts.gate_up_proj"],
        "block_sparse_moe.experts.down_proj": block["experts.down_proj"],
        "shared_mlp.input_linear.weight": torch.cat(shared[:2]),
        "shared_mlp.output_linear.weight": shared[2],
    }


def _mixtral(block: State) -> State:
    return {"mlp.gate.weight": block["router"]} | {
        f"mlp.{name}": block[name] for name in ("experts.gate_up_proj", "experts.down_proj")
    }


def _qwen(block: State) -> State:
    like, size = block["experts.gate_up_proj"], block["router"].shape[1]
    return _mixtral(block) | {
        "mlp.shared_expert.gate_proj.weight": like.new_zeros(EMPTY_WIDTH, size),
        "mlp.shared_expert.up_proj.weight": like.new_zeros(EMPTY_WIDTH, size),
        "mlp.shared_expert.down_proj.weight": like.new_zeros(size, EMPTY_WIDTH),
        "mlp.shared_expert_gate.weight": like.new_full((1, size), NEARLY_ZERO),
    }
