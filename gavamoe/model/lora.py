"""What is trained where the base model is frozen: low-rank adapters (LoRA, through peft) on its attention, and what it
does not have itself (slots, routers, experts).

`freeze_base` freezes the base model's own weights; `add_lora` adds adapters as well; `merged_state` merges those into
the plain model's weights, so that an artifact has no trace of them.
"""

from typing import Any

import torch
from torch import Tensor, nn

from gavamoe.config.schema import LoraConfig
from gavamoe.model.experts import LoraExperts, MlpExperts, SwiGluExperts
from gavamoe.model.explainer import GavamoeForCausalLM
from gavamoe.model.router import MultiGateRouter
from gavamoe.model.slots import SLOT_MODULES

ROUTED_MODULES = (MultiGateRouter, SwiGluExperts, MlpExperts, LoraExperts)
"""What a GaVaMoE block has and the base model has not."""
_ADAPTER = "default"
_ATTENTION = r".*\.(self_attn\.[qkvo]_proj|attn\.c_(attn|proj))"
"""Every projection of LLaMA's and of GPT-2's attention; GPT-2's feed-forward layer has a c_proj as well."""


def add_lora(model: GavamoeForCausalLM, lora: LoraConfig, seed: int) -> None:
    """Adapt the attention and freeze the base model: its attention, dense feed-forward layers, norms, embeddings, head.

    What is trained: adapters, routers, routed experts, both slots' projections and tables. Adapters start at zero
    output, so the model stays what it was.
    """
    adapt_attention(model, model.config.text_config.model_type, lora, seed)
    _train_new(model)


def adapt_attention(model: nn.Module, model_type: str, lora: LoraConfig, seed: int) -> None:
    """Put adapters with zero output on the attention of a LLaMA or GPT-2, and freeze all else."""
    from peft import LoraConfig as Adapter
    from peft import inject_adapter_in_model

    adapter = Adapter(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_ATTENTION,
        fan_in_fan_out=model_type == "gpt2",  # its weights are stored (in, out)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(adapter, model)  # leaves only the adapters trainable


def freeze_base(model: GavamoeForCausalLM) -> None:
    """Freeze the base model's own weights, as `add_lora` does, without adapters on its attention."""
    model.requires_grad_(False)
    _train_new(model)


def slot_modules(model: GavamoeForCausalLM) -> list[nn.Module]:
    """What reads users, items, ratings and clusters in prompts, which the base model has not."""
    return [module for name, module in model.named_children() if name in SLOT_MODULES]


def _train_new(model: GavamoeForCausalLM) -> None:
    slots = slot_modules(model)
    for module in model.modules():
        if module in slots or isinstance(module, ROUTED_MODULES):
            module.requires_grad_(True)


def merged_state(model: GavamoeForCausalLM, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The plain explainer's state from that of `model` with adapters: W + alpha / rank * B A in place of W, A and B.

    Only the shape of `model` is looked at: its own weights may be sharded over workers.
    """
    from peft.tuners.lora import LoraLayer

    plain = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if ".lora_" not in name}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            down, up = (state[f"{name}.lora_{side}.{_ADAPTER}.weight"] for side in "AB")
            delta = _delta(module, down, up)
            plain[f"{name}.weight"] = state[f"{name}.base_layer.weight"] + delta
    return plain


def _delta(layer: Any, down_RI: Tensor, up_OR: Tensor) -> Tensor:
    """The matrix that a layer's adapter adds to its weight, laid out as the weight is."""
    product_OI = up_OR @ down_RI * layer.scaling[_ADAPTER]
    return product_OI.T if layer.fan_in_fan_out else product_OI
