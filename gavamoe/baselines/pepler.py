"""PEPLER, a baseline: Li, Zhang and Chen, "Personalized Prompt Learning for Explainable Recommendation", TOIS 2023.

A language model reads [user, item, <s>, explanation], where user and item are vectors of its own width, learned for
each id. Sequential tuning, the paper's default, learns these first, beside the frozen model, and then everything.
Recommendation as regularization learns all at once, with a rating predicted from the two vectors: by their product
(mf) or by a network (mlp). PEPLER-D (discrete) reads words in place of the vectors: features of the user that are the
item's too, then others of both.

MAPLE (Yang et al., ACL 2025) adds a third vector, of an aspect that a network chooses from the first two: in training
the row's own, later the mean of the likeliest (`aspects`).

Ours, not the papers': any LLaMA or GPT-2 in place of GPT-2 small; a frozen model is frozen whole, and texts end with
its tokenizer's own end token (the published code trains all word vectors in the first phase, since it adds tokens);
labels begin at the first word; vectors of ids start as widely as those of words; rows for users and items never seen;
the state with the best text is kept; predicted ratings start at their mean; the words of PEPLER-D leave out the row's
own features in training, which a row to come does not have; aspects are the most frequent features, each class weighing
alike in the choice's loss, which is learned from the first step. The "+" form (rating and features between the ids and
<s>) is ours.

Shapes: B rows, T tokens, H vectors before them, A aspects, D the model's width.
"""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gavamoe.baselines.frame import Batch, Columns, Limits, Losses, Phase, Reader, Written
from gavamoe.baselines.language_model import LanguageBaseline, LanguageSpec, asked, language_model, real_tokens
from gavamoe.baselines.parts.profiles import Profiles
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import Dataset
from gavamoe.errors import InputError
from gavamoe.model.explainer import IGNORED

_NETWORK_WIDTH = 400
_INITIAL = 0.1
"""Weights of the networks start uniform between minus this and this."""


class PeplerSpec(LanguageSpec):
    """Everything from which PEPLER is built, apart from its weights and, for PEPLER-D, its profiles."""

    rating: Literal["none", "mf", "mlp"]
    rating_weight: float
    mean_rating: float
    """Mean of the training ratings, with which predictions start."""
    discrete_tokens: int
    """Tokens of features that stand in place of vectors; 0: vectors."""
    aspects: tuple[str, ...]
    """Features that are aspects; one more stands for all others. Empty: no aspects."""
    aspect_counts: tuple[int, ...]
    """Training rows of each aspect and of the others, (A + 1)."""
    top_aspects: int
    aspect_weight: float


class Pepler(LanguageBaseline):
    """The language model with its tables of ids, and the networks of ratings and aspects, if any."""

    spec_type = PeplerSpec
    asks_rating = True
    spec: PeplerSpec

    def __init__(self, spec: PeplerSpec) -> None:
        super().__init__(spec)
        self.mean: Tensor
        self.register_buffer("mean", torch.tensor(spec.mean_rating))
        self.rating: nn.Sequential | None = None
        self.profiles: Profiles | None = None
        if spec.discrete_tokens:
            return
        self.users = nn.Embedding(spec.n_users + 1, self.width)
        self.items = nn.Embedding(spec.n_items + 1, self.width)
        if spec.rating == "mlp":
            self.rating = _network((2 * self.width, *[_NETWORK_WIDTH] * 3), 1)
        if spec.aspects:
            self.aspects = nn.Embedding(len(spec.aspects) + 1, self.width)
            self.choice = _network((2 * self.width, _NETWORK_WIDTH), len(spec.aspects) + 1)

    @classmethod
    def check(cls, config: RunConfig, data: Dataset) -> None:
        own = config.baselines.pepler
        if (own.aspects or own.variant == "discrete") and not any(
            data.table("train", ["features"])["features"].to_pylist()
        ):
            wanting = "aspects" if own.aspects else "variant discrete"
            raise InputError(f"{data.path}: no training row has features, which baselines.pepler.{wanting} needs")

    @classmethod
    def create(cls, config: RunConfig, data: Dataset, reader: Reader, *, features: bool) -> Self:
        lm, values = language_model(config, data)
        own, rated = config.baselines.pepler, data.arrays("train").rating
        rating: Literal["none", "mf", "mlp"] = "none"
        if own.variant in ("mf", "mlp") and not np.isnan(rated).all():
            rating = own.variant
        aspects, counts = _aspects(data, own.aspects)
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
                discrete_tokens=own.discrete_tokens if own.variant == "discrete" else 0,
                aspects=aspects,
                aspect_counts=counts,
                top_aspects=min(own.top_aspects, len(aspects) + 1),
                aspect_weight=own.aspect_weight,
            )
        )
        model.lm.load_state_dict(lm.state_dict())
        if model.spec.discrete_tokens:
            model.profiles = Profiles.read(data)
            return model
        widest = own.id_scale or math.sqrt(3) * float(model.lm.get_input_embeddings().weight.detach().std())
        for table in [model.users, model.items, *([model.aspects] if aspects else [])]:
            nn.init.uniform_(table.weight, -widest, widest)
        return model

    def prefixes(self, columns: Columns, reader: Reader) -> list[list[int]]:
        """The start token; behind sentiment and features in the "+" form; before all the row's aspect, an id above the
        vocabulary, or PEPLER-D's words."""
        named: Sequence[Sequence[int]] = asked(columns, reader) if self.spec.features else [()] * len(columns)
        first = self._discrete(columns, reader) if self.spec.discrete_tokens else self._aspect_ids(columns)
        return [[*head, *ids, reader.start] for head, ids in zip(first, named, strict=True)]

    def _discrete(self, columns: Columns, reader: Reader) -> list[list[int]]:
        assert self.profiles is not None
        most = self.spec.discrete_tokens  # of each, since a feature has a token at least
        lines = []
        for user, item, words in zip(columns.users.tolist(), columns.items.tolist(), columns.features, strict=True):
            own = set(words) if columns.rows is not None else set()
            of_user, of_item = (
                counts.most_frequent(index, most, own)
                for counts, index in ((self.profiles.users, user), (self.profiles.items, item))
            )
            shared = [word for word in of_user if word in of_item]
            lines.append(", ".join(dict.fromkeys([*shared, *of_user, *of_item])))
        return reader.encode(lines, most)

    def _aspect_ids(self, columns: Columns) -> list[list[int]]:
        """The aspect of each training row, or the one that says that it must be chosen."""
        if not self.spec.aspects:
            return [[]] * len(columns)
        base, unknown = int(self.lm.config.vocab_size), len(self.spec.aspects) + 1
        if columns.rows is None:
            return [[base + unknown]] * len(columns)
        place = {word: number for number, word in enumerate(self.spec.aspects)}
        return [[base + _aspect_of(words, place)] for words in columns.features]

    def phases(self, config: RunConfig) -> list[Phase]:
        own = config.baselines.pepler
        everything = Phase("all", rate=own.learning_rate)
        if own.variant != "sequential" or config.stage2.base_model == "scratch":  # which has learned nothing to freeze
            return [everything]
        prompts = Phase("prompts", own.prompt_share, own.prompt_learning_rate, lambda name: not name.startswith("lm."))
        return [prompts, Phase("all", 1 - own.prompt_share, own.learning_rate)]

    def predict_rating(self, users_BD: Tensor, items_BD: Tensor) -> Tensor | None:
        """Ratings (B,) of pairs by their vectors, neither rounded nor clipped; None where none is learned."""
        if self.spec.rating == "mf":
            return self.mean + (users_BD * items_BD).sum(dim=-1)
        if self.rating is None:
            return None
        inner: Tensor = self.rating(torch.cat([users_BD, items_BD], dim=-1)).squeeze(-1)
        return self.mean + inner

    def _pair(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """The vectors of users and items, (B, D) each; None for PEPLER-D."""
        return None if self.spec.discrete_tokens else (self.users(batch["users"]), self.items(batch["items"]))

    def _aspect(self, scores_BA: Tensor, aspect_B: Tensor) -> Tensor:
        """The third vectors (B, D): of each row's aspect, or the mean of the likeliest where it is to be chosen."""
        unknown = scores_BA.shape[1]
        likeliest_BK = scores_BA.topk(self.spec.top_aspects, dim=1).indices
        chosen_BD = self.aspects(likeliest_BK).mean(dim=1)
        own_BD = self.aspects(aspect_B.clamp(max=unknown - 1))
        return torch.where((aspect_B == unknown)[:, None], chosen_BD, own_BD)

    def losses(self, batch: Batch) -> Losses:
        """The text's loss, and the weighted ones of the rating and of the aspect, where there are any."""
        tokens_BT, labels_BT, real_BT = batch["tokens"], batch["labels"], real_tokens(batch)
        pair, heads, weighted, others = self._pair(batch), [], [], {}
        if pair is not None:
            heads = [vectors_BD[:, None] for vectors_BD in pair]
        if self.spec.aspects and pair is not None:
            aspect_B = tokens_BT[:, 0] - int(self.lm.config.vocab_size)
            tokens_BT, labels_BT, real_BT = tokens_BT[:, 1:], labels_BT[:, 1:], real_BT[:, 1:]
            scores_BA = self.choice(torch.cat(pair, dim=-1)).float()
            heads.append(self._aspect(scores_BA, aspect_B)[:, None])
            named_B = aspect_B < scores_BA.shape[1]
            if named_B.any():
                others["aspect"] = F.cross_entropy(scores_BA[named_B], aspect_B[named_B], self._class_weights())
                weighted.append(self.spec.aspect_weight * others["aspect"])
        vectors_BSD = torch.cat([*heads, self.words(tokens_BT)], dim=1)
        mask_BS = F.pad(real_BT.long(), (len(heads), 0), value=1)
        labels_BS = F.pad(labels_BT, (len(heads), 0), value=IGNORED)
        explanation = self.likelihood(vectors_BSD, mask_BS, labels_BS)
        predicted_B = None if pair is None else self.predict_rating(*pair)
        if predicted_B is not None:
            rated_B = ~torch.isnan(batch["ratings"])
            error_N = (predicted_B - batch["ratings"])[rated_B]
            others["rating"] = error_N.square().mean() if len(error_N) else explanation.new_zeros(())
            weighted.append(self.spec.rating_weight * others["rating"])
        return {"loss": explanation + sum(weighted), "explanation": explanation, **others}

    def _class_weights(self) -> Tensor:
        """Weights (A,) by which each aspect that has rows counts alike."""
        counts_A = torch.tensor(self.spec.aspect_counts, dtype=torch.float32, device=self.mean.device)
        return counts_A.sum() / (counts_A.clamp(min=1) * len(counts_A))

    @torch.inference_mode()
    def write(self, batch: Batch, prefixes: Sequence[Sequence[int]], limits: Limits) -> Written:
        pair, device = self._pair(batch), self.mean.device
        heads: list[Tensor] = [] if pair is None else [*pair]
        if self.spec.aspects and pair is not None:
            base = int(self.lm.config.vocab_size)
            aspect_B = torch.tensor([prefix[0] - base for prefix in prefixes], device=device)
            heads.append(self._aspect(self.choice(torch.cat(pair, dim=-1)), aspect_B))
            prefixes = [prefix[1:] for prefix in prefixes]
        vectors = [
            torch.cat([*(head_BD[row, None] for head_BD in heads), self.words(torch.tensor(prefix, device=device))])
            for row, prefix in enumerate(prefixes)
        ]
        predicted_B = None if pair is None else self.predict_rating(*pair)
        ratings = None if predicted_B is None else predicted_B.tolist()
        return Written(self.greedy(vectors, limits), ratings)

    def save_more(self, folder: Path) -> None:
        if self.profiles is not None:
            self.profiles.save(folder)

    def load_more(self, folder: Path) -> None:
        if self.spec.discrete_tokens:
            self.profiles = Profiles.load(folder)


def _network(widths: Sequence[int], out: int) -> nn.Sequential:
    """Sigmoid layers of these widths, and a linear one."""
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(widths):
        layers += [nn.Linear(wide, narrow), nn.Sigmoid()]
    network = nn.Sequential(*layers, nn.Linear(widths[-1], out))
    for linear in (layer for layer in network if isinstance(layer, nn.Linear)):
        nn.init.uniform_(linear.weight, -_INITIAL, _INITIAL)
        nn.init.zeros_(linear.bias)
    return network


def _aspects(data: Dataset, most: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The most frequent features of the training rows, and the rows of each and of none of them."""
    if not most:
        return (), ()
    rows = [words or () for words in data.table("train", ["features"])["features"].to_pylist()]
    counts = Counter(chain.from_iterable(set(words) for words in rows))
    names = tuple(sorted(counts, key=lambda word: (-counts[word], word))[:most])
    place = {word: number for number, word in enumerate(names)}
    of_rows = Counter(_aspect_of(words, place) for words in rows)
    return names, tuple(of_rows[number] for number in range(len(names) + 1))


def _aspect_of(words: Sequence[str], place: dict[str, int]) -> int:
    """The number of the first feature that is an aspect; that of the others."""
    return next((place[word] for word in words if word in place), len(place))
