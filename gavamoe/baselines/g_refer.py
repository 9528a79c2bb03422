"""G-Refer's node retriever, a baseline: Li et al., "G-Refer: Graph Retrieval-Augmented Large Language Model for
Explainable Recommendation", WWW 2025.

A language model reads no ids, but evidence in words: training explanations of the same item by the users most like the
asked one, and explanations by the same user of the items most like the asked one, two of each. It learns to use them
by low-rank adapters.

Ours, not the paper's: of its retrievers the one of nodes alone, without the one of paths, which needs a graph neural
network, and without pruning of training rows; likeness by sets of features in place of profiles in a sentence
embedding (`evidence`); explanations are quoted in place of profiles that a large model wrote; the wording; any LLaMA
or GPT-2, a scratch model trained whole. The "+" form, which reads the rating's sentiment and the features too, is ours.

Shapes: B rows, T tokens.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
from pydantic import BaseModel, ConfigDict

from gavamoe.baselines.frame import Batch, Columns, Limits, Losses, Phase, Reader, Written
from gavamoe.baselines.language_model import asked, language_model, real_tokens
from gavamoe.baselines.parts.adapters import AdaptedBaseline, AdaptedSpec, adapter_settings
from gavamoe.baselines.parts.evidence import Evidence
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import Dataset
from gavamoe.model.base_model import encode_texts
from gavamoe.stage2.tokenized_rows import rows_with_text

_TEXTS = {
    "item": "item: ",
    "of_item": "\nothers on this item:",
    "of_user": "\nthis user on others:",
    "quote": "\n- ",
    "explanation": "\nexplanation:\n",
}


class Wording(BaseModel):
    """Token ids of the prompt's words."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    item: list[int]
    """Before the item's title, where there is one."""
    of_item: list[int]
    """Before explanations of the same item."""
    of_user: list[int]
    """Before explanations by the same user."""
    quote: list[int]
    """Before each of them."""
    explanation: list[int]


class GReferSpec(AdaptedSpec):
    """Everything from which G-Refer is built, apart from its weights and its evidence."""

    wording: Wording
    neighbors: int
    least_likeness: float
    quoted_tokens: int


class GRefer(AdaptedBaseline):
    """The language model with adapters, and the evidence that its prompts quote."""

    spec_type = GReferSpec
    asks_rating = True
    spec: GReferSpec
    evidence: Evidence
    """What may be quoted; from `create` or `load_more`."""

    @classmethod
    def create(cls, config: RunConfig, data: Dataset, reader: Reader, *, features: bool) -> Self:
        lm, values = language_model(config, data)
        own = config.baselines.g_refer
        words = dict(zip(_TEXTS, encode_texts(reader.tokenizer, list(_TEXTS.values())), strict=True))
        model = cls(
            GReferSpec(
                features=features,
                n_users=data.catalog.known_users,
                n_items=data.catalog.known_items,
                language_model=values,
                end=reader.end,
                wording=Wording(**words),
                neighbors=own.neighbors,
                least_likeness=own.least_likeness,
                quoted_tokens=own.quoted_tokens,
                **adapter_settings(config, own),
            )
        )
        model.lm.load_state_dict(lm.state_dict())
        model.adapt()
        model.evidence = Evidence.of_training(data, rows_with_text(data, "train"))
        return model

    def prefixes(self, columns: Columns, reader: Reader) -> list[list[int]]:
        """[sentiment, features] <s> [title] [evidence] explanation; sentiment and features in the "+" form only."""
        words = self.spec.wording
        named: Sequence[Sequence[int]] = asked(columns, reader) if self.spec.features else [()] * len(columns)
        titles = reader.encode([title or "" for title in columns.titles], reader.prompt.max_tokens // 2)
        heads = [
            [*names, reader.start, *(words.item if title else ()), *title]
            for names, title in zip(named, titles, strict=True)
        ]
        evidence = self._evidence(columns, reader)
        return [[*head, *quoted, *words.explanation] for head, quoted in zip(heads, evidence, strict=True)]

    def phases(self, config: RunConfig) -> list[Phase]:
        own = config.baselines.g_refer
        if config.stage2.base_model == "scratch":
            return [Phase("all", rate=own.scratch_learning_rate)]
        return [Phase("adapters", rate=own.learning_rate, trained=self.trained)]

    def losses(self, batch: Batch) -> Losses:
        """The explanation's loss."""
        explanation = self.likelihood(self.words(batch["tokens"]), real_tokens(batch).long(), batch["labels"])
        return {"loss": explanation, "explanation": explanation}

    @torch.inference_mode()
    def write(self, batch: Batch, prefixes: Sequence[Sequence[int]], limits: Limits) -> Written:
        device = batch["users"].device
        return Written(self.greedy([self.words(torch.tensor(ids, device=device)) for ids in prefixes], limits), None)

    def save_more(self, folder: Path) -> None:
        """Write the evidence."""
        self.evidence.save(folder)

    def load_more(self, folder: Path) -> None:
        """Read the evidence."""
        self.evidence = Evidence.load(folder)

    def _evidence(self, columns: Columns, reader: Reader) -> list[list[int]]:
        """The quoted explanations of each row with the words around them; nothing where there are none."""
        spec, words = self.spec, self.spec.wording
        rows = [None] * len(columns) if columns.rows is None else columns.rows.tolist()
        found = [
            self.evidence.nearest(int(user), int(item), spec.neighbors, spec.least_likeness, row)
            for user, item, row in zip(columns.users, columns.items, rows, strict=True)
        ]
        places = sorted({place for both in found for side in both for place in side})
        encoded = reader.encode([self.evidence.texts[place] for place in places], spec.quoted_tokens)
        quotes = {place: [*words.quote, *ids] for place, ids in zip(places, encoded, strict=True)}
        quoted = []
        for both in found:
            ids: list[int] = []
            for lead, side in zip((words.of_item, words.of_user), both, strict=True):
                ids += [*(lead if side else ()), *(token for place in side for token in quotes[place])]
            quoted.append(ids)
        return quoted
