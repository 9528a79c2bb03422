"""NETE, a baseline: Li, Zhang and Chen, "Generate Neural Template Explanations for Recommendation", CIKM 2020.

Two recurrent networks write together: one reads the words so far, the other the feature, at every step the same one; a
gate fuses their states, so that the template is learned and the feature put into it. They start from the user, the item
and the sentiment of the rating. Ratings are predicted by a network of its own, which shares nothing with them.

Ours, not the paper's: subword tokens, so that the feature is the mean of its tokens' embeddings (equal to the paper's
for one token); a learned vector where there is no feature; the sentiment is that of the row's rating in training, and
of the predicted one where a request gives none (the published code trains on the sentence's own); rows for users and
items never seen; predictions that start at the mean rating; vectors of words that start wider than the paper's
(`word_spread`); both parts are trained at the same time, which is as good as one after the other, since they share no
parameter and their gradients are clipped apart.

Shapes: B rows, A tokens of an explanation, E embedding size, H hidden size, V vocabulary.
"""

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gavamoe.baselines.frame import (
    Baseline,
    Batch,
    Columns,
    Limits,
    Losses,
    Phase,
    Reader,
    Spec,
    Texts,
    Written,
    answers_of,
)
from gavamoe.config.schema import NeteConfig, RunConfig
from gavamoe.data.dataset import Dataset
from gavamoe.errors import InputError

_INITIAL = 0.1
"""Embeddings, but for those of words, start uniform between minus this and this."""


class NeteSpec(Spec):
    """Everything from which NETE is built, apart from its weights."""

    size: NeteConfig
    vocabulary: int
    end: int
    """The token that ends a text."""
    mean_rating: float
    """Mean of the training ratings, with which predictions start."""
    middle: float | None
    """Middle of the scale: ratings below are negative, all others positive; None: there are none, all is positive."""


class Nete(Baseline):
    """The rating predictor, and the two recurrent networks with their gate."""

    spec_type = NeteSpec
    spec: NeteSpec
    apart = ("rating",)

    def __init__(self, spec: NeteSpec) -> None:
        super().__init__()
        self.spec = spec
        size = spec.size
        width, hidden = size.embedding_size, size.hidden_size
        self.rating_users = nn.Embedding(spec.n_users + 1, width)
        self.rating_items = nn.Embedding(spec.n_items + 1, width)
        layers: list[nn.Module] = []
        for _ in range(size.rating_layers):
            layers += [nn.Linear(2 * width, 2 * width), nn.Sigmoid()]
        self.rating = nn.Sequential(*layers, nn.Linear(2 * width, 1))
        self.users = nn.Embedding(spec.n_users + 1, width)
        self.items = nn.Embedding(spec.n_items + 1, width)
        self.sentiments = nn.Embedding(2, width)
        self.words = nn.Embedding(spec.vocabulary, width)
        self.no_feature = nn.Parameter(torch.empty(width))
        self.start = nn.Linear(3 * width, hidden)
        self.of_words = GruCell(width, hidden)
        self.of_feature = self.of_words if size.tied else GruCell(width, hidden)
        self.from_words = nn.Linear(hidden, width, bias=False)
        self.from_feature = nn.Linear(hidden, width, bias=False)
        self.fusion = nn.Linear(2 * width, 1, bias=False)
        self.output = nn.Linear(hidden, spec.vocabulary)
        self.dropout = nn.Dropout(size.dropout)
        for table in (self.rating_users, self.rating_items, self.users, self.items, self.sentiments):
            nn.init.uniform_(table.weight, -_INITIAL, _INITIAL)
        for weight in (self.words.weight, self.no_feature):
            nn.init.normal_(weight, std=size.word_spread)
        for linear in self.rating:
            if isinstance(linear, nn.Linear):
                nn.init.trunc_normal_(linear.weight, std=0.1)
                nn.init.zeros_(linear.bias)
                last = linear
        nn.init.constant_(last.bias, spec.mean_rating)

    @classmethod
    def check(cls, config: RunConfig, data: Dataset) -> None:
        del config
        features = data.table("train", ["features"])["features"].to_pylist()
        if not any(features):
            raise InputError(f"{data.path}: no training row has a feature, and NETE writes about one")

    @classmethod
    def create(cls, config: RunConfig, data: Dataset, reader: Reader, *, features: bool) -> Self:
        rated = data.arrays("train").rating
        low, high = data.rating_range or (0.0, 0.0)
        spec = NeteSpec(
            features=features,
            n_users=data.catalog.known_users,
            n_items=data.catalog.known_items,
            size=config.baselines.nete,
            vocabulary=len(reader.tokenizer),
            end=reader.end,
            mean_rating=0.0 if np.isnan(rated).all() else float(np.nanmean(rated)),
            middle=None if data.rating_range is None else (low + high) / 2,
        )
        return cls(spec)

    def prefixes(self, columns: Columns, reader: Reader) -> list[list[int]]:
        """The tokens of the first feature, the row's most frequent one, and the start token."""
        words = [next(iter(each), "") for each in columns.features]
        distinct = list(dict.fromkeys(words))
        ids = dict(zip(distinct, reader.encode(distinct, reader.prompt.max_tokens - 1), strict=True))
        return [[*ids[word], reader.start] for word in words]

    def phases(self, config: RunConfig) -> list[Phase]:
        return [Phase("both parts", rate=config.baselines.nete.learning_rate)]

    def predict_rating(self, users_B: Tensor, items_B: Tensor) -> Tensor:
        """Ratings (B,), neither rounded nor clipped."""
        pair = torch.cat([self.rating_users(users_B), self.rating_items(items_B)], dim=-1)
        rating_B: Tensor = self.rating(pair).squeeze(-1)
        return rating_B

    def first_state(self, users_B: Tensor, items_B: Tensor, ratings_B: Tensor) -> Tensor:
        """The state (B, H) before the first word; ratings that are NaN are predicted."""
        if self.spec.middle is None:
            sentiment_B = torch.ones_like(users_B)
        else:
            with torch.no_grad():
                known_B = torch.where(torch.isnan(ratings_B), self.predict_rating(users_B, items_B), ratings_B)
            sentiment_B = (known_B >= self.spec.middle).long()
        parts = (self.users(users_B), self.items(items_B), self.sentiments(sentiment_B))
        return torch.tanh(self.start(torch.cat(parts, dim=-1)))

    def feature(self, tokens_BP: Tensor, lengths_B: Tensor) -> Tensor:
        """The feature's vector (B, E): the mean of its tokens' embeddings.

        Args:
            tokens_BP: whatever begins with the feature's tokens; lengths_B: how many these are.
        """
        inside_BP1 = (torch.arange(tokens_BP.shape[1], device=tokens_BP.device) < lengths_B[:, None])[..., None]
        sum_BE = (self.words(tokens_BP) * inside_BP1).sum(dim=1)
        mean_BE = sum_BE / lengths_B.clamp(min=1)[:, None]
        return torch.where(lengths_B[:, None] > 0, mean_BE, self.no_feature)

    def gate(self, words_BH: Tensor, feature_BH: Tensor) -> Tensor:
        """The share of the feature's state, (B, 1)."""
        both = torch.cat([torch.tanh(self.from_words(words_BH)), torch.tanh(self.from_feature(feature_BH))], dim=-1)
        return torch.sigmoid(self.fusion(both))

    def step(self, state_BH: Tensor, words_BE: Tensor, feature_BE: Tensor) -> Tensor:
        """The next fused state (B, H), of the last word's embedding and the feature's."""
        words_BH = self.of_words(self.dropout(words_BE), state_BH)
        feature_BH = self.of_feature(self.dropout(feature_BE), state_BH)
        share_B1 = self.gate(words_BH, feature_BH)
        return (1 - share_B1) * words_BH + share_B1 * feature_BH

    def losses(self, batch: Batch) -> Losses:
        """Cross-entropy of the words, and the rating's squared error with the decay of its network."""
        users_B, items_B, ratings_B = batch["users"], batch["items"], batch["ratings"]
        answers_BA, real_BA = answers_of(batch, self.spec.end)
        rows = torch.arange(len(users_B), device=users_B.device)
        start_B = batch["tokens"][rows, batch["prefix"] - 1]
        read_BAE = self.words(torch.cat([start_B[:, None], answers_BA[:, :-1]], dim=1))
        feature_BE = self.feature(batch["tokens"], batch["prefix"] - 1)
        state_BH = self.first_state(users_B, items_B, ratings_B)
        states = []
        for words_BE in read_BAE.unbind(dim=1):
            state_BH = self.step(state_BH, words_BE, feature_BE)
            states.append(state_BH)
        states_BAH = torch.stack(states, dim=1)
        explanation = F.cross_entropy(self.output(states_BAH[real_BA]), answers_BA[real_BA])
        rated_B = ~torch.isnan(ratings_B)
        rating = explanation.new_zeros(())
        decay = explanation.new_zeros(())
        if bool(rated_B.any()):
            error_N = self.predict_rating(users_B[rated_B], items_B[rated_B]) - ratings_B[rated_B]
            rating = error_N.square().mean()
            weights = (*self.rating_users.parameters(), *self.rating_items.parameters(), *self.rating.parameters())
            decay = torch.stack([weight.square().sum() for weight in weights]).sum() / 2
        total = explanation + rating + self.spec.size.rating_decay * decay
        return {"loss": total, "explanation": explanation, "rating": rating}

    @torch.inference_mode()
    def write(self, batch: Batch, prefixes: Sequence[Sequence[int]], limits: Limits) -> Written:
        users_B, items_B = batch["users"], batch["items"]
        device = users_B.device
        lengths_B = torch.tensor([len(prefix) - 1 for prefix in prefixes], device=device)
        longest = max(map(len, prefixes))
        padded = [[*prefix, *[limits.end] * (longest - len(prefix))] for prefix in prefixes]
        tokens_BP = torch.tensor(padded, device=device)
        feature_BE = self.feature(tokens_BP, lengths_B)
        state_BH = self.first_state(users_B, items_B, batch["ratings"])
        last_B = torch.tensor([prefix[-1] for prefix in prefixes], device=device)
        texts = Texts(len(prefixes), limits)
        for _ in range(limits.longest):
            state_BH = self.step(state_BH, self.words(last_B), feature_BE)
            last_B = texts.add(self.output(state_BH))
            if texts.done:
                break
        ratings = None if self.spec.middle is None else self.predict_rating(users_B, items_B).tolist()
        return Written(texts.tokens, ratings)


class GruCell(nn.Module):
    """A gated recurrent unit as TensorFlow 1 has it, in which NETE was written: the reset gate acts on the old state
    before the product (torch's acts after it), the update gate keeps the OLD state, and gates start half open."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gates = nn.Linear(width + hidden, 2 * hidden)
        self.candidate = nn.Linear(width + hidden, hidden)
        for linear in (self.gates, self.candidate):
            nn.init.orthogonal_(linear.weight)
        nn.init.ones_(self.gates.bias)
        nn.init.zeros_(self.candidate.bias)

    def forward(self, x_BE: Tensor, state_BH: Tensor) -> Tensor:
        """The next state (B, H)."""
        reset_BH, keep_BH = torch.sigmoid(self.gates(torch.cat([x_BE, state_BH], dim=-1))).chunk(2, dim=-1)
        new_BH = torch.tanh(self.candidate(torch.cat([x_BE, reset_BH * state_BH], dim=-1)))
        return keep_BH * state_BH + (1 - keep_BH) * new_BH
