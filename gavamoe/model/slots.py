"""Token ids of users, items and ratings: the one layout, for the model, the prompts and id dropout; and what a soft
rating's vector is made of."""

from dataclasses import dataclass

import numpy as np

SLOT_MODULES = (
    "user_embedding", "item_embedding", "user_projection", "item_projection", "cluster_embedding", "rating_embedding",
)  # fmt: skip
"""The explainer's modules that make vectors of these ids; the base model has none of them."""
RATING_PLACES = 41
"""Places from one end of the rating scale to the other that a soft rating is moved to: tenths, on a scale of 1 to 5."""
RATING_ANCHORS = 5
"""Learned vectors, evenly from one end of the scale to the other, of which those of all places are made."""


@dataclass(frozen=True)
class SlotIds:
    """Token ids of users and items: above the vocabulary, known ones and one for all others, users first; then those of
    soft ratings, where prompts have such; and one id that stands for the cluster of the row that it is in.

    The layout of a model's slots, for the model itself, for prompts and for id dropout.
    """

    vocabulary: int
    """Number of text tokens, whose ids come first."""
    n_users: int
    """Known users."""
    n_items: int
    """Known items."""
    rating_places: int = 0
    """R: places on the rating scale that have an id, and another for ratings that are expected; 0: none has."""

    @property
    def unknown_user(self) -> int:
        """Token id of the unknown user, the last of the users'."""
        return self.vocabulary + self.n_users

    @property
    def unknown_item(self) -> int:
        """Token id of the unknown item, the last of the items'."""
        return self.unknown_user + 1 + self.n_items

    @property
    def cluster(self) -> int:
        """Token id of the row's cluster, whichever that is: the model is told it beside the tokens."""
        return self.first_rating + 2 * self.rating_places

    @property
    def first_rating(self) -> int:
        """Token id of the lowest rating that is known; those of expected ratings follow the highest one's."""
        return self.unknown_item + 1

    @property
    def first_item(self) -> int:
        """Token id of the first item; those of users lie between the vocabulary and this."""
        return self.unknown_user + 1

    def user_token(self, index: int) -> int:
        """Token id of a user by index; every index from `n_users` on is the unknown user."""
        return self.vocabulary + min(index, self.n_users)

    def item_token(self, index: int) -> int:
        """Token id of an item by index; every index from `n_items` on is the unknown item."""
        return self.first_item + min(index, self.n_items)

    def rating_token(self, share: float, *, expected: bool) -> int:
        """Token id of a rating.

        Args:
            share: where it lies between the lowest (0) and the highest (1); beyond them it counts as the nearer one.
            expected: it is stage 1's expectation, not what the user gave.
        """
        place = round(min(max(share, 0.0), 1.0) * (self.rating_places - 1))
        return self.first_rating + place + self.rating_places * expected


def rating_mix(places: int, anchors: int, spread: float) -> np.ndarray:
    """Shares of the anchors in the vectors of all soft ratings: float32 (2R, A), rows that sum to 1.

    A known rating has the two anchors around it, each by how near it is. An expected one has the mean of the known
    ones' vectors by their chances: those of a normal distribution around it, within the scale. So the vector is an
    expectation over ratings, as CIER's soft token is one over the ratings that its language model predicts.

    Args:
        spread: standard deviation of what is given around what is expected, as a share of the scale's range.
    """
    place_R = np.linspace(0.0, 1.0, places)
    known_RA = np.clip(1.0 - np.abs(place_R[:, None] * (anchors - 1) - np.arange(anchors)), 0.0, None)
    distance_RR = (place_R[:, None] - place_R) / max(spread, 1e-6)
    chance_RR = np.exp(-0.5 * distance_RR**2)
    expected_RA = (chance_RR / chance_RR.sum(1, keepdims=True)) @ known_RA
    return np.concatenate([known_RA, expected_RA]).astype(np.float32)
