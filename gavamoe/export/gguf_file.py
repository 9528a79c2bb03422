"""A plain model as one GGUF file, which llama.cpp and what is built on it (Ollama, LM Studio) read.

Input: a model of `plain_model`, its tokenizer. Output: the file; tables and matrices in the type that was asked for,
vectors and routers in float32, which are small and decide much.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gavamoe.errors import InputError

GgufType = Literal["f32", "f16", "q8_0", "q4_0"]
Arrays = Iterator[tuple[str, np.ndarray]]

_TYPES = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (gguf.GGMLQuantizationType.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
}
_ARCHITECTURES = {"llama": "llama", "mixtral": "llama", "granitemoeshared": "granitemoe", "qwen2_moe": "qwen2moe",
                  "gpt2": "gpt2"}  # fmt: skip
"""transformers' `model_type` -> llama.cpp's architecture."""
_ROTATES_PAIRS = ("llama", "granitemoe")
"""Architectures whose rotary positions turn neighboring numbers, not halves: queries and keys are reordered."""
_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
    "transformer.wte.weight": "token_embd.weight", "transformer.wpe.weight": "position_embd.weight",
    "transformer.ln_f.weight": "output_norm.weight", "transformer.ln_f.bias": "output_norm.bias",
    "lm_head.weight": "output.weight",
}  # fmt: skip
_LAYER_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp", "block_sparse_moe.router": "ffn_gate_inp",
    "mlp.experts.down_proj": "ffn_down_exps", "block_sparse_moe.experts.down_proj": "ffn_down_exps",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp", "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp", "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "shared_mlp.output_linear": "ffn_down_shexp",
    "ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
_SPLIT = {"mlp.experts.gate_up_proj": "exps", "block_sparse_moe.experts.gate_up_proj": "exps",
          "shared_mlp.input_linear": "shexp"}  # fmt: skip
"""What transformers keeps as one tensor of gate and up, and llama.cpp as two."""
_PRE_TOKENIZERS = {"Digits,ByteLevel": "smollm", "ByteLevel": "gpt-2"}
"""How a byte-level tokenizer cuts a text into words, by its parts -> llama.cpp's name for it."""


def write_gguf(
    path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kind: GgufType, *, name: str
) -> None:
    """Write a GGUF file.

    Args:
        name: of the model, for whoever lists models.

    Raises:
        InputError: rotary positions or a tokenizer that GGUF can't hold.
    """
    architecture = _ARCHITECTURES[model.config.model_type]
    writer = gguf.GGUFWriter(path, architecture)
    quantized, file_type = _TYPES[kind]
    try:
        writer.add_name(name)
        writer.add_file_type(file_type)
        _add_sizes(writer, model, architecture)
        _add_tokenizer(writer, tokenizer, model.config.vocab_size)
        for tensor_name, array in _tensors(model, architecture):
            _add_tensor(writer, tensor_name, array, quantized)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _add_tensor(writer: gguf.GGUFWriter, name: str, array: np.ndarray, kind: gguf.GGMLQuantizationType) -> None:
    """Matrices in `kind`, or in float16 where their rows are no whole blocks of it; the rest in float32."""
    array = np.ascontiguousarray(array, dtype=np.float32)
    if array.ndim < 2 or "gate_inp" in name or name == "position_embd.weight":
        kind = gguf.GGMLQuantizationType.F32
    elif kind == gguf.GGMLQuantizationType.Q4_0 and name in ("token_embd.weight", "output.weight"):
        kind = gguf.GGMLQuantizationType.Q8_0  # four bits cost most where words are told apart
    if array.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = gguf.GGMLQuantizationType.F16
    writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)


def _add_sizes(writer: gguf.GGUFWriter, model: PreTrainedModel, architecture: str) -> None:
    config: Any = model.config
    if architecture == "gpt2":
        writer.add_context_length(config.n_positions)
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_context_length(config.max_position_embeddings)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_head_count_kv(config.num_key_value_heads)
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        writer.add_rope_dimension_count(head)
        writer.add_key_length(head)
        writer.add_value_length(head)
        _add_rope(writer, config, architecture)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if architecture == "granitemoe":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(1.0)
        writer.add_residual_scale(1.0)
        writer.add_logit_scale(1.0)
        writer.add_expert_shared_feed_forward_length(config.shared_intermediate_size)
    if architecture == "qwen2moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if hasattr(config, "num_experts_per_tok"):
        writer.add_expert_count(getattr(config, "num_experts", None) or config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)


def _add_rope(writer: gguf.GGUFWriter, config: Any, architecture: str) -> None:
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "llama3" and architecture == "llama":
        # The frequencies of Llama 3.1 as divisors of the usual ones.
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        usual = 1.0 / rope["rope_theta"] ** (torch.arange(0, head, 2, dtype=torch.float) / head)
        writer.add_tensor("rope_freqs.weight", (usual / scaled).numpy())
    elif kind != "default":
        raise InputError(f"export: rotary positions of type {kind} beside this architecture are not written to GGUF;"
                         " --format hf keeps them")  # fmt: skip


def _tensors(model: PreTrainedModel, architecture: str) -> Arrays:
    """The model's tensors under llama.cpp's names, one at a time."""
    config: Any = model.config
    for full_name, tensor in model.state_dict().items():
        if full_name in _NAMES:
            yield _NAMES[full_name], _array(tensor)
            continue
        _, _, number, name = full_name.split(".", 3)
        stem, _, suffix = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "weight")
        block = f"blk.{number}"
        if stem in _SPLIT:
            for part, half in zip(("gate", "up"), tensor.chunk(2, dim=-2), strict=True):
                yield f"{block}.ffn_{part}_{_SPLIT[stem]}.weight", _array(half)
            continue
        array = _array(tensor)
        if architecture in _ROTATES_PAIRS and stem in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config.num_attention_heads if stem.endswith("q_proj") else config.num_key_value_heads
            array = _neighboring(array, heads)
        if architecture == "gpt2" and array.ndim == 2:
            array = array.T  # GPT-2 stores (in, out)
        if stem == "mlp.shared_expert_gate":
            array = array[0]
        yield f"{block}.{_LAYER_NAMES[stem]}.{suffix}", array
    if architecture == "qwen2moe":
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        for number in range(config.num_hidden_layers):  # llama.cpp expects biases here
            for name, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
                yield f"blk.{number}.attn_{name}.bias", np.zeros(heads * head, np.float32)
            yield f"blk.{number}.attn_v.bias", np.zeros(config.num_key_value_heads * head, np.float32)


def _array(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().float().cpu().numpy()
    return array


def _neighboring(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head reordered: number i of the first half, then number i of the second, and so on."""
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """The vocabulary of a byte-level BPE tokenizer; special tokens are CONTROL, which no plain text becomes."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    described = json.loads(backend.to_str()) if backend is not None else {}
    model = described.get("model", {})
    if model.get("type") != "BPE" or not _byte_level(described):
        raise InputError("export: only byte-level BPE tokenizers are written to GGUF; --format hf keeps this one")
    tokens, types = [f"<no token {index}>" for index in range(size)], [gguf.TokenType.UNUSED] * size
    for token, index in model["vocab"].items():
        tokens[index], types[index] = token, gguf.TokenType.NORMAL
    for index, added in tokenizer.added_tokens_decoder.items():
        tokens[index] = added.content
        types[index] = gguf.TokenType.CONTROL if added.special else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(described))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    adders: dict[str, Callable[[int], None]] = {
        "bos_token_id": writer.add_bos_token_id,
        "eos_token_id": writer.add_eos_token_id,
        "pad_token_id": writer.add_pad_token_id,
    }
    for name, add in adders.items():
        if getattr(tokenizer, name) is not None:
            add(getattr(tokenizer, name))
    writer.add_add_bos_token(value=tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])


def _parts(described: dict[str, Any]) -> list[dict[str, Any]]:
    pre = described.get("pre_tokenizer") or {}
    parts: list[dict[str, Any]] = pre.get("pretokenizers", [pre])
    return parts


def _byte_level(described: dict[str, Any]) -> bool:
    return any(part.get("type") == "ByteLevel" for part in _parts(described))


def _pre_tokenizer(described: dict[str, Any]) -> str:
    """llama.cpp's name of how texts are cut; Llama 3's pattern is the one that cuts digits by threes."""
    parts = _parts(described)
    patterns = [str(part.get("pattern", {}).get("Regex", "")) for part in parts if part.get("type") == "Split"]
    if any("{1,3}" in pattern for pattern in patterns):
        return "llama-bpe"
    return _PRE_TOKENIZERS.get(",".join(part.get("type", "") for part in parts), "default")
