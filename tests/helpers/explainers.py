"""Tiny explainers in float64 for the tests of the model."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from gavamoe.config.files import parse_config
from gavamoe.config.schema import RunConfig
from gavamoe.model.base_model import train_tokenizer
from gavamoe.model.build import build_explainer, load_explainer
from gavamoe.model.conversion import ExplainerSizes
from gavamoe.model.explainer import GavamoeForCausalLM

VOCABULARY, USERS, ITEMS, SLOT, GATES = 300, 5, 7, 12, 3
FAMILIES = ("llama", "gpt2")


def dense_model(family: str = "llama", tied: bool = True) -> PreTrainedModel:
    """A tiny dense model in float64 whose weights are large enough for every part to matter."""
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    torch.manual_seed(0)
    if family == "llama":
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=tied, **ids,
        )  # fmt: skip
        return LlamaForCausalLM(config).double().eval()
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_inner=64, initializer_range=0.2,
        tie_word_embeddings=tied, **ids,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).double().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    return model


def run_config(**experts: Any) -> RunConfig:
    values = {"count": 4, "top_k": 2, "conversion": "random", "implementation": "eager"} | experts
    base = "scratch" if values["conversion"] != "lora" else "some/model"  # what is frozen must have learned something
    return parse_config({"stage2": {"experts": values, "base_model": base}}, "test")


def explainer(base: PreTrainedModel | None = None, gates: int = GATES, **experts: Any) -> GavamoeForCausalLM:
    base = dense_model() if base is None else base
    return build_explainer(run_config(**experts), base, ExplainerSizes(USERS, ITEMS, SLOT, gates)).eval()


def text_ids(rows: int = 3, length: int = 9) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(4))


def slot_batch(model: GavamoeForCausalLM) -> tuple[Tensor, Tensor, Tensor]:
    """Three prompts of 9, 6 and 3 tokens, left-padded, with a user and an item each, of three clusters."""
    ids = text_ids()
    ids[:, -2], ids[:, -3] = model.user_token(1), model.item_token(2)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 3, 6)):
        ids[row, :padding], mask[row, :padding] = 2, 0
    return ids, mask, torch.tensor([2, 0, 1])


def saved_and_loaded(model: GavamoeForCausalLM, folder: Path) -> GavamoeForCausalLM:
    model.save_pretrained(folder)
    train_tokenizer(["a text"], VOCABULARY).save_pretrained(folder)
    return load_explainer(folder)[0]
