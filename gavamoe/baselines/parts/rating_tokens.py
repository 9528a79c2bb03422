"""A rating as a distribution over tokens of a language model, by which CIER reads ratings and writes them.

Each level of the scale has one token. A distribution over them is a predicted rating (its mean) and a soft token (the
mean of the tokens' vectors).

Shapes: B rows, L levels, D the model's width.
"""

from collections.abc import Sequence
from itertools import takewhile
from string import ascii_uppercase

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from gavamoe.data.ratings import RatingScale
from gavamoe.errors import InputError
from gavamoe.model.base_model import encode_texts

_MOST_SMOOTHED = 2 / 3
"""Largest share of a rating's mass that smoothing gives to its two neighbors: all three are then alike."""


class RatingLevels(nn.Module):
    """The levels of a scale with their tokens; it has no parameters.

    Args:
        levels: ratings, ascending, at least two.
        tokens: one token for each.
    """

    def __init__(self, levels: Sequence[float], tokens: Sequence[int]) -> None:
        super().__init__()
        self.levels_L: Tensor
        self.tokens_L: Tensor
        self.neighbors_LL: Tensor
        self.register_buffer("levels_L", torch.tensor(levels, dtype=torch.float32), persistent=False)
        self.register_buffer("tokens_L", torch.tensor(tokens), persistent=False)
        self.register_buffer("neighbors_LL", _neighbors(len(levels)), persistent=False)

    def mean(self, weights_BL: Tensor) -> Tensor:
        """The ratings (B,) that distributions stand for."""
        return weights_BL @ self.levels_L

    def weights(self, ratings_B: Tensor) -> Tensor:
        """Distributions (B, L) of ratings: all mass on the rating's level; between two levels on both, so that the mean
        is the rating. NaN in a row whose rating is NaN."""
        last = len(self.levels_L) - 1
        rating_B = ratings_B.float().clamp(self.levels_L[0], self.levels_L[-1])
        above_B = torch.searchsorted(self.levels_L, rating_B.contiguous()).clamp(1, last)
        low_B, high_B = self.levels_L[above_B - 1], self.levels_L[above_B]
        share_B1 = ((rating_B - low_B) / (high_B - low_B))[:, None]
        one_BL, other_BL = (F.one_hot(place_B, last + 1) for place_B in (above_B - 1, above_B))
        return (1 - share_B1) * one_BL + share_B1 * other_BL

    def smoothed(self, weights_BL: Tensor, rate: float) -> Tensor:
        """The same distributions, some with part of their mass moved to the neighbors of its levels.

        Args:
            rate: probability that a row is smoothed; up to two thirds of its mass are then moved, drawn uniformly. The
                lowest and the highest level keep theirs.
        """
        chosen_B1, share_B1 = torch.rand(2, len(weights_BL), 1, device=weights_BL.device)
        moved_B1 = torch.where(chosen_B1 < rate, share_B1 * _MOST_SMOOTHED, 0.0)
        return (1 - moved_B1) * weights_BL + moved_B1 * (weights_BL @ self.neighbors_LL)


def rating_levels(scale: RatingScale, levels: int) -> list[float]:
    """The ratings of a finite scale, or that many, evenly spaced, of a continuous one."""
    return list(scale.values) if scale.values is not None else np.linspace(scale.low, scale.high, levels).tolist()


def rating_tokens(
    tokenizer: PreTrainedTokenizerBase, lead: str, levels: Sequence[float]
) -> tuple[list[int], list[int]]:
    """The words before a rating as tokens, and the one token of each level behind them.

    Levels are named as they are written; where that takes more than one token, by their numbers, or by letters. A
    space that a tokenizer keeps apart from digits belongs to the words before.

    Raises:
        InputError: no such names are single, distinct tokens.
    """
    count = len(levels)
    names: list[Sequence[str]] = [[f"{level:g}" for level in levels], [str(number + 1) for number in range(count)]]
    if count <= len(ascii_uppercase):
        names.append(ascii_uppercase[:count])
    for each in names:
        for joint in (" ", ""):
            encoded = encode_texts(tokenizer, [lead + joint + name for name in each])
            shared = len(list(takewhile(lambda column: len(set(column)) == 1, zip(*encoded, strict=False))))
            rest = [ids[shared:] for ids in encoded]
            tokens = [ids[0] for ids in rest if len(ids) == 1]
            if len(set(tokens)) == count:
                return encoded[0][:shared], tokens
    raise InputError(f"CIER: the base model's tokenizer has no single tokens for {count} ratings; take another model")


def _neighbors(levels: int) -> Tensor:
    """Where smoothing moves the mass of each level (row), (L, L): half to each neighbor, at the ends nowhere."""
    half = torch.full((levels - 1,), 0.5)
    moved = half.diag(1) + half.diag(-1)
    moved[0], moved[-1] = 0, 0
    moved[0, 0] = moved[-1, -1] = 1
    return moved
