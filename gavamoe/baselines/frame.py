"""What a baseline is: one class, which the frame trains, keeps and writes with as it does the explainer.

The frame brings what all share: the explainer's tokenizer, rows and their order, the schedule, clipping, validation
rows, the state of the lowest validation loss, users and items never seen, files, requests and their answers. A
baseline says what stands before an explanation (`prefixes`), what it learns from a batch (`losses`), in which phases
(`phases`), and how it writes (`write`). docs/extend.md shows how to add one.

Shapes: B rows, P tokens of a prefix, T tokens of a row.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from gavamoe.config.schema import PromptConfig, RunConfig
from gavamoe.data.dataset import Dataset
from gavamoe.data.ratings import RatingScale
from gavamoe.errors import InputError
from gavamoe.generation.prompts import plain_line
from gavamoe.generation.sampling import Choice, Sampling, choose_tokens
from gavamoe.model.base_model import encode_texts
from gavamoe.model.explainer import IGNORED

Batch = dict[str, Tensor]
Losses = dict[str, Tensor]
_CHARACTERS_PER_TOKEN = 16
"""Text beyond this many characters a token is not even tokenized."""


class Spec(BaseModel):
    """Everything from which a baseline's module is built, apart from its weights; each has a class of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    features: bool
    """Whether the prefix names what a text is to speak of: the "+" forms."""
    n_users: int
    """Known users; one more row stands for all others, and is trained by hiding ids."""
    n_items: int
    """Known items, with one more row likewise."""


@dataclass(frozen=True)
class Columns:
    """N rows or requests by column; all of length N."""

    users: np.ndarray
    """int64, at most the number of known users."""
    items: np.ndarray
    """int64, at most the number of known items."""
    ratings: np.ndarray
    """float32; NaN: not given, or none."""
    features: Sequence[Sequence[str]]
    titles: Sequence[str | None]
    rows: np.ndarray | None = None
    """Row numbers in the training split, where they are training rows: what a prefix quotes may not be the row's
    own."""

    def __len__(self) -> int:
        return len(self.users)


class Reader:
    """Text as the tokens of the explainer's tokenizer; special tokens are never parsed in it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: PromptConfig, scale: RatingScale | None) -> None:
        self.tokenizer, self.prompt, self.scale = tokenizer, prompt, scale
        end = tokenizer.eos_token_id
        if end is None:
            raise InputError("the base model's tokenizer has no end-of-text token, so texts could not end")
        self.end = int(end)
        start = tokenizer.bos_token_id
        self.start = self.end if start is None else int(start)

    def encode(self, texts: Sequence[str], longest: int) -> list[list[int]]:
        """Token ids of each text as one line, at most `longest` of them."""
        lines = [plain_line(text, longest * _CHARACTERS_PER_TOKEN) for text in texts]
        return [list(ids[:longest]) for ids in encode_texts(self.tokenizer, lines)]

    def named_features(self, columns: Columns) -> list[list[int]]:
        """Token ids of "a, b" for the features of each row: at most `max_features`, and `max_tokens` less one."""
        lines = [", ".join(list(words)[: self.prompt.max_features]) for words in columns.features]
        distinct = list(dict.fromkeys(lines))
        ids = dict(zip(distinct, self.encode(distinct, self.prompt.max_tokens - 1), strict=True))
        return [ids[line] for line in lines]


@dataclass(frozen=True)
class Phase:
    """A part of a training; each has an optimizer, a warm-up and a best state of its own, and begins with the best
    state of the one before."""

    name: str
    share: float = 1.0
    """Share of all steps; those of all phases add up to 1."""
    rate: float = 1e-3
    """Peak learning rate."""
    trained: Callable[[str], bool] = field(default=lambda _: True)
    """Whether a parameter, by name, is trained; others stand still."""
    factor: Callable[[str], float] = field(default=lambda _: 1.0)
    """A parameter's share of the learning rate, by name."""


@dataclass(frozen=True)
class Limits:
    """Bounds of writing, which is greedy: those of the explainer, so that texts differ by their systems alone."""

    longest: int
    """Tokens written at most."""
    end: int
    """The token that ends a text."""
    banned: Sequence[int]
    """Tokens that are never written."""
    no_repeat_ngram: int = 0
    """No n-gram of this length twice in a text; 0: any."""
    repetition_penalty: float = 1.0
    """Makes tokens that the text already has less likely; 1: off."""
    shortest: int = 0
    """Tokens before the text may end."""


@dataclass(frozen=True)
class Written:
    """What a baseline wrote for B rows."""

    tokens: list[list[int]]
    """Token ids, the end included where it was written."""
    ratings: list[float] | None
    """Predicted ratings, neither rounded nor clipped; None: the system predicts none."""


class Texts:
    """Texts of B rows that grow token by token, each up to its end."""

    def __init__(self, rows: int, limits: Limits) -> None:
        sampling = Sampling(
            max_new_tokens=limits.longest,
            no_repeat_ngram=limits.no_repeat_ngram,
            repetition_penalty=limits.repetition_penalty,
            min_new_tokens=limits.shortest,
        )
        self._choices = [Choice(sampling, [], limits.end) for _ in range(rows)]
        self._end, self._banned = limits.end, torch.tensor(limits.banned, dtype=torch.long)

    @property
    def tokens(self) -> list[list[int]]:
        """Token ids of each row, the end included where it was written."""
        return [up_to_end(choice.tokens, self._end) for choice in self._choices]

    @property
    def done(self) -> bool:
        """Whether all have ended."""
        return all(self._end in choice.tokens for choice in self._choices)

    def add(self, scores_BV: Tensor) -> Tensor:
        """Choose the likeliest next token of each row that may be written, int64 (B,); what stands behind a row's end
        is not kept."""
        chosen = choose_tokens(scores_BV, self._choices, self._banned.to(scores_BV.device))
        return torch.tensor(chosen, device=scores_BV.device)


def up_to_end(tokens: list[int], end: int) -> list[int]:
    """A text's tokens up to and with its end, where it has one."""
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


class Baseline(nn.Module, ABC):
    """One rival, as a module with its losses, its phases and its way of writing."""

    spec_type: ClassVar[type[Spec]]
    equally_long: ClassVar[bool] = False
    """Whether `write` gets only prefixes of one length at a time."""
    apart: ClassVar[tuple[str, ...]] = ()
    """How the names of parameters begin that share no loss with the others: their gradients are clipped apart, or those
    of one part, where they are large, would make the other's small."""

    asks_rating: ClassVar[bool] = False
    """Whether the prefix of the "+" form says the sentiment of the rating. Where a request gives none the bias model's
    stands there: in training it is missing only in rows that have none."""

    spec: Spec

    @classmethod
    def check(cls, config: RunConfig, data: Dataset) -> None:
        """Raise InputError, in one line, for data or settings that this baseline can't use; by default none."""

    @classmethod
    @abstractmethod
    def create(cls, config: RunConfig, data: Dataset, reader: Reader, *, features: bool) -> Self:
        """A new one for a dataset, before training; random numbers are torch's, seeded by the frame."""

    @classmethod
    def build(cls, spec: Any) -> Self:
        """The module of a spec, with any weights."""
        return cls(spec)

    def prefixes(self, columns: Columns, reader: Reader) -> list[list[int]]:
        """Token ids before each explanation: by default the features, where the spec has them, and a start token."""
        named = reader.named_features(columns) if self.spec.features else [[] for _ in range(len(columns))]
        return [[*ids, reader.start] for ids in named]

    @abstractmethod
    def phases(self, config: RunConfig) -> list[Phase]:
        """The phases of the training, in order."""

    @abstractmethod
    def losses(self, batch: Batch) -> Losses:
        """Losses of a batch.

        Args:
            batch: users, items (B,), the unknown ones hidden or never seen; ratings (B,), NaN for none; tokens (B, T),
                padded on the right; labels (B, T), the same tokens where they are the explanation's or its end, -100
                elsewhere; prefix (B,), the length of each prefix; done, the share of the phase's steps that are taken.

        Returns:
            "loss", whose gradient is followed; "explanation", nats per token of the explanations with their ends; and
            any others, for the log.
        """

    @abstractmethod
    def write(self, batch: Batch, prefixes: Sequence[Sequence[int]], limits: Limits) -> Written:
        """Greedy texts of B rows.

        Args:
            batch: users, items, ratings (B,) as in `losses`.
        """

    def save_more(self, folder: Path) -> None:
        """Write what is neither spec nor weights; by default nothing."""

    def load_more(self, folder: Path) -> None:
        """Read what `save_more` wrote."""


def answers_of(batch: Batch, pad: int) -> tuple[Tensor, Tensor]:
    """The explanations alone, moved to the left.

    Returns:
        tokens (B, A), `pad` behind the end; bool (B, A), where they are real.
    """
    labels_BT = batch["labels"]
    real_BT = labels_BT != IGNORED
    longest = int(real_BT.sum(dim=1).max()) if len(labels_BT) else 0
    order_BT = (~real_BT).to(torch.int8).argsort(dim=1, stable=True)[:, :longest]
    answers_BA, real_BA = labels_BT.gather(1, order_BT), real_BT.gather(1, order_BT)
    return answers_BA.masked_fill(~real_BA, pad), real_BA
