"""A request for an explanation, by index."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ExplanationRequest:
    """A pair to explain. Indices at or above the known counts stand for users and items never seen."""

    user: int
    item: int
    rating: float | None = None
    """None: stage 1's prediction takes its place."""
    features: tuple[str, ...] | None = None
    """None: the item's usual features take their place; empty: none are named."""
