"""What a dataset's ratings can be, and which sentiment one of them says."""

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict

from gavamoe.errors import InputError

Sentiment = Literal["negative", "neutral", "positive"]
SENTIMENTS: tuple[Sentiment, ...] = ("negative", "neutral", "positive")

_CONTINUOUS_MIDDLE = 0.1
"""On a scale without steps, ratings within this share of the range around the middle are neutral."""


class RatingScale(BaseModel):
    """What ratings of a dataset can be, and so what one of them says."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    low: float
    high: float
    values: tuple[float, ...] | None = None
    """The finite scale, ascending; None if ratings are continuous."""

    @property
    def middle(self) -> float:
        return (self.low + self.high) / 2

    def nearest(self, rating: float) -> float:
        """The scale's rating closest to a predicted one (the lower of two equally close)."""
        if self.values is not None:
            return min(self.values, key=lambda value: (abs(value - rating), value))
        return min(max(rating, self.low), self.high)

    def sentiment(self, rating: float) -> Sentiment:
        """Below, at or above the middle of the scale."""
        tolerance = 0.0 if self.values is not None else _CONTINUOUS_MIDDLE * (self.high - self.low)
        distance = rating - self.middle
        if abs(distance) <= tolerance + 1e-9:
            return "neutral"
        return "positive" if distance > 0 else "negative"

    def check(self, rating: float) -> None:
        """Raise InputError unless `rating` lies within the scale."""
        if not (math.isfinite(rating) and self.low <= rating <= self.high):
            raise InputError(f"rating {rating:g}: outside this dataset's scale, {self.low:g} to {self.high:g}")
