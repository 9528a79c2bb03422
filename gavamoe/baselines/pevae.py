"""PEVAE, a baseline: Cai and Cai, "PEVAE: A Hierarchical VAE for Personalized Explainable Recommendation", SIGIR 2022.

Our construction after the paper's figure: the published code is unfinished and does not run, so the paper's scores
can't be made again from it. A text is written from latent variables of several levels. A prior network reads user and
item, a recognition network also the words; self-adaption fusion merges both, the surer one prevailing, and the text is
written from a sample of the fusion in training, from the prior's mean otherwise, when no word is read. A discriminator
raises the mutual information of pair and latent variables.

The paper's: the two networks, fusion, decoder, rating, discriminator with hard negatives, use of the prior's mean. The
published code's: the fusion's formula, narrowing levels, two soft prompts, stop-gradients and weights of the two
divergences. Ours: all sizes and blocks, Gaussian noise (the code's is uniform), subword tokens, the divergence counted
per token as the text's loss is, its warm-up and free nats, the rating's weight, no rating among the inputs (the code
reads the true one), gradients that stop at what a level reads of others, rows for users and items never seen, predicted
ratings that start at their mean, and the "+" form (sentiment of the rating and features, which the decoder
reads before the soft prompts).

Shapes: B rows, T tokens, A tokens of an explanation, P tokens asked for, D width, W width of a level, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
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
from gavamoe.baselines.language_model import asked
from gavamoe.baselines.parts.hierarchy import (
    Block,
    Decoder,
    Discriminator,
    Encoder,
    Gaussian,
    GaussianHead,
    Narrowing,
    table,
)
from gavamoe.config.schema import PevaeConfig, RunConfig
from gavamoe.data.dataset import Dataset
from gavamoe.errors import InputError

IDS = 2
"""Vectors of user and item, the first two that the pair encoder reads."""
PROMPTS = 2
"""Vectors before the first word in the decoder."""


class PevaeSpec(Spec):
    """Everything from which PEVAE is built, apart from its weights."""

    size: PevaeConfig
    vocabulary: int
    end: int
    """The token that ends a text."""
    asked: int
    """Places in the decoder for the tokens of rating and features; 0 in the form without."""
    longest: int
    """Tokens of an explanation at most, the end included."""
    mean_rating: float
    """Mean of the training ratings, with which predictions start."""
    rated: bool
    """Whether there are ratings to predict."""


@dataclass(frozen=True)
class Level:
    """One level's latent variable of B rows."""

    prior: Gaussian
    posterior: Gaussian | None
    """None where no words are read."""
    sampled: Gaussian
    """What the value is drawn from: fused, or the posterior without fusion; the prior where no words are read."""
    value: Tensor
    """(B, W)."""


class Pevae(Baseline):
    """Pair encoder, word encoder, levels of latent variables, decoder, and the rating's network."""

    spec_type = PevaeSpec
    asks_rating = True
    spec: PevaeSpec

    def __init__(self, spec: PevaeSpec) -> None:
        super().__init__()
        self.spec = spec
        size = spec.size
        width, shape = size.width, (size.width, size.layers, size.heads, size.dropout)
        widths = size.level_widths
        self.users = table(spec.n_users + 1, width)
        self.items = table(spec.n_items + 1, width)
        self.pair_encoder = Encoder(IDS, *shape)
        self.pair_levels = Narrowing(widths)
        self.read_words = table(spec.vocabulary, width)
        self.word_encoder = Encoder(spec.longest, *shape)
        self.word_levels = Narrowing(widths)
        read = [own + above for own, above in zip(widths, [*widths[1:], 0], strict=True)]
        self.priors = nn.ModuleList(map(GaussianHead, read, widths))
        self.posteriors = nn.ModuleList(map(GaussianHead, read, widths))
        self.widening = nn.ModuleList(Block(narrow, wide) for wide, narrow in pairwise(widths))
        self.discriminator = Discriminator(width, sum(widths)) if size.discriminator else None
        self.prompts = nn.Sequential(Block(width, width), Block(width, PROMPTS * width))
        self.words = table(spec.vocabulary, width)
        self.decoder = Decoder(spec.asked + PROMPTS + spec.longest - 1, *shape)
        self.output = nn.Linear(width, spec.vocabulary)
        outer = nn.Linear(width, 1)
        self.rating = nn.Sequential(nn.Linear(width, width), nn.GELU(), outer)
        nn.init.constant_(outer.bias, spec.mean_rating)

    @classmethod
    def check(cls, config: RunConfig, data: Dataset) -> None:
        if config.baselines.pevae.discriminator and config.stage2.batch_size < 2:
            raise InputError(
                "stage2.batch_size 1: PEVAE's discriminator takes its negatives from other rows of a batch; raise it,"
                " or set baselines.pevae.discriminator=false"
            )

    @classmethod
    def create(cls, config: RunConfig, data: Dataset, reader: Reader, *, features: bool) -> Self:
        ratings, prompt = data.arrays("train").rating, config.stage2.prompt
        rated = not np.isnan(ratings).all()
        spec = PevaeSpec(
            features=features,
            n_users=data.catalog.known_users,
            n_items=data.catalog.known_items,
            size=config.baselines.pevae,
            vocabulary=len(reader.tokenizer),
            end=reader.end,
            asked=prompt.max_tokens if features else 0,
            longest=max(prompt.max_explanation_tokens, config.generation.max_new_tokens),
            mean_rating=float(np.nanmean(ratings)) if rated else 0.0,
            rated=rated,
        )
        return cls(spec)

    def prefixes(self, columns: Columns, reader: Reader) -> list[list[int]]:
        """Sentiment and features in the "+" form, and the start token, which is not read."""
        named: Sequence[Sequence[int]] = asked(columns, reader) if self.spec.features else [()] * len(columns)
        return [[*ids, reader.start] for ids in named]

    def phases(self, config: RunConfig) -> list[Phase]:
        return [Phase("all", rate=config.baselines.pevae.learning_rate)]

    def pair(self, users_B: Tensor, items_B: Tensor) -> Tensor:
        """The summary E_Y of a pair (B, D)."""
        vectors_BSD = torch.stack([self.users(users_B), self.items(items_B)], dim=1)
        summary_BD: Tensor = self.pair_encoder(vectors_BSD, torch.ones_like(vectors_BSD[..., 0], dtype=torch.bool))
        return summary_BD

    def levels(self, pair_BD: Tensor, words_BD: Tensor | None) -> list[Level]:
        """The latent variables, the narrowest first, each given the one before.

        Args:
            words_BD: the summary E_X of the words; None: values are the prior's means.
        """
        size = self.spec.size
        pairs = self.pair_levels(pair_BD)
        words = None if words_BD is None else self.word_levels(words_BD)
        found: list[Level] = []
        for number in reversed(range(size.levels)):
            above = [found[-1].value] if found else []
            own = pairs[number]
            prior = self.priors[number](torch.cat([own, *self._given(above)], dim=-1))
            if words is None:
                found.append(Level(prior, None, prior, prior.mean))
                continue
            both = torch.cat([words[number] + self._given([own])[0], *self._given(above)], dim=-1)
            posterior = self.posteriors[number](both)
            sampled = prior.fused(posterior) if size.fusion else posterior
            found.append(Level(prior, posterior, sampled, sampled.sample()))
        return found

    def _given(self, read: list[Tensor]) -> list[Tensor]:
        """What a level reads of others. Each of the two divergences is to move its own network only: with them no
        gradient flows here. The text's flows through every level's value."""
        return read if self.spec.size.kl == "elbo" else [tensor.detach() for tensor in read]

    def summary(self, pair_BD: Tensor, levels: Sequence[Level]) -> Tensor:
        """What text and rating are made of, (B, D): the levels, widened one by one, and E_Y."""
        joined = levels[0].value
        for block, level in zip(reversed(self.widening), levels[1:], strict=True):
            joined = block(joined) + level.value
        return pair_BD + joined

    def opening(self, summary_BD: Tensor, asked_BP: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """What the decoder reads before the first word: what is asked for, moved to the right, and two soft prompts.

        Args:
            asked_BP: whatever begins with the tokens asked for; lengths_B: how many these are.

        Returns:
            vectors (B, longest of the lengths + 2, D), and how many of each row's first ones are padding, (B,).
        """
        prompts_B2D = self.prompts(summary_BD).view(len(summary_BD), PROMPTS, -1)
        lengths_B = lengths_B.clamp(max=self.spec.asked)
        padding_B = lengths_B.max() - lengths_B
        places_L = torch.arange(int(lengths_B.max()), device=lengths_B.device)
        asked_BL = asked_BP.gather(1, (places_L - padding_B[:, None]).clamp(min=0))
        return torch.cat([self.words(asked_BL), prompts_B2D], dim=1), padding_B

    def first_place(self, opening_BPD: Tensor) -> int:
        """The place of an opening's first vector: the soft prompts always stand at the same one."""
        return self.spec.asked + PROMPTS - opening_BPD.shape[1]

    def predict_rating(self, summary_BD: Tensor) -> Tensor:
        """Ratings (B,), neither rounded nor clipped."""
        rating_B: Tensor = self.rating(summary_BD).squeeze(-1)
        return rating_B

    def divergence(self, levels: Sequence[Level]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted divergences of the levels of B rows, in nats a row, and each of them for the log."""
        size = self.spec.size
        prior, posterior, read = [], [], []
        for level in levels:
            assert level.posterior is not None
            read.append(level.sampled.divergence(level.prior).mean())
            prior.append(level.prior.divergence(level.sampled.detach()).mean())
            # Without fusion the posterior would be held to itself: then it is held to the prior.
            target = level.sampled if size.fusion else level.prior
            posterior.append(target.detach().divergence(level.posterior).mean())
        if size.kl == "elbo":
            total = _beyond(read, size.free_nats)
        else:
            total = size.prior_weight * torch.stack(prior).sum() + size.posterior_weight * _beyond(
                posterior, size.free_nats
            )
        sums = {"prior_kl": prior, "posterior_kl": posterior, "read_kl": read}
        return total, {name: torch.stack(values).sum() for name, values in sums.items()}

    def losses(self, batch: Batch) -> Losses:
        """Text, rating, and in training the divergences and the discriminator; the words are read for the latent
        variables in training only."""
        size = self.spec.size
        answers_BA, real_BA = answers_of(batch, self.spec.end)
        pair_BD = self.pair(batch["users"], batch["items"])
        words_BD = self.word_encoder(self.read_words(answers_BA), real_BA) if self.training else None
        levels = self.levels(pair_BD, words_BD)
        summary_BD = self.summary(pair_BD, levels)
        opening_BPD, padding_B = self.opening(summary_BD, batch["tokens"], batch["prefix"] - 1)
        read_BSD = torch.cat([opening_BPD, self.words(answers_BA[:, :-1])], dim=1)
        states_BSD, _ = self.decoder(read_BSD, padding_B=padding_B, first=self.first_place(opening_BPD))
        # The position before a word predicts it; the first word stands behind the last of the prompts.
        spoken_BAD = states_BSD[:, opening_BPD.shape[1] - 1 :]
        explanation = F.cross_entropy(self.output(spoken_BAD[real_BA]).float(), answers_BA[real_BA])
        rated_B = ~torch.isnan(batch["ratings"])
        error_N = (self.predict_rating(summary_BD).float() - batch["ratings"])[rated_B]
        rating = error_N.square().mean() if len(error_N) else explanation.new_zeros(())
        total = explanation + size.rating_weight * rating
        losses = {"explanation": explanation, "rating": rating}
        if self.training:
            divergence, parts = self.divergence(levels)
            # The text's loss is one per token: so is the divergence, of which a row has one.
            total = total + self.beta(batch["done"]) * divergence * len(real_BA) / real_BA.sum()
            losses |= parts
            if self.discriminator is not None:
                drawn = torch.cat([level.prior.sample() for level in levels], dim=-1)
                losses["discriminator"] = self.discriminator.loss(pair_BD, drawn)
                total = total + size.discriminator_weight * losses["discriminator"]
        return {"loss": total, **losses}

    def beta(self, done: Tensor) -> Tensor:
        """The divergences' share of their weight: it grows from 0 to 1 over the first steps."""
        warmup = self.spec.size.beta_warmup
        return (done / warmup).clamp(max=1.0) if warmup else torch.ones_like(done)

    @torch.inference_mode()
    def write(self, batch: Batch, prefixes: Sequence[Sequence[int]], limits: Limits) -> Written:
        """Greedy texts from the prior's mean, shorter where the decoder has no more positions, and the ratings."""
        device = batch["users"].device
        longest = max(map(len, prefixes))
        padded = [[*prefix, *[limits.end] * (longest - len(prefix))] for prefix in prefixes]
        lengths_B = torch.tensor([len(prefix) - 1 for prefix in prefixes], device=device)
        pair_BD = self.pair(batch["users"], batch["items"])
        summary_BD = self.summary(pair_BD, self.levels(pair_BD, None))
        opening_BPD, padding_B = self.opening(summary_BD, torch.tensor(padded, device=device), lengths_B)
        read = partial(self.decoder, padding_B=padding_B, first=self.first_place(opening_BPD))
        states_BSD, past = read(opening_BPD)
        texts = Texts(len(prefixes), limits)
        for left in reversed(range(min(limits.longest, self.spec.longest))):
            next_B = texts.add(self.output(states_BSD[:, -1]))
            if texts.done or not left:
                break
            states_BSD, past = read(self.words(next_B)[:, None], past)
        ratings = self.predict_rating(summary_BD).tolist() if self.spec.rated else None
        return Written(texts.tokens, ratings)


def _beyond(levels: Sequence[Tensor], free: float) -> Tensor:
    """The sum of the levels' divergences, of which `free` nats each cost nothing, so that the words go on to be read
    (free bits: Kingma et al., "Improved Variational Inference with Inverse Autoregressive Flow", 2016)."""
    return torch.stack(list(levels)).clamp(min=free).sum()
