"""The GPT-2 that is made from scratch: the ablation GaVaMoE[GPT-2] without a download."""

from itertools import combinations
from pathlib import Path

import pytest
from helpers.tiny import tiny

from gavamoe.config.schema import ScratchModelConfig
from gavamoe.data.dataset import open_dataset
from gavamoe.errors import InputError
from gavamoe.model.base_model import load_base
from gavamoe.model.build import load_explainer
from gavamoe.runtime.context import LocalContext
from gavamoe.stage1.train import train_stage1
from gavamoe.stage2.tokenized_rows import tokenizer_texts
from gavamoe.stage2.train import train_stage2

TEXTS = ["The room was clean and the breakfast was good."] * 50


def test_it_has_the_sizes_of_its_config_and_no_dropout() -> None:
    sizes = {"hidden_size": 32, "layers": 3, "heads": 2, "intermediate_size": 48, "vocabulary": 300}
    gpt2, tokenizer = load_base("scratch", ScratchModelConfig(family="gpt2", **sizes), TEXTS, seed=1)
    llama, _ = load_base("scratch", ScratchModelConfig(**sizes), TEXTS, seed=1)
    config = gpt2.config
    assert (config.model_type, llama.config.model_type) == ("gpt2", "llama")
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.n_inner) == (32, 3, 2, 48)
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0, 0, 0)
    assert config.vocab_size == len(tokenizer) == llama.config.vocab_size
    assert config.eos_token_id == tokenizer.eos_token_id
    again, _ = load_base("scratch", ScratchModelConfig(family="gpt2", **sizes), TEXTS, seed=1)
    assert gpt2.lm_head.weight.equal(again.lm_head.weight)


def test_it_trains_with_experts_and_refuses_prompts_beyond_its_positions(tiny_dataset: Path, tmp_path: Path) -> None:
    family = "stage2.scratch.family=gpt2"
    config = tiny(family, "stage2.max_steps=12", "stage2.checkpoint_every=0")
    train_stage1(config, tiny_dataset, tmp_path / "stage1", LocalContext())
    metrics = train_stage2(config, tiny_dataset, tmp_path / "stage1", tmp_path / "stage2", LocalContext())
    assert metrics["validation_loss"] < metrics["validation_loss_at_start"]
    model, _ = load_explainer(tmp_path / "stage2")
    assert model.config.text_config.model_type == "gpt2"
    assert model.config.experts_enabled
    long = tiny(family, "stage2.prompt.max_tokens=500")
    with pytest.raises(InputError, match=r"500 \+ 64 tokens of prompt and explanation.* 512 positions"):
        train_stage2(long, tiny_dataset, tmp_path / "stage1", tmp_path / "other", LocalContext())


def test_untied_word_vectors_are_learned_and_kept_apart(stage1: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    changes = ("stage2.scratch.family=gpt2", "stage2.scratch.tie_word_embeddings=false")
    config = tiny(*changes, "stage2.max_steps=12", "stage2.checkpoint_every=0")
    metrics = train_stage2(config, tiny_dataset, stage1, tmp_path / "stage2", LocalContext())
    assert metrics["validation_loss"] < metrics["validation_loss_at_start"]
    model, _ = load_explainer(tmp_path / "stage2")
    texts = tokenizer_texts(open_dataset(tiny_dataset), config.stage2.prompt)
    start, _ = load_base("scratch", config.stage2.scratch, texts, config.seed)
    words = [of.weight for m in (model, start) for of in (m.get_input_embeddings(), m.get_output_embeddings())]
    for one, other in combinations(words, 2):
        assert not one.equal(other)
