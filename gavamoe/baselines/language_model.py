"""What baselines around a language model share: the model in their spec, its losses, greedy writing.

The model is `stage2.base_model`, as the explainer's: pretrained, or scratch. Its input are vectors, so that a baseline
can put its own among those of words.

Shapes: B rows, S positions, D the model's width.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers import initialization as init
from transformers.generation import (
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from gavamoe.baselines.frame import Baseline, Batch, Columns, Limits, Reader, Spec, up_to_end
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import Dataset
from gavamoe.model.base_model import load_base
from gavamoe.model.explainer import IGNORED
from gavamoe.stage2.tokenized_rows import tokenizer_texts


class LanguageSpec(Spec):
    """A spec with a language model."""

    language_model: dict[str, Any]
    """Its config, as transformers writes it."""
    end: int
    """The token that ends a text."""


class LanguageBaseline(Baseline):
    """A baseline around a language model, `self.lm`."""

    spec: LanguageSpec

    def __init__(self, spec: LanguageSpec) -> None:
        super().__init__()
        self.spec = spec
        with init.no_init_weights():
            self.lm: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(**spec.language_model))

    @property
    def width(self) -> int:
        """D."""
        return int(self.lm.config.hidden_size)

    def words(self, tokens: Tensor) -> Tensor:
        """The vectors of tokens."""
        vectors: Tensor = self.lm.get_input_embeddings()(tokens)
        return vectors

    def likelihood(self, vectors_BSD: Tensor, mask_BS: Tensor, labels_BS: Tensor) -> Tensor:
        """Mean negative log-likelihood of the labels; the position before one predicts it."""
        return self.likelihood_of(self.states(vectors_BSD, mask_BS), labels_BS)

    def states(self, vectors_BSD: Tensor, mask_BS: Tensor) -> Tensor:
        """The last layer's states (B, S, D); the mask is 0 where a row is padding."""
        hidden_BSD: Tensor = self.lm.base_model(inputs_embeds=vectors_BSD, attention_mask=mask_BS, use_cache=False)[0]
        return hidden_BSD

    def likelihood_of(self, states_BSD: Tensor, labels_BS: Tensor) -> Tensor:
        """Mean negative log-likelihood of the labels, from the states that `states` gives."""
        next_BS = labels_BS[:, 1:]
        spoken_BS = next_BS != IGNORED
        scores = self.lm.get_output_embeddings()(states_BSD[:, :-1][spoken_BS])
        return F.cross_entropy(scores.float(), next_BS[spoken_BS])

    @torch.inference_mode()
    def greedy(self, vectors: Sequence[Tensor], limits: Limits) -> list[list[int]]:
        """Texts after prefixes of vectors, (P, D) each: token ids, the end included where it was written."""
        longest = max(map(len, vectors))
        padded_BPD = torch.stack([F.pad(each, (0, 0, longest - len(each), 0)) for each in vectors])
        lengths_B1 = torch.tensor([[len(each)] for each in vectors], device=padded_BPD.device)
        mask_BP = (torch.arange(longest, device=padded_BPD.device) >= longest - lengths_B1).long()
        settings = GenerationConfig(
            max_new_tokens=limits.longest,
            do_sample=False,
            suppress_tokens=list(limits.banned) or None,
            min_new_tokens=limits.shortest or None,
            eos_token_id=limits.end,
            pad_token_id=limits.end,
        )
        # These read token ids, of which a prefix of vectors has none: the text alone, as in `Texts`. As settings they
        # would make `generate` warn of that, and the penalty leave out as many tokens of the text as a row has padding.
        rules = LogitsProcessorList()
        if limits.repetition_penalty != 1.0:
            rules.append(RepetitionPenaltyLogitsProcessor(limits.repetition_penalty))
        if limits.no_repeat_ngram:
            rules.append(NoRepeatNGramLogitsProcessor(limits.no_repeat_ngram))
        written_BT = self.lm.generate(
            inputs_embeds=padded_BPD, attention_mask=mask_BP, generation_config=settings, logits_processor=rules
        )
        return [up_to_end(text, limits.end) for text in written_BT.tolist()]  # behind it is padding to the longest


def language_model(config: RunConfig, data: Dataset) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The base model of a config with its weights, and its config for a spec.

    Raises:
        InputError: as `model.base_model.load_base`.
    """
    stage2 = config.stage2
    model, _ = load_base(stage2.base_model, stage2.scratch, tokenizer_texts(data, stage2.prompt), config.seed)
    return model, model.config.to_dict()


def real_tokens(batch: Batch) -> Tensor:
    """Which tokens of a batch are no padding, bool (B, T)."""
    places_T = torch.arange(batch["tokens"].shape[1], device=batch["tokens"].device)
    return (places_T < batch["prefix"][:, None]) | (batch["labels"] != IGNORED)


def asked(columns: Columns, reader: Reader) -> list[list[int]]:
    """What "+" forms read beside the ids: "positive, a, b", the sentiment of the rating, where it is given, and the
    features."""
    lines = []
    for rating, features in zip(columns.ratings.tolist(), columns.features, strict=True):
        given = reader.scale is not None and rating == rating
        sentiment = [reader.scale.sentiment(rating)] if given and reader.scale is not None else []
        lines.append(", ".join([*sentiment, *list(features)[: reader.prompt.max_features]]))
    distinct = list(dict.fromkeys(lines))
    ids = dict(zip(distinct, reader.encode(distinct, reader.prompt.max_tokens - 1), strict=True))
    return [ids[line] for line in lines]
