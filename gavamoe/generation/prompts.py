"""Prompts: what the language model reads, as token ids, and the answer it is trained to write.

Purpose: turn (user, item, rating, features, title) into token ids, and explanations into labels.
Inputs: a Hugging Face fast tokenizer, the model's slot ids, `PromptConfig`.
Outputs: lists of token ids.

Two templates; parts in brackets appear where they are known. The one in words, which a pretrained model understands:

    Explain the recommendation.
    User: [slot] [cluster] Item: [slot] [Rating: positive|neutral|negative] [Features: a, b] [Title: ...]
    [Similar reviews:
    - ...]
    Explanation:

And the one in marks (`instruction: false`), for a model trained from nothing, to which labels are only distance:

    [slot] [cluster] [slot] [, positive|neutral|negative] [; a, b] [: title] [| review | ...]

Without `title_last` the title stands behind the item's slot. With `soft_rating` a slot for the rating itself stands in
place of its sentiment's word.
Each piece is tokenized on its own and special tokens are never parsed in it, so no text of a user can
forge a slot, end the prompt or start an answer; slots are single ids above the vocabulary. Too long a
prompt loses quoted reviews first, then title tokens, then features from the last one on; slots and answer marker stay.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, NamedTuple, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator
from transformers import PreTrainedTokenizerBase

from gavamoe.config.schema import PromptConfig
from gavamoe.data.ratings import SENTIMENTS, RatingScale
from gavamoe.errors import InputError
from gavamoe.model.base_model import encode_texts
from gavamoe.model.slots import SlotIds

T = TypeVar("T", str, tuple[int, ...])
"""Text, or token ids."""


class Labels(NamedTuple, Generic[T]):
    """A template: what stands before each part of a prompt, as text or as token ids."""

    instruction: T
    item: T
    title: T
    rating: T
    features: T
    comma: T
    quotes: T
    quote: T
    answer: T


_WORDS = Labels(
    instruction="Explain the recommendation.\nUser:",
    item="\nItem:",
    title="\nTitle:",
    rating="\nRating:",
    features="\nFeatures:",
    comma=",",
    quotes="\nSimilar reviews:",
    quote="\n-",
    answer="\nExplanation:\n",
)
_MARKS = Labels("", "", ":", ",", ";", ",", "", "|", "\n")

_CONTROLS = dict.fromkeys((*range(32), *range(127, 160)), " ")
_CHARACTERS_PER_TOKEN = 16
"""Text beyond this many characters per allowed token is not even tokenized: a bound on work, not on meaning."""
_REMEMBERED, _REMEMBERED_CHARACTERS = 2**15, 100
"""Texts whose tokens are remembered, at most, and how long they may be: some 10 MB."""


class PromptSpec(BaseModel):
    """What a trained model's prompts look like: `prompt.json` of a stage-2 artifact."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    prompt: PromptConfig
    scale: RatingScale | None
    """None: implicit data, without ratings."""
    usual_features: Annotated[int, Field(ge=1)]
    """Features named where none are given: as many as training rows have, for more would be unlike any prompt read."""

    @model_validator(mode="before")
    @classmethod
    def _titles_were_first(cls, stored: Any) -> Any:
        """Models of before there was a choice were trained with titles behind the item's slot, and stay so."""
        if isinstance(stored, dict) and isinstance(stored.get("prompt"), dict):
            return stored | {"prompt": {"title_last": False} | stored["prompt"]}
        return stored


@dataclass(frozen=True)
class PromptColumns:
    """N prompts by column; all of length N."""

    users: Sequence[int]
    items: Sequence[int]
    ratings: Sequence[float | None]
    """None or NaN: no sentiment word."""
    features: Sequence[Sequence[str]]
    titles: Sequence[str | None]
    quotes: Sequence[Sequence[str]] | None = None
    """Training explanations that are quoted; None: none in any prompt."""
    expected: Sequence[float | None] | None = None
    """What is expected in place of ratings that nobody gave, as it is: soft ratings tell the two apart; None: all
    ratings were given."""

    def __len__(self) -> int:
        return len(self.users)


def labels(config: PromptConfig) -> Labels[str]:
    """The constant texts of the prompts that a config asks for."""
    return _WORDS if config.instruction else _MARKS


def template_texts(config: PromptConfig) -> list[str]:
    """The constant texts of prompts: what a tokenizer trained for this task must know well."""
    own = labels(config)
    lines = [
        f"{own.instruction}{own.item}{own.title}{own.rating} {word}{own.features}{own.comma}{own.answer}"
        for word in SENTIMENTS
    ]
    return ["".join(lines)]


def plain_line(text: str, max_characters: int) -> str:
    """Text as one line, cut to `max_characters`, without control characters."""
    return " ".join(text[:max_characters].translate(_CONTROLS).split())


class PromptBuilder:
    """Builds prompts and answers for one model.

    Raises:
        InputError: `max_tokens` has no room for the parts that are never cut.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        slots: SlotIds,
        config: PromptConfig,
        scale: RatingScale | None,
    ) -> None:
        """`scale` None: the data have no ratings, and prompts no sentiment word."""
        self.tokenizer, self.config, self.scale = tokenizer, config, scale
        self.slots = slots
        self.end = _end_token(tokenizer)
        self._labels = labels(config)
        self._constants: Labels[tuple[int, ...]] = Labels._make(map(tuple, encode_texts(tokenizer, self._labels)))
        self._encoded: dict[str, tuple[int, ...]] = {}
        self.start = (*_start_tokens(tokenizer), *self._constants.instruction)
        """Token ids that every prompt begins with: the instruction."""
        words = encode_texts(tokenizer, [f" {word}" for word in SENTIMENTS])
        self._sentiments = {word: (*self._constants.rating, *ids) for word, ids in zip(SENTIMENTS, words, strict=True)}
        self._cluster = (slots.cluster,) if config.cluster else ()
        self._check_room()

    @property
    def shows_ratings(self) -> bool:
        """Whether a rating changes the prompt."""
        return self.config.rating and self.scale is not None

    def pieces(self) -> dict[str, Any]:
        """The prompt's constant texts and bounds, for whoever builds prompts without this class."""
        own = self._labels
        return {
            "start": list(self.start[: len(self.start) - len(self._constants.instruction)]),
            "instruction": own.instruction,
            "item": own.item,
            "title": own.title,
            "sentiment": own.rating,
            "features": own.features,
            "comma": own.comma,
            "answer": own.answer,
            "titles": self.config.title,
            "title_last": self.config.title_last,
            "ratings": self.shows_ratings,
            "soft_ratings": self._soft_ratings(),
            "max_features": self.config.max_features if self.config.features else 0,
            "max_tokens": self.config.max_tokens,
        }

    def _soft_ratings(self) -> dict[str, Any] | None:
        """Token ids of the places from the lowest rating to the highest, known and expected."""
        if not (self.shows_ratings and self.config.soft_rating and self.scale is not None):
            return None
        first, count = self.slots.first_rating, self.slots.rating_places
        known, expected = (list(range(start, start + count)) for start in (first, first + count))
        return {"low": self.scale.low, "high": self.scale.high, "known": known, "expected": expected}

    def prompts(self, columns: PromptColumns) -> list[list[int]]:
        """Token ids of N prompts, each at most `max_tokens` long and ending in the answer marker."""
        titles = self._encode_unique(title for title in columns.titles if title) if self.config.title else {}
        kept = [tuple(words)[: self.config.max_features] for words in columns.features]
        words = self._encode_unique(word for words in kept for word in words) if self.config.features else {}
        quotes = columns.quotes if self.config.quotes and columns.quotes is not None else [()] * len(columns)
        quoted = self._encode_unique(text for texts in quotes for text in texts)
        expected = columns.expected or [None] * len(columns)
        return [
            self._assemble(
                self.slots.user_token(int(columns.users[row])),
                self.slots.item_token(int(columns.items[row])),
                titles.get(columns.titles[row] or "", ()),
                self._rating(columns.ratings[row], expected[row]),
                [words[word] for word in kept[row] if words.get(word)],
                [quoted[text] for text in quotes[row][: self.config.quotes] if quoted.get(text)],
            )
            for row in range(len(columns))
        ]

    def answers(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of N explanations, cut to `max_explanation_tokens` with the end token, which is always last."""
        room = self.config.max_explanation_tokens - 1
        lines = [plain_line(text, room * _CHARACTERS_PER_TOKEN) for text in texts]
        return [[*ids[:room], self.end] for ids in encode_texts(self.tokenizer, lines)]

    def _rating(self, rating: float | None, expected: float | None) -> tuple[int, ...]:
        if not self.config.rating or self.scale is None or rating is None or math.isnan(rating):
            return ()
        if not self.config.soft_rating:
            return self._sentiments[self.scale.sentiment(rating)]
        shown = rating if expected is None else expected
        token = self.slots.rating_token(self.scale.share(shown), expected=expected is not None)
        return (*self._constants.rating, token)

    def _encode_unique(self, texts: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """Ids of " text" for each distinct text: titles and features repeat, so each is tokenized once, and short ones
        are remembered for a service's next request."""
        distinct = list(dict.fromkeys(texts))
        known = {text: self._encoded[text] for text in distinct if text in self._encoded}
        new = [text for text in distinct if text not in known]
        if not new:
            return known
        lines = [plain_line(text, self.config.max_tokens * _CHARACTERS_PER_TOKEN) for text in new]
        encoded = encode_texts(self.tokenizer, [f" {line}" if line else "" for line in lines])
        found = {text: tuple(ids) for text, ids in zip(new, encoded, strict=True)}
        short = {text: ids for text, ids in found.items() if len(text) <= _REMEMBERED_CHARACTERS}
        if len(self._encoded) + len(short) > _REMEMBERED:
            self._encoded.clear()
        self._encoded.update(itertools.islice(short.items(), _REMEMBERED))
        return known | found

    def _assemble(
        self,
        user_slot: int,
        item_slot: int,
        title: tuple[int, ...],
        sentiment: tuple[int, ...],
        features: list[tuple[int, ...]],
        quotes: list[tuple[int, ...]],
    ) -> list[int]:
        item = (user_slot, *self._cluster, *self._constants.item, item_slot)
        answer = self._constants.answer
        room = self.config.max_tokens - len(self.start) - len(item) - len(sentiment) - len(answer)
        listed = self._list_features(features, room)
        room -= len(listed)
        label = self._constants.title
        titled = (*label, *title)[: max(room, 0)] if title and room > len(label) else ()
        quoted = self._list_quotes(quotes, room - len(titled))
        wanted = (*sentiment, *listed)
        known = (*wanted, *titled) if self.config.title_last else (*titled, *wanted)
        return [*self.start, *item, *known, *quoted, *answer]

    def _list_quotes(self, quotes: list[tuple[int, ...]], room: int) -> tuple[int, ...]:
        """Label and quoted reviews that fit into `room` tokens; those that don't fit whole are left out."""
        if not quotes:
            return ()
        label, dash = self._constants.quotes, self._constants.quote
        listed: tuple[int, ...] = label
        for ids in quotes:
            own = (*dash, *ids[: self.config.quote_tokens])
            if len(listed) + len(own) > room:
                break
            listed += own
        return listed if len(listed) > len(label) else ()

    def _list_features(self, features: list[tuple[int, ...]], room: int) -> tuple[int, ...]:
        """Label and features that fit into `room` tokens; only the first feature may be cut inside."""
        label, comma = self._constants.features, self._constants.comma
        if not features or room <= len(label):
            return ()
        listed = (*label, *features[0])[:room]
        for ids in features[1:]:
            if len(listed) + len(comma) + len(ids) > room:
                break
            listed = (*listed, *comma, *ids)
        return listed

    def _check_room(self) -> None:
        scale = self.scale
        shown = [] if scale is None else [self._rating(each, None) for each in (scale.low, scale.middle, scale.high)]
        longest = max(map(len, shown), default=0)
        fixed = (self.start, self._constants.item, self._constants.answer)
        needed = sum(map(len, fixed)) + 2 + len(self._cluster) + longest  # 2: the slots of user and item
        if needed > self.config.max_tokens:
            raise InputError(
                f"stage2.prompt.max_tokens: {self.config.max_tokens} is below the {needed} tokens that"
                " instruction, slots and answer marker take with this tokenizer; raise it"
            )


def left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of different lengths as (ids, attention mask), int64 (B, T), padded on the left for generation."""
    width = max(map(len, prompts))
    ids_BT = np.full((len(prompts), width), pad, dtype=np.int64)
    mask_BT = np.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):
        ids_BT[row, width - len(prompt) :] = prompt
        mask_BT[row, width - len(prompt) :] = 1
    return ids_BT, mask_BT


def _end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    end: Any = tokenizer.eos_token_id
    if end is None:
        raise InputError("stage2.base_model: its tokenizer has no end-of-text token, so no answer could ever stop")
    return int(end)


def _start_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The begin-of-text token, where this tokenizer puts one before a text."""
    start = tokenizer.bos_token_id
    encoded = tokenizer("a", add_special_tokens=True)["input_ids"]
    return (int(start),) if start is not None and encoded[:1] == [start] else ()
