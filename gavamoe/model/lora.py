"""Low-rank adapters (LoRA, through peft) on the attention of an explainer: training for a fraction of the states.

`add_lora` inserts them and freezes the base model's own weights; `merged_state` merges them into the plain model's
weights, so that an artifact has no trace of them.
"""

from typing import Any

import torch
from torch import Tensor

from gavamoe.config.schema import LoraConfig
from gavamoe.model.experts import MlpExperts, SwiGluExperts
from gavamoe.model.explainer import GavamoeForCausalLM
from gavamoe.model.router import MultiGateRouter

_ADAPTER = "default"
_ATTENTION = r".*\.(self_attn\.[qkvo]_proj|attn\.c_(attn|proj))"
"""Every projection of LLaMA's and of GPT-2's attention; GPT-2's feed-forward layer has a c_proj as well."""


def add_lora(model: GavamoeForCausalLM, lora: LoraConfig, seed: int) -> None:
    """Adapt the attention and freeze the base model: its attention, dense feed-forward layers, norms, embeddings, head.

    What is trained: adapters, routers, routed experts, both slots' projections and tables. Adapters start at zero
    output, so the model stays what it was.
    """
    from peft import LoraConfig as Adapter
    from peft import inject_adapter_in_model

    adapter = Adapter(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_ATTENTION,
        fan_in_fan_out=model.config.text_config.model_type == "gpt2",  # its weights are stored (in, out)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(adapter, model)  # leaves only the adapters trainable
    new = (model.user_embedding, model.item_embedding, model.user_projection, model.item_projection)
    for module in model.modules():
        if module in new or isinstance(module, MultiGateRouter | SwiGluExperts | MlpExperts):
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
