"""CIER, a baseline: Liu et al., "Coherency Improved Explainable Recommendation via Large Language Model", AAAI 2025.

A language model reads a worded prompt with a vector for the user and one for the item, then a rating, then writes the
explanation. The rating is read off the model itself: the softmax over the tokens of the scale's ratings, at the place
before the rating. It is put back as one soft token, the mean of these tokens' vectors by their probabilities, so that
the text agrees with it. In training the true rating stands there, now and then smoothed. A curriculum lets the model
write the first feature at first, and the explanation ever more often. Low-rank adapters on queries and keys are trained
at a rate of their own, beside the vectors of users and items: a table each, projected to the model's width.

Ours, not the paper's: the wording; any LLaMA or GPT-2 in place of LLaMA-2-7B (GPT-2's queries, keys and values are one
matrix, so its adapters are on all three); a scratch model is trained whole; any scale of ratings (`rating_tokens`); a
request that gives a rating has the soft token of that one; the curriculum and smoothing are drawn row by row; rows
without a feature always write their explanation; rows without a rating are shown the one read off; validation shows the
true rating; rows for users and items never seen. The "+" form, whose prompt names the features, is ours.

Shapes: B rows, S positions, L levels of the rating, D the model's width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from gavamoe.baselines.frame import Batch, Columns, Limits, Losses, Phase, Reader, Written
from gavamoe.baselines.language_model import language_model
from gavamoe.baselines.parts.adapters import AdaptedBaseline, AdaptedSpec, adapter_settings
from gavamoe.baselines.parts.rating_tokens import RatingLevels, rating_levels, rating_tokens
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import Dataset
from gavamoe.errors import InputError
from gavamoe.model.base_model import encode_texts
from gavamoe.model.explainer import IGNORED

_TEXTS = {
    "features": "features: ",
    "user": "user",
    "item": " item",
    "explanation": " explanation:",
    "feature": " feature:",
}
_RATING = " rating:"


class Wording(BaseModel):
    """Token ids of the prompt's words: features, user [vector], item [vector], rating [vector], and what is asked."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    features: list[int]
    """Before the features, in the form that reads them."""
    user: list[int]
    item: list[int]
    rating: list[int]
    explanation: list[int]
    """Before an explanation."""
    feature: list[int]
    """Before a feature, which the curriculum lets the model write."""


class CierSpec(AdaptedSpec):
    """Everything from which CIER is built, apart from its weights."""

    start: int
    """The token that begins a prompt."""
    wording: Wording
    levels: list[float]
    """Ratings that have a token, ascending."""
    level_tokens: list[int]
    embedding_size: int
    smoothing: float
    rating_weight: float


@dataclass(frozen=True)
class Layout:
    """B rows as the model reads them, padded on the right."""

    tokens_BS: Tensor
    """Token ids; those of the three vectors' places are never read."""
    mask_BS: Tensor
    """1 where a row is real, 0 where it is padding."""
    labels_BS: Tensor
    """The tokens that are written, -100 elsewhere."""
    rating_B: Tensor
    """Place of the rating."""


class Cier(AdaptedBaseline):
    """The language model with adapters, the tables of ids and their projections."""

    spec_type = CierSpec
    spec: CierSpec

    def __init__(self, spec: CierSpec) -> None:
        super().__init__(spec)
        self.users = nn.Embedding(spec.n_users + 1, spec.embedding_size)
        self.items = nn.Embedding(spec.n_items + 1, spec.embedding_size)
        self.user_projection = nn.Linear(spec.embedding_size, self.width)
        self.item_projection = nn.Linear(spec.embedding_size, self.width)
        self.ratings = RatingLevels(spec.levels, spec.level_tokens)

    @classmethod
    def check(cls, config: RunConfig, data: Dataset) -> None:
        del config
        if data.rating_range is None:
            raise InputError(f"{data.path}: the data have no ratings, which CIER reads and predicts; take pepler")
        low, high = data.rating_range
        if low == high:
            raise InputError(f"{data.path}: all ratings are {low:g}, so CIER has none to tell apart; take pepler")

    @classmethod
    def create(cls, config: RunConfig, data: Dataset, reader: Reader, *, features: bool) -> Self:
        lm, values = language_model(config, data)
        own = config.baselines.cier
        assert reader.scale is not None  # `check` has seen to it
        levels = rating_levels(reader.scale, own.levels)
        lead, level_tokens = rating_tokens(reader.tokenizer, _RATING, levels)
        words = dict(zip(_TEXTS, encode_texts(reader.tokenizer, list(_TEXTS.values())), strict=True))
        model = cls(
            CierSpec(
                features=features,
                n_users=data.catalog.known_users,
                n_items=data.catalog.known_items,
                language_model=values,
                start=reader.start,
                end=reader.end,
                wording=Wording(rating=lead, **words),
                levels=levels,
                level_tokens=level_tokens,
                embedding_size=own.embedding_size,
                smoothing=own.smoothing,
                rating_weight=own.rating_weight,
                **adapter_settings(config, own),
            )
        )
        model.lm.load_state_dict(lm.state_dict())
        model.adapt()
        # The vectors of users and items start as widely spread as those of words.
        spread = float(model.lm.get_input_embeddings().weight.detach().std())
        for table, projection in ((model.users, model.user_projection), (model.items, model.item_projection)):
            nn.init.normal_(table.weight, std=spread)
            nn.init.normal_(projection.weight, std=own.embedding_size**-0.5)
            nn.init.zeros_(projection.bias)
        return model

    def prefixes(self, columns: Columns, reader: Reader) -> list[list[int]]:
        """[first feature] <s> [features:] user [u] item [i] rating [r] explanation.

        What stands before <s> is never read: the curriculum lets the model write it. The features are in the "+" form
        only. The places of the three vectors hold <s>, and are at the same distance from the end in all rows.
        """
        words, slot = self.spec.wording, reader.start
        longest = reader.prompt.max_explanation_tokens - 1
        first = reader.encode([next(iter(each), "") for each in columns.features], longest)
        named = reader.named_features(columns) if self.spec.features else [[] for _ in first]
        asked = [*words.user, slot, *words.item, slot, *words.rating, slot, *words.explanation]
        return [
            [*feature, slot, *(words.features if names else ()), *names, *asked]
            for feature, names in zip(first, named, strict=True)
        ]

    def phases(self, config: RunConfig) -> list[Phase]:
        own = config.baselines.cier
        if config.stage2.base_model == "scratch":
            return [Phase("all", rate=own.learning_rate)]
        slower = own.model_learning_rate / own.learning_rate

        def factor(name: str) -> float:
            return slower if name.startswith("lm.") else 1.0

        return [Phase("prompts and adapters", rate=own.learning_rate, trained=self.trained, factor=factor)]

    def layout(self, prefixes: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], text_B: Tensor) -> Layout:
        """Rows as the model reads them.

        Args:
            text_B: bool (B,), whether a row writes its answer; otherwise its first feature, if it has one.
        """
        words, start, device = self.spec.wording, self.spec.start, text_B.device
        rows, labels, places = [], [], []
        for prefix, answer, text in zip(prefixes, answers, text_B.tolist(), strict=True):
            cut = list(prefix).index(start)
            prompt, written = list(prefix[cut:]), list(answer)
            place = len(prompt) - len(words.explanation) - 1
            if not text and cut:
                prompt, written = prompt[: place + 1] + words.feature, [*prefix[:cut], self.spec.end]
            rows.append(torch.tensor(prompt + written))
            labels.append(torch.tensor([IGNORED] * len(prompt) + written))
            places.append(place)
        tokens_BS = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.spec.end)
        labels_BS = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        lengths_B1 = torch.tensor([[len(row)] for row in rows])
        mask_BS = (torch.arange(tokens_BS.shape[1]) < lengths_B1).long()
        return Layout(tokens_BS.to(device), mask_BS.to(device), labels_BS.to(device), torch.tensor(places).to(device))

    def with_ids(self, layout: Layout, users_B: Tensor, items_B: Tensor) -> Tensor:
        """The rows' vectors (B, S, D), those of user and item in their places, any at the rating's."""
        item_B = layout.rating_B - len(self.spec.wording.rating) - 1
        user_B = item_B - len(self.spec.wording.item) - 1
        vectors_BSD = _put(self.words(layout.tokens_BS), user_B, self.user_projection(self.users(users_B)))
        return _put(vectors_BSD, item_B, self.item_projection(self.items(items_B)))

    def rating_scores(self, states_BSD: Tensor, rating_B: Tensor) -> Tensor:
        """Logits (B, L) of the ratings, from the states before their places."""
        before_BD = states_BSD[torch.arange(len(rating_B), device=rating_B.device), rating_B - 1]
        scores_BV: Tensor = self.lm.get_output_embeddings()(before_BD)
        return scores_BV[:, self.ratings.tokens_L].float()

    def read_off(self, vectors_BSD: Tensor, layout: Layout) -> Tensor:
        """The model's own distributions (B, L) of the ratings; nothing from a rating's place on is read."""
        end = int(layout.rating_B.max())
        states_BSD = self.states(vectors_BSD[:, :end], layout.mask_BS[:, :end])
        return self.rating_scores(states_BSD, layout.rating_B).softmax(dim=-1)

    def with_rating(self, vectors_BSD: Tensor, layout: Layout, weights_BL: Tensor) -> Tensor:
        """The vectors with the soft token of each row's rating in its place."""
        return _put(vectors_BSD, layout.rating_B, weights_BL @ self.words(self.ratings.tokens_L))

    def losses(self, batch: Batch) -> Losses:
        """The loss of what is written, and the weighted cross-entropy of the rating."""
        ratings_B = batch["ratings"]
        text_B = torch.ones_like(ratings_B, dtype=torch.bool)
        if self.training:
            text_B = torch.rand(len(text_B), device=text_B.device) < batch["done"]
        layout = self.layout(*_split(batch), text_B)
        vectors_BSD = self.with_ids(layout, batch["users"], batch["items"])
        rated_B = ~torch.isnan(ratings_B)
        true_BL = self.ratings.weights(ratings_B)
        shown_BL = self.ratings.smoothed(true_BL, self.spec.smoothing) if self.training else true_BL
        if not bool(rated_B.all()):
            shown_BL = torch.where(rated_B[:, None], shown_BL, self.read_off(vectors_BSD, layout))
        states_BSD = self.states(self.with_rating(vectors_BSD, layout, shown_BL), layout.mask_BS)
        explanation = self.likelihood_of(states_BSD, layout.labels_BS)
        scores_NL = self.rating_scores(states_BSD, layout.rating_B)[rated_B]
        rating = F.cross_entropy(scores_NL, true_BL[rated_B]) if len(scores_NL) else explanation.new_zeros(())
        total = explanation + self.spec.rating_weight * rating
        return {"loss": total, "explanation": explanation, "rating": rating}

    @torch.inference_mode()
    def write(self, batch: Batch, prefixes: Sequence[Sequence[int]], limits: Limits) -> Written:
        """Greedy texts, each after the given rating or the one that is read off, and the latter."""
        ratings_B = batch["ratings"]
        layout = self.layout(prefixes, [()] * len(prefixes), torch.ones_like(ratings_B, dtype=torch.bool))
        vectors_BSD = self.with_ids(layout, batch["users"], batch["items"])
        read_BL = self.read_off(vectors_BSD, layout)
        shown_BL = torch.where(torch.isnan(ratings_B)[:, None], read_BL, self.ratings.weights(ratings_B))
        vectors_BSD = self.with_rating(vectors_BSD, layout, shown_BL)
        lengths = layout.mask_BS.sum(dim=1).tolist()
        heads = [vectors_SD[:length] for vectors_SD, length in zip(vectors_BSD, lengths, strict=True)]
        return Written(self.greedy(heads, limits), self.ratings.mean(read_BL).tolist())


def _put(vectors_BSD: Tensor, places_B: Tensor, new_BD: Tensor) -> Tensor:
    """The vectors with one of each row replaced."""
    rows_B = torch.arange(len(places_B), device=places_B.device)
    return vectors_BSD.index_put((rows_B, places_B), new_BD.to(vectors_BSD.dtype))


def _split(batch: Batch) -> tuple[list[list[int]], list[list[int]]]:
    """Prefixes and answers of a batch, without padding."""
    tokens, lengths = batch["tokens"].tolist(), batch["prefix"].tolist()
    answers = (batch["labels"] != IGNORED).sum(dim=1).tolist()
    prefixes = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
    written = [row[length : length + count] for row, length, count in zip(tokens, lengths, answers, strict=True)]
    return prefixes, written
