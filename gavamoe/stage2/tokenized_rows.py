"""A dataset's rows as token ids: the prompt builder of a run, and the encoding of a split's rows with it.

Needs the base model's tokenizer, never its weights.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from gavamoe.config.schema import PromptConfig, RunConfig
from gavamoe.data.dataset import Dataset
from gavamoe.data.ratings import RatingScale
from gavamoe.errors import InputError
from gavamoe.generation.evidence.quotes import Quotes
from gavamoe.generation.prompts import PromptBuilder, PromptColumns, template_texts
from gavamoe.model.base_config import base_shape
from gavamoe.model.base_model import load_tokenizer
from gavamoe.model.slots import RATING_PLACES, SlotIds
from gavamoe.stage2.batches import Ragged, TextRows

_TEXTS_PER_TEMPLATE = 10
"""Explanations of which each group of this size brings the scratch tokenizer the prompts' constant text once."""


def prompt_builder(config: RunConfig, data: Dataset) -> PromptBuilder:
    """The prompt builder of a run, made without the model's weights.

    Raises:
        InputError: the base model's tokenizer or config can't be found.
    """
    stage2 = config.stage2
    tokenizer = load_tokenizer(stage2.base_model, stage2.scratch, tokenizer_texts(data, stage2.prompt))
    vocabulary = len(tokenizer) if stage2.base_model == "scratch" else base_shape(stage2).vocab_size
    slots = SlotIds(
        vocabulary=vocabulary,
        n_users=data.catalog.known_users,
        n_items=data.catalog.known_items,
        rating_places=RATING_PLACES if stage2.prompt.soft_rating else 0,
    )
    return PromptBuilder(tokenizer, slots, stage2.prompt, rating_scale(data))


def rating_scale(data: Dataset) -> RatingScale | None:
    """The scale of the dataset's ratings, which prompts name; None for implicit data."""
    if data.rating_range is None:
        return None
    low, high = data.rating_range
    return RatingScale(low=low, high=high, values=data.rating_values)


def encode_rows(builder: PromptBuilder, data: Dataset, split: str, rows: np.ndarray) -> TextRows:
    """Prompts and answers of the given rows (ascending) of a split; the file is read in parts."""
    titles = [data.catalog.item_title(item) for item in range(data.catalog.n_items)]
    quotes = Quotes.read(data) if builder.config.quotes else None
    prompts, answers = [Ragged.pack([])], [Ragged.pack([])]
    start = 0
    for batch in data.batches(split):
        wanted = rows[(rows >= start) & (rows < start + batch.num_rows)] - start
        start += batch.num_rows
        if not len(wanted):
            continue
        chosen = batch.take(wanted).to_pydict()
        columns = PromptColumns(
            users=chosen["user"],
            items=chosen["item"],
            ratings=chosen["rating"],
            features=[words or () for words in chosen["features"]],
            titles=[titles[item] for item in chosen["item"]],
            quotes=None if quotes is None else _quoted(quotes, chosen, builder.config),
        )
        prompts.append(Ragged.pack(builder.prompts(columns)))
        answers.append(Ragged.pack(builder.answers(chosen["text"])))
    return TextRows(Ragged.join(prompts), Ragged.join(answers))


def _quoted(quotes: Quotes, rows: dict[str, list[Any]], prompt: PromptConfig) -> list[tuple[str, ...]]:
    """The explanations that each row's prompt quotes, by what the prompt says; never one of the row's own pair."""
    columns = (rows[name] for name in ("user", "item", "rating", "features"))
    most = prompt.max_features if prompt.features else 0
    return [
        quotes.nearest(user, item, rating, (features or ())[:most], prompt.quotes)
        for user, item, rating, features in zip(*columns, strict=True)
    ]


def tokenizer_texts(data: Dataset, prompt: PromptConfig) -> Iterator[str]:
    """Training texts of the scratch model's tokenizer: explanations, features, titles, the prompts' constant texts."""
    templates = template_texts(prompt)
    for number, (text, words) in enumerate(_texts_and_features(data)):
        yield text
        yield " " + ", ".join(words)
        if number % _TEXTS_PER_TEMPLATE == 0:
            yield from templates
    for item in range(data.catalog.n_items):
        yield " " + (data.catalog.item_title(item) or "")


def _texts_and_features(data: Dataset) -> Iterator[tuple[str, list[str]]]:
    for batch in data.batches("train", ["text", "features"]):
        for text, words in zip(batch["text"].to_pylist(), batch["features"].to_pylist(), strict=True):
            yield text or "", words or []


def rows_with_text(data: Dataset, split: str) -> np.ndarray:
    """Row numbers of a split whose explanation is not empty, ascending: int64."""
    texts = data.table(split, ["text"])["text"].to_pylist()
    rows = np.array([row for row, text in enumerate(texts) if text and text.strip()], dtype=np.int64)
    if split == "train" and not len(rows):
        raise InputError(f"{data.path}: no training row has a text, so there is no explanation to learn from")
    return rows


def validation_rows(config: RunConfig, data: Dataset) -> np.ndarray:
    """At most `validation_rows` rows of the validation split with a text, drawn by the seed, ascending: int64."""
    rows = rows_with_text(data, "valid")
    count = min(len(rows), config.stage2.validation_rows)
    return np.sort(np.random.default_rng(config.seed).choice(rows, count, replace=False))


def usual_features(data: Dataset, most: int) -> int:
    """Third quartile of the number of features of the training rows that have any; at most `most`."""
    counts = (
        data.table("train", ["features"])["features"].combine_chunks().value_lengths().to_numpy(zero_copy_only=False)
    )
    some = counts[counts > 0]
    return min(int(np.percentile(some, 75, method="higher")), most) if len(some) else 1
