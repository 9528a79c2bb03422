"""The decoders of the explainer: LLaMA and GPT-2 whose feed-forward layers are GaVaMoE blocks, and the model's config.

transformers' own models are kept as they are except for the layer, which passes the rows' cluster ids to its block.
"""

import copy
import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, GPT2Config, GPT2Model, LlamaConfig, LlamaModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.configuration_utils import SubConfigSpec
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, GPT2Block
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP
from transformers.utils.output_capturing import OutputRecorder

from gavamoe.model.block import MultiGateMoe
from gavamoe.model.experts import LoraExperts, MlpExperts, MoeSpec, SwiGluExperts
from gavamoe.model.router import OWNED_WEIGHTS, MultiGateRouter
from gavamoe.model.tables.layout import TableLayout

KEEPS_DENSE = ("shared", "upcycle", "lora")
"""Conversions that leave the dense network, or most of it, beside the routed experts."""


class GavamoeConfig(PreTrainedConfig):
    """Sizes of the explainer; the decoder's own are in `text_config`, a LLaMA or GPT-2 config."""

    model_type = "gavamoe"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")
    }

    text_config: Any = None
    """Config of the decoder that the explainer is built on."""
    n_users: int = 0
    """Known users; their embedding table has one row more, for all others."""
    n_items: int = 0
    """Known items; their embedding table has one row more, for all others."""
    slot_size: int = 8
    """E: width of the user and item embeddings."""
    table_kind: str = "replicated"
    """How the tables of users and items are kept, as `stage1.tables`."""
    user_table_rows: int = 0
    """Rows of a hashed table of users, without the unknown one's; 0: it is not hashed."""
    item_table_rows: int = 0
    """Rows of a hashed table of items, without the unknown one's; 0: it is not hashed."""
    table_hashes: int = 2
    """Rows of a hashed table whose sum is the vector of a user or item."""
    table_seed: int = 0
    """Seed of the functions that hash users and items to rows."""
    n_gates: int = 1
    """K: gates of each router."""
    experts_enabled: bool = True
    """Whether the feed-forward layers are GaVaMoE blocks; False: they are dense."""
    n_experts: int = 2
    """N = rN: routed experts of each block."""
    experts_per_token: int = 1
    """S: experts that see a token."""
    expert_size: int = 8
    """I: width of one expert."""
    conversion: str = "shared"
    """How the experts came from the dense model, which decides what of the dense network stays beside them."""
    expert_lora_rank: int = 0
    """Rank of the experts of conversion lora; 0: experts are feed-forward networks."""
    renormalise: bool = False
    """Whether the gate values of the chosen experts are divided by their sum."""
    expert_scale: float = 1.0
    """Factor on the routed experts' output."""
    gate_bias: float = 0.0
    """Where each gate's bias for the experts that it owns started; 0: gates have no bias."""
    soft_routes: bool = False
    """Whether gate values are mixed by responsibilities: rows then come with those, not with cluster ids."""
    n_cluster_slots: int = 0
    """K: rows of the table of the prompt's slot for a cluster; 0: prompts have none."""
    rating_places: int = 0
    """R: places on the rating scale that prompts have soft tokens for; 0: they have none."""
    rating_spread: float = 0.0
    """Standard deviation of ratings around stage 1's expectation, as a share of the scale's range."""
    load_balance_weight: float = 0.0
    """Weight of the load-balancing loss in training."""
    router_z_weight: float = 0.0
    """Weight of the router z-loss in training."""
    expert_kernel: str = "auto"
    """Kernel that runs the experts (see `experts`), unless `from_pretrained` is given `experts_implementation`."""
    output_router_logits: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # A dense decoder refuses any kernel but "eager", which stands for none.
        kwargs.setdefault("experts_implementation", self.expert_kernel if self.experts_enabled else "eager")
        super().__post_init__(**kwargs)

    @property
    def shared_width(self) -> int:
        """Width of what stays of the dense network beside the experts; 0: nothing."""
        if self.conversion not in KEEPS_DENSE:
            return 0
        return dense_width(self.text_config) - (self.expert_size if self.conversion == "upcycle" else 0)

    @property
    def table_layout(self) -> TableLayout:
        """How the tables of users and items are laid out."""
        return TableLayout(
            self.table_kind, self.user_table_rows, self.item_table_rows, self.table_hashes, self.table_seed
        )

    @property
    def vocab_size(self) -> int:
        """V: number of text tokens; the ids of users and items follow above."""
        return self.text_config.vocab_size


def dense_width(text_config: PreTrainedConfig) -> int:
    """Width of a dense LLaMA's or GPT-2's feed-forward layers."""
    if text_config.model_type == "llama":
        return int(text_config.intermediate_size)
    return int(text_config.n_inner or 4 * text_config.hidden_size)


class MoeLlamaLayer(LlamaDecoderLayer):
    """A LLaMA layer whose feed-forward network is a GaVaMoE block and so needs the rows' clusters."""

    def __init__(self, config: LlamaConfig, layer_idx: int, spec: MoeSpec, shared_width: int) -> None:
        super().__init__(config, layer_idx)
        shared: nn.Module | None = self.get_submodule("mlp") if shared_width else None
        if shared is not None and shared_width != dense_width(config):
            narrow = copy.copy(config)
            narrow.intermediate_size = shared_width
            shared = LlamaMLP(narrow)
        self.mlp = MultiGateMoe(config, spec, shared_expert=shared)

    def forward(self, hidden_states: Tensor, *, cluster_ids: Tensor | None = None, **kwargs: Any) -> Tensor:
        """hidden_states (B, T, D) to the same shape; `kwargs` go to the attention, as in the parent class."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states), cluster_ids)


class MoeGpt2Layer(GPT2Block):
    """A GPT-2 layer whose feed-forward network is a GaVaMoE block and so needs the rows' clusters."""

    def __init__(self, config: GPT2Config, layer_idx: int, spec: MoeSpec, shared_width: int) -> None:
        super().__init__(config, layer_idx)
        shared: nn.Module | None = self.get_submodule("mlp") if shared_width else None
        if shared is not None and shared_width != dense_width(config):
            shared = GPT2MLP(shared_width, config)
        self.mlp = MultiGateMoe(config, spec, shared_expert=shared)

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        *,
        cluster_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states (B, T, D) to the same shape. There is no encoder: its arguments are GPT2Model's, and None."""
        attended, _ = self.attn(
            self.ln_1(hidden_states), past_key_values=past_key_values, attention_mask=attention_mask, **kwargs
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.ln_2(hidden_states), cluster_ids)


@torch.no_grad()
def init_moe_weights(module: nn.Module, std: float) -> None:
    """Draw a router's or experts' weights with standard deviation `std`, biases 0; other modules are left alone."""
    if isinstance(module, MultiGateRouter):
        if module.bias is None:
            init.normal_(module.weight, std=std)
        else:
            init.normal_(module.weight, std=std * OWNED_WEIGHTS)
            init.copy_(module.bias, module.owned_KN())
    elif isinstance(module, LoraExperts):
        init.normal_(module.read, std=1 / math.sqrt(module.read.shape[1]))
        init.zeros_(module.write)
    elif isinstance(module, SwiGluExperts | MlpExperts):
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                init.zeros_(parameter)
            else:
                init.normal_(parameter, std=std)


class MoeLlamaModel(LlamaModel):
    """LlamaModel with GaVaMoE blocks."""

    # transformers looks for the kernels' decorator in the source of the module that defines a model class and caches
    # the answer on the class; a subclass in another file inherits a False and silently runs the eager kernel.
    _can_set_experts_implementation_cached_value = True
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": LlamaDecoderLayer,
        "attentions": LlamaAttention,
        "router_logits": OutputRecorder(MultiGateRouter, index=0),
    }

    def __init__(self, config: LlamaConfig, spec: MoeSpec, shared_width: int) -> None:
        with init.no_init_weights():
            super().__init__(config)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList([MoeLlamaLayer(config, index, spec, shared_width) for index in layers])
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_moe_weights(module, self.config.initializer_range)


class MoeGpt2Model(GPT2Model):
    """GPT2Model with GaVaMoE blocks."""

    _can_set_experts_implementation_cached_value = True  # see MoeLlamaModel
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": GPT2Block,
        "attentions": OutputRecorder(GPT2Attention, layer_name=".attn", index=1),
        "router_logits": OutputRecorder(MultiGateRouter, index=0),
    }

    def __init__(self, config: GPT2Config, spec: MoeSpec, shared_width: int) -> None:
        with init.no_init_weights():
            super().__init__(config)
        layers = range(config.num_hidden_layers)
        self.h = nn.ModuleList([MoeGpt2Layer(config, index, spec, shared_width) for index in layers])
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        init_moe_weights(module, self.config.initializer_range)


def moe_spec(config: GavamoeConfig) -> MoeSpec:
    """Sizes and rules of the GaVaMoE blocks that the config describes."""
    text = config.text_config
    llama = text.model_type == "llama"
    return MoeSpec(
        hidden_size=text.hidden_size,
        experts=config.n_experts,
        top_k=config.experts_per_token,
        expert_size=config.expert_size,
        gates=config.n_gates,
        activation=text.hidden_act if llama else text.activation_function,
        gated=llama,
        renormalize=config.renormalise,
        scale=config.expert_scale,
        gate_bias=config.gate_bias,
        lora_rank=config.expert_lora_rank,
        dropout=0.0 if llama else text.resid_pdrop,
    )


def build_decoder(config: GavamoeConfig) -> PreTrainedModel:
    """The decoder that the config describes: with GaVaMoE blocks, or dense where experts are off."""
    text = config.text_config
    moe, dense = DECODERS[text.model_type]
    if not config.experts_enabled:
        return dense(text)
    return moe(text, moe_spec(config), config.shared_width)


DECODERS = {"llama": (MoeLlamaModel, LlamaModel), "gpt2": (MoeGpt2Model, GPT2Model)}
"""Supported architectures by `model_type`: with GaVaMoE blocks, and dense."""
