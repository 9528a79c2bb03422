"""GGUF files in llama.cpp itself: the same greedy texts in full precision, and what is quantized."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import xllamacpp
from helpers.explainers import dense_model, explainer
from helpers.exported_runs import exported
from transformers import AutoModelForCausalLM, AutoTokenizer

from gavamoe.errors import InputError
from gavamoe.export.gguf_file import write_gguf
from gavamoe.export.plain_model import plain_model
from gavamoe.export.slot_tokens import slot_rows
from gavamoe.model.base_model import train_tokenizer
from gavamoe.model.explainer import GavamoeForCausalLM

TOKENS = 16
TIE = 0.005
"""Logits as near as this may change places: llama.cpp keeps keys and values in 16 bits."""


def server(path: Path) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.fit_params = 512, 1, False, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.verbosity = 0
    return xllamacpp.Server(params)


def written(running: Any, ids: list[int], end: int) -> list[int]:
    """Token ids of a greedy text by llama.cpp, without the end."""
    request = {"prompt": ids, "n_predict": TOKENS, "temperature": 0, "logprobs": 1, "cache_prompt": False}
    answer = running.handle_completions(request)
    answer = answer[0] if isinstance(answer, list) else answer
    steps = answer["choices"][0]["logprobs"]["content"]
    return [step["id"] for step in steps if step["id"] != end]


@torch.inference_mode()
def parting_gap(model: Any, ids: list[int], ours: list[int], theirs: list[int]) -> float:
    """By how much transformers' logit of its own token exceeds that of the other's, where two texts first differ."""
    at = next(place for place, (own, other) in enumerate(zip(ours, theirs, strict=False)) if own != other)
    logits_V = model(torch.tensor([[*ids, *ours[:at]]])).logits[0, -1]
    return float(logits_V[ours[at]] - logits_V[theirs[at]])


def test_llama_cpp_writes_the_same_greedy_texts_for_fifty_prompts() -> None:
    out, full = exported("hf", "float32"), exported("gguf", "f32")
    described = json.loads((full / "prompt.json").read_text())
    assert described["models"] == ["gate-0.gguf", "gate-1.gguf", "gate-2.gguf"]
    tokenizer = AutoTokenizer.from_pretrained(full / "tokenizer")
    users, items = (pq.read_table(full / f"{name}.parquet")["token"].to_pylist() for name in ("users", "items"))
    texts, ties = set(), 0
    for gate in range(3):
        model = AutoModelForCausalLM.from_pretrained(out / f"gate-{gate}")
        running = server(full / f"gate-{gate}.gguf")
        for number in range(gate, 50, 3):
            pieces = (described["instruction"], described["item"], described["sentiment"], described["answer"])
            start, item, rating, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in pieces)
            word = tokenizer(f" {('negative', 'positive')[number % 2]}", add_special_tokens=False)["input_ids"]
            ids = [*start, users[number], *item, items[number % len(items)], *rating, *word, *answer]
            theirs = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=TOKENS)[0, len(ids) :].tolist()
            expected = [token for token in theirs if token != model.generation_config.eos_token_id]
            told = written(running, ids, model.generation_config.eos_token_id)
            if told != expected:
                ties += 1
                assert parting_gap(model, ids, expected, told) < TIE, number
            texts.add(tuple(expected))
    assert len(texts) > 5
    assert ties <= 2


@pytest.mark.parametrize(
    ("block", "architecture"),
    [
        ({"enabled": False}, "llama"),
        ({"conversion": "split", "renormalise": True}, "llama"),
        ({"conversion": "random", "intermediate_size": 32}, "qwen2moe"),
        ({"conversion": "upcycle", "intermediate_size": 32}, "granitemoe"),
        (None, "gpt2"),
    ],
)
def test_every_architecture_is_read_as_it_is_meant(
    block: dict[str, Any] | None, architecture: str, tmp_path: Path
) -> None:
    base = dense_model("llama" if block is not None else "gpt2", tied=False)
    model = explainer(base, **(block or {"enabled": False})).float()
    tokenizer = train_tokenizer(["a text of some words"], 300)
    with torch.no_grad():  # llama.cpp does not tell the ids of bytes that are no letter yet
        for token in range(300):
            if not tokenizer.decode([token]).isascii():
                model.lm_head.weight[token] = 0
    prompts = [[5, model.user_token(number % 4), 7 + number, 40, 50, 60] for number in range(5)]
    rows = slot_rows(model, prompts, torch.zeros(5, dtype=torch.long))
    plain = plain_model(model, 0, rows)
    if hasattr(plain.config, "num_experts_per_tok"):
        plain.set_experts_implementation("eager")
    write_gguf(tmp_path / "model.gguf", plain, tokenizer, "f32", name="test")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert reader.fields["general.architecture"].contents() == architecture
    running = server(tmp_path / "model.gguf")
    for ids in prompts:
        options = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": tokenizer.eos_token_id}
        theirs = plain.generate(torch.tensor([ids]), pad_token_id=2, **options)[0, len(ids) :].tolist()
        expected = [token for token in theirs if token != tokenizer.eos_token_id]
        assert written(running, ids, tokenizer.eos_token_id) == expected


def small(model: GavamoeForCausalLM, path: Path, kind: Any) -> dict[str, Any]:
    rows = slot_rows(model, [[5, 6]], torch.tensor([0]))
    write_gguf(path, plain_model(model, 0, rows), train_tokenizer(["a text"], 300), kind, name="test")
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def test_matrices_are_quantized_and_what_is_small_is_not(tmp_path: Path) -> None:
    model = explainer(dense_model(), conversion="shared", intermediate_size=24).float()
    tensors = small(model, tmp_path / "model.gguf", "q4_0")
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert kinds["blk.0.attn_q.weight"] == kinds["blk.1.ffn_up_exps.weight"] == "Q4_0"
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_down_exps.weight"] == "F16"  # 24 numbers a row are no whole blocks
    assert kinds["blk.0.ffn_gate_inp.weight"] == kinds["output_norm.weight"] == "F32"


def test_eight_bits_are_near_the_weights(tmp_path: Path) -> None:
    model = explainer(dense_model(), enabled=False).float()
    tensor = small(model, tmp_path / "model.gguf", "q8_0")["blk.0.ffn_up.weight"]
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    weight = model.model.layers[0].mlp.up_proj.weight.detach().numpy()
    assert 0 < np.abs(values - weight).max() < 0.01 * np.abs(weight).max()


def test_a_user_s_name_is_no_text_s(tmp_path: Path) -> None:
    out = exported("gguf", "f32")
    fields = gguf.GGUFReader(out / "gate-0.gguf").fields
    tokens, types = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    named = [kind for token, kind in zip(tokens, types, strict=True) if token.startswith(("<user:", "<item:"))]
    assert len(named) > 90
    assert set(named) == {gguf.TokenType.CONTROL}
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    read = tokenizer("Try <user:U000001> now", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert max(read) < 400


def test_positions_that_gguf_can_not_hold_are_refused(tmp_path: Path) -> None:
    model = explainer(dense_model(), conversion="shared").float()
    model.config.text_config.rope_parameters = {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 1024,
    }  # fmt: skip
    with pytest.raises(InputError, match=r"rotary positions of type yarn .* --format hf keeps them"):
        small(model, tmp_path / "model.gguf", "f32")
