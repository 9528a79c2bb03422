"""Tiny dense models on disk, as users give them to `stage2.base_model`: folders and GGUF files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gavamoe.model.base_model import train_tokenizer

TEXTS = ["The room was clean and the breakfast was lovely.", "Rooms were small but the staff was kind."] * 20
BASES = ("llama", "gpt2")


def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 300)


VOCABULARY = len(tokenizer())
"""Tokens of the models' tokenizer, and embeddings where a test does not say otherwise."""


def save_base_model(folder: Path, family: str = "llama", *, max_shard_size: str = "1GB", **changes: Any) -> Path:
    """A random model of one layer, with its tokenizer; `changes` are fields of its config. Returns the folder."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "tie_word_embeddings": False} | changes
    model: LlamaForCausalLM | GPT2LMHeadModel
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=512, **sizes))
    else:
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=512, **sizes))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer().save_pretrained(folder)
    return folder


def save_gguf(path: Path, *, without: str = "", spoiled: str = "", marks: Sequence[str] = ("<|endoftext|>",)) -> Path:
    """A tiny LLaMA with a GPT-2 style tokenizer as llama.cpp writes it. Returns the path.

    Args:
        without: a tensor that is left out.
        spoiled: a tensor that holds NaN.
        marks: special tokens; the last ends a text, the one before it, if there are several, begins one.
    """
    gguf = pytest.importorskip("gguf")
    hidden, width = 32, 64
    vocabulary = sorted(tokenizer().get_vocab().items(), key=lambda pair: pair[1])
    tokens = [*(token for token, index in vocabulary if 3 <= index < 259), "ab", *marks]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(width)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 257 + [3] * len(marks))
    writer.add_token_merges(["a b"])
    if len(marks) > 1:
        writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 1)
    shapes = {
        "token_embd": (len(tokens), hidden), "output_norm": (hidden,), "blk.0.attn_norm": (hidden,),
        "blk.0.ffn_norm": (hidden,), "blk.0.ffn_gate": (width, hidden), "blk.0.ffn_up": (width, hidden),
        "blk.0.ffn_down": (hidden, width), "blk.0.attn_q": (hidden, hidden), "blk.0.attn_k": (hidden, hidden),
        "blk.0.attn_v": (hidden, hidden), "blk.0.attn_output": (hidden, hidden),
    }  # fmt: skip
    numbers = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = numbers.normal(size=shape).astype(np.float32)
        if name == spoiled:
            values[3] = np.nan
        if name != without:
            writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
