"""Token ids of users and items: the one layout, for the model, the prompts and id dropout."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SlotIds:
    """Token ids of users and items: above the vocabulary, known ones and one for all others, users first; and one id
    that stands for the cluster of the row that it is in.

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
        """Token id of the unknown item, the last of the items'."""
        return self.unknown_user + 1 + self.n_items

    @property
    def cluster(self) -> int:
        """Token id of the row's cluster, whichever that is: the model is told it beside the tokens."""
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
