"""PETER's model, a baseline: Li, Zhang and Chen, "Personalized Transformer for Explainable Recommendation", ACL 2021.

A small Transformer from scratch reads [user, item, features, <s>, explanation]. Positions see what is to their left;
user and item also see each other (the paper's masking). From the item's position it predicts the explanation's words
without their order (context prediction), from the user's the rating, from <s> on the explanation. PETER+ is the one
with features.

Shapes: B rows, T tokens after the two ids, S = T + 2 positions, D embedding size, V vocabulary.
"""

import math
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gavamoe.baselines.frame import Baseline, Batch, Limits, Losses, Phase, Reader, Spec, Texts, Written
from gavamoe.config.schema import PeterConfig, RunConfig
from gavamoe.data.dataset import Dataset
from gavamoe.model.explainer import IGNORED

IDS = 2
"""Positions of user and item, the first two."""
_INITIAL = 0.1
"""Embeddings and output weights start uniform between minus this and this."""

Past = tuple[Tensor, Tensor]
"""Keys and values of one layer so far: (B, heads, S, D / heads) each."""


class PeterSpec(Spec):
    """Everything from which PETER is built, apart from its weights."""

    size: PeterConfig
    vocabulary: int
    end: int
    """The token that ends a text, which does not count as a word of its context."""
    places: int
    """Largest number of positions, S."""
    mean_rating: float
    """Mean of the training ratings, with which predictions start."""


class Peter(Baseline):
    """The Transformer and its three heads.

    What is ours, not its paper's: byte-level tokens in place of words, AdamW, several features, a row for users and
    items never seen, and predictions that start at the mean rating.
    """

    spec_type = PeterSpec
    equally_long = True
    spec: PeterSpec

    def __init__(self, spec: PeterSpec) -> None:
        super().__init__()
        size = spec.size
        width = size.embedding_size
        self.spec = spec
        self.users = nn.Embedding(spec.n_users + 1, width)
        self.items = nn.Embedding(spec.n_items + 1, width)
        self.words = nn.Embedding(spec.vocabulary, width)
        self.layers = nn.ModuleList(_Layer(size) for _ in range(size.layers))
        self.output = nn.Linear(width, spec.vocabulary)
        inner, outer = nn.Linear(width, width), nn.Linear(width, 1)
        self.rating = nn.Sequential(inner, nn.Sigmoid(), outer)
        self.dropout = nn.Dropout(size.dropout)
        self._places: Tensor
        self.register_buffer("_places", _sinusoids(spec.places, width), persistent=False)
        for weight in (module.weight for module in (self.users, self.items, self.words, self.output, inner, outer)):
            nn.init.uniform_(weight, -_INITIAL, _INITIAL)
        for linear in (self.output, inner):
            nn.init.zeros_(linear.bias)
        nn.init.constant_(outer.bias, spec.mean_rating)  # ours: ratings start where they are

    @classmethod
    def create(cls, config: RunConfig, data: Dataset, reader: Reader, *, features: bool) -> Self:
        rated = data.arrays("train").rating
        prompt = config.stage2.prompt
        prefix = prompt.max_tokens if features else 1
        spec = PeterSpec(
            features=features,
            n_users=data.catalog.known_users,
            n_items=data.catalog.known_items,
            size=config.baselines.peter,
            vocabulary=len(reader.tokenizer),
            end=reader.end,
            places=IDS + prefix + max(prompt.max_explanation_tokens, config.generation.max_new_tokens),
            mean_rating=0.0 if np.isnan(rated).all() else float(np.nanmean(rated)),
        )
        return cls(spec)

    def phases(self, config: RunConfig) -> list[Phase]:
        return [Phase("all", rate=config.baselines.peter.learning_rate)]

    def forward(
        self, users_B: Tensor, items_B: Tensor, tokens_BT: Tensor, past: list[Past] | None = None
    ) -> tuple[Tensor, list[Past]]:
        """States of the last layer, and the keys and values that a next call continues from.

        Args:
            past: of a call with the same rows; then `tokens_BT` are the next tokens, and the ids are not read again.

        Returns:
            (B, S, D), or (B, T, D) with `past`; keys and values by layer.
        """
        words_BTD = self.words(tokens_BT)
        if past is None:
            ids_B2D = torch.stack([self.users(users_B), self.items(items_B)], dim=1)
            x_BSD, start = torch.cat([ids_B2D, words_BTD], dim=1), 0
        else:
            x_BSD, start = words_BTD, past[0][0].shape[2]
        end = start + x_BSD.shape[1]
        x_BSD = self.dropout(x_BSD * math.sqrt(x_BSD.shape[-1]) + self._places[start:end])
        mask_SS = _mask(end)[start:]
        kept = []
        for number, layer in enumerate(self.layers):
            x_BSD, state = layer(x_BSD, mask_SS, None if past is None else past[number])
            kept.append(state)
        return x_BSD, kept

    def predict_rating(self, states_BSD: Tensor) -> Tensor:
        """Ratings (B,) from the user's position; neither rounded nor clipped."""
        rating_B: Tensor = self.rating(states_BSD[:, 0]).squeeze(-1)
        return rating_B

    def losses(self, batch: Batch) -> Losses:
        """The three losses and their weighted sum (its Eqs. 12 to 15)."""
        states_BSD, _ = self(batch["users"], batch["items"], batch["tokens"])
        labels_BT = batch["labels"]
        # The position before a token predicts it: `tokens` begin after the two ids.
        next_BT = states_BSD[:, IDS - 1 : -1]
        spoken_BT = labels_BT != IGNORED
        explanation = F.cross_entropy(self.output(next_BT[spoken_BT]), labels_BT[spoken_BT])
        context_BV = F.log_softmax(self.output(states_BSD[:, 1]), dim=-1)
        word_BT = spoken_BT & (labels_BT != self.spec.end)
        row_N, _ = word_BT.nonzero(as_tuple=True)
        context = -context_BV[row_N, labels_BT[word_BT]].mean() if len(row_N) else explanation.new_zeros(())
        rated_B = ~torch.isnan(batch["ratings"])
        error_N = (self.predict_rating(states_BSD) - batch["ratings"])[rated_B]
        rating = error_N.square().mean() if len(error_N) else explanation.new_zeros(())
        size = self.spec.size
        total = size.explanation_weight * explanation + size.context_weight * context + size.rating_weight * rating
        return {"loss": total, "explanation": explanation, "context": context, "rating": rating}

    @torch.inference_mode()
    def write(self, batch: Batch, prefixes: Sequence[Sequence[int]], limits: Limits) -> Written:
        """Greedy texts, shorter where the model has no more positions, and the predicted ratings."""
        prefix_BT = torch.tensor(prefixes, device=batch["users"].device)
        states_BSD, past = self(batch["users"], batch["items"], prefix_BT)
        ratings = self.predict_rating(states_BSD).tolist()
        room = min(limits.longest, self.spec.places - IDS - prefix_BT.shape[1] + 1)
        texts = Texts(len(prefixes), limits)
        for left in reversed(range(room)):
            next_B = texts.add(self.output(states_BSD[:, -1]))
            if texts.done or not left:
                break
            states_BSD, past = self(batch["users"], batch["items"], next_B[:, None], past)
        return Written(texts.tokens, ratings)


class _Layer(nn.Module):
    """Self-attention and feed-forward of the original Transformer: normalized after each sum, ReLU."""

    def __init__(self, size: PeterConfig) -> None:
        super().__init__()
        width = size.embedding_size
        self.heads = size.heads
        self.projected = nn.Linear(width, 3 * width)
        self.joined = nn.Linear(width, width)
        self.wide = nn.Linear(width, size.feed_forward)
        self.narrow = nn.Linear(size.feed_forward, width)
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(size.dropout)

    def forward(self, x_BSD: Tensor, mask_SS: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        rows, places, width = x_BSD.shape
        split = self.projected(x_BSD).view(rows, places, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        if past is not None:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        drop = self.dropout.p if self.training else 0.0
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask_SS, dropout_p=drop)
        seen_BSD = self.joined(seen.transpose(1, 2).reshape(rows, places, width))
        x_BSD = self.attention_norm(x_BSD + self.dropout(seen_BSD))
        wide_BSF = self.dropout(F.relu(self.wide(x_BSD)))
        return self.feed_forward_norm(x_BSD + self.dropout(self.narrow(wide_BSF))), (key, value)


def _mask(places: int) -> Tensor:
    """What each position sees, bool (S, S): everything to its left, itself, and user and item each other."""
    mask = torch.ones(places, places, dtype=torch.bool).tril()
    mask[:IDS, :IDS] = True
    return mask


def _sinusoids(places: int, width: int) -> Tensor:
    """The original Transformer's positional encoding (S, D)."""
    position = torch.arange(places, dtype=torch.float32)[:, None]
    rate = torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * (-math.log(10_000.0) / width))
    table = torch.zeros(places, width)
    table[:, 0::2] = torch.sin(position * rate)
    table[:, 1::2] = torch.cos(position * rate)
    return table
