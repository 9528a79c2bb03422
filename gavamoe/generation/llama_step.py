"""One more token of every row, by as few operations as a LLaMA with GaVaMoE blocks needs.

The model's own forward pass is transformers', made for any shape: some eighty operations a layer and token, each with
its overhead, which for one text is longer than the arithmetic. Here the three products that read the same input are
one (query, key, value; gate, up), rotary angles come from a table, grouped queries attend without copies of the keys,
and a row's gate is picked for all layers at once. Shapes depend on the number of rows and the read length alone.

Weights are the model's own: fused matrices take their place, and the layers' parameters become views of them.

Shape letters: B rows, D hidden size, H query heads, G of them for each of J key-value heads, F head size, L read length
of the cache, C positions, K gates, N experts, S of a token.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from gavamoe.generation.kv_cache import SlotCache
from gavamoe.model.block import MultiGateMoe
from gavamoe.model.experts import LoraExperts, SwiGluExperts
from gavamoe.model.explainer import GavamoeForCausalLM
from gavamoe.model.router import MultiGateRouter

Product = Callable[[Tensor], Tensor]
_STATIC_ROTATIONS = ("default", "linear", "llama3")
"""Kinds of rotary embedding whose angles depend on the position alone."""
_FUSED = "_gavamoe_fused"


class _Layer(NamedTuple):
    """What a layer computes with."""

    attention_norm: Tensor
    query_key_value: Product
    output: Product
    feed_norm: Tensor
    feed: Callable[[Tensor, Tensor | None], Tensor]
    """The feed-forward part: normed hidden states (B, D) and the rows' gates (B, N, D) to (B, D)."""


class LlamaStep:
    """The decoding pass over a model; made by `of`."""

    def __init__(self, model: GavamoeForCausalLM, positions: int, static: bool) -> None:
        decoder: Any = model.model
        text = model.config.text_config
        self._model, self._table = model, model.get_input_embeddings()
        first = decoder.layers[0].self_attn
        self._head, self._scale, self._epsilon = first.head_dim, first.scaling, text.rms_norm_eps
        self._heads, self._shared_heads = text.num_attention_heads, text.num_key_value_heads
        self._cos, self._sin = _rotations(decoder, positions, model.dtype)
        self._layers = [_layer(layer, static) for layer in decoder.layers]
        self._norm = decoder.norm.weight
        self._gates = _Gates([block.router for block in model.modules() if isinstance(block, MultiGateMoe)])

    @classmethod
    def of(cls, model: GavamoeForCausalLM, positions: int, static: bool | None = None) -> "LlamaStep | None":
        """The pass over a model; None where only its own forward pass can: GPT-2, low-rank experts, gates with biases,
        soft routes, angles that depend on the text's length.

        Args:
            positions: tokens of prompt and text together, at most.
            static: all experts run on every row, and the chosen ones count: no operation's shape then depends on the
                choice, none waits for the device, and a few rows read most experts' weights anyway. None: on a GPU.
        """
        text = model.config.text_config
        if text.model_type != "llama" or model.config.soft_routes:
            return None
        rotation = getattr(model.model, "rotary_emb", None)
        if getattr(rotation, "rope_type", "") not in _STATIC_ROTATIONS:
            return None
        blocks = [module for module in model.modules() if isinstance(module, MultiGateMoe)]
        if any(isinstance(block.experts, LoraExperts) or block.router.bias is not None for block in blocks):
            return None
        return cls(model, positions, model.device.type != "cpu" if static is None else static)

    def __call__(self, ids_B: Tensor, position_B: Tensor, clusters_B: Tensor, cache: SlotCache, longest: int) -> Tensor:
        """Read each row's last token, at `position_B` of the slots 0..B-1, and score the next one: logits (B, V).

        Args:
            longest: one more than the largest position.
        """
        rows, size = ids_B.shape[0], self._table.weight.shape[1:]
        hidden_BD = functional.embedding(ids_B, self._table.weight)
        cos_B1F, sin_B1F = (table.index_select(0, position_B) for table in (self._cos, self._sin))
        seen_BL = torch.arange(longest, device=ids_B.device) <= position_B[:, None]
        mask_B11L = torch.zeros(seen_BL.shape, dtype=hidden_BD.dtype, device=ids_B.device)
        mask_B11L = mask_B11L.masked_fill_(~seen_BL, -torch.inf)[:, None, None]
        slots = torch.arange(rows, device=ids_B.device)
        turned = self._heads + self._shared_heads
        grouped = (rows, self._shared_heads, self._heads // self._shared_heads, self._head)
        for layer, keys, values, gates_BND in zip(
            self._layers, cache.keys, cache.values, self._gates.of_rows(clusters_B, len(self._layers)), strict=True
        ):
            normed_BD = functional.rms_norm(hidden_BD, size, layer.attention_norm, self._epsilon)
            heads = layer.query_key_value(normed_BD).view(rows, -1, self._head)
            plain = heads[:, :turned]
            rotated = torch.addcmul(plain * cos_B1F, plain.roll(self._head // 2, -1), sin_B1F)
            keys[slots, :, position_B] = rotated[:, self._heads :]
            values[slots, :, position_B] = heads[:, turned:]
            attended = functional.scaled_dot_product_attention(
                rotated[:, : self._heads].view(grouped),  # the queries of a group, as tokens that see the same keys
                keys[:rows, :, :longest],
                values[:rows, :, :longest],
                attn_mask=mask_B11L,
                scale=self._scale,
            )
            hidden_BD = hidden_BD + layer.output(attended.reshape(rows, -1))
            normed_BD = functional.rms_norm(hidden_BD, size, layer.feed_norm, self._epsilon)
            hidden_BD = hidden_BD + layer.feed(normed_BD, gates_BND)
        logits_BV: Tensor = self._model.lm_head(functional.rms_norm(hidden_BD, size, self._norm, self._epsilon))
        return logits_BV


class _Gates:
    """The rows' gates of all layers, picked together and kept while the rows stay."""

    def __init__(self, routers: list[MultiGateRouter]) -> None:
        self._weights = torch.stack([router.weight for router in routers]) if routers else None  # (layers, K, N, D)
        self._clusters: Tensor | None = None
        self._picked: list[Tensor | None] = []

    def of_rows(self, clusters_B: Tensor, layers: int) -> list[Tensor | None]:
        """(B, N, D) a layer; None of a dense one."""
        if self._weights is None:
            return [None] * layers
        if self._weights.shape[1] == 1:
            clusters_B = torch.zeros_like(clusters_B)
        before = self._clusters
        # Elsewhere than on a CPU, looking would wait for the device.
        if before is None or clusters_B.device.type != "cpu" or not torch.equal(before, clusters_B):
            self._clusters = clusters_B
            self._picked = list(self._weights.index_select(1, clusters_B))
        return self._picked


def _layer(layer: Any, static: bool) -> _Layer:
    attention = layer.self_attn
    return _Layer(
        layer.input_layernorm.weight,
        _product(attention, "q_proj", "k_proj", "v_proj"),
        attention.o_proj,
        layer.post_attention_layernorm.weight,
        _routed(layer.mlp, static) if isinstance(layer.mlp, MultiGateMoe) else _dense(layer.mlp),
    )


def _dense(network: Any) -> Callable[[Tensor, Tensor | None], Tensor]:
    both, act, down = _product(network, "gate_proj", "up_proj"), network.act_fn, network.down_proj

    def feed(hidden_BD: Tensor, _: Tensor | None) -> Tensor:
        gate, up = both(hidden_BD).chunk(2, dim=-1)
        output: Tensor = down(act(gate) * up)
        return output

    return feed


def _routed(block: MultiGateMoe, static: bool) -> Callable[[Tensor, Tensor | None], Tensor]:
    shared = None if block.shared_expert is None else _dense(block.shared_expert)
    experts: Any = block.experts
    if static and isinstance(block.experts, SwiGluExperts):
        experts = _all_experts(block.experts)
    router, scale = block.router, block.scale
    renormalized = router.renormalize

    def feed(hidden_BD: Tensor, gates_BND: Tensor | None) -> Tensor:
        assert gates_BND is not None
        logits_BN = torch.bmm(gates_BND, hidden_BD.to(gates_BND.dtype)[..., None])[..., 0]
        # The quotients of the kept probabilities are the softmax of the kept logits.
        kept_BS, chosen_BS = (logits_BN if renormalized else logits_BN.softmax(-1)).topk(router.top_k, dim=-1)
        weights_BS = kept_BS.softmax(-1) if renormalized else kept_BS
        if scale != 1:
            weights_BS = weights_BS * scale
        routed_BD: Tensor = experts(hidden_BD, chosen_BS, weights_BS)
        return routed_BD if shared is None else routed_BD + shared(hidden_BD, None)

    return feed


def _all_experts(experts: SwiGluExperts) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Eq. 11 with every expert run on every row, in two products."""
    read_NDI = experts.gate_up_proj.transpose(1, 2)
    write_NID = experts.down_proj.transpose(1, 2)

    def run(hidden_BD: Tensor, chosen_BS: Tensor, weights_BS: Tensor) -> Tensor:
        gate, up = torch.matmul(hidden_BD, read_NDI).chunk(2, dim=-1)
        output_NBD = torch.matmul(experts.act_fn(gate) * up, write_NID)
        share_BN = torch.zeros(len(hidden_BD), len(read_NDI), dtype=weights_BS.dtype, device=hidden_BD.device)
        share_B1N = share_BN.scatter_(1, chosen_BS, weights_BS)[:, None].to(output_NBD.dtype)
        return torch.bmm(share_B1N, output_NBD.transpose(0, 1))[:, 0]

    return run


def _product(parent: nn.Module, *names: str) -> Product:
    """The linear layers of that names on one input, their outputs side by side; one product, where their weights are
    plain matrices."""
    layers: list[Any] = [getattr(parent, name) for name in names]
    if not all(type(layer) is nn.Linear for layer in layers):
        return lambda hidden: torch.cat([layer(hidden) for layer in layers], dim=-1)
    fused: tuple[Tensor, Tensor | None] | None = getattr(parent, _FUSED, None)
    if fused is None or fused[0].data_ptr() != layers[0].weight.data_ptr():
        weight = torch.cat([layer.weight.detach() for layer in layers])
        bias = None if layers[0].bias is None else torch.cat([layer.bias.detach() for layer in layers])
        start = 0
        for layer in layers:
            own = slice(start, start + layer.out_features)
            layer.weight.data = weight[own]
            if bias is not None:
                layer.bias.data = bias[own]
            start += layer.out_features
        fused = (weight, bias)
        setattr(parent, _FUSED, fused)
    weight, bias = fused
    return lambda hidden: functional.linear(hidden, weight, bias)


def _rotations(decoder: Any, positions: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine of every position and head entry, (C, 1, F): with x turned by half its length, x * cosine
    + turned * sine is the rotated x."""
    places = torch.arange(positions, device=decoder.norm.weight.device)[None]
    like = torch.zeros(1, dtype=dtype, device=places.device)
    cos_1CF, sin_1CF = decoder.rotary_emb(like, position_ids=places)
    sign_F = torch.ones(cos_1CF.shape[-1], dtype=dtype, device=places.device)
    sign_F[: len(sign_F) // 2] = -1
    return cos_1CF[0, :, None].contiguous(), (sin_1CF[0] * sign_F)[:, None].contiguous()
