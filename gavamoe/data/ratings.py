"""The scale of a dataset's ratings, and the sentiment that a rating stands for."""

import math
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from gavamoe.errors import InputError

Sentiment = Literal["negative", "neutral", "positive"]
SENTIMENTS: tuple[Sentiment, ...] = ("negative", "neutral", "positive")

_CONTINUOUS_MIDDLE = 0.1
"""Share of a continuous scale's range within which ratings around its middle are neutral, to either side."""


class RatingScale(BaseModel):
    """The scale of a dataset's ratings."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    low: float
    """Lowest rating."""
    high: float
    """Highest rating."""
    values: tuple[float, ...] | None = None
    """All ratings of a finite scale, ascending; None if ratings are continuous."""

    @property
    def middle(self) -> float:
        """The rating halfway between the lowest and the highest."""
        return (self.low + self.high) / 2

    def nearest(self, rating: float) -> float:
        """The scale's rating closest to a predicted one (the lower of two equally close)."""
        if self.values is not None:
            return min(self.values, key=lambda value: (abs(value - rating), value))
        return min(max(rating, self.low), self.high)

    def share(self, rating: float) -> float:
        """Where a rating lies between the lowest, 0, and the highest, 1."""
        return (rating - self.low) / (self.high - self.low) if self.high > self.low else 0.5

    def sentiment(self, rating: float) -> Sentiment:
        """Sentiment of a rating: negative below, neutral at, positive above the middle of the scale."""
        distance = rating - self.middle
        if abs(distance) <= self.neutral_within:
            return "neutral"
        return "positive" if distance > 0 else "negative"

    def leaning(self, ratings: np.ndarray) -> np.ndarray:
        """`sentiment` of ratings (N,) as int8: -1 negative, 1 positive, 0 neutral or, for NaN, no rating."""
        distance = np.nan_to_num(np.asarray(ratings, dtype=np.float64) - self.middle)
        return np.where(np.abs(distance) <= self.neutral_within, 0, np.sign(distance)).astype(np.int8)

    @property
    def neutral_within(self) -> float:
        """How far from the middle a rating is still neutral."""
        return (0.0 if self.values is not None else _CONTINUOUS_MIDDLE * (self.high - self.low)) + 1e-9

    def check(self, rating: float) -> None:
        """Raise InputError unless `rating` lies within the scale."""
        if not (math.isfinite(rating) and self.low <= rating <= self.high):
            raise InputError(f"rating {rating:g}: outside this dataset's scale, {self.low:g} to {self.high:g}")


PLANTED_SCALE = RatingScale(low=1, high=5, values=(1, 2, 3, 4, 5))
"""The scale of synthetic reviews."""
