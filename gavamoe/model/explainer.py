"""The explainer (section 3.3): a LLaMA or GPT-2 decoder whose feed-forward layers are GaVaMoE blocks, as an ordinary
Hugging Face causal language model that also takes a cluster id per row and knows users and items as tokens.

A user or item is one token id above the vocabulary: its embedding is a row of the table shared with stage 1, through
a projection. Such ids are read, never written: logits cover the vocabulary only.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
)
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from gavamoe.model.decoders import GavamoeConfig, build_decoder
from gavamoe.model.output_head import OutputHead
from gavamoe.model.router import check_cluster_ids, load_balance_loss, router_z_loss
from gavamoe.model.slots import RATING_ANCHORS, SlotIds, rating_mix
from gavamoe.model.tables.layout import some_vectors

IGNORED = -100
"""Label of positions that carry no loss, as in PyTorch and transformers."""


@dataclass
class GavamoeOutput(MoeCausalLMOutputWithPast):
    """The model's output: `loss` is cross-entropy plus the weighted `aux_loss`; the rest is as in Mixtral."""


class GavamoeForCausalLM(PreTrainedModel, GenerationMixin):
    """The explainer. `generate()` takes `cluster_ids`, (B,) or (B, K), beside `input_ids`."""

    config: GavamoeConfig
    config_class = GavamoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_set_experts_implementation_cached_value = True
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    # Loaded in bfloat16, these stay float32: gate values decide a discrete choice, and tables cost nothing to read.
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["router", "user_embedding", "item_embedding"]

    def __init__(self, config: GavamoeConfig) -> None:
        super().__init__(config)
        text = config.text_config
        self.model = build_decoder(config)
        self.lm_head = OutputHead(text.hidden_size, text.vocab_size)
        self.user_embedding = config.table_layout.make("user", config.n_users, config.slot_size)
        self.item_embedding = config.table_layout.make("item", config.n_items, config.slot_size)
        self.user_projection = nn.Linear(config.slot_size, text.hidden_size, bias=False)
        self.item_projection = nn.Linear(config.slot_size, text.hidden_size, bias=False)
        if config.n_cluster_slots:
            self.cluster_embedding = nn.Embedding(config.n_cluster_slots, text.hidden_size)
        if config.rating_places:
            self.rating_embedding = nn.Embedding(RATING_ANCHORS, text.hidden_size)
            self._rating_mix = rating_mix(config.rating_places, RATING_ANCHORS, config.rating_spread)
        self.slots = SlotIds(config.vocab_size, config.n_users, config.n_items, config.rating_places)
        table = "embed_tokens" if text.model_type == "llama" else "wte"
        self._tied_weights_keys = {"lm_head.weight": f"model.{table}.weight"}
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.user_projection or module is self.item_projection:
            # Slots enter at the scale of text tokens: rows of std s (here the tables' own) through E inputs.
            init.normal_(module.weight, std=1.0 / math.sqrt(self.config.slot_size))

    def get_input_embeddings(self) -> nn.Embedding:
        """The table of text tokens."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the table of text tokens."""
        self.model.set_input_embeddings(value)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Recompute activations in the backward pass; the older `gradient_checkpointing_enable` comes here as well.

        Raises:
            ValueError: asked for the reentrant variant, which silently drops the gradient of the auxiliary losses.
        """
        options = {"use_reentrant": False} | (activation_checkpointing_kwargs or {})
        if options["use_reentrant"]:
            raise ValueError("use_reentrant=True drops the gradient of the router's auxiliary losses; use False")
        super().activation_checkpointing_enable(options, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`, with `cluster_ids`, (B,) or (B, K), as one more keyword.

        `repetition_penalty` counts what was written, not the prompt: users and items in it have no logits, and its
        features are to be named.
        """
        settings = kwargs.get("generation_config") or self.generation_config
        penalty = kwargs.get("repetition_penalty", settings.repetition_penalty)
        if penalty not in (None, 1.0):
            prompt = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
            ignored = 0 if prompt is None else prompt.shape[1]
            processor = RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=ignored)
            given = kwargs.get("logits_processor") or []
            kwargs |= {"repetition_penalty": 1.0, "logits_processor": LogitsProcessorList([*given, processor])}
        return super().generate(*args, **kwargs)

    def user_token(self, index: int) -> int:
        """Token id of a user by index; every index from `n_users` on is the unknown user."""
        return self.slots.user_token(index)

    def item_token(self, index: int) -> int:
        """Token id of an item by index; every index from `n_items` on is the unknown item."""
        return self.slots.item_token(index)

    def embed(self, input_ids_BT: Tensor, clusters: Tensor | None = None) -> Tensor:
        """Embeddings (B, T, D) of text tokens, users, items and, with such slots, ratings and clusters.

        All are computed for every position and one is chosen: shapes stay static, nothing waits for a GPU, and each
        table gets a gradient (perhaps zero) on every worker, as DDP and ZeRO need.

        Args:
            clusters: ids (B,) or responsibilities (B, K) of the rows, for slots of clusters alone.

        Raises:
            IndexError: an id is negative or above the last item's (on a GPU, the device's own assertion).
        """
        slots = self.slots
        first_user, first_item = slots.vocabulary, slots.first_item
        others: list[tuple[Tensor, Tensor]] = []  # where they are, and their embeddings
        if self.config.n_cluster_slots:
            others.append((input_ids_BT == slots.cluster, self._cluster_slots(clusters)[:, None]))
        if self.config.rating_places:
            is_rating = (input_ids_BT >= slots.first_rating) & (input_ids_BT < slots.cluster)
            places_BT = (input_ids_BT - slots.first_rating).masked_fill(~is_rating, 0)
            others.append((is_rating, functional.embedding(places_BT, self._rating_slots())))
        for is_other, _ in others:
            input_ids_BT = input_ids_BT.masked_fill(is_other, 0)
        is_item = input_ids_BT >= first_item
        is_user = (input_ids_BT >= first_user) & ~is_item
        tokens_BTD = self.get_input_embeddings()(input_ids_BT.masked_fill(is_user | is_item, 0))
        users_BTE = self.user_embedding((input_ids_BT - first_user).masked_fill(~is_user, 0))
        items_BTE = self.item_embedding((input_ids_BT - first_item).masked_fill(~is_item, 0))
        users_BTD = self.user_projection(users_BTE.to(self.user_projection.weight.dtype)).to(tokens_BTD.dtype)
        items_BTD = self.item_projection(items_BTE.to(self.item_projection.weight.dtype)).to(tokens_BTD.dtype)
        slots_BTD = torch.where(is_item[..., None], items_BTD, users_BTD)
        embeds_BTD = torch.where((is_user | is_item)[..., None], slots_BTD, tokens_BTD)
        for is_other, vectors in others:
            embeds_BTD = torch.where(is_other[..., None], vectors.to(embeds_BTD.dtype), embeds_BTD)
        return embeds_BTD

    def _rating_slots(self) -> Tensor:
        """Embeddings (2R, D) of all places on the rating scale, known ones before expected ones."""
        # Read by the module, not off its weight, so that ZeRO-3 gathers it.
        anchors_AD = self.rating_embedding(torch.arange(RATING_ANCHORS, device=self.rating_embedding.weight.device))
        return torch.as_tensor(self._rating_mix, device=anchors_AD.device).to(anchors_AD.dtype) @ anchors_AD

    def _cluster_slots(self, clusters: Tensor | None) -> Tensor:
        """Embeddings (B, D) of the rows' clusters, or their means by responsibilities."""
        if clusters is None:
            raise ValueError("cluster_ids: needed by a model whose prompts have a slot for the cluster; one per row")
        if clusters.is_floating_point():
            weight = self.cluster_embedding.weight
            return clusters.to(weight.dtype) @ weight
        slots_BD: Tensor = self.cluster_embedding(clusters)
        return slots_BD

    @torch.no_grad()
    def calibrate_slots(self) -> None:
        """Rescale the projections so that users and items enter with the root mean square of the text embeddings.

        Call it on a model that has not been trained yet, after its tables were filled or replaced. From then on
        transformers counts every weight as initialized.
        """
        target = self.get_input_embeddings().weight.float().square().mean().sqrt()
        for table, projection, ids in (
            (self.user_embedding, self.user_projection, self.config.n_users),
            (self.item_embedding, self.item_projection, self.config.n_items),
        ):
            vectors = some_vectors(table, ids)
            present = projection(vectors.to(projection.weight)).float().square().mean().sqrt()
            if present > 0:
                projection.weight.mul_((target / present).to(projection.weight.dtype))
        for module in self.modules():
            module._is_hf_initialized = True  # a later init_weights() must not redraw what was put here

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        cluster_ids: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_router_logits: bool | None = None,
        return_logits: bool = True,
        right_padded: bool = False,
        **kwargs: Any,
    ) -> GavamoeOutput:
        """Score the next token at each position.

        Args:
            input_ids: (B, T), users and items as ids above the vocabulary; or `inputs_embeds` (B, T, D).
            attention_mask: (B, T), 0 at padding, on either side.
            labels: (B, T), the input ids or -100 where there is no loss; shifted inside.
            cluster_ids: int64 (B,), the gate of each row; or float (B, K), its responsibilities, by which all gates'
                values are mixed. May be missing with one gate, which then serves every cluster.
            logits_to_keep: score only the last n positions (0: all), or the positions in a 1-D tensor. The loss
                covers only positions that are scored.
            return_logits: False, in training: of these positions, those with a label alone are scored, and a large
                vocabulary's logits never stand whole (`output_head`).
            right_padded: padding, if any, is on the right, where causal attention of the tokens before never looks: the
                decoder then gets no mask, so that attention runs by faster kernels, without copies of grouped keys.

        Raises:
            ValueError: missing cluster ids, not one per row, or ids that no gate has.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        cluster_ids = self._checked(cluster_ids)
        embeds_BTD = inputs_embeds if input_ids is None else self.embed(input_ids, cluster_ids)
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2 and not right_padded:
            position_ids = _positions(attention_mask, embeds_BTD)
        record = self._records_router(output_router_logits, labels)
        if self.config.experts_enabled:
            kwargs |= {"cluster_ids": cluster_ids, "output_router_logits": record}
        outputs = self.model(
            inputs_embeds=embeds_BTD,
            attention_mask=None if right_padded else attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_BPD = outputs.last_hidden_state[:, keep]
        logits = self.lm_head(hidden_BPD) if return_logits else None
        router_logits = outputs.router_logits if record else None
        aux_loss = self._aux_loss(router_logits, cluster_ids, attention_mask) if router_logits else None
        loss = None
        if labels is not None:
            targets_BP = _next_tokens(labels)[:, keep].to(hidden_BPD.device)
            loss = self._token_loss(hidden_BPD, logits, targets_BP, kwargs.get("num_items_in_batch"))
            loss = loss if aux_loss is None else loss + aux_loss.to(loss.device)
        return GavamoeOutput(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=router_logits,
        )

    def _token_loss(
        self, hidden_BPD: Tensor, logits: Tensor | None, targets_BP: Tensor, tokens: Tensor | int | None
    ) -> Tensor:
        """Mean negative log-likelihood of the next tokens, in float32 or wider; 0 for a batch without any label."""
        if logits is None:
            labeled_L = (targets_BP.flatten() != IGNORED).nonzero()[:, 0]
            # A batch without labels goes through the head as well, as no token: its gradients are zero, not absent.
            total = self.lm_head(hidden_BPD.flatten(0, 1)[labeled_L], targets_BP.flatten()[labeled_L])
            return total / (max(len(labeled_L), 1) if tokens is None else tokens)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = functional.cross_entropy(
            wide.flatten(0, 1), targets_BP.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return total / ((targets_BP != IGNORED).sum().clamp(min=1) if tokens is None else tokens)

    def _checked(self, cluster_ids: Tensor | None) -> Tensor | None:
        config = self.config
        clusters = max(config.n_gates if config.experts_enabled else 1, config.n_cluster_slots)
        if cluster_ids is not None and clusters > 1:
            check_cluster_ids(cluster_ids, clusters)
        return cluster_ids

    def _records_router(self, requested: bool | None, labels: Tensor | None) -> bool:
        if not self.config.experts_enabled:
            return False
        weighted = self.config.load_balance_weight > 0 or self.config.router_z_weight > 0
        wanted = self.config.output_router_logits if requested is None else requested
        return wanted or (weighted and labels is not None)

    def _aux_loss(
        self, router_logits: tuple[Tensor, ...], cluster_ids: Tensor | None, attention_mask: Tensor | None
    ) -> Tensor:
        """Mean over layers of both auxiliary losses, by the config's weights."""
        config = self.config
        mask_BT = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
        total = router_logits[0].new_zeros(())
        for logits_BTN in router_logits:
            if config.load_balance_weight:
                balance = load_balance_loss(logits_BTN, config.experts_per_token, cluster_ids, config.n_gates, mask_BT)
                total = total + config.load_balance_weight * balance
            if config.router_z_weight:
                total = total + config.router_z_weight * router_z_loss(logits_BTN, mask_BT)
        return total / len(router_logits)


def _positions(attention_mask_BT: Tensor, embeds_BTD: Any) -> Tensor:
    """Positions (B, T) of the embedded tokens, counted from each row's first token that is not padding."""
    return (attention_mask_BT.long().cumsum(-1) - 1).clamp(min=0)[:, -embeds_BTD.shape[1] :]


def _next_tokens(labels_BT: Tensor) -> Tensor:
    """Each position's label is the token after it: (B, T)."""
    return functional.pad(labels_BT, (0, 1), value=IGNORED)[:, 1:]


AutoConfig.register("gavamoe", GavamoeConfig)
AutoModelForCausalLM.register(GavamoeConfig, GavamoeForCausalLM)
