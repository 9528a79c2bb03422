"""Making an explainer: from a dense model (`build_explainer`), from a saved folder, strictly (`load_explainer`), or
without weights, to be counted (`weightless_explainer`)."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import initialization as init

from gavamoe.artifacts.files import read_json
from gavamoe.config.schema import RunConfig
from gavamoe.errors import InputError
from gavamoe.model.conversion import ExplainerSizes, convert_block, explainer_config, widen
from gavamoe.model.decoders import GavamoeConfig
from gavamoe.model.explainer import GavamoeForCausalLM
from gavamoe.model.lora import ROUTED_MODULES, add_lora, freeze_base, slot_modules
from gavamoe.model.slots import RATING_ANCHORS, rating_mix
from gavamoe.model.tables.embedding import Table
from gavamoe.model.tables.layout import TableLayout, mapped_tables


def build_explainer(
    config: RunConfig,
    base: PreTrainedModel,
    sizes: ExplainerSizes,
    *,
    user_table: Tensor | None = None,
    item_table: Tensor | None = None,
    sentiments: Sequence[Sequence[int]] = (),
    empty_weights: bool = False,
) -> GavamoeForCausalLM:
    """Turn a dense LLaMA or GPT-2 into an explainer of these sizes; new weights are drawn by `config.seed`.

    Args:
        base: the dense model. Its weights are taken over, not copied: don't train it afterward.
        user_table, item_table: (n + 1, E), stage 1's tables to copy. If stage 2 rather shares stage 1's embedding
            modules, it replaces `user_embedding` and `item_embedding` and then calls `calibrate_slots()`.
        sentiments: token ids of the words for a low, a middling and a high rating, as which soft ratings start.
        empty_weights: `base` was loaded with empty weights: the new ones are left unset as well.

    Raises:
        InputError: an unsupported architecture, or, with `split`, experts that do not partition the dense width.
    """
    model_config = explainer_config(config, base.config, sizes)
    with init.no_init_weights():
        model: GavamoeForCausalLM = AutoModelForCausalLM.from_config(model_config, dtype=base.dtype)
    if config.stage2.extra_width:
        for dense in _feed_forwards(base.base_model):
            widen(dense, config.stage2.extra_width)
    _take_over(model, base)
    if not empty_weights:
        _draw_new_weights(model, config.seed)
        if model_config.rating_places and sentiments:
            _start_ratings(model, sentiments)
        if model_config.experts_enabled:
            dense_layers = _feed_forwards(base.base_model)
            for block, dense in zip(_feed_forwards(model.model), dense_layers, strict=True):
                convert_block(block, dense, config.stage2.experts)
        for table, values in ((model.user_embedding, user_table), (model.item_embedding, item_table)):
            if values is not None:
                assert isinstance(table, Table)
                with torch.no_grad():
                    table.weight.copy_(values)
        model.calibrate_slots()
    model.generation_config = GenerationConfig(
        bos_token_id=model_config.bos_token_id,
        eos_token_id=model_config.eos_token_id,
        pad_token_id=model_config.pad_token_id,
    )
    return model


def weightless_explainer(config: RunConfig, base: PreTrainedConfig, users: int, items: int) -> GavamoeForCausalLM:
    """The explainer that a run would train, with its adapters, on the meta device: shapes, and no memory.

    Args:
        base: config of the dense model.
        users, items: numbers of known users and items; the tables have one row more each.

    Raises:
        InputError: an architecture or expert sizes that can't be built.
    """
    tables = TableLayout.of(config.stage1, users, items)
    wanted = ExplainerSizes(users, items, config.stage1.embedding_size, config.gates, tables)
    sizes = explainer_config(config, base, wanted)
    with torch.device("meta"), init.no_init_weights():
        explainer = GavamoeForCausalLM(sizes)
        adapt(explainer, config)
    if sizes.tie_word_embeddings:
        explainer.tie_weights()  # initializing weights does it otherwise
    return explainer


def adapt(explainer: GavamoeForCausalLM, config: RunConfig) -> None:
    """Freeze the base model and add adapters, as far as the settings say so.

    With `stage2.shared_first` a base model beside low-rank experts is trained at first; its rates freeze it then.
    """
    stage2 = config.stage2
    if stage2.lora.rank:
        add_lora(explainer, stage2.lora, config.seed)
    elif stage2.experts.enabled and stage2.experts.conversion == "lora" and not stage2.shared_first:
        freeze_base(explainer)


def load_explainer(
    folder: Path, dtype: torch.dtype | None = None, device: str = "cpu"
) -> tuple[GavamoeForCausalLM, PreTrainedTokenizerBase]:
    """Read a folder that `save_pretrained` of the model and of its tokenizer have written; nothing may be missing.

    Args:
        dtype: of the weights, but for routers and tables, which stay float32 in bfloat16; None: as they were saved.
        device: where the weights go, tensor by tensor: the host never holds them all for another device.

    Raises:
        InputError: no such folder, damaged files, or weights that are missing, unknown or of another shape.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no explainer can be loaded (config.json is missing)")
    saved = read_json(folder / "config.json")
    model_type = saved.get("model_type") if isinstance(saved, dict) else None
    if model_type != GavamoeConfig.model_type:
        raise InputError(f"{folder}: holds a {model_type} model, not {GavamoeConfig.model_type}")
    try:
        # Other shapes are let through here only to be named below; transformers prints them and raises without.
        model, loading = GavamoeForCausalLM.from_pretrained(
            folder,
            dtype=dtype or "auto",
            device_map=None if device == "cpu" else {"": device},
            output_loading_info=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,
        )
        # Without the word False transformers would ask whether to run a tokenizer's own code.
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder}: no explainer can be loaded ({' '.join(str(error).split())[:300]})") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[problem]:
            example = min(str(key) for key in loading[problem])
            raise InputError(f"{folder}: {problem.replace('_', ' ')} in the weights, such as {example}")
    for table in mapped_tables(model):
        table.attach(folder)
    return model, tokenizer


def _take_over(model: GavamoeForCausalLM, base: PreTrainedModel) -> None:
    """Move the base model's tensors to the explainer, all but those of feed-forward layers that become experts."""
    state = base.base_model.state_dict()
    difference = model.model.load_state_dict(state, strict=False, assign=True)
    strays = [name for name in difference.missing_keys + difference.unexpected_keys if ".mlp." not in name]
    if strays or (not model.config.experts_enabled and any(difference)):
        raise ValueError(f"base model and explainer differ in {strays or difference}")
    if not model.config.tie_word_embeddings:
        model.lm_head.load_state_dict(base.lm_head.state_dict(), assign=True)
    model.tie_weights()


def _draw_new_weights(model: GavamoeForCausalLM, seed: int) -> None:
    """Initialize what has no counterpart in the base model: slots, routers, experts."""
    slots = slot_modules(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in slots:
            model._init_weights(module)
        for module in model.model.modules():
            if isinstance(module, ROUTED_MODULES):
                model.model._init_weights(module)


@torch.no_grad()
def _start_ratings(model: GavamoeForCausalLM, sentiments: Sequence[Sequence[int]]) -> None:
    """Start soft ratings as the sentiments' words: the lowest, middle and highest as these, others between them."""
    table_VD = model.get_input_embeddings().weight
    words_3D = torch.stack([table_VD[list(ids)].mean(0) for ids in sentiments])
    mix_A3 = rating_mix(RATING_ANCHORS, len(sentiments), 0.0)[:RATING_ANCHORS]
    model.rating_embedding.weight.copy_(torch.from_numpy(mix_A3).to(words_3D) @ words_3D)


def _feed_forwards(decoder: PreTrainedModel) -> Iterator[Any]:
    layers = decoder.layers if hasattr(decoder, "layers") else decoder.h
    return (layer.mlp for layer in layers)
