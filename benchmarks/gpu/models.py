"""Explainers of known shapes with random weights, for which speed, memory and arithmetic don't care."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig
from transformers import initialization as init

from gavamoe.config.files import parse_config
from gavamoe.config.schema import RunConfig
from gavamoe.model.base_config import base_shape
from gavamoe.model.conversion import ExplainerSizes, explainer_config
from gavamoe.model.explainer import GavamoeForCausalLM
from gavamoe.stage1.vae_gmm import VaeGmm
from gavamoe.stage2.joint_model import JointModel

USERS, ITEMS = 1000, 800
RATINGS = (1.0, 2.0, 3.0, 4.0, 5.0)
BASES = {
    "135m": "HuggingFaceTB/SmolLM2-135M",
    "1b": "meta-llama/Llama-3.2-1B",
    "8b": "meta-llama/Llama-3.1-8B",
}
EXPERT_SIZE = {"8b": 1280}
"""The paper's; elsewhere the dense width divided by the number of experts."""


def tiny_llama() -> LlamaConfig:
    """A LLaMA that a CPU runs in no time."""
    return LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip


def tiny_gpt2() -> GPT2Config:
    """A GPT-2 of the same size."""
    return GPT2Config(
        vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_inner=192, n_positions=256, resid_pdrop=0, embd_pdrop=0,
        attn_pdrop=0, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip


def run_config(conversion: str, size: str = "", experts: Mapping[str, Any] | None = None, **stage2: Any) -> RunConfig:
    """A run's config; `conversion` may be "dense": no experts; `experts`: more settings of these."""
    chosen: dict[str, Any] = {"enabled": False}
    if conversion != "dense":
        chosen = {"conversion": conversion, "intermediate_size": EXPERT_SIZE.get(size, 0)}
    values = {
        "stage1": {"embedding_size": 64, "latent_size": 32, "encoder_heads": 4, "dropout": 0.0},
        "stage2": {"base_model": BASES.get(size, "scratch"), "experts": chosen | dict(experts or {}), **stage2},
    }
    return parse_config(values, "gpu check")


def shape_of(size: str) -> PreTrainedConfig:
    """The base model's config."""
    return tiny_llama() if size == "tiny" else base_shape(run_config("dense", size).stage2)


def explainer(
    config: RunConfig,
    base: PreTrainedConfig,
    device: str,
    dtype: torch.dtype = torch.float32,
    layers: int | None = None,
) -> GavamoeForCausalLM:
    """An explainer made on the device, every weight drawn anew; `layers` in place of the base model's own."""
    sizes = explainer_config(config, base, ExplainerSizes(USERS, ITEMS, config.stage1.embedding_size, config.gates))
    if layers is not None:
        sizes.text_config.num_hidden_layers = layers
    torch.manual_seed(0)
    with torch.device(device), init.no_init_weights():
        model: GavamoeForCausalLM = AutoModelForCausalLM.from_config(sizes, dtype=dtype)
    kept_wide = tuple(model._keep_in_fp32_modules_strict)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
        else:
            torch.nn.init.ones_(parameter) if "norm" in name or "ln_" in name else torch.nn.init.zeros_(parameter)
        if any(part in name for part in kept_wide):
            parameter.data = parameter.data.float()
    model.tie_weights()
    return model


def joint(config: RunConfig, model: GavamoeForCausalLM) -> JointModel:
    """The explainer beside a stage 1 of its tables, as stage 2 trains them."""
    torch.manual_seed(1)
    vae_gmm = VaeGmm(config.stage1, USERS, ITEMS, "categorical", RATINGS).to(model.device)
    whole = JointModel(model, vae_gmm, config.stage2.alpha, bf16=config.stage2.precision == "bf16")
    if config.stage2.precision == "bf16_weights":
        whole.store_in_bf16()
    return whole


def active_parameters(model: GavamoeForCausalLM) -> int:
    """Parameters that one token multiplies with: no tables, and of the experts those that its gate keeps."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    tables.discard(id(model.lm_head.weight))
    kept = model.config.experts_per_token / model.config.n_experts
    return int(
        sum(
            parameter.numel() * (kept if ".experts." in name else 1)
            for name, parameter in model.named_parameters()
            if id(parameter) not in tables
        )
    )


def batch_of(
    model: GavamoeForCausalLM, rows: int, tokens: int, *, unscored: float = 0.0, pairs: int = 64, seed: int = 0
) -> dict[str, Tensor]:
    """A training batch on the CPU: a user and an item at the front, and a share of each row unscored."""
    draw = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(1, model.config.vocab_size, (rows, tokens), generator=draw)
    user_B, item_B = (torch.randint(0, count, (rows,), generator=draw) for count in (USERS, ITEMS))
    ids_BT[:, 0] = model.slots.vocabulary + user_B
    ids_BT[:, 1] = model.slots.first_item + item_B
    labels_BT = ids_BT.clone()
    labels_BT[:, : max(int(unscored * tokens), 2)] = -100
    ratings = torch.tensor(RATINGS)
    return {
        "input_ids": ids_BT,
        "attention_mask": torch.ones_like(ids_BT),
        "labels": labels_BT,
        "cluster_ids": torch.arange(rows) % model.config.n_gates,
        "users": torch.randint(0, USERS, (pairs,), generator=draw),
        "items": torch.randint(0, ITEMS, (pairs,), generator=draw),
        "ratings": ratings[torch.randint(0, len(ratings), (pairs,), generator=draw)],
    }
