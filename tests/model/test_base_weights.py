"""Base models whose weights, numbers or tokenizer don't fit: one line each, before training and while loading."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.base_models import BASES, VOCABULARY, save_base_model, save_gguf
from helpers.tiny import tiny
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from gavamoe.config.schema import ScratchModelConfig
from gavamoe.errors import InputError
from gavamoe.model.base_config import base_shape
from gavamoe.model.base_model import check_base, encode_text, load_base
from gavamoe.model.build import build_explainer
from gavamoe.model.conversion import ExplainerSizes

Weights = dict[str, Tensor]


def check(folder: Path) -> object:
    return check_base(str(folder))


def load(folder: Path) -> object:
    return load_base(str(folder), ScratchModelConfig(), [], seed=0)


BOTH = pytest.mark.parametrize("look", [check, load])
"""Looking before any training, and loading: they refuse the same models."""


def change_weights(folder: Path, change: Callable[[Weights], Weights]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def refusal(look: Callable[[Path], object], folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        look(folder)
    text = str(caught.value)
    assert text.startswith(f"base_model {folder}: ")
    assert "\n" not in text
    return text.removeprefix(f"base_model {folder}: ")


@BOTH
@pytest.mark.parametrize("family", BASES)
def test_a_whole_model_passes(look: Callable[[Path], object], family: str, tmp_path: Path) -> None:
    look(save_base_model(tmp_path, family))


@BOTH
def test_weights_saved_inside_a_peft_wrapper_are_missing_and_unknown(
    look: Callable[[Path], object], tmp_path: Path
) -> None:
    change_weights(
        save_base_model(tmp_path), lambda weights: {f"base_model.model.{name}": w for name, w in weights.items()}
    )
    text = refusal(look, tmp_path)
    assert text.startswith("12 weights are missing, such as model.layers.0.")
    assert "; 12 weights are unknown, such as base_model.model.model.layers.0." in text
    assert "merge_and_unload" in text


@BOTH
@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.mlp.up_proj.weight"])
def test_one_missing_weight_is_named(look: Callable[[Path], object], name: str, tmp_path: Path) -> None:
    change_weights(save_base_model(tmp_path), lambda weights: {each: w for each, w in weights.items() if each != name})
    assert refusal(look, tmp_path) == (
        f"1 weight is missing, such as {name}; save the whole model again (save_pretrained)"
    )


@BOTH
def test_one_unknown_weight_is_named(look: Callable[[Path], object], tmp_path: Path) -> None:
    """Biases of attention, say, that config.json does not know: the model would compute something else."""
    name = "model.layers.0.self_attn.q_proj.bias"
    change_weights(save_base_model(tmp_path), lambda weights: weights | {name: torch.zeros(16)})
    assert refusal(look, tmp_path).startswith(f"1 weight is unknown, such as {name};")


@BOTH
def test_a_tied_head_is_rightly_absent(look: Callable[[Path], object], tmp_path: Path) -> None:
    save_base_model(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    look(tmp_path)


@BOTH
def test_names_of_the_published_gpt2_pass(look: Callable[[Path], object], tmp_path: Path) -> None:
    """Its file leaves out `transformer.`, and holds the attention masks, which are no weights."""
    save_base_model(tmp_path, "gpt2")
    masks = {"h.0.attn.bias": torch.ones(1, 1, 8, 8)}
    change_weights(tmp_path, lambda weights: {n.removeprefix("transformer."): w for n, w in weights.items()} | masks)
    look(tmp_path)


@BOTH
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_are_not_finite_are_refused(
    look: Callable[[Path], object], bad: float, dtype: torch.dtype, tmp_path: Path
) -> None:
    def spoil(weights: Weights) -> Weights:
        weights = {name: weight.to(dtype) for name, weight in weights.items()}
        weights["model.norm.weight"][3] = bad
        return weights

    change_weights(save_base_model(tmp_path), spoil)
    assert refusal(look, tmp_path).startswith("1 weight is not finite (NaN or infinity), such as model.norm.weight;")


@BOTH
def test_another_shape_is_named_with_both(look: Callable[[Path], object], tmp_path: Path) -> None:
    change_weights(save_base_model(tmp_path), lambda weights: weights | {"model.norm.weight": torch.ones(7)})
    expected = "1 weight is of another shape than config.json says, such as model.norm.weight: (7,), not (16,);"
    assert refusal(look, tmp_path).startswith(expected)


@BOTH
def test_pickled_weights_are_checked_too(look: Callable[[Path], object], tmp_path: Path) -> None:
    weights = load_file(save_base_model(tmp_path) / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    path = tmp_path / "pytorch_model.bin"
    torch.save(weights, path)
    look(tmp_path)
    torch.save(weights | {"model.norm.weight": torch.full((16,), float("nan"))}, path)
    assert "not finite (NaN or infinity), such as model.norm.weight" in refusal(look, tmp_path)
    path.write_bytes(path.read_bytes()[:-2000])
    text = refusal(look, tmp_path)
    assert text.startswith("cannot be loaded (pytorch_model.bin is cut short or damaged: ")
    assert text.endswith("); copy or download it again")


@BOTH
def test_every_shard_is_checked(look: Callable[[Path], object], tmp_path: Path) -> None:
    save_base_model(tmp_path, max_shard_size="10KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    look(tmp_path)
    shard = tmp_path / index["model.layers.0.mlp.up_proj.weight"]
    weights = load_file(shard)
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, shard, metadata={"format": "pt"})
    assert "such as model.layers.0.mlp.up_proj.weight" in refusal(look, tmp_path)


@BOTH
def test_a_cut_file_is_named(look: Callable[[Path], object], tmp_path: Path) -> None:
    path = save_base_model(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert refusal(look, tmp_path).startswith("cannot be loaded (model.safetensors is cut short or damaged: ")


@BOTH
@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8"])
def test_quantized_weights_are_refused_by_name(look: Callable[[Path], object], method: str, tmp_path: Path) -> None:
    path = save_base_model(tmp_path) / "config.json"
    quantization = {"quant_method": method, "bits": 4}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))
    expected = f"its weights are quantized ({method}), and experts can't be trained from those; give the model"
    assert refusal(look, tmp_path).startswith(expected)


@BOTH
def test_a_tokenizer_of_a_newer_library_is_refused(look: Callable[[Path], object], tmp_path: Path) -> None:
    path = save_base_model(tmp_path) / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": {"type": "Unheard", "vocab": {}}}))
    text = refusal(look, tmp_path)
    assert text.startswith("its tokenizer cannot be loaded (data did not match any variant of untagged enum")
    assert "update the package tokenizers" in text


@BOTH
@pytest.mark.parametrize(("tokens", "special"), [(["ghost", "pool", "puns"], False), (["<PADX>"], True)])
def test_every_token_needs_an_embedding(
    look: Callable[[Path], object], tokens: list[str], special: bool, tmp_path: Path
) -> None:
    """The ids after the last embedding are those of users; a padding token that was added is no exception."""
    tokenizer = AutoTokenizer.from_pretrained(save_base_model(tmp_path))
    if special:
        tokenizer.add_special_tokens({"pad_token": tokens[0]})
    else:
        tokenizer.add_tokens(tokens)
    tokenizer.save_pretrained(tmp_path)
    count = VOCABULARY + len(tokens)
    expected = f"the tokenizer has {count} tokens, the model {VOCABULARY} embeddings: resize it (model.resize_token_emb"
    assert refusal(look, tmp_path).startswith(expected)


def test_slots_lie_above_embeddings_that_no_token_has(tmp_path: Path) -> None:
    """Tables of embeddings are often filled up to a multiple of 64."""
    save_base_model(tmp_path, vocab_size=320)
    assert check_base(str(tmp_path)).vocab_size == 320
    base, tokenizer = load_base(str(tmp_path), ScratchModelConfig(), [], seed=0)
    assert len(tokenizer) == VOCABULARY < 320
    config = tiny(f"stage2.base_model={tmp_path}")
    explainer = build_explainer(config, base, ExplainerSizes(users=5, items=4, slot_size=16, gates=1))
    assert explainer.slots.vocabulary == 320
    assert explainer.slots.user_token(0) == 320
    assert max(encode_text(tokenizer, "The room, the pool and the puns <PADX>")) < VOCABULARY


@BOTH
def test_a_gguf_file_is_checked(look: Callable[[Path], object], tmp_path: Path) -> None:
    path = save_gguf(tmp_path / "whole.gguf")
    look(path)
    for size in (100, 2000, 3 * path.stat().st_size // 4):
        cut = tmp_path / "cut.gguf"
        cut.write_bytes(path.read_bytes()[:size])
        text = refusal(look, cut)
        assert text.startswith(f"cannot be loaded (not a whole GGUF file of {size:,} bytes: ")
        assert text.endswith("; it is cut short or damaged: download it again")
    name = "model.layers.0.post_attention_layernorm.weight" if look is load else "blk.0.ffn_norm.weight"
    missing = save_gguf(tmp_path / "missing.gguf", without="blk.0.ffn_norm")
    assert refusal(look, missing).startswith(f"1 weight is missing, such as {name};")
    spoiled = save_gguf(tmp_path / "nan.gguf", spoiled="output_norm")
    name = "model.norm.weight" if look is load else "output_norm.weight"
    assert refusal(look, spoiled).startswith(f"1 weight is not finite (NaN or infinity), such as {name};")


TYPES = b"tokenizer.ggml.token_type"


@pytest.mark.parametrize(
    ("skipped", "value", "problem"),
    [
        (8, struct.pack("<Q", 2**60), "arrays of 1,152,921,504,606,84"),
        (8, struct.pack("<Q", 1_000_000), "what begins at byte "),
        (4, struct.pack("<I", 9), "an array of type 9 before byte "),
        (0, struct.pack("<I", 77), "unknown type 77 before byte "),
    ],
)
def test_a_gguf_file_that_claims_more_than_it_has_takes_no_memory(
    skipped: int, value: bytes, problem: str, tmp_path: Path
) -> None:
    """After a field's name stand its type, for an array that of its values, and how many there are. The reader of the
    package gguf would make an object for every value that is claimed."""
    path = save_gguf(tmp_path / "model.gguf")
    data = bytearray(path.read_bytes())
    at = data.index(TYPES) + len(TYPES) + skipped
    data[at : at + len(value)] = value
    path.write_bytes(data)
    with pytest.raises(InputError) as refused:
        check_base(str(path))
    assert f"(not a whole GGUF file of {len(data):,} bytes: {problem}" in str(refused.value)


@pytest.mark.parametrize(
    ("start", "problem"),
    [
        (b"", "it has no header"),
        (b"GGML" + bytes(40), "it does not begin"),
        (b"GGUF\1" + bytes(40), "its version is 1;"),
    ],
)
def test_what_is_no_gguf_file_is_refused(start: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(start)
    with pytest.raises(InputError, match=problem):
        check_base(str(path))


def test_a_cut_gguf_file_has_no_shape_either(tmp_path: Path) -> None:
    """What `gavamoe plan` reads."""
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(save_gguf(tmp_path / "whole.gguf").read_bytes()[:2000])
    with pytest.raises(InputError, match="not a whole GGUF file of 2,000 bytes"):
        base_shape(tiny(f"stage2.base_model={cut}").stage2)
