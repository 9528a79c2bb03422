"""Token ids of users and items: the one layout, for the model, the prompts and id dropout."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SlotIds:
    """Token ids of users and items: above the vocabulary, known ones and one for all others, users first.

    The layout of a model's slots, for the model itself, for prompts and for id dropout.
    """

    vocabulary: int
    """Number of text tokens, whose ids come first."""
    n_users: int
    """Known users."""
    n_items: int
    """Known items."""

    @property
    def unknown_user(self) -> int:
        """Token id of the unknown user, the last of the users'."""
        return self.vocabulary + self.n_users

    @property
    def unknown_item(self) -> int:
        """Token id of the unknown item, the last of all."""
        return self.unknown_user + 1 + self.n_items

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
