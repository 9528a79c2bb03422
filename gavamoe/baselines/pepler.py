"""PEPLER, a baseline: Li, Zhang and Chen, "Personalized Prompt Learning for Explainable Recommendation", TOIS 2023.

A language model reads [user, item, <s>, explanation], where user and item are vectors of its own width, learned for
each id. Sequential tuning, the paper's default, learns these first, beside the frozen model, and then everything.
Recommendation as regularization learns all at once, with a rating predicted from the two vectors: by their product
(mf) or by a network (mlp).

Ours, not the paper's: any LLaMA or GPT-2 in place of GPT-2 small; a frozen model is frozen whole, and texts end with
its tokenizer's own end token (the published code trains all word vectors in the first phase, since it adds tokens);
labels begin at the first word; vectors of ids start as widely as those of words; rows for users and items never seen;
the state with the best text is kept; predicted ratings start at their mean. The "+" form (rating and features between
the ids and <s>) is ours.

Shapes: B rows, T tokens, D the model's width.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from gavamoe.baselines.frame import Batch, Columns, Limits, Losses, Phase, Reader, Written
from gavamoe.baselines.language_model import LanguageBaseline, LanguageSpec, asked, language_model, real_tokens
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import Dataset
from gavamoe.model.explainer import IGNORED

IDS = 2
"""Positions of user and item, the first two."""
_RATING_WIDTH = 400
_INITIAL = 0.1
"""Weights of the rating network start uniform between minus this and this."""


class PeplerSpec(LanguageSpec):
    """Everything from which PEPLER is built, apart from its weights."""

    rating: Literal["none", "mf", "mlp"]
    rating_weight: float
    mean_rating: float
    """Mean of the training ratings, with which predictions start."""


class Pepler(LanguageBaseline):
    """The language model with its two tables of ids, and the rating's network, if any."""

    spec_type = PeplerSpec
    spec: PeplerSpec

    def __init__(self, spec: PeplerSpec) -> None:
        super().__init__(spec)
        self.users = nn.Embedding(spec.n_users + 1, self.width)
        self.items = nn.Embedding(spec.n_items + 1, self.width)
        self.mean: Tensor
        self.register_buffer("mean", torch.tensor(spec.mean_rating))
        self.rating: nn.Sequential | None = None
        if spec.rating == "mlp":
            inner = (2 * self.width, _RATING_WIDTH, _RATING_WIDTH, _RATING_WIDTH)
            layers: list[nn.Module] = []
            for wide, narrow in pairwise(inner):
                layers += [nn.Linear(wide, narrow), nn.Sigmoid()]
            self.rating = nn.Sequential(*layers, nn.Linear(_RATING_WIDTH, 1))
            for linear in (layer for layer in self.rating if isinstance(layer, nn.Linear)):
                nn.init.uniform_(linear.weight, -_INITIAL, _INITIAL)
                nn.init.zeros_(linear.bias)

    @classmethod
    def create(cls, config: RunConfig, data: Dataset, reader: Reader, *, features: bool) -> Self:
        lm, values = language_model(config, data)
        own, rated = config.baselines.pepler, data.arrays("train").rating
        rating: Literal["none", "mf", "mlp"] = "none"
        if own.variant != "sequential" and not np.isnan(rated).all():
            rating = own.variant
        model = cls(
            PeplerSpec(
                features=features,
                n_users=data.catalog.known_users,
                n_items=data.catalog.known_items,
                language_model=values,
                end=reader.end,
                rating=rating,
                rating_weight=own.rating_weight or {"mf": 0.01}.get(rating, 1.0),
                mean_rating=0.0 if np.isnan(rated).all() else float(np.nanmean(rated)),
            )
        )
        model.lm.load_state_dict(lm.state_dict())
        widest = own.id_scale or math.sqrt(3) * float(model.lm.get_input_embeddings().weight.detach().std())
        for table in (model.users, model.items):
            nn.init.uniform_(table.weight, -widest, widest)
        return model

    def prefixes(self, columns: Columns, reader: Reader) -> list[list[int]]:
        """The start token; in the "+" form behind sentiment and features."""
        named: Sequence[Sequence[int]] = asked(columns, reader) if self.spec.features else [()] * len(columns)
        return [[*ids, reader.start] for ids in named]

    def phases(self, config: RunConfig) -> list[Phase]:
        own = config.baselines.pepler
        everything = Phase("all", rate=own.learning_rate)
        if own.variant != "sequential" or config.stage2.base_model == "scratch":  # which has learned nothing to freeze
            return [everything]
        ids = ("users.", "items.")
        prompts = Phase("prompts", own.prompt_share, own.prompt_learning_rate, lambda name: name.startswith(ids))
        return [prompts, Phase("all", 1 - own.prompt_share, own.learning_rate)]

    def predict_rating(self, users_BD: Tensor, items_BD: Tensor) -> Tensor | None:
        """Ratings (B,) of pairs by their vectors, neither rounded nor clipped; None where none is learned."""
        if self.spec.rating == "mf":
            return self.mean + (users_BD * items_BD).sum(dim=-1)
        if self.rating is None:
            return None
        inner: Tensor = self.rating(torch.cat([users_BD, items_BD], dim=-1)).squeeze(-1)
        return self.mean + inner

    def losses(self, batch: Batch) -> Losses:
        """The text's loss, and with a rating its weighted squared error."""
        users_BD, items_BD = self.users(batch["users"]), self.items(batch["items"])
        vectors_BSD = torch.cat([users_BD[:, None], items_BD[:, None], self.words(batch["tokens"])], dim=1)
        rows = len(users_BD)
        mask_BS = torch.cat([batch["tokens"].new_ones(rows, IDS), real_tokens(batch).long()], dim=1)
        labels_BS = torch.cat([batch["labels"].new_full((rows, IDS), IGNORED), batch["labels"]], dim=1)
        explanation = self.likelihood(vectors_BSD, mask_BS, labels_BS)
        predicted_B = self.predict_rating(users_BD, items_BD)
        if predicted_B is None:
            return {"loss": explanation, "explanation": explanation}
        rated_B = ~torch.isnan(batch["ratings"])
        error_N = (predicted_B - batch["ratings"])[rated_B]
        rating = error_N.square().mean() if len(error_N) else explanation.new_zeros(())
        return {"loss": explanation + self.spec.rating_weight * rating, "explanation": explanation, "rating": rating}

    @torch.inference_mode()
    def write(self, batch: Batch, prefixes: Sequence[Sequence[int]], limits: Limits) -> Written:
        users_BD, items_BD = self.users(batch["users"]), self.items(batch["items"])
        device = users_BD.device
        vectors = [
            torch.cat([user_D[None], item_D[None], self.words(torch.tensor(prefix, device=device))])
            for user_D, item_D, prefix in zip(users_BD, items_BD, prefixes, strict=True)
        ]
        predicted_B = self.predict_rating(users_BD, items_BD)
        ratings = None if predicted_B is None else predicted_B.tolist()
        return Written(self.greedy(vectors, limits), ratings)
